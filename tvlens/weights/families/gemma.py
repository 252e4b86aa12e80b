"""Gemma 2 and 3: norms before and after each sub-layer, gains stored as their difference from 1.

Gemma 2 caps attention scores and logits; Gemma 3 (text) normalises queries and keys within each
head instead. Both scale scores by ``query_pre_attn_scalar``, embeddings by sqrt(d_model), and
attend through a sliding window in most blocks.
"""

from collections.abc import Mapping
from typing import Any

from . import llama
from .table import Family, Place, norm
from .windows import alternating_windows

_DEFAULTS: Mapping[str, Any] = {
    **llama.DEFAULTS,
    "head_dim": 256,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "use_bidirectional_attention": None,
}
_FUNCTION = (
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_bidirectional_attention",
)


def _numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **llama.numbers(config),
        "activation": config["hidden_activation"],
        "mlp_bias": False,
        "windows": alternating_windows(config),
    }


def _gemma3_numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**_numbers(config), "qk_norm": "head"}


def _norm(name: str, module: str) -> tuple[Place, ...]:
    return norm(name, module, centre=1.0)


_ENDS = (*_norm("ln_final", "model.norm"), llama.UNEMBEDDING)
_MLP = (
    *_norm("ln1_post", llama.BLOCK + "post_attention_layernorm"),
    *_norm("ln2", llama.BLOCK + "pre_feedforward_layernorm"),
    *llama.MLP,
    *_norm("ln2_post", llama.BLOCK + "post_feedforward_layernorm"),
)
_LN1 = _norm("ln1", llama.BLOCK + "input_layernorm")
_QK_NORMS = (
    *_norm("q_norm", llama.ATTENTION_MODULE + "q_norm"),
    *_norm("k_norm", llama.ATTENTION_MODULE + "k_norm"),
)

GEMMA2 = Family(
    name="gemma2",
    model_types=("gemma2",),
    numbers=_numbers,
    places=(llama.EMBEDDING, *_LN1, *llama.ATTENTION, *_MLP, *_ENDS),
    prefix=llama.PREFIX,
    buffers=llama.BUFFERS,
    defaults={
        **_DEFAULTS,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    function=_FUNCTION,
)
GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    numbers=_gemma3_numbers,
    places=(llama.EMBEDDING, *_LN1, *llama.ATTENTION, *_QK_NORMS, *_MLP, *_ENDS),
    prefix=llama.PREFIX,
    buffers=llama.BUFFERS,
    defaults={
        **_DEFAULTS,
        "sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "use_bidirectional_attention": False,
    },
    function=_FUNCTION,
)
