"""Attribution to weights: how much of a behaviour's change each component's delta carries.

For a component c with base weights W and delta D, and theta(s) = base + s (tuned - base),

    score_c(s) = < d metric / d W_c at theta(s), D_c >          first order: s = 0 or s = 1
    score_c    = integral over s in [0, 1] of score_c(s)        integrated gradients

in the metric's units; a score above 0 means that the metric is higher because c is tuned. By the
fundamental theorem the integrated scores of the disjoint kinds sum to metric(tuned) -
metric(base) for every prompt [1]; ``gap`` is what the quadrature leaves. First order at base
estimates inserting c alone into the base, at tuned removing c alone from the tuned model; the
integral is the average effect of c while everything else has moved equally far.

No gradient of a parameter is ever formed. At a linear map y = x W the score is
sum over positions of g . (x D), with g the gradient at y, so hooks on x and y suffice; the terms
of that sum by entry of y (or of x, for W_O and W_out) are the scores of heads and neurons.
Prompts are independent rows, so one backward of the summed metric serves all of them. Beside
the two models this holds one copy of the base's weights and, while a site is scored, its delta.

[1] Sundararajan, Taly and Yan 2017, https://arxiv.org/abs/1703.01365
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor, nn

from tvlens.components import DISJOINT_KINDS, Component, Kind
from tvlens.errors import HostError
from tvlens.models.hosts import Norm
from tvlens.models.lens import HookList, LensModel, leaf
from tvlens.models.metrics import Metric, refuse_vanishing_gradient
from tvlens.models.pair import HookedPair
from tvlens.models.prompts import Batch
from tvlens.models.reading import Reading
from tvlens.tables import Table, concatenated

from .sites import (
    LINEAR,
    Site,
    WeightPath,
    counts,
    gate_count,
    ties_embeddings,
    weight_path,
)
from .tables import (
    NEURONS_PER_PROMPT,
    Cut,
    Direction,
    MethodRun,
    attribution_table,
    sampled_table,
)

Estimator = Literal["ig", "first_order"]
At = Literal["base", "tuned", "path"]

NODE_COUNTS = (8, 12, 16, 24)
"""Gauss-Legendre nodes tried in turn; they do not nest."""
COMPLETE = 0.002
"""Relative gap at which more nodes are not worth their passes."""
INCOMPLETE = 0.1
"""Relative gap above which scores are marked ``incomplete``."""
NOISE = 1e-4
"""Metric units; an fp32 metric moves by 2e-5 to 4e-5 with the layout of the batch."""
LOGITS_AT_ONCE = 2**26
"""Logits of one chunk of prompts (256 MB in fp32, held a few times over)."""
TOKENS_AT_ONCE = 4096
"""Tokens of one chunk of prompts: bounds the activations that the backward pass keeps."""

NEURONS_AT_RANDOM = 64
"""Neurons outside the top that get rows per prompt too, for an unbiased check against exact."""

METHODS: dict[str, tuple[str, Direction, At]] = {
    "weight_first_order_base": ("first_order", "tuned_into_base", "base"),
    "weight_first_order_tuned": ("first_order", "base_into_tuned", "tuned"),
    "weight_ig": ("ig", "tuned_into_base", "path"),
    "exact_weight_insert": ("exact", "tuned_into_base", "base"),
    "exact_weight_remove": ("exact", "base_into_tuned", "tuned"),
    "exact_weight_path": ("exact", "tuned_into_base", "path"),
}
"""Estimator, direction and place of every method label in weight space."""

WEIGHT_ESTIMATES: tuple[tuple[Estimator, At], ...] = (
    ("first_order", "base"),
    ("first_order", "tuned"),
    ("ig", "path"),
)
"""What a study estimates."""
TOKENS = ("", "tokens")
"""Where ``Rows`` keeps the sum over all sites, by position."""
Rows = dict[tuple[str, str], Float[Tensor, "_ _"]]
"""Scores [prompt, index] by (site, ``weight`` or ``bias``): one for each head or neuron that cuts
the tensor, one in all where none does."""


@dataclass(frozen=True)
class WeightScores:
    """Scores of every component on every prompt.

    Attributes:
        method: The method's label.
        components: The disjoint kinds first, then heads, kv heads and neurons.
        values: Scores in the metric's units, float64.
        change: metric(tuned) - metric(base) of every prompt.
        nodes: Quadrature nodes; 1 for a first-order estimate.
        by_token: The same scores by the position they arise at, summed over components.
    """

    method: str
    components: list[Component]
    values: Float[Tensor, "component prompt"]
    change: Float[Tensor, " prompt"]
    nodes: int
    by_token: Float[Tensor, "prompt pos"]

    @property
    def gap(self) -> Float[Tensor, " prompt"]:
        """What the disjoint kinds leave of the change, in metric units."""
        disjoint = torch.tensor([c.kind in DISJOINT_KINDS for c in self.components])
        return self.change - self.values[disjoint].sum(0)

    @property
    def completeness(self) -> float:
        """mean |gap| / mean |change|; 0 is perfect. Means first: a prompt's change may be 0."""
        scale = max(float(self.change.abs().mean()), NOISE)
        return float(self.gap.abs().mean()) / scale

    @property
    def incomplete(self) -> bool:
        """Whether the scores of an integral must not be trusted to sum up."""
        return self.method == "weight_ig" and self.completeness > INCOMPLETE


