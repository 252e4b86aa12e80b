"""Attribution to activations: what a metric would change by if one activation were exchanged.

A run of the *receiver* is patched with activations of the *donor* at the same tokens' places.
The estimate of all patches at once is one backward pass (Nanda 2023; Syed et al. 2023),

    score = (tuned activation - base activation) . d metric / d activation,

summed over positions and the component's width, with the gradient taken on the receiver. The
exact effect patches one component for real. Directions:

- ``tuned_into_base``: receiver base, donor tuned. ``base_into_tuned``: receiver tuned, donor base,
  sign turned. Both answer "how much higher is the metric with the tuned activation".
- ``clean_into_corrupt``: one model, receiver on the corrupt prompt, donor on the prompt itself;
  above 0: the metric is higher with the clean activation. This is the sign of TransformerLens.

Scores of activations say where a difference *passes*, since an activation carries everything
upstream of it. They do not add up to the change of the metric.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.components import Component
from tvlens.errors import HostError, MetricError, PromptError
from tvlens.models.lens import LensModel, leaf
from tvlens.models.metrics import Metric
from tvlens.models.pair import HookedPair
from tvlens.models.prompts import Batch
from tvlens.models.reading import Reading
from tvlens.models.replay import Replay, replay
from tvlens.tables import Table

from .tables import NEURONS_PER_PROMPT, Cut, Direction, MethodRun, attribution_table, sampled_table

ROWS_AT_ONCE = 16
"""Prompts of one forward and backward: memory grows with it, scores do not change."""
_CPU_TOKENS = 128
"""Past this a CPU's forward is bound by arithmetic, and stacking patches gains nothing."""
_ACCELERATOR_TOKENS = 8_192
"""Enough rows to fill an accelerator, few enough for the logits of a large vocabulary."""
NEURONS_AT_RANDOM = 64
"""Neurons outside the largest that get rows per prompt too: an unbiased check against exact."""

HEAD, NEURON = Cut("head", "z"), Cut("neuron", "post")
ATTENTION, MLP = Cut("node", "attn_out"), Cut("node", "mlp_out")
EMBEDDING = Cut("node", "embed", layered=False)
_HOOKS = {
    HEAD: "blocks.{}.attn.hook_z",
    NEURON: "blocks.{}.mlp.hook_post",
    ATTENTION: "blocks.{}.hook_attn_out",
    MLP: "blocks.{}.hook_mlp_out",
    EMBEDDING: "hook_embed",
}
_PRODUCTS = {
    "head": "batch pos head width, batch pos head width -> batch head",
    "neuron": "batch pos neuron, batch pos neuron -> batch neuron",
    "node": "batch pos width, batch pos width -> batch",
}


class Site(NamedTuple):
    """A cut of one layer and the hook where its activation passes."""

    cut: Cut
    layer: int | None
    hook: str


def activation_sites(model: LensModel) -> list[Site]:
    """Every activation that is attributed to: heads, neurons, block outputs, the embedding."""
    return [
        Site(cut, layer if cut.layered else None, name.format(layer))
        for cut, name in _HOOKS.items()
        for layer in range(model.n_layers if cut.layered else 1)
    ]


@dataclass(frozen=True)
class _Patch:
    """Which run is patched with which."""

    receiver: LensModel
    donor: LensModel
    receiver_ids: Int[Tensor, "batch pos"]
    reading: Reading
    sign: int

    @property
    def batch(self) -> Batch:
        """The prompts."""
        return self.reading.batch


