"""Mistral: a Llama without biases whose every block attends through one sliding window."""

from collections.abc import Mapping
from typing import Any

from . import llama
from .table import Family
from .windows import same_window


def _numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    no_bias = {"qkv_bias": False, "output_bias": False, "mlp_bias": False}
    return {**llama.numbers(config), **no_bias, "windows": same_window(config)}


FAMILY = Family(
    name="mistral",
    model_types=("mistral",),
    numbers=_numbers,
    places=llama.FAMILY.places,
    prefix=llama.PREFIX,
    buffers=llama.BUFFERS,
    defaults={**llama.DEFAULTS, "num_key_value_heads": 8, "sliding_window": 4096},
)
