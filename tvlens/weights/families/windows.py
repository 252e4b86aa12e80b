"""Which blocks attend through a sliding window, and how wide it is."""

from collections.abc import Mapping
from typing import Any

Windows = tuple[int | None, ...]
"""One entry a block; None where a position attends to everything before it."""


def same_window(config: Mapping[str, Any]) -> Windows:
    """The same window in every block (Mistral, Phi-3)."""
    return (config.get("sliding_window"),) * config["num_hidden_layers"]


def upper_windows(config: Mapping[str, Any]) -> Windows:
    """Windows from block ``max_window_layers`` on, if they are switched on at all (Qwen)."""
    first = config["max_window_layers"]
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    return _windows(config, window, [n >= first for n in range(config["num_hidden_layers"])])


def alternating_windows(config: Mapping[str, Any]) -> Windows:
    """A window everywhere but in every n-th block (Gemma: every 2nd, later every 6th)."""
    step = config.get("_sliding_window_pattern") or config["sliding_window_pattern"]
    sliding = [bool((n + 1) % step) for n in range(config["num_hidden_layers"])]
    return _windows(config, config.get("sliding_window"), sliding)


def _windows(config: Mapping[str, Any], window: int | None, sliding: list[bool]) -> Windows:
    """The window of each block; a config's own ``layer_types`` overrules the family's rule."""
    if kinds := config.get("layer_types"):
        sliding = [kind == "sliding_attention" for kind in kinds]
    return tuple(window if slides else None for slides in sliding)
