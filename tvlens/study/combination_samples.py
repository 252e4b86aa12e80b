"""Measures of combined models as sums over the same bootstrap draws of items.

Every comparison of points of a grid is a sum of values of models on the same items,

    difference     f(s) - f(0)
    interaction    f(s) - sum_j f(s_j alone) + (m - 1) f(0), over the m vectors that have a dose;
                   0 where effects add up, negative where a measure is lower than they would say

so the draws of each model are made once and summed (paired intervals, 95 %, percentiles).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvlens.evaluation.intervals import Sampled, sampled, summed
from tvlens.evaluation.measures import MEASURES
from tvlens.evaluation.suite import Measured, values_of
from tvlens.evaluation.tasks import Task

from .combination_points import Point

Value = Callable[[Point], Sampled]
"""The measure of one task at a point, on the items of one split."""


def splits_of(task: Task) -> tuple[str, ...]:
    """``all``, and ``choose`` and ``judge`` where a task has both; else the split that it asks."""
    both = {item.split for item in task.items.values()} == {"choose", "judge"}
    return ("all", "choose", "judge") if both else (task.spec.split,)


def good(measure: str) -> float:
    """1 where a higher value is better, -1 where a lower one is, 0 where neither is."""
    return {"higher": 1.0, "lower": -1.0}.get(MEASURES[measure].better, 0.0)


@dataclass(frozen=True)
class Samples:
    """The draws of every model, task, measure and split, each made once.

    Items on which some model has no value (a text too short for its repetitions) are left out of
    all, so that any two are compared on the same ones.

    Attributes:
        tasks: The tasks; each has a seed of its own, so that draws of two are independent.
        seed: Of the study.
        models: All that are compared.
    """

    tasks: Sequence[Task]
    seed: int
    models: Sequence[Measured] = field(repr=False)
    _known: dict[tuple[str, str, str, str], Sampled] = field(default_factory=dict, repr=False)
    _common: dict[tuple[str, str], set[int]] = field(default_factory=dict, repr=False)

    def of(self, one: Measured, task: Task, measure: str, split: str = "all") -> Sampled:
        """One model on the items of a split of a task; of all items where there is no such split.

        Args:
            one: The model.
            task: The task.
            measure: The measure.
            split: ``choose``, ``judge``, or anything else for all items.
        """
        key = (one.variant.model, task.spec.name, measure, split)
        if key not in self._known:
            self._known[key] = self._sampled(one, task, measure, split)
        return self._known[key]

    def _sampled(self, one: Measured, task: Task, measure: str, split: str) -> Sampled:
        common = self._shared(task.spec.name, measure)
        items = [item for item in one.items[task.spec.name] if item.item in common]
        if split in ("choose", "judge"):
            items = [item for item in items if task.items[item.item].split == split]
        place = [other.spec.name for other in self.tasks].index(task.spec.name)
        seed = 1_000 * self.seed + place
        return sampled(values_of(items, measure), MEASURES[measure].transform, seed=seed)

    def _shared(self, task: str, measure: str) -> set[int]:
        """The items on which every model has a value."""
        if (task, measure) not in self._common:
            items = (
                {item.item for item in one.items[task] if item.measure == measure}
                for one in self.models
            )
            self._common[task, measure] = set.intersection(*items)
        return self._common[task, measure]


def difference(mine: Sampled, other: Sampled) -> Sampled:
    """``mine`` minus ``other``, paired."""
    return summed([(1.0, mine), (-1.0, other)])


def interaction(point: Point, value: Value) -> Sampled:
    """How far a point is from where the single effects add up to; see the module.

    Args:
        point: At least two vectors have a dose; a stand-in's single effect is its own.
        value: The measure at a point.

    Raises:
        ValueError: Fewer than two vectors have a dose.
    """
    if len(point.acting) < 2:
        raise ValueError(f"effects of one vector have nothing to add up with: {point.scales}.")
    terms = [(1.0, value(point)), (len(point.acting) - 1.0, value(point.only(())))]
    terms += [(-1.0, value(point.only((place,)))) for place in point.acting]
    return summed(terms)


def ends(found: Sampled, name: str, *, value: str | None = None) -> dict[str, Any]:
    """Columns ``name``, ``name_low`` and ``name_high``."""
    whole = found.interval
    return {value or name: whole.value, f"{name}_low": whole.low, f"{name}_high": whole.high}


def towards(found: Sampled, sign: float) -> Sampled:
    """A value times ``sign``: what ``good`` says gives it the good direction."""
    return found._replace(value=sign * found.value, draws=sign * found.draws)
