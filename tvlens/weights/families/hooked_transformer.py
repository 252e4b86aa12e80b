"""HookedTransformer in memory: TransformerLens's own names, every map stored as ``x @ W``.

It has a bias at every map, 0 where the checkpoint it was made from has none. A gated MLP's input
is without one here: there it is added after the product with the gate, and is refused unless 0.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from .table import Family, Place

POST_NORM = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")
"""Architectures whose ``ln1`` and ``ln2`` come after attention and MLP."""
MODEL_TYPE = "hooked_transformer"
_BLOCK = "blocks.{layer}."
_FUNCTION = (
    "original_architecture",
    "normalization_type",
    "positional_embedding_type",
    "attention_dir",
    "attn_scale",
    "scale_attn_by_inverse_layer_idx",
    "attn_scores_soft_cap",
    "output_logits_soft_cap",
    "clip_qkv",
    "window_size",
    "attn_types",
    "rotary_dim",
    "rotary_base",
    "rotary_adjacent_pairs",
    "use_NTK_by_parts_rope",
    "NTK_by_parts_factor",
    "use_yarn_rope",
)


def config_of(cfg: Any) -> dict[str, Any]:
    """The entries of a HookedTransformer's ``cfg`` that can be written down."""
    plain = (bool, int, float, str, list, type(None))
    found = {name: value for name, value in vars(cfg).items() if isinstance(value, plain)}
    return {**found, "model_type": MODEL_TYPE, "vocab_size": cfg.d_vocab}


def _numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    gated = bool(config["gated_mlp"])
    rotary = config["positional_embedding_type"] == "rotary"
    return {
        "n_layers": config["n_layers"],
        "n_heads": config["n_heads"],
        "n_kv_heads": config.get("n_key_value_heads") or config["n_heads"],
        "d_head": config["d_head"],
        "d_model": config["d_model"],
        "d_mlp": config["d_mlp"],
        "d_vocab": config["d_vocab"],
        "n_ctx": 0 if rotary else config["n_ctx"],
        "gated": gated,
        "tied": False,
        "activation": config["act_fn"],
        "norm_eps": float(config["eps"]),
        "rotary": rotary,
        "parallel": bool(config["parallel_attn_mlp"]),
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": not gated,
        "qk_norm": _qk_norm(config),
    }


def _qk_norm(config: Mapping[str, Any]) -> str:
    if config.get("use_qk_norm"):
        return "head"
    return "projection" if config.get("original_architecture") in POST_NORM else ""


def family(config: Mapping[str, Any]) -> Family:
    """The table of a model with this ``config_of``: which norms it has depends on its settings."""
    return Family(
        name="HookedTransformer",
        model_types=(MODEL_TYPE,),
        numbers=_numbers,
        places=tuple(_places(config)),
        prefix="",
        buffers=(),
        function=_FUNCTION,
    )


def _places(config: Mapping[str, Any]) -> Iterator[Place]:
    attention, mlp = _BLOCK + "attn.", _BLOCK + "mlp."
    grouped = "_" if config.get("n_key_value_heads") else ""
    yield Place("embedding", "W_E", "embed.W_E")
    if config["positional_embedding_type"] != "rotary":
        yield Place("embedding", "W_pos", "pos_embed.W_pos")
    for name, own in (("Q", ""), ("K", grouped), ("V", grouped), ("O", "")):
        yield Place("matrix", f"W_{name}", f"{attention}{own}W_{name}")
        yield Place("bias", f"b_{name}", f"{attention}{own}b_{name}")
    if config["gated_mlp"]:
        yield Place("matrix", "W_gate", f"{mlp}W_gate")
    yield Place("matrix", "W_in", f"{mlp}W_in")
    yield Place("bias", "b_in", f"{mlp}b_in", when="mlp_bias")
    yield Place("matrix", "W_out", f"{mlp}W_out")
    yield Place("bias", "b_out", f"{mlp}b_out")
    yield from _norms(config)
    yield Place("embedding", "W_U", "unembed.W_U", transposed=True)
    yield Place("bias", "b_U", "unembed.b_U")


def _norms(config: Mapping[str, Any]) -> Iterator[Place]:
    """The norms that the model's settings ask for."""
    if config["normalization_type"] is None:
        return
    centred = config["normalization_type"] == "LN"
    post = config.get("original_architecture") in POST_NORM
    for name in ("ln1", "ln2"):
        yield from _norm(f"{name}_post" if post else name, _BLOCK + name, bias=centred)
        if config.get("use_normalization_before_and_after"):
            yield from _norm(f"{name}_post", f"{_BLOCK}{name}_post", bias=False)
    if post or config.get("use_qk_norm"):
        for name in ("q_norm", "k_norm"):
            yield from _norm(name, f"{_BLOCK}attn.{name}", bias=False)
    yield from _norm("ln_final", "ln_final", bias=centred and not config.get("final_rms"))


def _norm(name: str, module: str, *, bias: bool) -> Iterator[Place]:
    yield Place("norm", f"{name}.w", f"{module}.w")
    if bias:
        yield Place("bias", f"{name}.b", f"{module}.b")
