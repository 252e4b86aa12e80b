"""Attribution to edges: what a metric would change by if one reader saw another activation.

An edge exchanges what a source writes for one target alone (``edge_graph``); every other reader
still sees the receiver's own. Edge attribution patching [1] estimates all of them at once,

    score(u, v) = (what u writes in the given run - in the receiver's) . d metric / d input of v

summed over positions. The gradient at the input of v is that of v's own reading: back from the
query, key, value or MLP through its map and norm, at the receiver's stream. A key and a value are
stored once and read by all query heads of their group, so their edges are one each on grouped
queries; rotary embeddings and norms of queries and keys lie behind the point where the gradient is
taken. ``ig_inputs`` averages the gradient along the line between two prompts' embeddings
(``input_lines``) [2]. Across models a source gives what the other model writes, by that model's
W_O; TransformerLens's edges are within one model, without grouped keys, in the same sign.

Identities that the tests hold: the edges into one target sum to (given stream - own) . d metric /
d its input; those out of one source sum to the first-order score of what it writes.

Exact counterpart: ``edge_patching``.

[1] Syed, Rager and Conmy 2023, https://arxiv.org/abs/2310.10348
[2] Hanna, Pezzelle and Belinkov 2024, https://arxiv.org/abs/2403.17806
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Float64
from torch import Tensor

from tvlens.models.lens import HookList, leaf
from tvlens.models.metrics import Metric
from tvlens.models.pair import HookedPair
from tvlens.models.prompts import Batch
from tvlens.tables import Table

from .directions import Patch, Question, question
from .edge_graph import EdgeGraph, Reader
from .input_lines import InputLine, along_inputs
from .nodes import activations, wide
from .products import START, metric_value
from .tables import EDGES_PER_PROMPT, Direction, Edge, EdgeEstimator, MethodRun, edge_table
from .weights import gauss_legendre

EDGES_AT_RANDOM = 64
"""Edges outside the largest that get rows per prompt too: an unbiased check against exact."""
ROWS_AT_ONCE = 16
TARGETS_AT_ONCE = 64
"""Targets whose gradients wait for one product: what sources write is read from memory once."""
FLOATS_AT_ONCE = 2**27
"""Entries of all sources' differences that are held at a time: half a gigabyte in float32."""


@dataclass(frozen=True, eq=False)
class EdgeScores:
    """Scores of every edge.

    Attributes:
        graph: Its sources are the rows and its targets the columns; ``exists`` says where there is
            an edge, elsewhere scores are 0.
        values: Per prompt, all positions together, in the metric's unit.
        run: How they were made.
    """

    graph: EdgeGraph
    values: Float64[Tensor, "batch source target"]
    run: MethodRun

    def of(self, edge: Edge) -> Float64[Tensor, " batch"]:
        """The scores of one edge.

        Raises:
            HostError: The model has no such edge.
        """
        source, target = self.graph.place(edge)
        return self.values[:, source, target]

    def ranked(self, rows: Sequence[int] | None = None) -> list[Edge]:
        """All edges, those with the largest |mean over prompts| first.

        Args:
            rows: The prompts that count, all of them unless given.
        """
        values = self.values if rows is None else self.values[list(rows)]
        edges, size = self.graph.edges, values.mean(0)[self.graph.exists].abs()
        return [edges[i] for i in torch.argsort(size, descending=True, stable=True).tolist()]

    def table(self, *, edges: int | None = EDGES_PER_PROMPT) -> Table:
        """The attribution table's rows: one over all prompts for every edge, and some per prompt.

        Args:
            edges: How many edges get rows per prompt, the largest; None for all.
        """
        flat = self.values[:, self.graph.exists]
        return edge_table(
            self.graph.edges, flat, self.run, largest=edges, at_random=EDGES_AT_RANDOM
        )


def attribute_edges(
    hooked: HookedPair,
    batch: Batch,
    metric: Metric,
    *,
    direction: Direction,
    at: str = "",
    estimator: EdgeEstimator = "first_order",
    edges: int | None = EDGES_PER_PROMPT,
    mean_over: Batch | None = None,
) -> Table:
    """The estimated score of every edge, in the rows of the attribution table.

    Args:
        hooked: The two models; left as they were.
        batch: The prompts; directions with a corrupt prompt take those that have one.
        metric: What is measured.
        direction: What is put where; see ``directions``.
        at: The model of a direction within one model, tuned unless said.
        estimator: ``first_order`` (EAP), or ``ig_inputs`` (EAP-IG) between a prompt and its corrupt
            prompt.
        edges: How many edges get rows per prompt, None for all.
        mean_over: Prompts whose mean ``mean_ablation`` puts in, these unless given.

    Raises:
        PromptError: No prompt has the corrupt prompt that the direction needs.
        HostError: The family's blocks do not add up to a residual stream, the model is in training
            mode, or the direction has no line between inputs.
        MetricError: The metric does not depend on the logits, or its gradient vanishes where it
            would be taken.
    """
    asked = question(hooked, metric, direction, at=at, mean_over=mean_over)
    return edge_scores(asked, batch, estimator=estimator).table(edges=edges)


