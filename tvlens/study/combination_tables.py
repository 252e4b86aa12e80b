"""The table of a grid of combined vectors, its items, and what to say of each task.

``difference`` is to the base, ``over_single`` to the best of the stored fine-tunes, in the
measure's own direction; ``interaction`` see ``combination_samples``. The best fine-tune and the
best point of a task are those whose mean over the items of ``choose`` is best (over all items where
a task has no such split); what is quoted of them is the value on the items of ``judge``.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from tvlens.evaluation.measures import MEASURES
from tvlens.evaluation.suite import ITEMS_SCHEMA, Measured
from tvlens.evaluation.tasks import MEASURED, Task
from tvlens.tables import Table

from .combination_points import Point
from .combination_samples import Samples, difference, ends, good, interaction, splits_of
from .combining import Found
from .plan import StudyPlan

COMBINATIONS_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("base", "method", "model")),
        ("vectors", pa.list_(pa.string())),
        ("scales", pa.list_(pa.float64())),
        ("acting", pa.int32()),
        *((name, pa.string()) for name in ("replaced", "by")),
        ("draw", pa.int32()),
        *((name, pa.string()) for name in ("task", "kind", "domain", "split", "measure")),
        ("primary", pa.bool_()),
        *((name, pa.string()) for name in ("unit", "better")),
        *((name, pa.float64()) for name in ("value", "ci_low", "ci_high")),
        ("n", pa.int32()),
        *((name, pa.float64()) for name in ("difference", "difference_low", "difference_high")),
        ("single", pa.string()),
        *((name, pa.float64()) for name in ("over_single", "over_single_low", "over_single_high")),
        *((name, pa.float64()) for name in ("interaction", "interaction_low", "interaction_high")),
    ]
)
"""One row a task x measure x point x split.

    vectors, scales    which fine-tunes' vectors, and the dose of each
    acting             how many have a dose
    replaced, by, draw which vector something stands in for, and what; null on the grid itself
    single             the fine-tune that ``over_single`` is to
