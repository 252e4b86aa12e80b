"""Qwen2 and Qwen2.5: a Llama with biases on query, key and value."""

from collections.abc import Mapping
from typing import Any

from . import llama
from .table import Family
from .windows import upper_windows

DEFAULTS: Mapping[str, Any] = {
    **llama.DEFAULTS,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def _numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    biases = {"qkv_bias": True, "output_bias": False, "mlp_bias": False}
    return {**llama.numbers(config), **biases, "windows": upper_windows(config)}


FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    numbers=_numbers,
    places=llama.FAMILY.places,
    prefix=llama.PREFIX,
    buffers=llama.BUFFERS,
    defaults=DEFAULTS,
)
