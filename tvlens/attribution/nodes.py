"""The activations that are attributed to: which tensor each is, and how components cut it.

Every part is one hook of the host. Along its index axis it falls into components:

    embed                        node      before the first block
    q, z, pattern                head      a query head's query, output, attention pattern
    k, v                         kv_head   a key-value head's key and value, stored once
    pre, pre_linear, post        neuron    gate branch (of a plain MLP: the input), up branch, and
                                           what the neuron gives on
    attn_out, mlp_out            node      what a sub-layer adds to the residual stream
    resid_pre, resid_post        node      the residual stream before and after a block

``Component("node", 3, None, "z")`` is the whole tensor: all heads of block 3 together. Products
of a pattern are summed over keys; its position is the query's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from tvlens.components import Component
from tvlens.errors import HostError
from tvlens.models.lens import LensModel

from .tables import Cut

HEAD, NEURON = Cut("head", "z"), Cut("neuron", "post")
EMBEDDING = Cut("node", "embed", layered=False)
NODES: dict[str, tuple[Cut, str]] = {
    "embed": (EMBEDDING, "hook_embed"),
    "q": (Cut("head", "q"), "blocks.{}.attn.hook_q"),
    "k": (Cut("kv_head", "k"), "blocks.{}.attn.hook_k"),
    "v": (Cut("kv_head", "v"), "blocks.{}.attn.hook_v"),
    "pattern": (Cut("head", "pattern"), "blocks.{}.attn.hook_pattern"),
    "z": (HEAD, "blocks.{}.attn.hook_z"),
    "pre": (Cut("neuron", "pre"), "blocks.{}.mlp.hook_pre"),
    "pre_linear": (Cut("neuron", "pre_linear"), "blocks.{}.mlp.hook_pre_linear"),
    "post": (NEURON, "blocks.{}.mlp.hook_post"),
    "attn_out": (Cut("node", "attn_out"), "blocks.{}.hook_attn_out"),
    "mlp_out": (Cut("node", "mlp_out"), "blocks.{}.hook_mlp_out"),
    "resid_pre": (Cut("node", "resid_pre"), "blocks.{}.hook_resid_pre"),
    "resid_post": (Cut("node", "resid_post"), "blocks.{}.hook_resid_post"),
}
"""Part -> how components cut it, and the hook where it passes, in the order of a block."""
DEFAULT_PARTS = ("z", "post", "attn_out", "mlp_out", "embed")
"""What a study attributes to unless asked for more: each says something the others do not."""
SOFTMAX_PARTS = ("q", "k")
"""What acts through a softmax alone, which some estimators make anew."""
_SUMMED = {
    "head": "batch pos head width, batch pos head width -> batch head",
    "kv_head": "batch pos head width, batch pos head width -> batch head",
    "neuron": "batch pos neuron, batch pos neuron -> batch neuron",
    "node": "batch pos width, batch pos width -> batch",
    "pattern": "batch head pos key, batch head pos key -> batch head",
}
_BY_POSITION = {
    "head": "batch pos head width, batch pos head width -> batch pos head",
    "kv_head": "batch pos head width, batch pos head width -> batch pos head",
    "neuron": "batch pos neuron, batch pos neuron -> batch pos neuron",
    "node": "batch pos width, batch pos width -> batch pos",
    "pattern": "batch head pos key, batch head pos key -> batch pos head",
}


class Site(NamedTuple):
    """A cut of one layer and the hook where its activation passes."""

    cut: Cut
    layer: int | None
    hook: str

    @property
    def part(self) -> str:
        """The activation's name."""
        return self.cut.part or ""

    @property
    def index_axis(self) -> int:
        """The axis of heads or neurons; patterns are [batch, head, query, key]."""
        return 1 if self.part == "pattern" else 2

    def real(self, where: Bool[Tensor, "batch pos"], ndim: int) -> Bool[Tensor, "batch ..."]:
        """``where`` over positions, shaped to be broadcast over the whole activation."""
        if self.part == "pattern":
            return rearrange(where, "batch pos -> batch 1 pos 1")
        return where.reshape(*where.shape, *[1] * (ndim - 2))

    def product(
        self,
        difference: Float[Tensor, "batch ..."],
        gradient: Float[Tensor, "batch ..."],
        *,
        by_position: bool = False,
    ) -> Float[Tensor, "batch ..."]:
        """Difference times gradient: [batch, index], by position [batch, pos, index]."""
        patterns = _BY_POSITION if by_position else _SUMMED
        pattern = patterns["pattern" if self.part == "pattern" else self.cut.kind]
        product = einsum(difference, gradient, pattern)
        return product[..., None] if self.cut.kind == "node" else product


