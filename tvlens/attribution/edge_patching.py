"""Exact edge patching: let one reader see what another run writes, run, and look at the metric.

    score(u, v) = sign * (metric(run in which v reads stream + difference of u) - metric(run))

with the difference that ``edges`` multiplies by a gradient. The stream before v is the receiver's
own, since nothing upstream of v is touched, so what v makes of it is known without running
anything up to v: the forward begins there.

A *set* of edges is exchanged at once in ``edges_together``: every target reads its own stream, in
which the sources of its edges are given and the others are what they are in that very run. All
edges together give the given run itself (within one model), which the tests hold; what a circuit
of some edges carries is measured in ``edge_circuits``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from tvlens.models.lens import HookList
from tvlens.models.metrics import Metric
from tvlens.models.pair import HookedPair
from tvlens.models.prompts import Batch
from tvlens.tables import Table

from .directions import Patch, Question, question
from .edge_graph import EdgeGraph, Reader, Writer
from .edges import (
    ROWS_AT_ONCE,
    differences,
    edge_run,
    given_writes,
    prompts_at_once,
    require_sums,
    source_means,
)
from .nodes import NODES, Site, activations, wide
from .patching import Edit, effects, require_single_precision
from .tables import Direction, Edge, sampled_edges_table


def exact_edges(
    hooked: HookedPair,
    batch: Batch,
    metric: Metric,
    edges: Sequence[Edge],
    *,
    direction: Direction,
    at: str = "",
    mean_over: Batch | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
) -> Table:
    """What the metric changes by when each edge is exchanged, one at a time.

    Same sign and unit as ``attribute_edges``: per prompt, all positions together.

    Args:
        hooked: The two models; left as they were.
        batch: The prompts.
        metric: What is measured.
        edges: The edges.
        direction: What is put where; see ``directions``.
        at: The model of a direction within one model, tuned unless said.
        mean_over: Prompts whose mean ``mean_ablation`` puts in, these unless given.
        rows_at_once: Prompts of one forward, fewer where memory asks for it.

    Raises:
        PromptError: No prompt has the corrupt prompt that the direction needs.
        HostError: The model has no such edge, its blocks do not add up, or it runs below float32.
    """
    asked = question(hooked, metric, direction, at=at, mean_over=mean_over)
    require_single_precision(asked)
    batch, graph = asked.usable(batch), EdgeGraph(asked.receiver)
    places = [graph.place(edge) for edge in edges]
    means, parts = source_means(asked, batch, graph), []
    for rows in batch.chunks(min(rows_at_once, prompts_at_once(graph, batch))):
        patch = asked.patch(rows, means)
        read = _Read(graph, patch, differences(patch, graph))
        parts.append(effects(patch, [read.edits(*place) for place in places]))
    return sampled_edges_table(edges, torch.cat(parts), edge_run(asked, batch, "exact"))


@dataclass(frozen=True, eq=False)
class _Read:
    """What targets make of the receiver's streams, an edge exchanged.

    Attributes:
        graph: The edges.
        patch: What is put where.
        exchanged: What every source's write changes by.
    """

    graph: EdgeGraph
    patch: Patch
    exchanged: Float[Tensor, "batch source pos d_model"]
    streams: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Run the receiver once for its streams."""
        names = [*self.graph.streams, self.graph.last_stream]
        patch = self.patch
        self.streams.update(
            activations(patch.receiver, patch.receiver_ids, patch.batch.mask, names)
        )

    def edits(self, source: int, target: int) -> list[Edit]:
        """The activations behind a target's reading, to be put in place of its own."""
        graph, name = self.graph, self.graph.targets[target]
        real = self.patch.batch.mask.bool()
        if name.part == "logits":
            stream = self._stream(graph.last_stream, source)
            return [Edit(_site("resid_post", graph.model.n_layers - 1), None, real, stream)]
        reader = graph.reader_of(target)
        stream = self._stream(reader.stream, source)
        if name.part == "mlp_in":
            normed = graph.normed(reader.norm, stream)
            parts = {hook.rpartition("hook_")[2]: site for site, hook in graph.maps(reader)}
            return [
                Edit(_site(part, name.layer), None, real, graph.made(site, normed))
                for part, site in parts.items()
            ]
        made = graph.made_of_head(reader, name.index or 0, stream)
        head = rearrange(made, "batch pos d_head -> batch pos 1 d_head")
        return [Edit(_site(_activation(reader), name.layer), name.index, real, head)]

    def _stream(self, name: str, source: int) -> Float[Tensor, "batch pos d_model"]:
        own = self.streams[name]
        return (wide(own) + self.exchanged[:, source]).to(own.dtype)


def edges_together(
    asked: Question,
    batch: Batch,
    given: Bool[Tensor, "source target"],
    *,
    rows_at_once: int = ROWS_AT_ONCE,
) -> Float64[Tensor, " batch"]:
    """The metric of every prompt with a set of edges exchanged at once, in the metric's unit.

    No sign is applied: none given is the receiver's metric, and within one model all given is the
    given run's.

    Args:
        asked: The direction.
        batch: The prompts, as ``asked.usable`` gives them.
        given: The edges that are exchanged; entries where there is no edge do not count.
        rows_at_once: Prompts of one forward, fewer where memory asks for it.

    Raises:
        HostError: The model's blocks do not add up, or it runs below float32.
    """
    return sets_of_edges(asked, batch, [given], rows_at_once=rows_at_once)[0]