def attribute_weights(
    hooked: HookedPair,
    batch: Batch,
    metric: Metric,
    *,
    estimator: Estimator = "ig",
    at: At = "path",
) -> Table:
    """The attribution table of every component with weights, one row per prompt.

    Args:
        hooked: The pair; both models are left bit for bit as they were.
        batch: Tokenised prompts.
        metric: What is attributed.
        estimator: Integrated gradients, or the gradient at one end.
        at: ``path`` for ``ig``; ``base`` or ``tuned`` for ``first_order``.

    Raises:
        HostError: The weights are not float32, or the pair's difference is not all in its sites.
        MetricError: The metric is a distance to the model at whose weights first order is taken.
        ValueError: ``estimator`` and ``at`` do not go together.
    """
    scores = weight_scores(hooked, batch, metric, estimator=estimator, at=at)
    return weight_table(scores, hooked, batch, metric)


def weight_scores(
    hooked: HookedPair,
    batch: Batch,
    metric: Metric,
    *,
    estimator: Estimator = "ig",
    at: At = "path",
    nodes: int | None = None,
) -> WeightScores:
    """The scores behind ``attribute_weights``, as arrays.

    ``nodes`` fixes the quadrature; None takes as many as make the scores sum up. Keeps
    O(components x prompts) float64; activations of one chunk of prompts at a time.
    """
    method = method_name(estimator, at)
    refuse_vanishing_gradient(metric, at)
    with hooked.base.frozen(), weight_path(hooked) as path:
        parts = chunks(batch, hooked.base.d_vocab)
        _check_whole_difference(hooked, path, parts[0])
        change = torch.cat([metric_change(hooked, metric, part) for part in parts])
        for count in node_counts(estimator, nodes):
            rule = gauss_legendre(count) if at == "path" else [(float(at == "tuned"), 1.0)]
            rows = _over_chunks([_averaged(hooked, path, metric, part, rule) for part in parts])
            components, values = by_component(path.sites, path.lens, rows)
            scores = WeightScores(method, components, values, change, count, rows[TOKENS])
            if scores.completeness <= COMPLETE:
                break
    return scores


def method_name(estimator: str, at: str) -> str:
    """The method label of an estimator at a place.

    Raises:
        ValueError: The two do not go together.
    """
    for method, (known, _, where) in METHODS.items():
        if (known, where) == (estimator, at) and known != "exact":
            return method
    raise ValueError(
        f"expected ig at path, or first_order at base or tuned; got {estimator} at {at}."
    )


def node_counts(estimator: Estimator, nodes: int | None) -> Sequence[int]:
    """The numbers of nodes to try in turn."""
    if estimator == "first_order":
        return (1,)
    return NODE_COUNTS if nodes is None else (nodes,)