def attribute_activations(
    hooked: HookedPair,
    batch: Batch,
    metric: Metric,
    *,
    direction: Direction,
    at: str = "",
    rows_at_once: int = ROWS_AT_ONCE,
    neurons: int | None = NEURONS_PER_PROMPT,
) -> Table:
    """The first-order score of every head, neuron and block output.

    Args:
        hooked: The two models.
        batch: The prompts; clean into corrupt takes those that have a corrupt prompt.
        metric: What is measured.
        direction: Which activation is put where.
        at: The model of ``clean_into_corrupt``, tuned unless said; the other two imply theirs.
        rows_at_once: Prompts of one forward and backward.
        neurons: How many neurons get rows per prompt, None for all.

    Raises:
        PromptError: ``clean_into_corrupt`` without a corrupt prompt.
        HostError: A model lacks a hook, or is in training mode.
        MetricError: The metric does not depend on the logits.
    """
    at, batch = _place(direction, at), _usable(batch, direction)
    parts = [
        _first_order(_patch(hooked, rows, metric, direction, at))
        for rows in batch.chunks(rows_at_once)
    ]
    scores = {cut: torch.cat([part[cut] for part in parts]) for cut in _HOOKS}
    run = _method_run(hooked, batch, metric, direction, at, "first_order")
    return attribution_table(scores, run, neurons=neurons, at_random=NEURONS_AT_RANDOM)


def exact_activations(
    hooked: HookedPair,
    batch: Batch,
    metric: Metric,
    components: Sequence[Component],
    *,
    direction: Direction,
    at: str = "",
    rows_at_once: int = ROWS_AT_ONCE,
) -> Table:
    """What the metric changes by when each component's activation is exchanged, one at a time.

    Same sign and unit as ``attribute_activations``: per prompt, all positions together.

    Raises:
        PromptError: ``clean_into_corrupt`` without a corrupt prompt.
        HostError: A component has no activation here, or the model runs below float32, where
            rounding is larger than the effect of a head.
    """
    at, batch = _place(direction, at), _usable(batch, direction)
    _require_float32(hooked)
    sites = [_site_of(component, hooked.base) for component in components]
    parts = [
        _exact(_patch(hooked, rows, metric, direction, at), components, sites)
        for rows in batch.chunks(rows_at_once)
    ]
    run = _method_run(hooked, batch, metric, direction, at, "exact")
    named = [
        component._replace(part=site.cut.part)
        for component, site in zip(components, sites, strict=True)
    ]
    return sampled_table(named, torch.cat(parts), run)


def _place(direction: Direction, at: str) -> str:
    """The model that is run with gradients."""
    implied = {"tuned_into_base": "base", "base_into_tuned": "tuned"}
    if direction == "clean_into_corrupt":
        place = at or "tuned"
    elif direction in implied:
        place = at or implied[direction]
    else:
        raise HostError(f"there is no direction {direction!r}.")
    if place != implied.get(direction, place) or place not in ("base", "tuned"):
        raise HostError(f"{direction} cannot be taken at {place!r}.")
    return place


def _usable(batch: Batch, direction: Direction) -> Batch:
    if direction != "clean_into_corrupt":
        return batch
    chosen = batch.with_corrupt()
    if len(chosen) == 0:
        raise PromptError(
            "clean_into_corrupt needs prompts with 'corrupt' of the same token length.",
            hint="; ".join(batch.warnings),
        )
    return chosen


def _require_float32(hooked: HookedPair) -> None:
    for model in (hooked.base, hooked.tuned):
        if model.dtype not in (torch.float32, torch.float64):
            raise HostError(
                f"exact patching needs float32, the model is {model.dtype}.",
                hint="Load the pair with dtype=torch.float32.",
            )


def _patch(
    hooked: HookedPair, batch: Batch, metric: Metric, direction: Direction, at: str
) -> _Patch:
    receiver = hooked.base if at == "base" else hooked.tuned
    donor, ids, sign = receiver, batch.ids, 1
    if direction == "clean_into_corrupt":
        ids = batch.corrupted().ids
    elif direction == "tuned_into_base":
        donor = hooked.tuned
    else:
        donor, sign = hooked.base, -1
    return _Patch(receiver, donor, ids, hooked.reading(metric, batch), sign)


