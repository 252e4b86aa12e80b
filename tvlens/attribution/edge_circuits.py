"""What a circuit of a few edges carries: faithfulness, by real runs.

With M(S) the metric of a run in which the edges of a set S are exchanged and all others are the
receiver's (``edge_patching.sets_of_edges``), for means over prompts,

    restored(S)  = (M(S) - M(none)) / (M(all) - M(none))           1: S alone gives the other run
    destroyed(S) = (M(all) - M(all but S)) / (M(all) - M(none))    1: without S nothing is left

Between a prompt and its corrupt prompt ``restored`` is what circuit papers call faithfulness of S
[1]. Scores of single edges do not sum up, and estimates that rank single edges well need not find
the better circuit; so sets are ranked on the prompts of the split ``choose`` and measured on
``judge``, beside random sets with as many edges into each kind of reader. Intervals are 95 %
percentiles of a bootstrap over prompts, of the ratio of means.

[1] Hanna, Pezzelle and Belinkov 2024, https://arxiv.org/abs/2403.17806
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from tvlens.errors import PromptError, StudyError
from tvlens.models.prompts import Batch
from tvlens.tables import Table

from .directions import Question
from .edge_graph import EdgeGraph
from .edge_patching import sets_of_edges
from .edges import EdgeScores
from .grafting import QUESTIONS, Interval, share_of_change
from .grafting import Question as Asked
from .weights import NOISE

RANDOM_SETS = 2
"""Random sets at every size."""
STEP = 4
"""From one size of a set to the next."""
EDGE_CIRCUITS_SCHEMA = pa.schema(
    [
        ("base", pa.string()),
        ("tuned", pa.string()),
        ("direction", pa.string()),
        ("at", pa.string()),
        ("curve", pa.string()),
        ("ranked_by", pa.string()),
        ("draw", pa.int32()),
        ("split", pa.string()),
        ("metric", pa.string()),
        ("k", pa.int32()),
        ("of", pa.int32()),
        ("value", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("n", pa.int32()),
        ("change", pa.float64()),
        ("change_low", pa.float64()),
        ("change_high", pa.float64()),
    ]
)
"""``ranked_by`` is the method whose scores chose the set, or ``random``; ``change`` is what the
shares are of, mean over prompts of M(all) - M(none): where it is not surely different from 0 they
mean nothing."""


class _Set(NamedTuple):
    """Edges, by place among the graph's, and what chose them."""

    ranked_by: str
    draw: int
    chosen: Int[Tensor, " k"]


@dataclass(frozen=True)
class _Point:
    """One set on one split."""

    curve: Asked
    ranked_by: str
    draw: int
    split: str
    k: int
    value: float
    low: float
    high: float


def edge_circuits(
    asked: Question,
    batch: Batch,
    ranked: Sequence[EdgeScores],
    *,
    choose: Sequence[int],
    judge: Sequence[int],
    seed: int = 0,
) -> Table:
    """Share of the metric's change that sets of edges restore and destroy, by size.

    Args:
        asked: The direction.
        batch: The prompts that the scores were made on, as ``asked.usable`` gives them.
        ranked: Scores of the same direction; each gives sets of its own, those edges first whose
            mean over ``choose`` has the sign of the change and is largest.
        choose: Rows that sets are chosen on.
        judge: Rows that they are judged on.
        seed: Of random sets and of the bootstrap.

    Raises:
        PromptError: One of the splits has no prompt.
        StudyError: The metric does not differ between the two runs on ``choose``.
        HostError: The model's blocks do not add up, or it runs below float32.
    """
    if not choose or not judge:
        raise PromptError(
            "circuits of edges are chosen on one half of the prompts and judged on the other, and "
            "one of the splits 'choose' and 'judge' is empty.",
            hint="Give more prompts, or set 'split' in the prompt file.",
        )
    search = _Search(asked, batch, {"choose": list(choose), "judge": list(judge)}, seed)
    sets = []
    for scores in ranked:
        order = search.order(scores)
        sets += [_Set(scores.run.method, 0, order[:k]) for k in search.sizes]
    order = search.order(ranked[0])
    sets += [
        _Set("random", draw, search.random(order[:k], draw))
        for k in search.sizes[:-1]
        for draw in range(RANDOM_SETS)
    ]
    points = [point for curve in QUESTIONS for point in search.points(curve, sets)]
    return _table(points, search)


def sizes_of_sets(count: int) -> list[int]:
    """1, 4, 16, ... and all of ``count`` edges."""
    powers = range(1, count.bit_length())
    return sorted({*(STEP**power for power in powers if STEP**power < count), 1, count})


