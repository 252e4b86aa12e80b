"""HookedTransformer of TransformerLens 3.9: modules of its own, W_Q as [head, d_model, d_head].

Its hook points lie inside its attention and MLP, not around each map, so inputs and outputs of
maps are found at the edges of those modules. No class of it is imported: 4.x has none.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tvlens.errors import HostError
from tvlens.weights.families.hooked_transformer import POST_NORM

from .hosts import Host, Kept, row_means, submodule
from .passages import Passage

QKV = ("query_input", "key_input", "value_input")
"""Arguments of its attention: three calls of one norm on one residual stream."""
OWN_HOOKS = {
    "attn.q.hook_out": "attn.hook_q",
    "attn.k.hook_out": "attn.hook_k",
    "attn.v.hook_out": "attn.hook_v",
    "attn.o.hook_in": "attn.hook_z",
    "mlp.out.hook_in": "mlp.hook_post",
}
MAPS = {
    "attn.q": ("attn", "W_Q", "b_Q", "head d_in d_head", "head d_head"),
    "attn.k": ("attn", "W_K", "b_K", "head d_in d_head", "head d_head"),
    "attn.v": ("attn", "W_V", "b_V", "head d_in d_head", "head d_head"),
    "attn.o": ("attn", "W_O", "b_O", "head d_head d_out", "d_out"),
    "mlp.gate": ("mlp", "W_gate", "", "d_in d_out", ""),
    "mlp.in": ("mlp", "W_in", "b_in", "d_in d_out", "d_out"),
    "mlp.out": ("mlp", "W_out", "b_out", "d_in d_out", "d_out"),
    "embed": ("embed", "W_E", "", "", ""),
    "pos_embed": ("pos_embed", "W_pos", "", "", ""),
    "unembed": ("unembed", "W_U", "b_U", "d_in d_out", "d_out"),
}
"""Module, weight and bias of each map, and the axes of the two. Grouped keys and values are
stored under ``_W_K``, ``_W_V``; ``W_K`` is then a copy for every query head."""
CENTRED = 1e-5
"""Largest mean of a centred weight's rows, in units of its entries; a raw one's is above 1e-3."""
UNREADABLE = {
    "attn_only": "it has no MLPs",
    "num_experts": "it has experts",
    "load_in_4bit": "its weights are quantised",
}
SPLIT_INPUTS = (
    "use_attn_in",
    "use_split_qkv_input",
    "ungroup_grouped_query_attention",
)
"""Settings that give each head a copy of its input; ``set_NAME(False)`` turns them off."""
OTHERWISE_ADDED = ("post_embedding_ln", "use_attention_sinks")
"""Settings of families whose weights enter in a way that is no site."""


def hooked_transformer_host(model: Any) -> Host:
    """The host of a ``HookedTransformer``.

    Raises:
        HostError: It has no MLPs, has experts, or is quantised.
    """
    for setting, what in UNREADABLE.items():
        if getattr(model.cfg, setting, None):
            raise HostError(f"tvlens cannot read this {type(model).__name__}: {what}.")

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        return model(ids, attention_mask=mask)

    def module(site: str) -> nn.Module | None:
        return submodule(model, _own(model, site))

    name = type(model).__name__
    return Host(
        logits,
        partial(_kept, model),
        module,
        _passages(model),
        not_raw=_processing(model),
        training_differs=bool(getattr(model.cfg, "use_logn_attn", False)),  # it has no dropout
        reload=f'Reload it raw: {name}.from_pretrained_no_processing("{model.cfg.model_name}").',
    )


def _kept(model: Any, site: str) -> Mapping[str, Kept]:
    """The parameters of a site.

    Raises:
        HostError: The model runs in a way in which they are not used as a site's are.
    """
    _require_plain(model)
    block, role = _split(site)
    if role not in MAPS:
        norm = submodule(model, _own(model, site))
        return _parameters(norm, {"weight": ("w", ""), "bias": ("b", "")})
    owner, weight, bias, form, bias_form = MAPS[role]
    module = submodule(model, block + owner)
    found = _parameters(module, {"weight": (weight, form), "bias": (bias, bias_form)})
    if role == "mlp.in" and model.cfg.gated_mlp:
        return {"weight": _without_bias(site, found)}
    return found


def _parameters(module: nn.Module | None, names: Mapping[str, tuple[str, str]]) -> dict[str, Kept]:
    """Those of the parameters that a module has, grouped ones by their own name."""
    known = {} if module is None else module._parameters
    found = {}
    for tensor, (name, form) in names.items():
        own = f"_{name}" if f"_{name}" in known else name
        if module is not None and known.get(own) is not None:
            found[tensor] = Kept(module, own, form)
    return found


def _without_bias(site: str, found: Mapping[str, Kept]) -> Kept:
    """The weight of a gated MLP's input; its bias is added after the product with the gate."""
    if found["bias"].parameter.any():
        raise HostError(
            f"{site} has a bias other than 0, which a gated MLP here adds after the product with "
            "its gate: it is the bias of no map.",
        )
    return found["weight"]