def _activations(
    model: LensModel, batch: Batch, names: Sequence[str]
) -> dict[str, Float[Tensor, "batch pos ..."]]:
    """The activations of ``names``, by the name asked for: hooks go by other names inside."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda activation, hook: kept.__setitem__(name, activation.detach())

    model.require_eval()
    with torch.no_grad(), model.hooks(fwd=[(name, keep(name)) for name in names]):
        model(batch.ids, batch.mask)
    return kept


@dataclass
class _Products:
    """Hooks that turn gradients into scores as they arrive, so that neither is kept.

    Attributes:
        difference: The donor's activations; minus the receiver's once the forward has passed.
        mask: Real tokens.
        start: The embedding's output, where the graph of a frozen model starts.
        scores: [batch, index] of every site, filled in the backward.
    """

    difference: dict[str, Tensor]
    mask: Int[Tensor, "batch pos"]
    start: list[Tensor] = field(default_factory=list)
    scores: dict[str, Tensor] = field(default_factory=dict)

    def subtract(self, site: Site) -> Callable[..., None]:
        """A forward hook."""

        def hook_function(activation: Tensor, hook: object) -> None:
            donor = _wide(self.difference[site.hook])
            mask = self.mask.reshape(*self.mask.shape, *[1] * (donor.ndim - 2))
            self.difference[site.hook] = (donor - _wide(activation.detach())) * mask

        return hook_function

    def begin(self, activation: Tensor, hook: object) -> Tensor:
        """The forward hook of the embedding, whose gradient needs no backward hook."""
        self.start.append(leaf(activation, hook))
        return self.start[0]

    def multiply(self, site: Site) -> Callable[..., None]:
        """A backward hook."""

        def hook_function(gradient: Tensor, hook: object) -> None:
            difference = self.difference.pop(site.hook)
            score = einsum(difference, _wide(gradient), _PRODUCTS[site.cut.kind])
            self.scores[site.hook] = score.reshape(len(score), -1)

        return hook_function


def _first_order(patch: _Patch) -> dict[Cut, Float[Tensor, "batch layer index"]]:
    """One forward of the donor, one forward and backward of the receiver."""
    model, batch, sites = patch.receiver, patch.batch, activation_sites(patch.receiver)
    names = [site.hook for site in sites]
    products = _Products(_activations(patch.donor, batch, names), batch.mask.to(model.device))
    embedding = next(site for site in sites if site.cut == EMBEDDING)
    forward = [
        *((site.hook, products.subtract(site)) for site in sites),
        (embedding.hook, products.begin),
    ]
    backward = [(site.hook, products.multiply(site)) for site in sites if site != embedding]
    with model.frozen(), torch.enable_grad(), model.hooks(fwd=forward, bwd=backward):
        values = patch.reading.value(patch.reading.logits(model, patch.receiver_ids))
        if not values.requires_grad:
            raise MetricError(
                f"{patch.reading.metric.name} does not depend on the logits differentiably."
            )
        values.sum().backward()
    if (gradient := products.start[0].grad) is not None:
        products.multiply(embedding)(gradient, None)
    if silent := [name for name in names if name not in products.scores]:
        raise HostError(f"no gradient reached {silent[0]!r}.")
    return {
        cut: patch.sign * _by_layer(products.scores, [s for s in sites if s.cut == cut])
        for cut in _HOOKS
    }


def _wide(values: Tensor) -> Tensor:
    """At least float32: products of bfloat16 are summed there."""
    return values if values.dtype == torch.float64 else values.float()


def _by_layer(scores: dict[str, Tensor], sites: list[Site]) -> Float[Tensor, "batch layer index"]:
    return torch.stack([scores[site.hook] for site in sites], dim=1)


def _site_of(component: Component, model: LensModel) -> Site:
    """Where the activation of a component passes.

    Raises:
        HostError: It has none, or its number is out of range.
    """
    for site in activation_sites(model):
        kind, part, _ = site.cut
        part_agrees = component.part == part or (component.part is None and kind != "node")
        if kind == component.kind and part_agrees and site.layer == component.layer:
            _require_index(component, model)
            return site
    raise HostError(f"{component} is not an activation of a model with {model.n_layers} blocks.")


def _require_index(component: Component, model: LensModel) -> None:
    count = {"head": model.n_heads, "neuron": model.d_mlp}.get(component.kind)
    if count is not None and (component.index is None or not 0 <= component.index < count):
        raise HostError(f"{component}: the block has {count} of kind {component.kind}.")


def _exact(
    patch: _Patch, components: Sequence[Component], sites: Sequence[Site]
) -> Float[Tensor, "batch component"]:
    """The exact scores: each forward begins at the first block that is patched.

    Where that is faster, several components are row groups of one forward, neighbours in depth
    together; the unpatched run then has as many copies, so that the rounding of a layout cancels.
    """
    batch = patch.batch
    donated = _activations(patch.donor, batch, sorted({site.hook for site in sites}))
    groups = max(1, min(_groups(patch.receiver, batch), len(components)))
    order = sorted(range(len(sites)), key=lambda i: _depth(sites[i]))
    patch.receiver.require_eval()
    begun = _repeated(patch, groups)
    layers = {site.layer for site in sites if site.layer is not None}
    plain = _group_values(patch, begun.record(layers), groups)
    scores = plain.new_zeros(len(components), len(batch))
    for start in range(0, len(order), groups):
        chosen = order[start : start + groups]
        hooks = list(_exchanges([(components[i], sites[i]) for i in chosen], donated, batch))
        with torch.no_grad(), patch.receiver.hooks(fwd=hooks):
            patched = _group_values(patch, begun.logits(sites[chosen[0]].layer), groups)
        scores[chosen] = (patched - plain)[: len(chosen)]
    return patch.sign * rearrange(scores, "component batch -> batch component")


def _groups(model: LensModel, batch: Batch) -> int:
    tokens = _CPU_TOKENS if model.device.type == "cpu" else _ACCELERATOR_TOKENS
    return max(1, tokens // max(1, batch.ids.numel()))


def _depth(site: Site) -> int:
    return -1 if site.layer is None else site.layer


def _repeated(patch: _Patch, groups: int) -> Replay:
    """The receiver's pass over ``groups`` copies of the batch."""
    ids, mask, positions = (
        repeat(rows, "batch pos -> (group batch) pos", group=groups)
        for rows in (patch.receiver_ids, patch.batch.mask, patch.reading.positions)
    )
    return replay(patch.receiver, ids, mask, positions)


