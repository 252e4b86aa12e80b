"""Qwen3: a Llama whose queries and keys are normalised within each head before they rotate."""

from collections.abc import Mapping
from typing import Any

from . import llama, qwen2
from .table import Family, norm
from .windows import upper_windows


def _numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    own = {"mlp_bias": False, "qk_norm": "head", "windows": upper_windows(config)}
    return {**llama.numbers(config), **own}


FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    numbers=_numbers,
    places=(
        llama.EMBEDDING,
        *llama.LN1,
        *llama.ATTENTION,
        *norm("q_norm", llama.ATTENTION_MODULE + "q_norm"),
        *norm("k_norm", llama.ATTENTION_MODULE + "k_norm"),
        *llama.LN2,
        *llama.MLP,
        *llama.LN_FINAL,
        llama.UNEMBEDDING,
    ),
    prefix=llama.PREFIX,
    buffers=llama.BUFFERS,
    defaults={**qwen2.DEFAULTS, "head_dim": 128},
)
