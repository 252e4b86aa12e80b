"""Llama (SmolLM2 too) and the names its descendants share: separate projections, gated MLP."""

from collections.abc import Mapping
from typing import Any

from .table import Family, embedding, linear, norm

BLOCK = "model.layers.{layer}."
ATTENTION_MODULE = BLOCK + "self_attn."
EMBEDDING = embedding("W_E", "model.embed_tokens")
UNEMBEDDING = embedding("W_U", "lm_head")
LN1 = norm("ln1", BLOCK + "input_layernorm")
LN2 = norm("ln2", BLOCK + "post_attention_layernorm")
LN_FINAL = norm("ln_final", "model.norm")
OUTPUT = linear("W_O", ATTENTION_MODULE + "o_proj", bias="output_bias")
ATTENTION = (
    *linear("W_Q", ATTENTION_MODULE + "q_proj", bias="qkv_bias"),
    *linear("W_K", ATTENTION_MODULE + "k_proj", bias="qkv_bias"),
    *linear("W_V", ATTENTION_MODULE + "v_proj", bias="qkv_bias"),
    *OUTPUT,
)
MLP = (
    *linear("W_gate", BLOCK + "mlp.gate_proj", bias="mlp_bias"),
    *linear("W_in", BLOCK + "mlp.up_proj", bias="mlp_bias"),
    *linear("W_out", BLOCK + "mlp.down_proj", bias="mlp_bias"),
)
PREFIX = "model."
BUFFERS = (r"\.rotary_emb\.inv_freq$",)
DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "rope_theta": 10000.0,
}


def numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the configs of Llama and its descendants call the same."""
    n_heads = config["num_attention_heads"]
    attention_bias = bool(config["attention_bias"])
    return {
        "n_layers": config["num_hidden_layers"],
        "n_heads": n_heads,
        "n_kv_heads": config.get("num_key_value_heads") or n_heads,
        "d_head": config.get("head_dim") or config["hidden_size"] // n_heads,
        "d_model": config["hidden_size"],
        "d_mlp": config["intermediate_size"],
        "d_vocab": config["vocab_size"],
        "gated": True,
        "tied": bool(config["tie_word_embeddings"]),
        "activation": config["hidden_act"],
        "norm_eps": float(config["rms_norm_eps"]),
        "rotary": True,
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "mlp_bias": bool(config.get("mlp_bias")),
    }


FAMILY = Family(
    name="llama",
    model_types=("llama",),
    numbers=numbers,
    places=(EMBEDDING, *LN1, *ATTENTION, *LN2, *MLP, *LN_FINAL, UNEMBEDDING),
    prefix=PREFIX,
    buffers=BUFFERS,
    defaults=DEFAULTS,
)
