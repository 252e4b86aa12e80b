"""Where a hooked pair's weights live, and the base model at other weights.

A *site* is a place of the host that has weights: a linear map, a norm, an embedding. A component
(a head, a neuron, a matrix) is a set of slices of sites. ``WeightPath`` writes

    theta(s) = (1 - s) base + s tuned

into the modules that the host really reads (so GPT-2's views of a fused tensor and GPT-NeoX's
copies are right), or one component's slices alone, and puts every bit back when it is left.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tvlens.components import Component, Kind
from tvlens.errors import HostError
from tvlens.models.hosts import Kept
from tvlens.models.lens import LensModel
from tvlens.models.pair import HookedPair

End = Literal["base", "tuned"]


class LinearCut(NamedTuple):
    """How heads or neurons cut a linear map.

    Attributes:
        weight: The part's name in the key.
        bias: The bias's name in the key.
        side: The side of the map whose entries belong to one head or neuron.
        kind: What those entries make up.
    """

    weight: str
    bias: str
    side: Literal["in", "out"]
    kind: Kind


LINEAR = {
    "attn.q": LinearCut("W_Q", "b_Q", "out", "head"),
    "attn.k": LinearCut("W_K", "b_K", "out", "kv_head"),
    "attn.v": LinearCut("W_V", "b_V", "out", "kv_head"),
    "attn.o": LinearCut("W_O", "b_O", "in", "head"),
    "mlp.gate": LinearCut("W_gate", "b_gate", "out", "neuron"),
    "mlp.in": LinearCut("W_in", "b_in", "out", "neuron"),
    "mlp.out": LinearCut("W_out", "b_out", "in", "neuron"),
}
IN_BLOCK = (
    "ln1",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.q_norm",
    "attn.k_norm",
    "attn.o",
    "ln1_post",
    "ln2",
    "mlp.gate",
    "mlp.in",
    "mlp.out",
    "ln2_post",
)
"""Roles within a block, in the order of the forward pass; what is no linear map is a norm."""
EMBEDDINGS = {"embed": ("W_E", "b_E"), "pos_embed": ("W_pos", "b_pos"), "unembed": ("W_U", "b_U")}


@dataclass(frozen=True)
class Site:
    """A place of the host that has weights.

    Attributes:
        name: The name that its hook names start with.
        layer: Block number, None outside the blocks.
        role: Name within the block: a key of ``LINEAR`` or ``EMBEDDINGS``, or a norm's name.
        kept: The parameters that the forward pass reads, by ``weight`` and ``bias``.
    """

    name: str
    layer: int | None
    role: str
    kept: Mapping[str, Kept] = field(repr=False, compare=False)

    @property
    def tensors(self) -> list[str]:
        """``weight`` and ``bias``, as far as it has them."""
        return list(self.kept)

    @property
    def module(self) -> nn.Module:
        """The module that owns the weight."""
        return self.kept["weight"].module

    def parameter(self, tensor: str) -> nn.Parameter:
        """The parameter that the forward pass reads under ``weight`` or ``bias``.

        Raises:
            HostError: There is none.
        """
        if tensor not in self.kept:
            raise HostError(f"{self.name} has no {tensor}.")
        return self.kept[tensor].parameter

    def canonical(self, tensor: str, stored: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Maps as x @ W; embeddings [token, d_model], gains and biases flat."""
        return self.kept[tensor].canonical(stored)

    def component(self, tensor: str) -> Component:
        """The component of a disjoint kind that one of ``tensors`` is."""
        if self.role in LINEAR:
            cut = LINEAR[self.role]
            kind, part = ("matrix", cut.weight) if tensor == "weight" else ("bias", cut.bias)
        elif self.role in EMBEDDINGS:
            kind = "embedding" if tensor == "weight" else "bias"
            part = EMBEDDINGS[self.role][tensor == "bias"]
        else:
            kind = "norm" if tensor == "weight" else "bias"
            part = f"{self.role.removeprefix('attn.')}.{tensor[0]}"
        return Component(kind, self.layer, None, part)

    def cut_axis(self, tensor: str) -> int | None:
        """The stored tensor's axis that heads or neurons divide, None where they do not."""
        return self.kept[tensor].axis_of(LINEAR[self.role].side) if self.role in LINEAR else None