def weight_table(
    scores: WeightScores,
    hooked: HookedPair,
    batch: Batch,
    metric: Metric,
    *,
    neurons: int | None = NEURONS_PER_PROMPT,
) -> Table:
    """The contract's rows of ``scores``.

    Neurons get one row over all prompts, and rows per prompt for the top ``neurons`` (None: all)
    and for ``NEURONS_AT_RANDOM`` of the others.
    """
    run = method_run(
        scores.method,
        hooked,
        batch,
        metric,
        nodes=scores.nodes,
        gap=scores.gap.tolist() if scores.method == "weight_ig" else (),
        status="incomplete" if scores.incomplete else "ok",
    )
    coarse = [i for i, c in enumerate(scores.components) if c.kind != "neuron"]
    fine = [i for i, c in enumerate(scores.components) if c.kind == "neuron"]
    by_prompt = rearrange(scores.values, "component prompt -> prompt component")
    tables = [sampled_table([scores.components[i] for i in coarse], by_prompt[:, coarse], run)]
    if fine:
        layered = rearrange(
            by_prompt[:, fine],
            "prompt (layer index) -> prompt layer index",
            layer=hooked.base.n_layers,
        )
        tables.append(
            attribution_table(
                {Cut("neuron"): layered}, run, neurons=neurons, at_random=NEURONS_AT_RANDOM
            )
        )
    return concatenated("attribution", tables, order="score")


def method_run(
    method: str,
    hooked: HookedPair,
    batch: Batch,
    metric: Metric,
    *,
    nodes: int,
    gap: Sequence[float] = (),
    status: str = "ok",
) -> MethodRun:
    """What all rows of one method in weight space have in common."""
    estimator, direction, at = METHODS[method]
    tied = ties_embeddings(hooked.base) and ties_embeddings(hooked.tuned)
    return MethodRun(
        method=method,
        space="weight",
        estimator=estimator,
        direction=direction,
        at=at,
        metric=metric.name,
        unit=metric.unit,
        base=hooked.base_name,
        tuned=hooked.tuned_name,
        prompts=batch.numbers,
        n_tokens=batch.lengths.tolist(),
        nodes=nodes,
        gap=gap,
        status=status,
        heads_per_kv=hooked.base.n_heads // hooked.base.n_kv_heads,
        tied=frozenset({"W_E", "W_U"}) if tied else frozenset(),
    )


def gauss_legendre(nodes: int) -> list[tuple[float, float]]:
    """Nodes and weights of the Gauss-Legendre rule on [0, 1]; exact to degree 2 nodes - 1."""
    where, weight = np.polynomial.legendre.leggauss(nodes)
    return [(float((x + 1) / 2), float(w / 2)) for x, w in zip(where, weight, strict=True)]


