"""GPT-NeoX (Pythia): query, key and value interleaved per head; attention and MLP in parallel."""

from collections.abc import Mapping
from typing import Any

from .table import Family, Place

_BLOCK = "gpt_neox.layers.{layer}."
_QKV = _BLOCK + "attention.query_key_value."


def _numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    d_model, n_heads = config["hidden_size"], config["num_attention_heads"]
    attention_bias = bool(config.get("attention_bias", True))
    return {
        "n_layers": config["num_hidden_layers"],
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "d_head": d_model // n_heads,
        "d_model": d_model,
        "d_mlp": config["intermediate_size"],
        "d_vocab": config["vocab_size"],
        "gated": False,
        "tied": bool(config.get("tie_word_embeddings", False)),
        "activation": config.get("hidden_act", "gelu"),
        "norm_eps": float(config.get("layer_norm_eps", 1e-5)),
        "rotary": True,
        "parallel": bool(config.get("use_parallel_residual", True)),
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "mlp_bias": True,
    }


FAMILY = Family(
    name="neox",
    model_types=("gpt_neox",),
    numbers=_numbers,
    places=(
        Place("embedding", "W_E", "gpt_neox.embed_in.weight"),
        Place("norm", "ln1.w", _BLOCK + "input_layernorm.weight"),
        Place("bias", "ln1.b", _BLOCK + "input_layernorm.bias"),
        Place("matrix", "W_Q", _QKV + "weight", transposed=True, third=0),
        Place("matrix", "W_K", _QKV + "weight", transposed=True, third=1),
        Place("matrix", "W_V", _QKV + "weight", transposed=True, third=2),
        Place("matrix", "W_O", _BLOCK + "attention.dense.weight", transposed=True),
        Place("bias", "b_Q", _QKV + "bias", third=0, when="qkv_bias"),
        Place("bias", "b_K", _QKV + "bias", third=1, when="qkv_bias"),
        Place("bias", "b_V", _QKV + "bias", third=2, when="qkv_bias"),
        Place("bias", "b_O", _BLOCK + "attention.dense.bias", when="output_bias"),
        Place("norm", "ln2.w", _BLOCK + "post_attention_layernorm.weight"),
        Place("bias", "ln2.b", _BLOCK + "post_attention_layernorm.bias"),
        Place("matrix", "W_in", _BLOCK + "mlp.dense_h_to_4h.weight", transposed=True),
        Place("matrix", "W_out", _BLOCK + "mlp.dense_4h_to_h.weight", transposed=True),
        Place("bias", "b_in", _BLOCK + "mlp.dense_h_to_4h.bias"),
        Place("bias", "b_out", _BLOCK + "mlp.dense_4h_to_h.bias"),
        Place("norm", "ln_final.w", "gpt_neox.final_layer_norm.weight"),
        Place("bias", "ln_final.b", "gpt_neox.final_layer_norm.bias"),
        Place("embedding", "W_U", "embed_out.weight", transposed=True),
    ),
    prefix="gpt_neox.",
    aliases={"lm_head.weight": "embed_out.weight"},
    buffers=(r"\.attention\.(masked_)?bias$", r"\.rotary_emb\.inv_freq$"),
    thirds="interleaved",
)