def weight_sites(lens: LensModel) -> list[Site]:
    """The sites of ``lens`` in the order of its forward pass.

    Raises:
        HostError: Its weights were folded or centred, so they are not those of a checkpoint.
    """
    lens.host.require_raw()
    names = [("embed", None, "embed"), ("pos_embed", None, "pos_embed")]
    for layer in range(lens.n_layers):
        names += [(f"blocks.{layer}.{role}", layer, role) for role in IN_BLOCK]
    names += [("ln_final", None, "ln_final"), ("unembed", None, "unembed")]
    found = [Site(name, layer, role, lens.host.kept(name)) for name, layer, role in names]
    return [site for site in found if site.kept]


def ties_embeddings(lens: LensModel) -> bool:
    """Whether the unembedding is the very parameter of the embedding."""
    ends = [site for site in weight_sites(lens) if site.role in ("embed", "unembed")]
    return len({id(site.parameter("weight")) for site in ends}) < len(ends)


class Piece(NamedTuple):
    """A slice of one site's weight or bias; ``axis`` None means the whole tensor."""

    site: str
    tensor: str
    axis: int | None = None
    start: int = 0
    length: int = 0

    def of(self, whole: Tensor) -> Tensor:
        """The view of ``whole`` that this piece is."""
        return whole if self.axis is None else whole.narrow(self.axis, self.start, self.length)


def pieces(component: Component, lens: LensModel, sites: Iterable[Site]) -> list[Piece]:
    """The slices that make up ``component``.

    Raises:
        HostError: The model has no weights under that key.
    """
    if component.kind == "kv_group":
        found = [p for part in _group(component, lens) for p in pieces(part, lens, sites)]
    elif component.index is None:
        found = [Piece(s.name, t) for s in sites for t in s.tensors if s.component(t) == component]
    elif component.index in range(counts(lens).get(component.kind, 0)):
        found = [
            _piece(site, tensor, axis, component.index, lens)
            for site in sites
            if site.layer == component.layer and _fine_kind(site) == component.kind
            for tensor in site.tensors
            if (axis := site.cut_axis(tensor)) is not None
        ]
    else:
        found = []
    if not found:
        raise HostError(f"the model has no weights for {component}.")
    return found


def _piece(site: Site, tensor: str, axis: int, index: int, lens: LensModel) -> Piece:
    width = site.parameter(tensor).shape[axis] // gate_count(site, tensor, lens)
    return Piece(site.name, tensor, axis, index * width, width)


def counts(lens: LensModel) -> dict[Kind, int]:
    """Heads, kv heads and neurons of a block."""
    return {"head": lens.n_heads, "kv_head": lens.n_kv_heads, "neuron": lens.d_mlp}


def gate_count(site: Site, tensor: str, lens: LensModel) -> int:
    """Heads or neurons that cut a tensor of ``site``; 1 where it is not cut."""
    kind = _fine_kind(site)
    if kind is None or site.cut_axis(tensor) is None:
        return 1
    return {str(name): count for name, count in counts(lens).items()}[kind]


def _fine_kind(site: Site) -> str | None:
    return LINEAR[site.role].kind if site.role in LINEAR else None


def _group(component: Component, lens: LensModel) -> list[Component]:
    share = lens.n_heads // lens.n_kv_heads
    first = (component.index or 0) * share
    heads = [Component("head", component.layer, first + i) for i in range(share)]
    return [Component("kv_head", component.layer, component.index), *heads]


Weights = dict[tuple[str, str], Tensor]


@dataclass(frozen=True)
class WeightPath:
    """The base model of a pair, movable along the line from base to tuned.

    Attributes:
        lens: The base model, whose weights are written in place.
        sites: Its sites.
        base: A copy of the base's tensors by (site, ``weight`` or ``bias``); 1 x parameters.
        tuned: The tuned model's own tensors, not copied.
    """

    lens: LensModel
    sites: list[Site]
    base: Weights
    tuned: Weights

    def delta(self, site: Site, tensor: str) -> Tensor:
        """Tuned minus base of one tensor, as stored; made on request so that none is kept."""
        return self.tuned[site.name, tensor] - self.base[site.name, tensor]

    def rows_delta(self, site: Site, rows: Int[Tensor, "batch pos"]) -> Tensor:
        """Tuned minus base of the rows of an embedding, [batch, pos, d_model]."""
        key = (site.name, "weight")
        tuned, base = (site.canonical("weight", w[key]) for w in (self.tuned, self.base))
        return tuned[rows] - base[rows]

    def move(self, s: float) -> None:
        """Write theta(s); exact at both ends."""
        for site in self.sites:
            for tensor in site.tensors:
                key, live = (site.name, tensor), site.parameter(tensor).data
                if s in (0.0, 1.0):
                    live.copy_(self.base[key] if s == 0.0 else self.tuned[key])
                else:
                    torch.lerp(self.base[key], self.tuned[key], s, out=live)

    @contextmanager
    def placed(self, parts: list[Piece], end: End) -> Iterator[None]:
        """Give ``parts`` their base or tuned weights for a while; what was there comes back."""
        source = self.base if end == "base" else self.tuned
        sites = {site.name: site for site in self.sites}
        live = [p.of(sites[p.site].parameter(p.tensor).data) for p in parts]
        before = [tensor.clone() for tensor in live]
        try:
            for part, tensor in zip(parts, live, strict=True):
                tensor.copy_(part.of(source[part.site, part.tensor]))
            yield
        finally:
            for tensor, old in zip(live, before, strict=True):
                tensor.copy_(old)