def sets_of_edges(
    asked: Question,
    batch: Batch,
    sets: Sequence[Bool[Tensor, "source target"]],
    *,
    rows_at_once: int = ROWS_AT_ONCE,
) -> Float64[Tensor, "set batch"]:
    """``edges_together`` of several sets, for which the given run is run once.

    Raises:
        HostError: As for ``edges_together``.
    """
    require_single_precision(asked)
    graph, found = EdgeGraph(asked.receiver), []
    means = source_means(asked, batch, graph)
    for rows in batch.chunks(min(rows_at_once, prompts_at_once(graph, batch))):
        patch, values = asked.patch(rows, means), []
        require_sums(patch, graph)
        writes = given_writes(patch, graph)
        for given in sets:
            run = _SetOfEdges(graph, patch, given & graph.exists, writes.clone())
            with torch.no_grad(), patch.receiver.hooks(fwd=run.hooks()):
                logits = patch.reading.logits(patch.receiver, patch.receiver_ids)
                values.append(patch.reading.value(logits).cpu().double())
        found.append(torch.stack(values))
    return torch.cat(found, dim=1)


@dataclass(eq=False)
class _SetOfEdges:
    """Hooks of a run in which every target reads a stream of its own.

    Attributes:
        graph: The edges.
        patch: What is put where.
        given: The edges that are exchanged.
        writes: What sources write in the given run, which becomes that minus what they write here
            as soon as they have written.
        total: The sum of these differences over the sources that have written, by their number.
        streams: What is read here, by hook, as far as the run has come.
    """

    graph: EdgeGraph
    patch: Patch
    given: Bool[Tensor, "source target"]
    writes: Float[Tensor, "batch source pos d_model"]
    total: dict[int, Float[Tensor, "batch pos d_model"]] = field(default_factory=dict)
    streams: dict[str, Tensor] = field(default_factory=dict)

    def hooks(self) -> HookList:
        """Forward hooks, in the order of the pass."""
        graph = self.graph
        last = graph.last_stream
        found = [(writer.hook, partial(self._wrote, writer)) for writer in graph.writers]
        found += [(name, partial(self._keep, name)) for name in graph.streams]
        found += [(reader.hook, partial(self._read, reader)) for reader in graph.readers]
        for mlp in graph.mlps:
            found += [(hook, partial(self._mlp, mlp, site)) for site, hook in graph.maps(mlp)]
        return [*found, (last, self._last)]

    def _keep(self, name: str, activation: Tensor, hook: object) -> None:
        self.streams[name] = activation

    def _wrote(self, writer: Writer, activation: Tensor, hook: object) -> None:
        written = self.graph.written_by(self.patch.receiver, writer, activation)
        padding = ~self.patch.batch.mask.bool().to(written.device)
        moved = self.writes[:, writer.places].sub_(written)
        moved.masked_fill_(padding[:, None, :, None], 0.0)
        before = self.total.get(writer.places.start, torch.zeros_like(moved[:, 0]))
        self.total[writer.places.stop] = before + moved.sum(1)

    def _moved(self, target: int, seen: int) -> Float[Tensor, "batch pos d_model"]:
        """What the sources of a target's edges change in its stream, by the shorter way."""
        given = self.given[:seen, target]
        few = int(given.sum()) <= seen // 2
        moved = torch.zeros_like(self.total[seen]) if few else self.total[seen].clone()
        for source in torch.nonzero(given == few).flatten().tolist():
            moved.add_(self.writes[:, source], alpha=1.0 if few else -1.0)
        return moved

    def _stream_of(self, reader: Reader, target: int) -> Float[Tensor, "batch pos d_model"]:
        own = self.streams[reader.stream]
        return (wide(own) + self._moved(target, reader.seen)).to(own.dtype)

    def _read(self, reader: Reader, activation: Tensor, hook: object) -> Tensor:
        places = range(reader.targets.start, reader.targets.stop)
        made = {
            number: self.graph.made_of_head(reader, number, self._stream_of(reader, target))
            for number, target in enumerate(places)
            if self.given[:, target].any()
        }
        patched = activation.clone()
        for number, head in made.items():
            patched[:, :, number] = head.to(activation.dtype)
        return patched

    def _mlp(self, reader: Reader, site: str, activation: Tensor, hook: object) -> Tensor:
        target = reader.targets.start
        if not self.given[:, target].any():
            return activation
        normed = self.graph.normed(reader.norm, self._stream_of(reader, target))
        return self.graph.made(site, normed).to(activation.dtype)

    def _last(self, activation: Tensor, hook: object) -> Tensor:
        logits = self.graph.logits
        moved = self._moved(logits.targets.start, logits.seen)
        return (wide(activation) + moved).to(activation.dtype)


def _site(part: str, layer: int | None) -> Site:
    cut, name = NODES[part]
    return Site(cut, layer, name.format(layer))


def _activation(reader: Reader) -> str:
    """``q``, ``k`` or ``v``."""
    return reader.site.rpartition(".")[2]