def _require_plain(model: Any) -> None:
    for setting in SPLIT_INPUTS:
        if getattr(model.cfg, setting, False):
            raise HostError(
                f"the model's {setting} is on, which gives each head an input of its own.",
                hint=f"Call model.set_{setting}(False) first.",
            )
    for setting in OTHERWISE_ADDED:
        if getattr(model.cfg, setting, False):
            raise HostError(f"tvlens cannot attribute to weights of a model with {setting}.")


def _passages(model: Any) -> dict[str, str | Passage]:
    """Where the bridge's names of hooks are found here."""
    found: dict[str, str | Passage] = {}
    if (places := submodule(model, "pos_embed")) is not None:
        found |= _edges("pos_embed", places)
        found["pos_embed.hook_in"] = Passage(places, "in", made=_positions)
    if (final := submodule(model, "ln_final")) is not None:
        found |= _edges("ln_final", final)
    for layer in range(model.cfg.n_layers):
        found |= _of_block(model, f"blocks.{layer}.")
    return found


def _of_block(model: Any, block: str) -> dict[str, str | Passage]:
    attention, mlp = submodule(model, f"{block}attn"), submodule(model, f"{block}mlp")
    if attention is None or mlp is None:
        return {}
    found: dict[str, str | Passage] = {f"{block}{n}": f"{block}{o}" for n, o in OWN_HOOKS.items()}
    for name, argument in zip("qkv", QKV, strict=True):
        found[f"{block}attn.{name}.hook_in"] = Passage(attention, "in", (argument,))
    found[f"{block}attn.o.hook_out"] = Passage(attention, "out")
    for role in ("gate", "in") if model.cfg.gated_mlp else ("in",):
        found[f"{block}mlp.{role}.hook_in"] = Passage(mlp, "in")
    pre = (
        {"gate": "hook_pre", "in": "hook_pre_linear"} if model.cfg.gated_mlp else {"in": "hook_pre"}
    )
    found |= {f"{block}mlp.{role}.hook_out": f"{block}mlp.{own}" for role, own in pre.items()}
    found[f"{block}mlp.out.hook_out"] = Passage(mlp, "out")
    return found | _of_norms(model, block, attention)


def _of_norms(model: Any, block: str, attention: nn.Module) -> dict[str, str | Passage]:
    """A norm before attention is called once each for q, k and v, so it is found around them."""
    found: dict[str, str | Passage] = {}
    for role in ("ln1", "ln1_post", "ln2", "ln2_post", "attn.q_norm", "attn.k_norm"):
        norm = submodule(model, _own(model, block + role))
        if norm is None:
            continue
        if role == "ln1":
            found[f"{block}ln1.hook_in"] = f"{block}hook_resid_pre"
            found[f"{block}ln1.hook_out"] = Passage(attention, "in", QKV)
        else:
            by_head = model.cfg.use_qk_norm and role.startswith("attn.")
            found |= _edges(block + role, norm, within=attention if by_head else None)
    return found


def _edges(site: str, module: nn.Module, within: nn.Module | None = None) -> dict[str, Passage]:
    return {
        f"{site}.hook_in": Passage(module, "in", within=within),
        f"{site}.hook_out": Passage(module, "out", within=within),
    }


def _positions(tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "one pos"]:
    """The positions of right-padded tokens."""
    return torch.arange(tokens.shape[1], device=tokens.device)[None]


def _split(site: str) -> tuple[str, str]:
    """``blocks.0.`` and the role in the block; nothing and the site outside the blocks."""
    if not site.startswith("blocks."):
        return "", site
    _, layer, role = site.split(".", 2)
    return f"blocks.{layer}.", role


def _own(model: Any, site: str) -> str:
    """The model's name for the module of a norm; one that no module has, where it has none."""
    if getattr(model.cfg, "original_architecture", None) not in POST_NORM:
        return site
    block, role = _split(site)
    own = {"ln1_post": "ln1", "ln2_post": "ln2", "ln1": "none", "ln2": "none"}
    return block + own.get(role, role)


def _processing(model: Any) -> str:
    """What was done to the weights when they were loaded, as far as it shows; empty for nothing."""
    if str(model.cfg.normalization_type).endswith("Pre"):
        return (
            f"its norms have no gains ({model.cfg.normalization_type}): they were folded into the "
            "weights that read after them"
        )
    if row_means(model.unembed.W_U.detach()) < CENTRED:
        return "its unembedding was centred"
    attention = [block.attn for block in model.blocks]
    kept = [_parameters(a, {n: (f"b_{n}", "") for n in "QVO"}) for a in attention]
    moved = {n: any(bool(k[n].parameter.any()) for k in kept) for n in "QVO"}
    if moved["Q"] and moved["O"] and not moved["V"]:
        return "its value biases were folded into the output biases"
    return ""
