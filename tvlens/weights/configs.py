"""Config entries that make two models compute different things with equal weights."""

import math
from collections.abc import Mapping
from typing import Any

from tvlens.errors import CheckpointError

from .layout import Layout
from .report import ConfigDifference

STRUCTURE = (
    "family",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "d_head",
    "d_model",
    "d_mlp",
    "n_ctx",
    "gated",
    "rotary",
    "parallel",
    "activation",
    "qkv_bias",
    "output_bias",
    "mlp_bias",
)
"""Layout entries that must agree, or a difference of weights has no meaning."""
FUNCTION_ENTRIES: Mapping[str, Any] = {
    "sliding_window": None,
    "use_sliding_window": False,
    "layer_types": None,
}
"""Entries that change the attention of some family, with the value that leaving them out means.

Entries of single families stand in their tables.
"""
SAME_ACTIVATION = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new"}
ROPE_ENTRIES = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rope_local_base_freq",
    "rotary_emb_base",
    "rotary_pct",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)
LENGTH_SCALED = ("dynamic", "yarn", "longrope")
"""Kinds of rotary scaling that also depend on the longest sequence."""
SAME_ROPE = {"su": "longrope"}
READ_ELSEWHERE = (
    *ROPE_ENTRIES,
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "hidden_act",
    "hidden_activation",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "max_window_layers",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "model_type",
    "use_parallel_residual",
    "activation_function",
    "n_embd",
    "n_head",
    "n_layer",
    "n_inner",
    "n_positions",
)
WITHOUT_EFFECT = (
    "transformers_version",
    "torch_dtype",
    "dtype",
    "_name_or_path",
    "use_cache",
    "_attn_implementation",
    "initializer_range",
    "pretraining_tp",
)
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
"""Entries that matter to generation and not to logits."""
FLOAT32_DIGITS = 1e-6
"""Epsilons and bases are often written as the float32 of a decimal; that is no difference."""


def config_differences(
    base: Mapping[str, Any], tuned: Mapping[str, Any], layouts: tuple[Layout, Layout]
) -> list[ConfigDifference]:
    """Every entry that differs, those that forbid a comparison first.

    Args:
        base: The base's config.json.
        tuned: The tuned model's config.json.
        layouts: The layouts read from them.

    Raises:
        CheckpointError: An entry is not of the type it must have.
    """
    if not layouts[0].listed:
        return _all_differences(base, tuned)
    try:
        return _differences(base, tuned, layouts)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"a config.json garbles an entry of the rotation or the attention ({error}).",
            hint="Copy the config.json that belongs to these weights.",
        ) from error


def _differences(
    base: Mapping[str, Any], tuned: Mapping[str, Any], layouts: tuple[Layout, Layout]
) -> list[ConfigDifference]:
    first, second = (_structure(layout) for layout in layouts)
    found = [
        ConfigDifference(name, first[name], second[name], "refused")
        for name in STRUCTURE
        if first[name] != second[name]
    ]
    first, second = (
        _function_entries(config, layout)
        for config, layout in zip((base, tuned), layouts, strict=True)
    )
    found += [
        ConfigDifference(name, first[name], second[name], "function")
        for name in first
        if not _same(first[name], second[name])
    ]
    own = layouts[0].function_entries
    known = {*READ_ELSEWHERE, *WITHOUT_EFFECT, *FUNCTION_ENTRIES, *own}
    return found + [
        ConfigDifference(name, base.get(name), tuned.get(name), "note")
        for name in sorted({*base, *tuned} - known)
        if not _same(base.get(name), tuned.get(name))
    ]


def _all_differences(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> list[ConfigDifference]:
    """Every entry that differs: without a table any of them may change the function."""
    return [
        ConfigDifference(
            name, base.get(name), tuned.get(name), "note" if name in TOKENS else "function"
        )
        for name in sorted({*base, *tuned} - {*WITHOUT_EFFECT})
        if not _same(base.get(name), tuned.get(name))
    ]


def rotary_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """Base frequency, rotated share and scaling, from the old or the new form of a config.

    Gemma 3 rotates otherwise in blocks with a sliding window, so it has a second set.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    whole = rope.get("full_attention", {}) if _by_layer_type(rope) else rope
    found = _rotary({**(whole or {})}, config)
    if not _by_layer_type(rope) and "rope_local_base_freq" not in config:
        return found
    local = {"rope_theta": config.get("rope_local_base_freq")}
    local |= rope.get("sliding_attention") or {}
    return found | {f"{name} of sliding layers": v for name, v in _rotary(local, config).items()}


def _by_layer_type(rope: Mapping[str, Any]) -> bool:
    return bool({"full_attention", "sliding_attention"} & rope.keys())


def _rotary(rope: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    theta = rope.pop("rope_theta", None) or config.get("rope_theta")
    theta = theta or config.get("rotary_emb_base") or 10000.0
    share = rope.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor")
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    kind = SAME_ROPE.get(kind, kind)
    rope.pop("type", None)
    if trained := config.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = trained
    if kind in LENGTH_SCALED:
        rope["max_position_embeddings"] = config.get("max_position_embeddings")
    return {
        "rope_theta": float(theta),
        "rotary_share": float(share or config.get("rotary_pct") or 1.0),
        "rope_scaling": {"rope_type": kind, **rope} if kind != "default" else None,
    }


def _structure(layout: Layout) -> dict[str, Any]:
    found = {name: getattr(layout, name) for name in STRUCTURE}
    found["activation"] = SAME_ACTIVATION.get(layout.activation, layout.activation)
    return found


def _function_entries(config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    filled = layout.filled(config)
    return {
        "model_type": config.get("model_type"),
        "norm_eps": layout.norm_eps,
        "tie_word_embeddings": layout.tied,
        **(rotary_entries(filled) if layout.rotary else {}),
        **(_windows(layout) if layout.windows else _window_entries(config)),
        **{name: filled.get(name) for name in layout.function_entries},
    }


def _windows(layout: Layout) -> dict[str, Any]:
    """The window of all blocks, or a list with each block's."""
    windows = layout.windows
    return {"sliding_window": windows[0] if len(set(windows)) == 1 else list(windows)}


def _window_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says of windows where the family's table does not read it."""
    entries = {name: config.get(name, default) for name, default in FUNCTION_ENTRIES.items()}
    kinds = entries["layer_types"] or []
    return {**entries, "layer_types": None if set(kinds) <= {"full_attention"} else list(kinds)}


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=FLOAT32_DIGITS)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(
            _same(first[key], second[key]) for key in first
        )
    return first == second or (_is_off(first) and _is_off(second))


def _is_off(value: Any) -> bool:
    return value is None or value is False
