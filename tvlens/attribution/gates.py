"""A tuning vector behind gates: one mechanism for estimate, exact patch, graft and dose.

Hooks on a base model add what each difference of weights would add, times a gate:

    heads or neurons on the output of a map    y += gate * (x delta)       one gate an entry's owner
    heads or neurons on its input              y += (gate * x) delta
    norms, embeddings, biases, other maps      likewise, with one gate a tensor

Every prompt has gates of its own. All gates 0 is the base, all 1 the tuned model, s everywhere is
theta(s) = base + s (tuned - base). The weights are never written, so nothing can leave a model
changed, two fine-tunes share one base, and low-rank differences stay in their factors. Then

    d metric / d gate at gates s       first-order score at theta(s); averaged over s, integrated
    metric(gate 1) - metric(gate 0)    exact swing of a component, the other gates at s
    gates 0 or 1                       a graft;  any number: a dose, also beyond 1 or below 0

The swap of weights (``attribution.weights``, ``attribution.exact``) gives the same numbers at
about two thirds of the time where both models are resident; each checks the other. In bfloat16
the sums are made in float32 and only their result is rounded: good for a scan, not for exact
effects, which are refused there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.components import Component
from tvlens.errors import HostError
from tvlens.models.lens import HookList, LensModel
from tvlens.models.metrics import Metric, refuse_vanishing_gradient
from tvlens.models.pair import HookedPair
from tvlens.models.prompts import Batch
from tvlens.models.reading import Reading
from tvlens.models.replay import Replay, replay
from tvlens.weights.delta import Absent, Delta, Dense, Dora, LowRank
from tvlens.weights.vector import TuningVector

from .exact import first_block
from .sites import LINEAR, Site, gate_count, pieces, weight_sites
from .weights import (
    COMPLETE,
    At,
    Estimator,
    Rows,
    WeightScores,
    by_component,
    chunks,
    embedding_scale,
    gauss_legendre,
    method_name,
    node_counts,
    normalised,
)

Key = tuple[str, str]
"""A site's name and ``weight`` or ``bias``."""
Gates = dict[Key, Float[Tensor, "row index"]]
"""The gates of every tensor: a row for each prompt, an index for each head or neuron."""
ROW_TOKENS = 128
"""Tokens up to which several patches share one pass: past it a CPU gains nothing."""


