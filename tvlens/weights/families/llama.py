"""Llama and its kin (SmolLM2, Mistral, Qwen2): separate projections, gated MLP, RMS norms."""

from collections.abc import Mapping
from typing import Any

from .table import Family, Place

_BLOCK = "model.layers.{layer}."


def _numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    n_heads = config["num_attention_heads"]
    qwen2 = config["model_type"] == "qwen2"
    attention_bias = bool(config.get("attention_bias", False))
    return {
        "n_layers": config["num_hidden_layers"],
        "n_heads": n_heads,
        "n_kv_heads": config.get("num_key_value_heads") or n_heads,
        "d_head": config.get("head_dim") or config["hidden_size"] // n_heads,
        "d_model": config["hidden_size"],
        "d_mlp": config["intermediate_size"],
        "d_vocab": config["vocab_size"],
        "gated": True,
        "tied": bool(config.get("tie_word_embeddings", False)),
        "activation": config.get("hidden_act", "silu"),
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "rotary": True,
        "qkv_bias": attention_bias or qwen2,
        "output_bias": attention_bias and not qwen2,
        "mlp_bias": bool(config.get("mlp_bias", False)),
    }


FAMILY = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2"),
    numbers=_numbers,
    places=(
        Place("embedding", "W_E", "model.embed_tokens.weight"),
        Place("norm", "ln1.w", _BLOCK + "input_layernorm.weight"),
        Place("matrix", "W_Q", _BLOCK + "self_attn.q_proj.weight", transposed=True),
        Place("matrix", "W_K", _BLOCK + "self_attn.k_proj.weight", transposed=True),
        Place("matrix", "W_V", _BLOCK + "self_attn.v_proj.weight", transposed=True),
        Place("matrix", "W_O", _BLOCK + "self_attn.o_proj.weight", transposed=True),
        Place("bias", "b_Q", _BLOCK + "self_attn.q_proj.bias", when="qkv_bias"),
        Place("bias", "b_K", _BLOCK + "self_attn.k_proj.bias", when="qkv_bias"),
        Place("bias", "b_V", _BLOCK + "self_attn.v_proj.bias", when="qkv_bias"),
        Place("bias", "b_O", _BLOCK + "self_attn.o_proj.bias", when="output_bias"),
        Place("norm", "ln2.w", _BLOCK + "post_attention_layernorm.weight"),
        Place("matrix", "W_gate", _BLOCK + "mlp.gate_proj.weight", transposed=True),
        Place("matrix", "W_in", _BLOCK + "mlp.up_proj.weight", transposed=True),
        Place("matrix", "W_out", _BLOCK + "mlp.down_proj.weight", transposed=True),
        Place("bias", "b_gate", _BLOCK + "mlp.gate_proj.bias", when="mlp_bias"),
        Place("bias", "b_in", _BLOCK + "mlp.up_proj.bias", when="mlp_bias"),
        Place("bias", "b_out", _BLOCK + "mlp.down_proj.bias", when="mlp_bias"),
        Place("norm", "ln_final.w", "model.norm.weight"),
        Place("embedding", "W_U", "lm_head.weight", transposed=True),
    ),
    prefix="model.",
    aliases={},
    buffers=(r"\.rotary_emb\.inv_freq$",),
)