def edge_scores(
    asked: Question,
    batch: Batch,
    *,
    estimator: EdgeEstimator = "first_order",
    rows_at_once: int = ROWS_AT_ONCE,
) -> EdgeScores:
    """The estimated scores as a tensor.

    Memory: what all sources write, O(prompts at once * sources * pos * d_model), held to about
    half a gigabyte where one prompt fits into it, and the scores.

    Args:
        asked: The direction, from ``question``.
        batch: The prompts.
        estimator: Where the gradient is taken.
        rows_at_once: Prompts of one forward and backward, fewer where memory asks for it.

    Raises:
        TvlensError: As for ``attribute_edges``.
    """
    asked.refuse_vanishing_gradient()
    batch, graph = asked.usable(batch), EdgeGraph(asked.receiver)
    run, rule, along = edge_run(asked, batch, estimator), [(0.0, 1.0)], None
    if estimator == "ig_inputs":
        along = along_inputs(asked, batch, rows_at_once=rows_at_once)
        rule = gauss_legendre(along.nodes)
    means, parts = source_means(asked, batch, graph), []
    for rows in batch.chunks(min(rows_at_once, prompts_at_once(graph, batch))):
        patch = asked.patch(rows, means)
        exchanged, gradients = differences(patch, graph), 0.0
        line = InputLine.of(patch) if along is not None else None
        for s, weight in rule:
            passed = _Pass(graph, patch, line.hook(s) if line is not None else None)
            gradients = gradients + weight * passed.products(exchanged)
        parts.append(patch.sign * gradients)
        if along is not None:  # the embedding is the first source
            along.note(patch, parts[-1][:, 0].sum(1))
    run = run if along is None else replace(run, **along.facts)
    return EdgeScores(graph, torch.cat(parts), run)


def edge_run(asked: Question, batch: Batch, estimator: str) -> MethodRun:
    """What the rows of edges have in common."""
    method = "exact_edge" if estimator == "exact" else f"edge_{estimator}"
    return replace(asked.run(batch, estimator), method=method, space="edge")


def source_means(asked: Question, batch: Batch, graph: EdgeGraph) -> dict[str, Tensor]:
    """For a mean ablation: the means that sources write with; empty otherwise."""
    return asked.means_at(batch, graph.written_at)