def _group_values(
    patch: _Patch, logits: Float[Tensor, "rows read d_vocab"], groups: int
) -> Float[Tensor, "group batch"]:
    """The metric of every copy of the batch."""
    split = rearrange(logits, "(group batch) pos vocab -> group batch pos vocab", group=groups)
    return torch.stack([patch.reading.value(one) for one in split])


def _exchanges(
    chosen: Sequence[tuple[Component, Site]], donated: dict[str, Tensor], batch: Batch
) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """A forward hook for every row group: its component's activation is the donor's."""
    for group, (component, site) in enumerate(chosen):
        rows = slice(group * len(batch), (group + 1) * len(batch))
        place = (
            (rows, slice(None)) if component.index is None else (rows, slice(None), component.index)
        )
        new = donated[site.hook]
        new = new if component.index is None else new[:, :, component.index]
        yield site.hook, _exchange(place, new, batch.mask)


def _exchange(place: tuple, new: Tensor, mask: Tensor) -> Callable[..., Tensor]:
    real = mask.bool().to(new.device)
    real = real if new.ndim == 2 else real[:, :, None]

    def hook_function(activation: Tensor, hook: object) -> Tensor:
        patched = activation.clone()
        patched[place] = torch.where(real, new.to(activation.dtype), activation[place])
        return patched

    return hook_function


def _method_run(
    hooked: HookedPair, batch: Batch, metric: Metric, direction: Direction, at: str, estimator: str
) -> MethodRun:
    within = "activation" if direction == "clean_into_corrupt" else "cross_model"
    method = "exact_activation" if estimator == "exact" else f"{within}_{estimator}"
    return MethodRun(
        method=method,
        space="activation",
        estimator=estimator,
        direction=direction,
        at=at,
        metric=metric.name,
        unit=metric.unit,
        base=hooked.base_name,
        tuned=hooked.tuned_name,
        prompts=batch.numbers,
        n_tokens=batch.lengths.tolist(),
        heads_per_kv=hooked.base.n_heads // hooked.base.n_kv_heads,
    )
