"""GPT-2: ``Conv1D`` stores [d_in, d_out]; query, key and value lie side by side in one tensor."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from . import table
from .table import Family, embedding, norm

_BLOCK = "transformer.h.{layer}."
_linear = partial(table.linear, stored="in out", bias="")


def _numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    d_model, n_heads = config["n_embd"], config["n_head"]
    return {
        "n_layers": config["n_layer"],
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "d_head": d_model // n_heads,
        "d_model": d_model,
        "d_mlp": config.get("n_inner") or 4 * d_model,
        "d_vocab": config["vocab_size"],
        "n_ctx": config["n_positions"],
        "gated": False,
        "tied": bool(config["tie_word_embeddings"]),
        "activation": config["activation_function"],
        "norm_eps": float(config["layer_norm_epsilon"]),
        "rotary": False,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
    }


FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    numbers=_numbers,
    places=(
        embedding("W_E", "transformer.wte"),
        embedding("W_pos", "transformer.wpe"),
        *norm("ln1", _BLOCK + "ln_1", bias=True),
        *table.fused(("W_Q", "W_K", "W_V"), _BLOCK + "attn.c_attn", stored="in out", bias=""),
        *_linear("W_O", _BLOCK + "attn.c_proj"),
        *norm("ln2", _BLOCK + "ln_2", bias=True),
        *_linear("W_in", _BLOCK + "mlp.c_fc"),
        *_linear("W_out", _BLOCK + "mlp.c_proj"),
        *norm("ln_final", "transformer.ln_f", bias=True),
        embedding("W_U", "lm_head"),
    ),
    prefix="transformer.",
    buffers=(r"\.attn\.bias$", r"\.attn\.masked_bias$"),
    defaults={
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    },
    function=("scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
)
