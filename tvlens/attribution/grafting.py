"""The smallest part of a tuning vector that carries a behaviour.

A *graft* puts the tuning vectors of a set of components into the base; a *removal* takes them out
of the tuned model. With M the metric and a bar for the mean over prompts,

    restored(S)  = (M(base + S) - M(base))  / (M(tuned) - M(base))       1: all of the change
    destroyed(S) = (M(tuned) - M(tuned - S)) / (M(tuned) - M(base))      1: nothing is left of it

Components are ranked by their integrated score on the prompts of the split ``choose`` alone, the
smallest set that reaches the wanted share is found there, and what is reported of it is measured
on ``judge``. Beside it stand sets ranked by the length of their tuning vector, and random sets of
equally many other components of each kind whose vectors are scaled to the same length: a set
that is no better than these was not found by attribution. Every value is a forward pass, no
estimate; intervals are 95 % percentiles of a bootstrap over prompts, of the ratio of means. Where
the metric's own change on the judging prompts is not surely different from 0, shares of it mean
nothing, and the sentence says ``cannot tell``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.components import Component, key_columns
from tvlens.errors import PromptError, StudyError
from tvlens.models.metrics import Metric
from tvlens.models.prompts import Batch
from tvlens.models.reading import Reading
from tvlens.tables import Table, concatenated, keyed_schema

from .gates import GatedModel
from .partition import Partition, partition
from .weights import NOISE, WeightScores, chunks

Question = Literal["restored", "destroyed"]
Order = Literal["score", "delta_norm", "random"]
QUESTIONS: tuple[Question, ...] = ("restored", "destroyed")
RANDOM_SETS = 5
"""Random sets at every size: enough to see their spread, few enough for their passes."""
RESAMPLES = 1_000
LONGEST_SCALE = 100.0
"""A random set whose vectors would have to be made longer than this is left as long as that: it
then holds next to no tuning vector, and what it does says nothing."""

CURVES_SCHEMA = pa.schema(
    [
        ("curve", pa.string()),
        ("ranked_by", pa.string()),
        ("draw", pa.int32()),
        ("split", pa.string()),
        ("base", pa.string()),
        ("tuned", pa.string()),
        ("metric", pa.string()),
        ("unit", pa.string()),
        ("k", pa.int32()),
        ("of", pa.int32()),
        ("share_of_norm", pa.float64()),
        ("scale", pa.float64()),
        ("value", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("n", pa.int32()),
        ("task", pa.string()),
    ]
)
"""``curve`` is ``restored`` or ``destroyed`` here, ``sweep`` for the curves of doses."""
GRAFTS_SCHEMA = keyed_schema(
    ("curve", pa.string()),
    ("place", pa.int32()),
    ("score", pa.float64()),
    ("delta_norm", pa.float64()),
    ("metric", pa.string()),
)


@dataclass(frozen=True)
class Graft:
    """What grafting found for one pair.

    Attributes:
        curves: Share restored and destroyed against the size of the set, and the controls'.
        sets: The components of the smallest sets.
        facts: Sizes, shares on ``judge`` with their intervals, and the sentence of each.
    """

    curves: Table
    sets: Table
    facts: dict[str, Any]


def graft(
    gated: GatedModel,
    batch: Batch,
    metric: Metric,
    scores: WeightScores,
    *,
    choose: Sequence[int],
    judge: Sequence[int],
    keep: float = 0.9,
    seed: int = 0,
    names: tuple[str, str] = ("base", "tuned"),
) -> Graft:
    """Find the smallest sets of components that carry the change of ``metric``.

    Args:
        gated: The base with the tuning vector behind gates.
        batch: The prompts.
        metric: What is to be restored or destroyed.
        scores: Integrated scores of the same prompts.
        choose: Rows that sets are chosen on.
        judge: Rows that they are judged on.
        keep: Share of the change to restore or to destroy.
        seed: Of the random sets and the bootstrap.
        names: Of the two models.

    Raises:
        PromptError: One of the splits has no prompt.
        StudyError: The metric does not change on ``choose``, so there is nothing to restore.
    """
    if not choose or not judge:
        raise PromptError(
            "grafting chooses components on one half of the prompts and judges on the other, and "
            "one of the splits 'choose' and 'judge' is empty.",
            hint="Give more prompts, or set 'split' in the prompt file.",
        )
    search = _Search(gated, metric, batch, list(choose), list(judge), seed)
    ranked = search.ranked(scores)
    tables, sets, facts = [], [], {}
    for question in QUESTIONS:
        size = search.smallest(question, ranked, keep)
        found = search.curve(question, ranked, size)
        tables.append(_curves_table(found, search, metric, names))
        if size is not None:
            sets.append(_set_table(question, ranked[:size], search, scores, metric, names))
        facts[question] = _facts(
            question, size, keep, found, len(ranked), search.whole_change("judge")
        )
    empty = Table.of("grafts", GRAFTS_SCHEMA, {})
    return Graft(
        concatenated("curves", tables), concatenated("grafts", [*sets, empty]), {"graft": facts}
    )


@dataclass(frozen=True)
class _Point:
    """One forward of one set on one split."""

    question: Question
    order: Order
    draw: int
    split: str
    k: int
    share_of_norm: float
    scale: float
    value: float
    low: float
    high: float


class _Search:
    """The prompts of both splits, measured with sets of components let in."""

    def __init__(
        self,
        gated: GatedModel,
        metric: Metric,
        batch: Batch,
        choose: list[int],
        judge: list[int],
        seed: int,
    ) -> None:
        self.gated, self.seed = gated, seed
        self.parts: Partition = partition(gated)
        self.rows = {"choose": choose, "judge": judge}
        self.readings: dict[str, list[Reading]] = {
            split: [
                gated.reading(metric, part) for part in chunks(batch.rows(rows), gated.lens.d_vocab)
            ]
            for split, rows in self.rows.items()
        }
        nothing = torch.zeros(len(self.parts.components))
        self.ends = {
            split: (self._values(nothing, split), self._values(nothing + 1, split))
            for split in self.rows
        }
        change = self._change("choose").mean()
        if abs(float(change)) <= NOISE:
            raise StudyError(
                f"{metric.name} changes by {float(change):.2g} {metric.unit} on the prompts of "
                "'choose': there is nothing to restore.",
                hint="Choose prompts, or a metric, on which the two models differ.",
            )

    def ranked(self, scores: WeightScores) -> Int[Tensor, " candidate"]:
        """Candidates by how much of the change their score carries on ``choose``."""
        rows = {component: row for row, component in enumerate(scores.components)}
        places = [rows[component] for component in self.parts.components]
        mean = scores.values[places][:, self.rows["choose"]].mean(1)
        sign = self._change("choose").mean().sign()
        return torch.argsort(sign * mean, descending=True, stable=True)

    def smallest(
        self, question: Question, ranked: Int[Tensor, " candidate"], keep: float
    ) -> int | None:
        """The fewest of ``ranked`` that reach ``keep`` on ``choose``; None if no number does.

        Sizes double until one does; then the gap is halved, so that a curve that is not monotone
        may hold a smaller size in between that was not looked at.
        """
        below, above = 0, None
        for size in _sizes(len(ranked)):
            if self._share(question, ranked[:size], "choose", 1.0).mean >= keep:
                above = size
                break
            below = size
        while above is not None and above - below > 1:
            middle = (above + below) // 2
            reached = self._share(question, ranked[:middle], "choose", 1.0).mean >= keep
            below, above = (below, middle) if reached else (middle, above)
        return above

    def curve(
        self, question: Question, ranked: Int[Tensor, " candidate"], size: int | None
    ) -> list[_Point]:
        """The set by score, the set by length and random sets, at every size, on both splits."""
        by_norm = torch.argsort(self.parts.norms, descending=True, stable=True)
        points = []
        for k in sorted({*_sizes(len(ranked)), *([size] if size else [])}):
            points += self._points(question, "score", 0, ranked[:k], 1.0)
            points += self._points(question, "delta_norm", 0, by_norm[:k], 1.0)
            for draw in range(RANDOM_SETS):
                chosen, scale = self._random(ranked[:k], draw)
                points += self._points(question, "random", draw, chosen, scale)
        return points

    def _points(
        self, question: Question, order: Order, draw: int, chosen: Tensor, scale: float
    ) -> list[_Point]:
        share = self.parts.norm(chosen) / max(float(self.parts.norms.pow(2).sum().sqrt()), 1e-30)
        found = []
        for split in self.rows:
            value = self._share(question, chosen, split, scale)
            found.append(
                _Point(
                    question, order, draw, split, len(chosen), share, scale,
                    value.mean, value.low, value.high,
                )
            )  # fmt: skip
        return found

    def _random(self, chosen: Int[Tensor, " k"], draw: int) -> tuple[Int[Tensor, " k"], float]:
        """As many others of each kind, and the factor that gives them equal length.

        Where a kind has too few others, all of them are taken and the rest comes from the set.
        """
        rng = np.random.default_rng([self.seed, draw, len(chosen)])
        kinds = np.array([component.kind for component in self.parts.components])
        mine = np.isin(np.arange(len(kinds)), chosen.numpy())
        picked = []
        for kind in np.unique(kinds[mine]):
            same, count = kinds == kind, int((kinds[mine] == kind).sum())
            order = [rng.permutation(np.flatnonzero(same & side)) for side in (~mine, mine)]
            picked.append(np.concatenate(order)[:count])
        drawn = torch.from_numpy(np.concatenate(picked))
        longest = LONGEST_SCALE * self.parts.norm(drawn)
        scale = min(self.parts.norm(chosen), longest) / max(self.parts.norm(drawn), 1e-30)
        return drawn, scale

    def _share(
        self, question: Question, chosen: Int[Tensor, " k"], split: str, scale: float
    ) -> "Interval":
        base, tuned = self.ends[split]
        start = 0.0 if question == "restored" else 1.0
        values = torch.full((len(self.parts.components),), start)
        values[chosen] = scale if question == "restored" else 1.0 - scale
        edited = self._values(values, split)
        moved = edited - base if question == "restored" else tuned - edited
        return share_of_change(moved, tuned - base, self.seed)

    def whole_change(self, split: str) -> "Interval":
        """Mean of metric(tuned) - metric(base), with its bootstrap."""
        change = self._change(split)
        return share_of_change(change, torch.ones_like(change), self.seed)

    def _change(self, split: str) -> Float[Tensor, " prompt"]:
        base, tuned = self.ends[split]
        return tuned - base

    def _values(self, values: Float[Tensor, " candidate"], split: str) -> Float[Tensor, " prompt"]:
        found = [
            self.gated.values(self.parts.gates(values, len(reading.batch)), reading)
            for reading in self.readings[split]
        ]
        return torch.cat(found).cpu().double()


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def share_of_change(
    moved: Float[Tensor, " prompt"], change: Float[Tensor, " prompt"], seed: int
) -> Interval:
    """Mean of ``moved`` over mean of ``change``, with its bootstrap over prompts."""
    top, bottom = moved.numpy(), change.numpy()
    drawn = np.random.default_rng(seed).integers(0, len(top), (RESAMPLES, len(top)))
    below = bottom[drawn].mean(1)
    ratios = (top[drawn].mean(1) / np.where(below == 0, np.nan, below))[below != 0]
    low, high = np.quantile(ratios, (0.025, 0.975)) if len(ratios) else (np.nan, np.nan)
    return Interval(float(top.mean() / bottom.mean()), float(low), float(high))


def _sizes(count: int) -> list[int]:
    """1, 2, 4, ... and ``count``."""
    return sorted({*(2**power for power in range(count.bit_length()) if 2**power <= count), count})


def _curves_table(
    points: Sequence[_Point], search: _Search, metric: Metric, names: tuple[str, str]
) -> Table:
    count = len(points)
    columns: dict[str, Sequence[object]] = {
        "curve": [p.question for p in points],
        "ranked_by": [p.order for p in points],
        "draw": [p.draw for p in points],
        "split": [p.split for p in points],
        "base": [names[0]] * count,
        "tuned": [names[1]] * count,
        "metric": [metric.name] * count,
        "unit": ["share of the change"] * count,
        "k": [p.k for p in points],
        "of": [len(search.parts.components)] * count,
        "share_of_norm": [p.share_of_norm for p in points],
        "scale": [p.scale for p in points],
        "value": [p.value for p in points],
        "ci_low": [p.low for p in points],
        "ci_high": [p.high for p in points],
        "n": [len(search.rows[p.split]) for p in points],
    }
    return Table.of("curves", CURVES_SCHEMA, columns)


def _set_table(
    question: Question,
    chosen: Int[Tensor, " k"],
    search: _Search,
    scores: WeightScores,
    metric: Metric,
    names: tuple[str, str],
) -> Table:
    components: list[Component] = [search.parts.components[int(i)] for i in chosen]
    rows = {component: row for row, component in enumerate(scores.components)}
    mean = scores.values[[rows[c] for c in components]][:, search.rows["choose"]].mean(1)
    count = len(components)
    columns: dict[str, Sequence[object]] = {
        **key_columns(components),
        "base": [names[0]] * count,
        "tuned": [names[1]] * count,
        "tied": [False] * count,
        "curve": [question] * count,
        "place": list(range(1, count + 1)),
        "score": mean.tolist(),
        "delta_norm": search.parts.norms[chosen].tolist(),
        "metric": [metric.name] * count,
    }
    return Table.of("grafts", GRAFTS_SCHEMA, columns)


def _facts(
    question: Question,
    size: int | None,
    keep: float,
    points: Sequence[_Point],
    of: int,
    change: "Interval",
) -> dict[str, Any]:
    """The smallest set on ``judge``, beside the sets of the same size ranked otherwise."""
    verb = "restores" if question == "restored" else "destroys"
    if size is None:
        sentence = f"no number of the components ranked by score {verb} {keep:.0%} of the change."
        return {"size": None, "of": of, "keep": keep, "sentence": sentence}
    if change.low <= 0 <= change.high:
        sentence = (
            f"cannot tell what {verb} the change: on the judging prompts the metric itself changes "
            f"by {change.mean:.3g} [{change.low:.3g}, {change.high:.3g}]."
        )
        return {"size": size, "of": of, "keep": keep, "sentence": sentence}
    judged = [p for p in points if p.split == "judge" and p.k == size]
    mine = next(p for p in judged if p.order == "score")
    longest = next(p for p in judged if p.order == "delta_norm")
    drawn = [p.value for p in judged if p.order == "random"]
    best = max(longest.value, *drawn)
    verdict = "better than" if mine.low > best else "not surely better than"
    sentence = (
        f"the smallest set by score that {verb} {keep:.0%} of the change on the choosing prompts "
        f"has {size} of {of} components ({mine.share_of_norm:.1%} of the tuning vector's length); "
        f"on the judging prompts it {verb} {mine.value:.0%} [{mine.low:.0%}, {mine.high:.0%}], "
        f"{verdict} as many ranked by length ({longest.value:.0%}) and random sets of equal length "
        f"({min(drawn):.0%} to {max(drawn):.0%})."
    )
    return {
        "size": size,
        "of": of,
        "keep": keep,
        "judged": mine.value,
        "ci_low": mine.low,
        "ci_high": mine.high,
        "by_delta_norm": longest.value,
        "random": drawn,
        "sentence": sentence,
    }
