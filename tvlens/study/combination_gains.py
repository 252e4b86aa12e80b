"""The gain of the chosen combination over everything that the paper's claim is judged against.

Judged are tasks *elsewhere* (of no fine-tune whose vector is combined) and, for each measure that
some task of every domain has, its mean over domains, in which each domain counts once. With f the
measure (or mean) in the good direction and s the point that is best on the items of ``choose``
among those at which two vectors or more have a dose, one row is

    D = f(s) - f(other)        on the items of ``judge``, paired, 95 %

    base         the base
    fine-tune    each fine-tune as it was stored
    alone        each vector alone at its dose that is best on ``choose``
    random       s with a random vector as long in place of one
    control      s with a control fine-tune's vector as long in place of one; not where the task is
                 of that control's domain

The rule is in ``combination_claims`` and docs/claims.md.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from tvlens.evaluation.intervals import Sampled, averaged
from tvlens.evaluation.measures import MEASURES
from tvlens.evaluation.suite import Measured
from tvlens.evaluation.tasks import Task
from tvlens.tables import Table

from .combination_points import RANDOM, Point
from .combination_samples import Samples, difference, ends, good, splits_of, towards
from .combining import Found
from .plan import StudyPlan

Scope = Literal["elsewhere", "domains"]
Kind = Literal["base", "fine-tune", "alone", "random", "control"]
MEAN = "mean over domains"
QUALITY = ("chrf", "rouge_l")
"""Measures of generation that say how good it is; the others say what it is like."""
GAINS_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("scope", "task", "measure", "unit", "model")),
        ("scales", pa.list_(pa.float64())),
        *((name, pa.string()) for name in ("kind", "over")),
        *((name, pa.float64()) for name in ("gain", "ci_low", "ci_high")),
        ("n", pa.int32()),
    ]
)
"""One row a comparison; without ``over`` where a task has no items to choose or to judge on."""


class Target(NamedTuple):
    """What is judged.

    Attributes:
        scope: A task elsewhere, or the mean over domains.
        name: The task's name, or ``MEAN``.
        measure: Its measure.
        tasks: The tasks.
        weights: How much each counts; they sum to 1.
    """

    scope: Scope
    name: str
    measure: str
    tasks: tuple[Task, ...]
    weights: tuple[float, ...]

    @property
    def owners(self) -> set[str]:
        """The domains of its tasks."""
        return {task.spec.domain for task in self.tasks if task.spec.domain}

    @property
    def can_be_judged(self) -> bool:
        """Whether all tasks have items to choose and to judge on."""
        return all("judge" in splits_of(task) for task in self.tasks)


def gains_table(plan: StudyPlan, found: Found, tasks: Sequence[Task]) -> Table:
    """Every comparison that decides the claim.

    Args:
        plan: What was asked.
        found: What every model did.
        tasks: The tasks.
    """
    samples = Samples(tasks, plan.seed, found.models)
    rows = [row for one in targets(tasks, found.names) for row in _rows(found, one, samples)]
    columns = {name: [row.get(name) for row in rows] for name in GAINS_SCHEMA.names}
    return Table.of("combination_gains", GAINS_SCHEMA, columns)


def targets(tasks: Sequence[Task], names: Sequence[str]) -> list[Target]:
    """What of the tasks the claim is judged on, by their own metrics.

    Args:
        tasks: The tasks.
        names: The fine-tunes whose vectors are combined: their domains.
    """
    fitting = [task for task in tasks if _says_how_good(task)]
    found = [
        Target("elsewhere", task.spec.name, task.spec.primary, (task,), (1.0,))
        for task in fitting
        if task.spec.domain not in names
    ]
    for measure in dict.fromkeys(task.spec.primary for task in fitting):
        of_domain = {
            name: [t for t in fitting if t.spec.domain == name and t.spec.primary == measure]
            for name in names
        }
        if all(of_domain.values()):
            chosen = [(t, 1 / len(names) / len(own)) for own in of_domain.values() for t in own]
            of, weights = zip(*chosen, strict=True)
            found.append(Target("domains", MEAN, measure, of, weights))
    return found


def _says_how_good(task: Task) -> bool:
    quality = task.spec.kind != "generation" or task.spec.primary in QUALITY
    return bool(good(task.spec.primary)) and quality


def _rows(found: Found, target: Target, samples: Samples) -> Iterator[dict[str, Any]]:
    named = {
        "scope": target.scope,
        "task": target.name,
        "measure": target.measure,
        "unit": MEASURES[target.measure].unit,
    }
    if not target.can_be_judged or not found.combinations:
        yield named
        return
    best = chosen_point(found.combinations, found, target, samples)
    named |= {"model": found.points[best].variant.model, "scales": list(best.scales)}
    sign, mine = good(target.measure), value_of(found.points[best], target, samples, "judge")
    for kind, other in others(found, best, target, samples):
        gain = towards(difference(mine, value_of(other, target, samples, "judge")), sign)
        row = {**named, "kind": kind, "over": other.variant.model, "n": len(gain.items)}
        yield {**row, **ends(gain, "ci", value="gain")}


def value_of(one: Measured, target: Target, samples: Samples, split: str) -> Sampled:
    """What is judged, of one model on the items of a split."""
    return averaged(
        [
            (weight, samples.of(one, task, target.measure, split))
            for task, weight in zip(target.tasks, target.weights, strict=True)
        ]
    )


def chosen_point(points: Sequence[Point], found: Found, target: Target, samples: Samples) -> Point:
    """The point that is best on the items of ``choose``; the first of several."""
    sign = good(target.measure)
    return max(
        points,
        key=lambda point: sign * value_of(found.points[point], target, samples, "choose").value,
    )


def others(
    found: Found, best: Point, target: Target, samples: Samples
) -> Iterator[tuple[Kind, Measured]]:
    """Everything that the chosen point must be better than."""
    yield "base", found.base
    for one in found.alone.values():
        yield "fine-tune", one
    for place in range(len(found.names)):
        single = [point for point in found.grid if point.acting == (place,)]
        yield "alone", found.points[chosen_point(single, found, target, samples)]
    for point in found.stood_in(best):
        stand = point.stand_in
        if stand is not None and stand.by == RANDOM:
            yield "random", found.points[point]
        elif stand is not None and stand.by not in target.owners:
            yield "control", found.points[point]
