"""OLMo 2: norms after each sub-layer only; queries and keys normalised over all their heads."""

from collections.abc import Mapping
from typing import Any

from . import llama
from .table import Family, norm


def _numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**llama.numbers(config), "mlp_bias": False, "qk_norm": "projection"}


FAMILY = Family(
    name="olmo2",
    model_types=("olmo2",),
    numbers=_numbers,
    places=(
        llama.EMBEDDING,
        *llama.ATTENTION,
        *norm("q_norm", llama.ATTENTION_MODULE + "q_norm"),
        *norm("k_norm", llama.ATTENTION_MODULE + "k_norm"),
        *norm("ln1_post", llama.BLOCK + "post_attention_layernorm"),
        *llama.MLP,
        *norm("ln2_post", llama.BLOCK + "post_feedforward_layernorm"),
        *llama.LN_FINAL,
        llama.UNEMBEDDING,
    ),
    prefix=llama.PREFIX,
    buffers=llama.BUFFERS,
    defaults={**llama.DEFAULTS, "rms_norm_eps": 1e-5},
)