@dataclass(eq=False)
class _Search:
    """The prompts of both splits, run with sets of edges exchanged."""

    asked: Question
    batch: Batch
    rows: dict[str, list[int]]
    seed: int
    graph: EdgeGraph = field(init=False)
    ends: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Run none and all of the edges."""
        self.graph = EdgeGraph(self.asked.receiver)
        every = self.graph.exists
        for split in self.rows:
            none, all_of_them = self._values([torch.zeros_like(every), every], split)
            self.ends[split] = none, all_of_them
        if abs(self._change("choose")) <= NOISE:
            raise StudyError(
                f"{self.asked.metric.name} is the same with all edges exchanged as with none on "
                "the prompts of 'choose': there is nothing to restore.",
                hint="Choose prompts, or a metric, on which the two runs differ.",
            )

    @property
    def sizes(self) -> list[int]:
        """How many edges sets have."""
        return sizes_of_sets(int(self.graph.exists.sum()))

    def order(self, scores: EdgeScores) -> Int[Tensor, " edge"]:
        """Places among the graph's edges by how much of the change their score carries."""
        mean = scores.values[self.rows["choose"]].mean(0)[self.graph.exists]
        toward = self.asked.sign * np.sign(self._change("choose"))
        return torch.argsort(toward * mean, descending=True, stable=True)

    def random(self, chosen: Int[Tensor, " k"], draw: int) -> Int[Tensor, " k"]:
        """As many edges into each kind of reader, drawn from all."""
        rng = np.random.default_rng([self.seed, draw, len(chosen)])
        parts = np.array([str(edge.target.part) for edge in self.graph.edges])
        wanted = parts[chosen.numpy()]
        drawn = [
            rng.permutation(np.flatnonzero(parts == part))[: int((wanted == part).sum())]
            for part in np.unique(wanted)
        ]
        return torch.from_numpy(np.concatenate(drawn))

    def points(self, curve: Asked, sets: Sequence[_Set]) -> list[_Point]:
        """Every set on both splits."""
        exchanged = [self._given(one.chosen) for one in sets]
        if curve == "destroyed":
            exchanged = [self.graph.exists & ~given for given in exchanged]
        found = []
        for split in self.rows:
            none, every = self.ends[split]
            for one, values in zip(sets, self._values(exchanged, split), strict=True):
                moved = values - none if curve == "restored" else every - values
                share = share_of_change(moved, every - none, self.seed)
                at = (one.ranked_by, one.draw, split, len(one.chosen))
                found.append(_Point(curve, *at, share.mean, share.low, share.high))
        return found

    def _given(self, chosen: Int[Tensor, " k"]) -> Bool[Tensor, "source target"]:
        given = torch.zeros_like(self.graph.exists)
        source, target = self.graph.exists.nonzero()[chosen].unbind(1)
        given[source, target] = True
        return given

    def _values(
        self, sets: Sequence[Bool[Tensor, "source target"]], split: str
    ) -> Float64[Tensor, "set prompt"]:
        return sets_of_edges(self.asked, self.batch.rows(self.rows[split]), sets)

    def change(self, split: str) -> Interval:
        """Mean of M(all) - M(none), with its bootstrap."""
        none, every = self.ends[split]
        return share_of_change(every - none, torch.ones_like(every), self.seed)

    def _change(self, split: str) -> float:
        return self.change(split).mean


def _table(points: Sequence[_Point], search: _Search) -> Table:
    asked, count = search.asked, len(points)
    same = {
        "base": asked.hooked.base_name,
        "tuned": asked.hooked.tuned_name,
        "direction": asked.direction,
        "at": asked.at,
        "metric": asked.metric.name,
        "of": int(search.graph.exists.sum()),
    }
    columns: dict[str, Sequence[Any]] = {
        **{name: [value] * count for name, value in same.items()},
        "curve": [p.curve for p in points],
        "ranked_by": [p.ranked_by for p in points],
        "draw": [p.draw for p in points],
        "split": [p.split for p in points],
        "k": [p.k for p in points],
        "value": [p.value for p in points],
        "ci_low": [p.low for p in points],
        "ci_high": [p.high for p in points],
        "n": [len(search.rows[p.split]) for p in points],
    }
    changes = {split: search.change(split) for split in search.rows}
    for name, end in (("change", "mean"), ("change_low", "low"), ("change_high", "high")):
        columns[name] = [getattr(changes[p.split], end) for p in points]
    return Table.of("edge_circuits", EDGE_CIRCUITS_SCHEMA, columns)
