"""Config entries that make two models compute different things with equal weights."""

import math
from collections.abc import Mapping
from typing import Any

from tvlens.errors import CheckpointError

from .layout import Layout
from .report import ConfigDifference

STRUCTURE = (
    "family",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "d_head",
    "d_model",
    "d_mlp",
    "n_ctx",
    "gated",
    "rotary",
    "parallel",
    "activation",
    "qkv_bias",
    "output_bias",
    "mlp_bias",
)
"""Layout entries that must agree, or a difference of weights has no meaning."""
FUNCTION_ENTRIES: Mapping[str, Any] = {
    "sliding_window": None,
    "use_sliding_window": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
"""Entries that change the attention, with the value that leaving them out means."""
SAME_ACTIVATION = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new"}
ROPE_ENTRIES = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_emb_base", "rotary_pct")
READ_ELSEWHERE = (
    *ROPE_ENTRIES,
    "partial_rotary_factor",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "hidden_act",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "layer_types",
    "model_type",
    "use_parallel_residual",
    "activation_function",
    "n_embd",
    "n_head",
    "n_layer",
    "n_inner",
    "n_positions",
)
WITHOUT_EFFECT = (
    "transformers_version",
    "torch_dtype",
    "dtype",
    "_name_or_path",
    "use_cache",
    "_attn_implementation",
    "initializer_range",
    "pretraining_tp",
)
FLOAT32_DIGITS = 1e-6
"""Epsilons and bases are often written as the float32 of a decimal; that is no difference."""


def config_differences(
    base: Mapping[str, Any], tuned: Mapping[str, Any], layouts: tuple[Layout, Layout]
) -> list[ConfigDifference]:
    """Every entry that differs, those that forbid a comparison first.

    Args:
        base: The base's config.json.
        tuned: The tuned model's config.json.
        layouts: The layouts read from them.

    Raises:
        CheckpointError: An entry is not of the type it must have.
    """
    try:
        return _differences(base, tuned, layouts)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"a config.json garbles an entry of the rotation or the attention ({error}).",
            hint="Copy the config.json that belongs to these weights.",
        ) from error


def _differences(
    base: Mapping[str, Any], tuned: Mapping[str, Any], layouts: tuple[Layout, Layout]
) -> list[ConfigDifference]:
    first, second = (_structure(layout) for layout in layouts)
    found = [
        ConfigDifference(name, first[name], second[name], "refused")
        for name in STRUCTURE
        if first[name] != second[name]
    ]
    first, second = (
        _function_entries(config, layout)
        for config, layout in zip((base, tuned), layouts, strict=True)
    )
    found += [
        ConfigDifference(name, first[name], second[name], "function")
        for name in first
        if not _same(first[name], second[name])
    ]
    known = {*READ_ELSEWHERE, *WITHOUT_EFFECT, *FUNCTION_ENTRIES}
    return found + [
        ConfigDifference(name, base.get(name), tuned.get(name), "note")
        for name in sorted({*base, *tuned} - known)
        if not _same(base.get(name), tuned.get(name))
    ]


def rotary_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """Base frequency, rotated share and scaling, from the old or the new form of a config."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or config.get("rope_theta")
    theta = theta or config.get("rotary_emb_base") or 10000.0
    share = rope.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor")
    default_share = 0.25 if config.get("model_type") == "gpt_neox" else 1.0
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    return {
        "rope_theta": float(theta),
        "rotary_share": float(share or config.get("rotary_pct") or default_share),
        "rope_scaling": {"rope_type": kind, **rope} if kind != "default" else None,
    }


def _structure(layout: Layout) -> dict[str, Any]:
    found = {name: getattr(layout, name) for name in STRUCTURE}
    found["activation"] = SAME_ACTIVATION.get(layout.activation, layout.activation)
    return found


def _function_entries(config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    rotary = rotary_entries(config) if layout.rotary else {}
    return {
        "model_type": config.get("model_type"),
        "norm_eps": layout.norm_eps,
        "tie_word_embeddings": layout.tied,
        **rotary,
        **{name: config.get(name, default) for name, default in FUNCTION_ENTRIES.items()},
        "layer_types": _unusual_layers(config),
    }


def _unusual_layers(config: Mapping[str, Any]) -> list[str] | None:
    """The kinds of layers, None where all attend to everything."""
    kinds = config.get("layer_types") or []
    return None if set(kinds) <= {"full_attention"} else list(kinds)


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=FLOAT32_DIGITS)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(
            _same(first[key], second[key]) for key in first
        )
    return first == second