@contextmanager
def weight_path(hooked: HookedPair) -> Iterator[WeightPath]:
    """A path for ``hooked``; on leaving, also by an exception, the base is bit for bit as before.

    Tied embeddings are parted meanwhile, so that reading and writing tokens are two components.

    Raises:
        HostError: The weights are not float32 or float64, or the models' sites differ.
    """
    sites, others = weight_sites(hooked.base), weight_sites(hooked.tuned)
    _check_alike(sites, others)
    tuned = {(o.name, t): o.parameter(t).data for o in others for t in o.tensors}
    with parted(sites):
        live = {(s.name, t): s.parameter(t).data for s in sites for t in s.tensors}
        base = {key: tensor.clone() for key, tensor in live.items()}
        try:
            yield WeightPath(hooked.base, sites, base, tuned)
        finally:
            for key, tensor in live.items():
                tensor.copy_(base[key])


def _check_alike(sites: list[Site], others: list[Site]) -> None:
    shapes, wanted = (
        {(s.name, t): tuple(s.parameter(t).shape) for s in found for t in s.tensors}
        for found in (sites, others)
    )
    for key in shapes.keys() | wanted.keys():
        if shapes.get(key) != wanted.get(key):
            raise HostError(
                f"{'.'.join(key)} has shape {shapes.get(key)} in base and {wanted.get(key)} in "
                "tuned.",
                hint="Attribution to weights needs two models of one architecture.",
            )
    for site in (*sites, *others):
        if (dtype := site.parameter("weight").dtype) not in (torch.float32, torch.float64):
            raise HostError(
                f"weights move in float32 or float64, but {site.name} is {dtype}: a small step "
                "would be rounded away.",
                hint="Load the pair with dtype=torch.float32.",
            )


@contextmanager
def parted(sites: list[Site]) -> Iterator[None]:
    """Tied embeddings have a parameter each for the time of the block."""
    by_role = {site.role: site for site in sites}
    embed, unembed = by_role["embed"], by_role.get("unembed")
    if unembed is None or embed.parameter("weight") is not unembed.parameter("weight"):
        yield
        return
    shared, kept = unembed.parameter("weight"), unembed.kept["weight"]
    apart = nn.Parameter(shared.detach().clone(), requires_grad=False)
    kept.module._parameters[kept.name] = apart
    try:
        yield
    finally:
        kept.module._parameters[kept.name] = shared


def all_components(lens: LensModel, sites: Iterable[Site]) -> list[Component]:
    """Every component with weights: the disjoint kinds, then heads, kv heads and neurons."""
    disjoint = [site.component(tensor) for site in sites for tensor in site.tensors]
    fine = [
        Component(kind, layer, index)
        for kind, count in counts(lens).items()
        for layer in range(lens.n_layers)
        for index in range(count)
    ]
    return disjoint + fine


def live_weights(model: Any) -> dict[Component, Float[Tensor, "..."]]:
    """Views of the tensors that a hooked model's forward pass reads, by component.

    Their entries are in the order of the canonical weight; heads may be an axis of their own, as
    in [d_in, head, d_head].

    Args:
        model: A ``LensModel``, a TransformerBridge or a HookedTransformer.

    Raises:
        HostError: Its weights were folded or centred.
    """
    lens = model if isinstance(model, LensModel) else LensModel.wrap(model)
    return {
        site.component(tensor): site.kept[tensor].in_order(site.parameter(tensor).detach())
        for site in weight_sites(lens)
        for tensor in site.tensors
    }