def prompts_at_once(graph: EdgeGraph, batch: Batch) -> int:
    """How many prompts' sources fit into ``FLOATS_AT_ONCE``, one at least."""
    each = len(graph.sources) * batch.ids.shape[1] * graph.model.d_model
    return max(1, FLOATS_AT_ONCE // each)


def require_sums(patch: Patch, graph: EdgeGraph) -> None:
    """Check on the receiver's first prompt that sources sum to the streams that targets read.

    Raises:
        HostError: They do not in this family.
    """
    ids, mask = patch.receiver_ids[:1], patch.batch.mask[:1]
    graph.require_sums(activations(patch.receiver, ids, mask, graph.checked_at))


def given_writes(patch: Patch, graph: EdgeGraph) -> Float[Tensor, "batch source pos d_model"]:
    """What every source writes in the run that gives, or 0, or its mean."""
    model, donor = patch.receiver, patch.donor or patch.receiver
    batch, pos = patch.batch.ids.shape
    made = torch.zeros(
        (batch, len(graph.sources), pos, model.d_model),
        dtype=torch.promote_types(model.dtype, torch.float32),
        device=model.device,
    )
    for places, written in graph.written(donor, patch.given(graph.written_at)):
        made[:, places] = written.to(made)
    return made


def differences(patch: Patch, graph: EdgeGraph) -> Float[Tensor, "batch source pos d_model"]:
    """What every source writes in the given run minus in the receiver's, 0 at padding.

    Raises:
        HostError: Sources do not sum to streams in this family.
    """
    require_sums(patch, graph)
    made, mask = given_writes(patch, graph), patch.batch.mask
    own = activations(patch.receiver, patch.receiver_ids, mask, graph.written_at)
    for places, written in graph.written(patch.receiver, own):
        made[:, places] -= written
    padding = ~mask.bool().to(made.device)
    return made.masked_fill_(padding[:, None, :, None], 0.0)


@dataclass(eq=False)
class _Pass:
    """One forward and backward of the receiver: streams, and gradients of what is read of them.

    Attributes:
        graph: The edges.
        patch: What is put where.
        moved: A hook that moves the embedding first.
        streams: What is read, by hook.
        gradients: At what readers make and at the last stream, by hook; an MLP's already behind
            its maps, at the normed stream.
    """

    graph: EdgeGraph
    patch: Patch
    moved: tuple[str, Any] | None = None
    streams: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def products(
        self, exchanged: Float[Tensor, "batch source pos d_model"]
    ) -> Float64[Tensor, "batch source target"]:
        """Differences times gradients, for every edge.

        Raises:
            MetricError: The metric does not depend on the logits differentiably.
        """
        model = self.patch.receiver
        forward, backward = self._hooks()
        with model.frozen(), torch.enable_grad(), model.hooks(fwd=forward, bwd=backward):
            metric_value(self.patch, model).backward()
        scores = torch.zeros(
            len(exchanged), len(self.graph.sources), len(self.graph.targets), dtype=torch.float64
        )
        waiting: list[tuple[Reader, Tensor]] = []
        for reader, gradients in self._read():
            waiting.append((reader, gradients))
            if sum(len(rows) for _, rows in waiting) >= TARGETS_AT_ONCE:
                _fill(scores, exchanged, waiting)
                waiting = []
        _fill(scores, exchanged, waiting)
        return scores

    def _read(self) -> Iterator[tuple[Reader, Float[Tensor, "read batch pos d_model"]]]:
        """The gradients at the stream of every reader's targets, layer by layer."""
        graph = self.graph
        for reader in graph.in_order:
            if reader in graph.mlps:
                at_normed = self.gradients.pop(reader.hook)[None]
            else:
                at_normed = self._behind_map(reader)
            yield reader, self._behind_norm(reader, at_normed)
        yield graph.logits, wide(self.gradients.pop(graph.last_stream))[None]

    def _hooks(self) -> tuple[HookList, HookList]:
        graph = self.graph
        moved = [] if self.moved is None else [self.moved]
        forward = [(name, partial(self._keep, name)) for name in graph.streams]
        backward = [(reader.hook, partial(self._take, reader.hook)) for reader in graph.readers] + [
            (hook, partial(self._through_map, mlp.hook, site))
            for mlp in graph.mlps
            for site, hook in graph.maps(mlp)
        ]
        last = (graph.last_stream, partial(self._take, graph.last_stream))
        return [*moved, (START, leaf), *forward], [*backward, last]

    def _keep(self, name: str, activation: Tensor, hook: object) -> None:
        self.streams[name] = activation.detach()

    def _take(self, name: str, gradient: Tensor, hook: object) -> None:
        self.gradients[name] = gradient.detach()

    def _through_map(self, name: str, site: str, gradient: Tensor, hook: object) -> None:
        """Sum an MLP's gradients at the normed stream, which its maps read together."""
        back = einsum(
            wide(gradient), self.graph.weight(site), "batch pos made, d_in made -> batch pos d_in"
        )
        self.gradients[name] = self.gradients.get(name, 0.0) + back

    def _behind_map(self, reader: Reader) -> Float[Tensor, "target batch pos d_model"]:
        """The gradients of single heads at the normed stream."""
        gradient = wide(self.gradients.pop(reader.hook))
        by_head = rearrange(
            self.graph.weight(reader.site),
            "d_in (head d_head) -> head d_in d_head",
            head=gradient.shape[2],
        )
        pattern = "batch pos head d_head, head d_in d_head -> head batch pos d_in"
        return einsum(gradient, by_head, pattern)

    def _behind_norm(
        self, reader: Reader, gradients: Float[Tensor, "target batch pos d_model"]
    ) -> Float[Tensor, "target batch pos d_model"]:
        """The gradients at the stream itself, each through a norm of its own."""
        with torch.enable_grad():
            stream = self.streams[reader.stream].requires_grad_(True)
            normed = self.graph.normed(reader.norm, stream)
            back = [
                torch.autograd.grad(normed, stream, one.to(normed.dtype), retain_graph=True)[0]
                for one in gradients
            ]
        return wide(torch.stack(back))


def _fill(
    scores: Float64[Tensor, "batch source target"],
    exchanged: Float[Tensor, "batch source pos d_model"],
    waiting: Sequence[tuple[Reader, Tensor]],
) -> None:
    """Differences times gradients of some readers, whose sources are looked through once."""
    if not waiting:
        return
    seen = max(reader.seen for reader, _ in waiting)
    gradients = torch.cat([rows for _, rows in waiting])
    for prompt, writes in enumerate(exchanged):
        products = writes[:seen].flatten(1) @ gradients[:, prompt].flatten(1).mT
        start = 0
        for reader, rows in waiting:
            own = products[: reader.seen, start : start + len(rows)]
            scores[prompt, : reader.seen, reader.targets] = own.cpu().double()
            start += len(rows)