def chunks(batch: Batch, d_vocab: int) -> list[Batch]:
    """``batch`` in runs of prompts whose logits and activations fit ``LOGITS_AT_ONCE``."""
    width = max(1, batch.ids.shape[1])
    size = max(1, min(LOGITS_AT_ONCE // (width * d_vocab), TOKENS_AT_ONCE // width))
    return list(batch.chunks(size))


def metric_change(hooked: HookedPair, metric: Metric, batch: Batch) -> Float[Tensor, " batch"]:
    """metric(tuned) - metric(base) of every prompt; the base must be at its own weights."""
    tuned, base = (hooked.values(lens, metric, batch) for lens in (hooked.tuned, hooked.base))
    return (tuned - base).cpu().double()


def _check_whole_difference(hooked: HookedPair, path: WeightPath, batch: Batch) -> None:
    """The base moved to the other end must be the tuned model, else a weight is no site."""
    first = batch.rows([0])
    with torch.no_grad():
        wanted = hooked.tuned(first.ids, first.mask)
        path.move(1.0)
        got = hooked.base(first.ids, first.mask)
        path.move(0.0)
    error, size = float((got - wanted).abs().max()), float(wanted.abs().max())
    if not error <= 1e-3 * size:
        raise HostError(
            f"moving all known weights to the tuned model's leaves logits {error:.3g} away from "
            f"it (they reach {size:.3g}).",
            hint="This architecture has weights that tvlens cannot attribute to, or the two "
            "models' configurations differ.",
        )


def _averaged(
    hooked: HookedPair,
    path: WeightPath,
    metric: Metric,
    batch: Batch,
    rule: list[tuple[float, float]],
) -> Rows:
    """The scores of one chunk averaged over ``rule``; the path is back at base afterwards."""
    reading = hooked.reading(metric, batch)
    total: Rows = {}
    for s, weight in rule:
        path.move(s)
        for key, rows in node_rows(path, reading).items():
            total[key] = total.get(key, 0.0) + weight * rows.cpu().double()
    path.move(0.0)
    return total


def node_rows(path: WeightPath, reading: Reading) -> Rows:
    """One forward and backward at the weights as they are."""
    scorer = _Scorer(path, reading)
    fwd, bwd = scorer.hooks()
    with torch.enable_grad(), path.lens.hooks(fwd=fwd, bwd=bwd):
        reading.value(reading.logits(path.lens)).sum().backward()
    rows = scorer.finish()
    wanted = {(site.name, tensor) for site in path.sites for tensor in site.tensors}
    if silent := sorted(wanted - rows.keys()):
        raise HostError(f"no gradient reached {'.'.join(silent[0])}: its hook did not fire.")
    return rows


class _Scorer:
    """The hooks of one pass: inputs are kept on the way up, scores made on the way down."""

    def __init__(self, path: WeightPath, reading: Reading) -> None:
        device = path.lens.device
        self.path, self.ids = path, reading.batch.ids.to(device)
        self.positions = reading.positions.to(device)
        self.inputs: dict[str, Tensor] = {}
        self.rows: Rows = {}
        self.leaves: dict[str, Tensor] = {}
        self.by_token = torch.zeros(self.ids.shape, device=device, dtype=path.lens.dtype)

    def hooks(self) -> tuple[HookList, HookList]:
        """Forward and backward hooks for every site."""
        fwd: list[tuple[str, Callable[..., Any]]] = []
        bwd: list[tuple[str, Callable[..., Any]]] = []
        for site in self.path.sites:
            if site.role == "embed":
                fwd.append(("hook_embed", partial(self._leaf, site)))
                continue
            fwd.append((f"{site.name}.hook_in", partial(self._keep, site)))
            if site.role == "pos_embed":
                fwd.append((f"{site.name}.hook_out", partial(self._leaf, site)))
                continue
            bwd.append((f"{site.name}.hook_out", partial(self._score, site)))
        return fwd, bwd

    def finish(self) -> Rows:
        """Score the embeddings, where the graph begins and so no backward hook belongs."""
        for site in self.path.sites:
            start = self.leaves.get(site.name)
            if start is None or start.grad is None:
                continue
            scale, where = 1.0, self.ids
            if site.role == "embed":
                scale = embedding_scale(start.detach(), site, where)
            else:
                where = self.inputs.pop(site.name).expand(len(where), -1)
            self._summed(site, scale * start.grad * self.path.rows_delta(site, where))
        self.rows[TOKENS] = self.by_token
        return self.rows

    def _delta(self, site: Site, tensor: str) -> Tensor:
        return site.canonical(tensor, self.path.delta(site, tensor))

    def _score(self, site: Site, gradient: Tensor, hook: Any) -> None:
        named = {"unembed": self._unembed, **dict.fromkeys(LINEAR, self._linear)}
        scores = named.get(site.role, self._norm)
        with torch.no_grad():
            scores(site, gradient.detach())

    def _keep(self, site: Site, activation: Tensor, hook: Any) -> None:
        self.inputs[site.name] = activation.detach()

    def _leaf(self, site: Site, activation: Tensor, hook: Any) -> Tensor:
        start = leaf(activation.expand(len(self.ids), -1, -1), hook)
        self.leaves[site.name] = start
        return start

    def _linear(self, site: Site, gradient: Tensor) -> None:
        x = rearrange(self.inputs.pop(site.name), "batch pos ... -> batch pos (...)")
        g = rearrange(gradient, "batch pos ... -> batch pos (...)")
        delta = self._delta(site, "weight")
        if LINEAR[site.role].side == "out":
            terms = g * einsum(x, delta, "batch pos d_in, d_in d_out -> batch pos d_out")
        else:
            terms = x * einsum(g, delta, "batch pos d_out, d_in d_out -> batch pos d_in")
        self.rows[site.name, "weight"] = self._cut(site, "weight", terms)
        self._at_tokens(terms)
        self._bias(site, g)

    def _cut(
        self, site: Site, tensor: str, terms: Float[Tensor, "batch pos ... row"]
    ) -> Float[Tensor, "batch index"]:
        """Sums over positions and over the entries of each head or neuron."""
        count = gate_count(site, tensor, self.path.lens)
        return reduce(terms, "batch pos ... (index width) -> batch index", "sum", index=count)

    def _bias(self, site: Site, g: Float[Tensor, "batch pos ... d_out"]) -> None:
        if "bias" in site.tensors:
            terms = g * self._delta(site, "bias")
            self.rows[site.name, "bias"] = self._cut(site, "bias", terms)
            self._at_tokens(terms)

    def _norm(self, site: Site, gradient: Float[Tensor, "batch ... width"]) -> None:
        x, g = (by_position(t) for t in (self.inputs.pop(site.name), gradient))
        x = normalised(x, self.path.lens.host.norm(site.name))
        self._summed(site, g * x * self._delta(site, "weight"))
        self._bias(site, g)

    def _unembed(self, site: Site, g: Tensor) -> None:
        """As wide as the vocabulary, so only where the metric reads the logits."""
        rows, read_at = g.abs().amax(-1).nonzero(as_tuple=True)
        positions = self.positions[rows, read_at]
        read, x = g[rows, read_at], self.inputs.pop(site.name)[rows, positions]
        delta = self._delta(site, "weight")
        moved = einsum(x, delta, "read d_model, d_model d_vocab -> read d_vocab")
        scores = reduce(read * moved, "read d_vocab -> read", "sum")
        self.rows[site.name, "weight"] = _per_prompt(scores, rows, len(g))
        self.by_token.index_put_((rows, positions), scores, accumulate=True)
        if "bias" in site.tensors:
            terms = reduce(read * self._delta(site, "bias"), "read d_vocab -> read", "sum")
            self.rows[site.name, "bias"] = _per_prompt(terms, rows, len(g))
            self.by_token.index_put_((rows, positions), terms, accumulate=True)

    def _summed(self, site: Site, terms: Float[Tensor, "batch pos ..."]) -> None:
        total = reduce(terms, "batch ... -> batch", "sum")
        self.rows[site.name, "weight"] = rearrange(total, "batch -> batch 1")
        self._at_tokens(terms)

    def _at_tokens(self, terms: Float[Tensor, "batch pos ..."]) -> None:
        self.by_token += reduce(terms, "batch pos ... -> batch pos", "sum")


def _per_prompt(
    scores: Float[Tensor, " read"], rows: Int[Tensor, " read"], count: int
) -> Float[Tensor, "batch 1"]:
    total = scores.new_zeros(count).index_add(0, rows, scores)
    return rearrange(total, "batch -> batch 1")


def by_position(x: Float[Tensor, "batch ... width"]) -> Float[Tensor, "batch pos ... width"]:
    """Positions before heads: a norm within each head acts on [batch, head, pos, d_head]."""
    return x if x.ndim == 3 else rearrange(x, "batch head pos d_head -> batch pos head d_head")


def normalised(x: Float[Tensor, "batch ... width"], norm: Norm) -> Tensor:
    """The input of a norm's gain: centred (LayerNorm only) and divided by its root mean square.

    Whether the gain is stored as itself or as its difference from 1, its change is the same.
    """
    if norm.centred:
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.epsilon)


def embedding_scale(
    activation: Float[Tensor, "batch pos d_model"],
    embed: Site,
    ids: Int[Tensor, "batch pos"],
) -> float:
    """The factor that a family puts on its embeddings (sqrt(d_model) in Gemma, mostly 1)."""
    rows = embed.parameter("weight")[ids]
    scale = float((activation * rows).sum() / rows.pow(2).sum().clamp_min(1e-30))
    return 1.0 if abs(scale - 1.0) < 1e-4 else scale


def _over_chunks(parts: list[Rows]) -> Rows:
    width = max(part[TOKENS].shape[1] for part in parts)
    for part in parts:
        short = width - part[TOKENS].shape[1]
        part[TOKENS] = nn.functional.pad(part[TOKENS], (0, short))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def by_component(
    sites: Sequence[Site], lens: LensModel, rows: Rows
) -> tuple[list[Component], Float[Tensor, "component prompt"]]:
    """Scores of the disjoint kinds, then of heads, kv heads and neurons, summed over parts."""
    fine: dict[tuple[Kind, int | None], Tensor] = {}
    components, values = [], []
    for site in sites:
        for tensor in site.tensors:
            scores = rows[site.name, tensor]
            components.append(site.component(tensor))
            values.append(rearrange(scores.sum(-1), "prompt -> 1 prompt"))
            if site.cut_axis(tensor) is not None:
                key = LINEAR[site.role].kind, site.layer
                fine[key] = fine.get(key, 0.0) + rearrange(scores, "prompt index -> index prompt")
    for kind in counts(lens):
        for layer in range(lens.n_layers):
            total = fine[kind, layer]
            components += [Component(kind, layer, index) for index in range(len(total))]
            values.append(total)
    return components, torch.cat(values)
