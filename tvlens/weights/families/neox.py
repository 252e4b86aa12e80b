"""GPT-NeoX (Pythia): query, key and value interleaved per head; attention and MLP in parallel."""

from collections.abc import Mapping
from typing import Any

from .table import Family, embedding, fused, linear, norm

_BLOCK = "gpt_neox.layers.{layer}."
_ATTENTION = _BLOCK + "attention."


def _numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    d_model, n_heads = config["hidden_size"], config["num_attention_heads"]
    attention_bias = bool(config["attention_bias"])
    return {
        "n_layers": config["num_hidden_layers"],
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "d_head": d_model // n_heads,
        "d_model": d_model,
        "d_mlp": config["intermediate_size"],
        "d_vocab": config["vocab_size"],
        "gated": False,
        "tied": bool(config["tie_word_embeddings"]),
        "activation": config["hidden_act"],
        "norm_eps": float(config["layer_norm_eps"]),
        "rotary": True,
        "parallel": bool(config["use_parallel_residual"]),
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "mlp_bias": True,
    }


FAMILY = Family(
    name="neox",
    model_types=("gpt_neox",),
    numbers=_numbers,
    places=(
        embedding("W_E", "gpt_neox.embed_in"),
        *norm("ln1", _BLOCK + "input_layernorm", bias=True),
        *fused(("W_Q", "W_K", "W_V"), _ATTENTION + "query_key_value", bias="qkv_bias"),
        *linear("W_O", _ATTENTION + "dense", bias="output_bias"),
        *norm("ln2", _BLOCK + "post_attention_layernorm", bias=True),
        *linear("W_in", _BLOCK + "mlp.dense_h_to_4h", bias=""),
        *linear("W_out", _BLOCK + "mlp.dense_4h_to_h", bias=""),
        *norm("ln_final", "gpt_neox.final_layer_norm", bias=True),
        embedding("W_U", "embed_out"),
    ),
    prefix="gpt_neox.",
    aliases={"lm_head.weight": "embed_out.weight"},
    buffers=(r"\.attention\.(masked_)?bias$", r"\.rotary_emb\.inv_freq$"),
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "use_parallel_residual": True,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000.0,
    },
    interleaved=True,
)
