"""GPT-2: ``Conv1D`` stores [d_in, d_out]; query, key and value lie side by side in one tensor."""

from collections.abc import Mapping
from typing import Any

from .table import Family, Place

_BLOCK = "transformer.h.{layer}."


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
        "tied": bool(config.get("tie_word_embeddings", True)),
        "activation": config.get("activation_function", "gelu_new"),
        "norm_eps": float(config.get("layer_norm_epsilon", 1e-5)),
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
        Place("embedding", "W_E", "transformer.wte.weight"),
        Place("embedding", "W_pos", "transformer.wpe.weight"),
        Place("norm", "ln1.w", _BLOCK + "ln_1.weight"),
        Place("bias", "ln1.b", _BLOCK + "ln_1.bias"),
        Place("matrix", "W_Q", _BLOCK + "attn.c_attn.weight", third=0),
        Place("matrix", "W_K", _BLOCK + "attn.c_attn.weight", third=1),
        Place("matrix", "W_V", _BLOCK + "attn.c_attn.weight", third=2),
        Place("matrix", "W_O", _BLOCK + "attn.c_proj.weight"),
        Place("bias", "b_Q", _BLOCK + "attn.c_attn.bias", third=0),
        Place("bias", "b_K", _BLOCK + "attn.c_attn.bias", third=1),
        Place("bias", "b_V", _BLOCK + "attn.c_attn.bias", third=2),
        Place("bias", "b_O", _BLOCK + "attn.c_proj.bias"),
        Place("norm", "ln2.w", _BLOCK + "ln_2.weight"),
        Place("bias", "ln2.b", _BLOCK + "ln_2.bias"),
        Place("matrix", "W_in", _BLOCK + "mlp.c_fc.weight"),
        Place("matrix", "W_out", _BLOCK + "mlp.c_proj.weight"),
        Place("bias", "b_in", _BLOCK + "mlp.c_fc.bias"),
        Place("bias", "b_out", _BLOCK + "mlp.c_proj.bias"),
        Place("norm", "ln_final.w", "transformer.ln_f.weight"),
        Place("bias", "ln_final.b", "transformer.ln_f.bias"),
        Place("embedding", "W_U", "lm_head.weight", transposed=True),
    ),
    prefix="transformer.",
    aliases={},
    buffers=(r"\.attn\.bias$", r"\.attn\.masked_bias$"),
)