"""


def combination_tables(
    plan: StudyPlan, found: Found, tasks: Sequence[Task]
) -> tuple[tuple[Table, ...], dict[str, Any]]:
    """The grid and its items, and facts with a sentence a task.

    Args:
        plan: What was asked.
        found: What every model did.
        tasks: The tasks.
    """
    samples = Samples(tasks, plan.seed, found.models)
    rows = [row for task in tasks for row in _rows(plan, found, task, samples)]

    items = [row for one in found.models for task in tasks for row in _item_rows(one, task)]
    tables = (
        _table("combinations", COMBINATIONS_SCHEMA, rows),
        _table("combination_items", ITEMS_SCHEMA, items),
    )
    facts = {task.spec.name: _facts(found, task, samples) for task in tasks}
    sentences = [_sentence(task, facts[task.spec.name], found) for task in tasks]
    return tables, {"tasks": facts, "sentences": [text for text in sentences if text]}


def _table(name: str, schema: pa.Schema, rows: list[dict[str, Any]]) -> Table:
    columns = {column: [row.get(column) for row in rows] for column in schema.names}
    return Table.of(name, schema, columns)


def _item_rows(one: Measured, task: Task) -> Iterator[dict[str, Any]]:
    shared = {**one.variant._asdict(), "task": task.spec.name, "kind": task.spec.kind}
    for item in one.items[task.spec.name]:
        yield {**shared, "split": task.items[item.item].split, **item._asdict()}


def _rows(plan: StudyPlan, found: Found, task: Task, samples: Samples) -> Iterator[dict[str, Any]]:
    for measure in MEASURED[task.spec.kind]:
        if not len(samples.of(found.base, task, measure).items):
            continue  # no item has a value in every model
        single = best_single(found, task, measure, samples)
        for split in splits_of(task):
            value = partial(_value, found, samples, task, measure, split)
            other = None if single is None else samples.of(single, task, measure, split)
            for point in found.points:
                row = {**_named(plan, found, point), **_measure(task, measure), "split": split}
                row |= _compared(point, value, other)
                yield row if single is None else {**row, "single": single.variant.model}


def _value(
    found: Found, samples: Samples, task: Task, measure: str, split: str, point: Point
) -> Any:
    return samples.of(found.points[point], task, measure, split)


def _named(plan: StudyPlan, found: Found, point: Point) -> dict[str, Any]:
    stand = point.stand_in
    row: dict[str, Any] = {
        "base": found.base_name,
        "method": plan.method,
        "model": found.points[point].variant.model,
        "vectors": list(found.names),
        "scales": list(point.scales),
        "acting": len(point.acting),
    }
    if stand is not None:
        row |= {"replaced": found.names[stand.which], "by": stand.by, "draw": stand.draw}
    return row


def _measure(task: Task, measure: str) -> dict[str, Any]:
    return {
        "task": task.spec.name,
        "kind": task.spec.kind,
        "domain": task.spec.domain,
        "measure": measure,
        "primary": measure == task.spec.primary,
        "unit": MEASURES[measure].unit,
        "better": MEASURES[measure].better or None,
    }


def _compared(point: Point, value: Any, single: Any) -> dict[str, Any]:
    mine = value(point)
    row = {**ends(mine, "ci", value="value"), "n": len(mine.items)}
    row |= ends(difference(mine, value(point.only(()))), "difference")
    if single is not None:
        row |= ends(difference(mine, single), "over_single")
    if len(point.acting) > 1:
        row |= ends(interaction(point, value), "interaction")
    return row


def choosing_split(task: Task) -> str:
    """The items that a best point is chosen on."""
    return "choose" if "choose" in splits_of(task) else "all"


def judging_split(task: Task) -> str:
    """The items that it is reported on."""
    return "judge" if "judge" in splits_of(task) else "all"


def best_single(found: Found, task: Task, measure: str, samples: Samples) -> Measured | None:
    """The stored fine-tune that is best on the choosing items; None without a good direction."""
    sign, split = good(measure), choosing_split(task)
    if not sign:
        return None
    models = found.alone.values()
    return max(models, key=lambda one: sign * samples.of(one, task, measure, split).value)


def best_point(
    points: Sequence[Point], found: Found, task: Task, measure: str, samples: Samples
) -> Point | None:
    """The point that is best on the choosing items; None without a good direction."""
    sign, split = good(measure), choosing_split(task)
    if not sign or not points:
        return None
    return max(
        points,
        key=lambda point: sign * samples.of(found.points[point], task, measure, split).value,
    )


def _facts(found: Found, task: Task, samples: Samples) -> dict[str, Any]:
    name = task.spec.primary
    measure = MEASURES[name]
    known: dict[str, Any] = {
        "metric": name,
        "unit": measure.unit,
        "better": measure.better,
        "domain": task.spec.domain,
    }
    if not len(samples.of(found.base, task, name).items):
        return known
    models = {found.base_name: found.base, **found.alone}
    known["models"] = {
        model: _quoted(samples, one, task, name, "all") for model, one in models.items()
    }
    for fact, points in (("best", found.grid), ("best_combination", found.combinations)):
        best = best_point(points, found, task, name, samples)
        if best is not None:
            one = found.points[best]
            quoted = _quoted(samples, one, task, name, judging_split(task))
            known[fact] = {"model": one.variant.model, "scales": list(best.scales), **quoted}
    return known


def _quoted(
    samples: Samples, one: Measured, task: Task, measure: str, split: str
) -> dict[str, Any]:
    """A value with its ends, null where there is no interval."""
    whole = samples.of(one, task, measure, split).interval
    known = {"value": whole.value, "low": whole.low, "high": whole.high}
    return {"split": split, **{k: v if v == v else None for k, v in known.items()}}


def _sentence(task: Task, facts: dict[str, Any], found: Found) -> str:
    """What can be quoted of a task: the models themselves, and the best combination."""
    if "models" not in facts:
        return ""
    unit = f", {facts['unit']}" if facts["unit"] else ""
    of = f", of {facts['domain']}" if facts["domain"] in found.names else ", elsewhere"
    values = ", ".join(
        f"{_text(said['value'])} in {model}" for model, said in facts["models"].items()
    )
    text = f"{task.spec.name} ({facts['metric']}{unit}{of}): {values}."
    best = facts.get("best_combination")
    if best is None:
        return text
    ends = f" [{_text(best['low'])}, {_text(best['high'])}]"
    where = "judging items" if best["split"] == "judge" else "items that it was chosen on"
    return f"{text} Best combination: {best['model']}, {_text(best['value'])}{ends} on the {where}."


def _text(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.4g}"
