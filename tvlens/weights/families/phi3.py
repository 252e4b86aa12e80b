"""Phi-3: a Llama that fuses query, key and value in one tensor, gate and up in another."""

from collections.abc import Mapping
from typing import Any

from . import llama
from .table import Family, fused, linear
from .windows import same_window


def _numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    no_bias = {"qkv_bias": False, "output_bias": False, "mlp_bias": False}
    return {**llama.numbers(config), **no_bias, "windows": same_window(config)}


FAMILY = Family(
    name="phi3",
    model_types=("phi3",),
    numbers=_numbers,
    places=(
        llama.EMBEDDING,
        *llama.LN1,
        *fused(("W_Q", "W_K", "W_V"), llama.ATTENTION_MODULE + "qkv_proj"),
        *llama.OUTPUT,
        *llama.LN2,
        *fused(("W_gate", "W_in"), llama.BLOCK + "mlp.gate_up_proj"),
        *linear("W_out", llama.BLOCK + "mlp.down_proj"),
        *llama.LN_FINAL,
        llama.UNEMBEDDING,
    ),
    prefix=llama.PREFIX,
    buffers=llama.BUFFERS,
    defaults={
        **llama.DEFAULTS,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
    },
)