def activation_sites(model: LensModel, parts: Sequence[str] = DEFAULT_PARTS) -> list[Site]:
    """Every activation of ``parts`` in ``model``, part by part.

    Raises:
        HostError: There is no such part, or this family does not have it.
    """
    sites = []
    for part in parts:
        if part not in NODES:
            raise HostError(f"there is no activation {part!r}; there are {', '.join(NODES)}.")
        cut, name = NODES[part]
        layers = range(model.n_layers) if cut.layered else [None]
        sites += [Site(cut, layer, name.format(layer)) for layer in layers]
    if missing := [site for site in sites if site.hook not in model.hook_names]:
        raise HostError(
            f"this model has no activation {missing[0].part!r} (hook {missing[0].hook!r}).",
            hint="pre_linear is the up branch of a gated MLP; all_parts() lists what there is.",
        )
    return sites


def parts_for(estimators: Sequence[str]) -> tuple[str, ...]:
    """What a study attributes to: queries and keys too, where an estimator was made for them."""
    plain = set(estimators) <= {"first_order", "ig_inputs"}
    return DEFAULT_PARTS if plain else (*DEFAULT_PARTS, *SOFTMAX_PARTS)


def all_parts(model: LensModel) -> tuple[str, ...]:
    """Every part that ``model`` has."""
    return tuple(part for part, (_, name) in NODES.items() if name.format(0) in model.hook_names)


def site_of(component: Component, model: LensModel) -> Site:
    """Where the activation of a component passes; a head without a part is its z.

    Raises:
        HostError: It has none, or its number is out of range.
    """
    part = component.part or {"head": "z", "neuron": "post"}.get(component.kind, "")
    cut, name = NODES.get(part, (None, ""))
    layers = range(model.n_layers) if cut is not None and cut.layered else [None]
    if cut is None or component.layer not in layers or component.kind not in (cut.kind, "node"):
        raise HostError(
            f"{component} is not an activation of a model with {model.n_layers} blocks."
        )
    site = Site(cut, component.layer, name.format(component.layer))
    model.require_hooks([site.hook])
    _require_index(component, model)
    return site


def named_activation(component: Component, site: Site) -> Component:
    """The component under the name of its activation."""
    return component._replace(part=site.part)


def _require_index(component: Component, model: LensModel) -> None:
    counts = {"head": model.n_heads, "kv_head": model.n_kv_heads, "neuron": model.d_mlp}
    count = counts.get(component.kind)
    if count is None:
        if component.index is not None:
            raise HostError(f"{component} is one activation; it has no number {component.index}.")
    elif component.index is None or not 0 <= component.index < count:
        raise HostError(f"{component}: the block has {count} of kind {component.kind}.")


def activations(
    model: LensModel,
    ids: Tensor,
    mask: Tensor,
    names: Sequence[str],
) -> dict[str, Float[Tensor, "batch ..."]]:
    """The activations of ``names``, by the name asked for: hooks go by other names inside."""
    kept: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda activation, hook: kept.__setitem__(name, activation.detach())

    model.require_eval()
    with torch.no_grad(), model.hooks(fwd=[(name, keep(name)) for name in names]):
        model(ids, mask)
    return kept


def wide(values: Tensor) -> Tensor:
    """At least float32: products of bfloat16 are summed there."""
    return values if values.dtype == torch.float64 else values.float()