@dataclass(frozen=True)
class GatedModel:
    """A base model with a tuning vector that gates let in.

    A DoRA difference has no low rank and is written out here.

    Attributes:
        lens: The base model; its weights are read, never written.
        sites: Where it has weights.
        deltas: The difference of every tensor in canonical orientation: x @ delta.
    """

    lens: LensModel
    sites: list[Site]
    deltas: dict[Key, Delta] = field(repr=False)

    @classmethod
    def of_pair(cls, hooked: HookedPair) -> "GatedModel":
        """Both models are resident; the differences take as much memory as one of them.

        Raises:
            HostError: The models' sites differ.
        """
        sites, others = weight_sites(hooked.base), weight_sites(hooked.tuned)
        if [(s.name, s.tensors) for s in sites] != [(o.name, o.tensors) for o in others]:
            raise HostError("base and tuned have weights at different places.")
        deltas: dict[Key, Delta] = {}
        for site, other in zip(sites, others, strict=True):
            for tensor in site.tensors:
                tuned, base = (x.parameter(tensor).data.float() for x in (other, site))
                deltas[site.name, tensor] = Dense(site.canonical(tensor, tuned - base))
        return cls(hooked.base, sites, deltas)

    @classmethod
    def of_vector(cls, lens: LensModel, vector: TuningVector) -> "GatedModel":
        """The base alone, with a tuning vector that was read from files: no second model.

        Raises:
            HostError: The vector has components that this model lacks, or other shapes.
        """
        sites = weight_sites(lens)
        left = set(vector)
        deltas: dict[Key, Delta] = {}
        for site in sites:
            for tensor in site.tensors:
                component = site.component(tensor)
                found = _plain(_difference(vector, component))
                shape = tuple(site.canonical(tensor, site.parameter(tensor).data).shape)
                deltas[site.name, tensor] = Absent(shape) if found is None else found
                left.discard(component)
                if deltas[site.name, tensor].shape != shape:
                    raise HostError(
                        f"the vector's {component} is {deltas[site.name, tensor].shape}, the "
                        f"model's {shape}.",
                        hint="The vector belongs to another base.",
                    )
        if left:
            raise HostError(f"the model has no weights for {min(map(str, left))}.")
        return cls(lens, sites, {key: _on(delta, lens.device) for key, delta in deltas.items()})

    def gates(self, rows: int, value: float = 0.0) -> Gates:
        """Gates that all have one value."""
        return {
            (site.name, tensor): torch.full(
                (rows, gate_count(site, tensor, self.lens)), value, device=self.lens.device
            )
            for site in self.sites
            for tensor in site.tensors
        }

    def set(
        self, gates: Gates, component: Component, value: float, rows: slice = slice(None)
    ) -> None:
        """Give the gates of one component a value, in place.

        Raises:
            HostError: The model has no weights under that key.
        """
        for piece in pieces(component, self.lens, self.sites):
            gate = gates[piece.site, piece.tensor]
            if piece.axis is None:
                gate[rows] = value
            else:
                gate[rows, piece.start // piece.length] = value

    def hooks(self, gates: Gates, reading: Reading) -> HookList:
        """Forward hooks for the prompts of ``reading``, repeated as often as gates have rows."""
        copies = len(next(iter(gates.values()))) // max(1, len(reading.batch))
        ids, positions = (x.repeat(copies, 1) for x in (reading.batch.ids, reading.positions))
        return self.hooks_at(gates, ids, positions)

    def hooks_at(
        self, gates: Gates, ids: Int[Tensor, "row pos"], positions: Int[Tensor, "row read"]
    ) -> HookList:
        """Forward hooks for a pass over ``ids`` whose logits are made at ``positions``."""
        return _Adder(self, gates, ids, positions).hooks()

    def logits(self, gates: Gates, reading: Reading) -> Float[Tensor, "batch read d_vocab"]:
        """What ``reading`` reads of the model with its gates set so."""
        with self.lens.hooks(fwd=self.hooks(gates, reading)):
            return reading.logits(self.lens)

    def values(self, gates: Gates, reading: Reading) -> Float[Tensor, " batch"]:
        """The metric of every prompt with the gates set so."""
        with torch.no_grad():
            return reading.value(self.logits(gates, reading))

    def reading(self, metric: Metric, batch: Batch) -> Reading:
        """``metric`` on ``batch``; where it compares with the tuned model, that is all gates 1."""
        plain = Reading.of(metric, batch)
        if metric.reference is None:
            return plain
        end = 1.0 if metric.reference == "tuned" else 0.0
        with torch.no_grad():
            logits = self.logits(self.gates(len(batch), end), plain)
            logits, _ = plain.beside.parted(logits)
        return replace(plain, reference=logits)


def gated_weight_scores(
    gated: GatedModel,
    batch: Batch,
    metric: Metric,
    *,
    estimator: Estimator = "ig",
    at: At = "path",
    nodes: int | None = None,
) -> WeightScores:
    """The scores of ``attribution.weights.weight_scores``, by derivatives of gates.

    ``nodes`` fixes the quadrature, as it must below float32, where rounding leaves a gap that no
    number of nodes closes. ``by_token`` is not made here and is zero.
    """
    method = method_name(estimator, at)
    refuse_vanishing_gradient(metric, at)
    parts = [gated.reading(metric, part) for part in chunks(batch, gated.lens.d_vocab)]
    ends = [
        torch.cat([gated.values(gated.gates(len(p.batch), end), p) for p in parts])
        for end in (0.0, 1.0)
    ]
    change = (ends[1] - ends[0]).cpu().double()
    with gated.lens.frozen():
        for count in node_counts(estimator, nodes):
            rule = gauss_legendre(count) if at == "path" else [(float(at == "tuned"), 1.0)]
            found = [_averaged(gated, part, rule) for part in parts]
            rows = {key: torch.cat([part[key] for part in found]) for key in found[0]}
            components, values = by_component(gated.sites, gated.lens, rows)
            scores = WeightScores(
                method, components, values, change, count, torch.zeros(batch.ids.shape)
            )
            if scores.completeness <= COMPLETE:
                break
    return scores


def _averaged(gated: GatedModel, reading: Reading, rule: list[tuple[float, float]]) -> Rows:
    total: Rows = {}
    for s, weight in rule:
        for key, gradient in gate_gradients(gated, reading, s).items():
            total[key] = total.get(key, 0.0) + weight * gradient.cpu().double()
    return total


def gate_gradients(gated: GatedModel, reading: Reading, s: float) -> Rows:
    """d metric / d gate of every prompt's gates, all gates at ``s``; parameters must be frozen."""
    gates = gated.gates(len(reading.batch), s)
    for gate in gates.values():
        gate.requires_grad_(True)
    with torch.enable_grad():
        total = reading.value(gated.logits(gates, reading)).sum()
        gradients = torch.autograd.grad(total, list(gates.values()), materialize_grads=True)
    return dict(zip(gates, gradients, strict=True))


def gated_swings(
    gated: GatedModel,
    batch: Batch,
    metric: Metric,
    components: Sequence[Component],
    *,
    s: float,
) -> Float[Tensor, "component prompt"]:
    """metric(component's gates 1) - metric(its gates 0), all other gates at ``s``; float64.

    Small batches share a pass: each patch is a group of rows with gates of its own.

    Raises:
        HostError: The model runs below float32, where rounding exceeds the effect of a head.
    """
    if gated.lens.dtype not in (torch.float32, torch.float64):
        raise HostError(
            f"exact patching needs float32, the model is {gated.lens.dtype}.",
            hint="Load the model with dtype=torch.float32.",
        )
    gated.lens.require_eval()
    parts = [
        _Swings(gated, gated.reading(metric, part), s).of(components)
        for part in chunks(batch, gated.lens.d_vocab)
    ]
    return torch.cat(parts, dim=1)


class _Swings:
    """Patches of one chunk of prompts, each from its own block on."""

    def __init__(self, gated: GatedModel, reading: Reading, s: float) -> None:
        self.gated, self.reading, self.s = gated, reading, s
        self.size = len(reading.batch)

    def of(self, components: Sequence[Component]) -> Float[Tensor, "component prompt"]:
        """The swings in the order of ``components``."""
        starts = [self._start(component) for component in components]
        depth = [-1 if start is None else start for start in starts]
        order = sorted(range(len(starts)), key=depth.__getitem__)
        groups = max(1, ROW_TOKENS // max(1, 2 * self.reading.batch.ids.numel()))
        swings = torch.zeros(len(components), self.size, dtype=torch.float64)
        with torch.no_grad():
            begun = self._begun(groups, {start for start in starts if start is not None})
            for place in range(0, len(order), groups):
                chosen = order[place : place + groups]
                asked = [components[i] for i in chosen]
                swings[chosen] = self._group(begun, asked, starts[chosen[0]], groups)
        return swings

    def _start(self, component: Component) -> int | None:
        parts = pieces(component, self.gated.lens, self.gated.sites)
        return first_block(parts, self.gated.sites, self.gated.lens)

    def _begun(self, groups: int, layers: set[int]) -> Replay:
        """The pass with all gates at ``s``, recorded for two copies of the prompts a patch."""
        ids, mask, positions = (
            repeat(rows, "batch pos -> (copy batch) pos", copy=2 * groups)
            for rows in (self.reading.batch.ids, self.reading.batch.mask, self.reading.positions)
        )
        gates = self.gated.gates(len(ids), self.s)
        with self.gated.lens.hooks(fwd=self.gated.hooks(gates, self.reading)):
            begun = replay(self.gated.lens, ids, mask, positions, self.reading.beside)
            begun.record(layers)
        return begun

    def _group(
        self, begun: Replay, asked: Sequence[Component], start: int | None, groups: int
    ) -> Float[Tensor, "component prompt"]:
        gates = self.gated.gates(2 * groups * self.size, self.s)
        for place, component in enumerate(asked):
            for end in (0, 1):
                first = (2 * place + end) * self.size
                self.gated.set(gates, component, float(end), slice(first, first + self.size))
        with self.gated.lens.hooks(fwd=self.gated.hooks(gates, self.reading)):
            logits = begun.logits(start)
        split = rearrange(
            logits, "(group end batch) read vocab -> group end batch read vocab", end=2,
            batch=self.size,
        )  # fmt: skip
        values = [[self.reading.value(one).cpu().double() for one in pair] for pair in split]
        return torch.stack([high - low for low, high in values[: len(asked)]])


class _Adder:
    """The forward hooks of one pass: inputs are kept, gated outputs added."""

    def __init__(self, gated: GatedModel, gates: Gates, ids: Tensor, positions: Tensor) -> None:
        self.gated, self.gates = gated, gates
        self.inputs: dict[str, Tensor] = {}
        self.ids, self.positions = (x.to(gated.lens.device) for x in (ids, positions))

    def hooks(self) -> HookList:
        """Hooks at every site whose difference is not absent."""
        found: list[tuple[str, Callable[..., Any]]] = []
        for site in self.gated.sites:
            if all(isinstance(self.gated.deltas[site.name, t], Absent) for t in site.tensors):
                continue
            if site.role == "embed":
                found.append(("hook_embed", partial(self._embedded, site)))
                continue
            found.append((f"{site.name}.hook_in", partial(self._keep, site)))
            found.append((f"{site.name}.hook_out", partial(self._added, site)))
        return found

    def _keep(self, site: Site, activation: Tensor, hook: Any) -> None:
        self.inputs[site.name] = activation

    def _embedded(self, site: Site, activation: Tensor, hook: Any) -> Tensor:
        scale = embedding_scale(activation.detach(), site, self.ids)
        table = _written(self.gated.deltas[site.name, "weight"])
        gate = rearrange(self.gates[site.name, "weight"], "row 1 -> row 1 1")
        return _sum(activation, gate * scale * table[self.ids])

    def _added(self, site: Site, activation: Tensor, hook: Any) -> Tensor:
        moved = {"unembed": self._unembedded, "pos_embed": self._placed}
        moved |= dict.fromkeys(LINEAR, self._linear)
        share = moved.get(site.role, self._normed)
        return _sum(activation, share(site, self.inputs.pop(site.name), activation))

    def _linear(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        flat = rearrange(x, "row pos ... -> row pos (...)").float()
        gate, delta = self.gates[site.name, "weight"], self.gated.deltas[site.name, "weight"]
        if LINEAR[site.role].side == "in":
            moved = _applied(_by_index(gate, flat), delta)
        else:
            moved = _by_index(gate, _applied(flat, delta))
        return self._with_bias(site, moved).reshape(y.shape)

    def _with_bias(self, site: Site, moved: Tensor) -> Tensor:
        if "bias" not in site.tensors:
            return moved
        bias = _written(self.gated.deltas[site.name, "bias"])
        return moved + _by_index(self.gates[site.name, "bias"], bias.expand(moved.shape))

    def _normed(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """Gains and biases have one gate each; a norm within each head has an axis more."""
        x = normalised(x.float(), self.gated.lens.host.norm(site.name))
        inputs = {"weight": x, "bias": torch.ones_like(x)}
        shape = (len(x), *[1] * (x.ndim - 1))
        return torch.stack(
            [
                self.gates[site.name, tensor].reshape(shape)
                * inputs[tensor]
                * _written(self.gated.deltas[site.name, tensor])
                for tensor in site.tensors
            ]
        ).sum(0)

    def _placed(self, site: Site, positions: Tensor, y: Tensor) -> Tensor:
        table = _written(self.gated.deltas[site.name, "weight"])
        gate = rearrange(self.gates[site.name, "weight"], "row 1 -> row 1 1")
        return gate * table[positions.expand(len(self.ids), -1)]

    def _unembedded(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """At the positions whose logits are made; the input may have been cut to them or not."""
        if x.shape[1] != y.shape[1]:
            rows = rearrange(torch.arange(len(x), device=x.device), "row -> row 1")
            x = x[rows, self.positions]
        moved = _applied(x.float(), self.gated.deltas[site.name, "weight"])
        return self._with_bias(site, _by_index(self.gates[site.name, "weight"], moved))


def _sum(activation: Tensor, moved: Tensor) -> Tensor:
    """Added in float32 at least, then rounded once to what the model runs in."""
    return (activation + moved).to(activation.dtype)


def _by_index(gate: Float[Tensor, "row index"], x: Float[Tensor, "row pos width"]) -> Tensor:
    """Every head's or neuron's entries times its gate."""
    wide = repeat(gate, "row index -> row 1 (index width)", width=x.shape[-1] // gate.shape[1])
    return wide * x


def _applied(x: Float[Tensor, "row pos d_in"], delta: Delta) -> Float[Tensor, "row pos d_out"]:
    match delta:
        case Dense():
            return einsum(x, delta.tensor, "row pos d_in, d_in d_out -> row pos d_out")
        case LowRank():
            low = einsum(x, delta.left, "row pos d_in, d_in rank -> row pos rank")
            return einsum(low, delta.right, "row pos rank, rank d_out -> row pos d_out")
        case Dora():
            return _applied(x, Dense(delta.dense()))
        case Absent():
            return x.new_zeros(*x.shape[:-1], delta.shape[-1])


def _written(delta: Delta) -> Tensor:
    return delta.dense()


def _plain(delta: Delta | None) -> Delta | None:
    return Dense(delta.dense()) if isinstance(delta, Dora) else delta


def _on(delta: Delta, device: torch.device) -> Delta:
    match delta:
        case Dora():
            return _on(Dense(delta.dense()), device)
        case Dense():
            return Dense(delta.tensor.to(device))
        case LowRank():
            return LowRank(delta.left.to(device), delta.right.to(device))
        case Absent():
            return delta


def _difference(vector: TuningVector, component: Component) -> Delta | None:
    """The vector's difference; a tied unembedding reads the embedding's."""
    if component in vector:
        return vector[component]
    if component.part != "W_U":
        return None
    embedding = vector.get(component._replace(part="W_E"))
    match embedding:
        case Dense():
            return Dense(embedding.tensor.mT)
        case LowRank():
            return LowRank(embedding.right.mT, embedding.left.mT)
        case Dora():
            return Dense(embedding.dense().mT)
        case Absent():
            return Absent(embedding.shape[::-1])
        case _:
            return None
