"""The tables and the sentences of a sweep.

Each task has one curve for the tuning vector and one for each control, of the task's own metric.
The best dose is the one whose mean over the items of ``choose`` is best; what is reported of it is
the value on the items of ``judge``. A tuning vector is *more than a push* on a task where, at the
dose compared, it differs from each random vector (paired 95 % interval without zero) and moves the
metric further from where the sweep starts than each of them does.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tvlens.attribution.grafting import CURVES_SCHEMA
from tvlens.evaluation.intervals import Values, comparison, interval
from tvlens.evaluation.measures import MEASURES
from tvlens.evaluation.suite import Measured, evaluation_tables, primary_rows, values_of
from tvlens.evaluation.tasks import Task
from tvlens.tables import Table

from .plan import StudyPlan

if TYPE_CHECKING:
    from tvlens.weights.matching import Pair


def sweep_tables(
    plan: StudyPlan,
    pair: "Pair",
    tasks: Sequence[Task],
    found: Sequence[Measured],
    *,
    share_of_norm: float,
    known: Collection[str] = (),
) -> tuple[tuple[Table, ...], dict[str, Any]]:
    """Curves, evaluation and items of all variants, and what to say of each task.

    Args:
        plan: What was asked.
        pair: Base and fine-tune.
        tasks: The tasks.
        found: The base, the tuned model, and every variant.
        share_of_norm: Length of the part over that of the whole vector.
        known: Models whose rows are left out.
    """
    base, tuned = found[0], found[1]
    start = base if plan.rest == "base" else tuned
    against = start.variant.model
    evaluation, items = evaluation_tables(
        found, tasks, against=against, seed=plan.seed, without=known
    )
    curves = _curves(plan, pair, evaluation, share_of_norm)
    facts = {task.spec.name: _facts(plan, task, found, start) for task in tasks}
    return (curves, evaluation, items), facts


def _curves(plan: StudyPlan, pair: "Pair", evaluation: Table, share_of_norm: float) -> Table:
    rows = primary_rows(evaluation)
    rows = rows[rows["control"].notna()]
    count = len(rows)
    columns = {
        "curve": ["sweep"] * count,
        "ranked_by": rows["control"],
        "draw": rows["draw"].astype("Int32"),
        "split": rows["split"],
        "base": [pair.base_name] * count,
        "tuned": [pair.tuned_name] * count,
        "metric": rows["measure"],
        "unit": rows["unit"],
        "share_of_norm": [share_of_norm] * count,
        "scale": rows["scale"],
        "value": rows["value"],
        "ci_low": rows["ci_low"],
        "ci_high": rows["ci_high"],
        "n": rows["n"].astype("Int32"),
        "task": rows["task"],
    }
    return Table.of("curves", CURVES_SCHEMA, columns)


def _facts(
    plan: StudyPlan, task: Task, found: Sequence[Measured], start: Measured
) -> dict[str, Any]:
    base, tuned = found[0], found[1]
    measure = MEASURES[task.spec.primary]
    value = {one.variant.model: _value(one, task, plan.seed) for one in (base, tuned)}
    facts: dict[str, Any] = {
        "metric": measure.name,
        "unit": measure.unit,
        "better": measure.better,
        **{end: value[one.variant.model] for end, one in (("base", base), ("tuned", tuned))},
        **_best(plan, task, found),
        **_beside(plan, task, found, start),
    }
    what = "the tuning vector" if plan.is_whole else "this part of the tuning vector"
    return {**facts, "sentence": _sentence(task, facts, tuned.variant.model, what)}


def _value(one: Measured, task: Task, seed: int) -> float | None:
    values = values_of(one.items[task.spec.name], task.spec.primary)
    if not len(values.items):
        return None
    return interval(values, MEASURES[task.spec.primary].transform, seed=seed).value


def _best(plan: StudyPlan, task: Task, found: Sequence[Measured]) -> dict[str, Any]:
    """The best dose on ``choose`` and its value on ``judge``; empty where there is no best."""
    measure = MEASURES[task.spec.primary]
    split = {number: item.split for number, item in task.items.items()}
    if not measure.better or set(split.values()) != {"choose", "judge"}:
        return {}
    sign = 1.0 if measure.better == "higher" else -1.0
    best: tuple[float, float, Measured] | None = None
    for one in (m for m in found if m.variant.control == "tuning"):
        chosen = _of_split(one, task, split, "choose")
        if not len(chosen.items) or one.variant.scale is None:
            continue
        value = sign * interval(chosen, measure.transform, seed=plan.seed).value
        if best is None or value > best[0]:
            best = value, one.variant.scale, one
    if best is None:
        return {}
    judged = interval(_of_split(best[2], task, split, "judge"), measure.transform, seed=plan.seed)
    ends = {"best_low": judged.low, "best_high": judged.high}
    known = {name: end if np.isfinite(end) else None for name, end in ends.items()}
    return {"best_scale": best[1], "best": judged.value, **known}


def _of_split(one: Measured, task: Task, split: dict[int, str], name: str) -> Values:
    items = [item for item in one.items[task.spec.name] if split[item.item] == name]
    return values_of(items, task.spec.primary)


def _beside(
    plan: StudyPlan, task: Task, found: Sequence[Measured], start: Measured
) -> dict[str, Any]:
    """The tuning vector and its controls at the dose farthest compared: one from the start."""
    origin = 0.0 if plan.rest == "base" else 1.0
    aim = 1.0 - origin
    scale = min((s for s in plan.doses if s != origin), key=lambda s: abs(s - aim))
    at = [one for one in found if one.variant.scale == scale]
    mine = next(one for one in at if one.variant.control == "tuning")
    others = [one for one in at if one is not mine]
    controls: dict[str, list[float | None]] = {}
    for one in others:
        controls.setdefault(str(one.variant.control), []).append(_value(one, task, plan.seed))
    random = [one for one in others if one.variant.control in ("random", "random_set")]
    return {
        "compared_at": scale,
        "at_that_scale": _value(mine, task, plan.seed),
        "controls": controls,
        "more_than_a_push": _stands_out(plan, task, mine, random, start),
        "moved_farther_by": [
            str(one.variant.control)
            for one in others
            if one not in random and _goes_farther(plan, task, one, mine, start)
        ],
    }


def _stands_out(
    plan: StudyPlan, task: Task, mine: Measured, others: Sequence[Measured], start: Measured
) -> bool | None:
    """Whether one vector does surely more than every other; None without any to compare with."""
    measure, (name, primary) = MEASURES[task.spec.primary], (task.spec.name, task.spec.primary)
    here, origin = (values_of(one.items[name], primary) for one in (mine, start))
    if not others or not len(here.items):
        return None
    moved = [values_of(one.items[name], primary) for one in (mine, *others)]
    if any(not np.array_equal(one.items, origin.items) for one in moved):
        return None
    steps = [
        abs(comparison(one, origin, measure.transform, seed=plan.seed).difference) for one in moved
    ]
    apart = [comparison(here, one, measure.transform, seed=plan.seed) for one in moved[1:]]
    surely = all(one.low > 0 or one.high < 0 for one in apart)
    return surely and steps[0] > max(steps[1:])


def _goes_farther(
    plan: StudyPlan, task: Task, one: Measured, mine: Measured, start: Measured
) -> bool:
    """Whether a control surely does more than the vector, and the same way."""
    at = [_value(x, task, plan.seed) for x in (one, mine, start)]
    if None in at or not _stands_out(plan, task, one, [mine], start):
        return False
    other, own, origin = (float(x or 0.0) for x in at)
    return (other - origin) * (own - origin) > 0


def _sentence(task: Task, facts: dict[str, Any], tuned: str, what: str) -> str:
    unit = f", {facts['unit']}" if facts["unit"] else ""
    parts = [
        f"{task.spec.name} ({facts['metric']}{unit}): {_text(facts['base'])} in the base, "
        f"{_text(facts['tuned'])} in {tuned}."
    ]
    if "best_scale" in facts:
        ends = f" [{_text(facts['best_low'])}, {_text(facts['best_high'])}]"
        parts.append(
            f"Best dose on the choosing items: {facts['best_scale']:g}, with "
            f"{_text(facts['best'])}{ends} on the judging ones."
        )
    if facts["controls"]:
        listed = "; ".join(_control(name, values) for name, values in facts["controls"].items())
        parts.append(
            f"At dose {facts['compared_at']:g} {what} gives "
            f"{_text(facts['at_that_scale'])}; in its place {listed}."
        )
    if (verdict := facts["more_than_a_push"]) is not None:
        parts.append(
            "It does more than any random push as hard."
            if verdict
            else "It does not surely do more than a random push as hard."
        )
    if farther := facts.get("moved_farther_by"):
        parts.append(f"The control {' and '.join(farther)} moves it farther.")
    return " ".join(parts)


def _control(name: str, values: Sequence[float | None]) -> str:
    words = {"random": "random vectors as long", "random_set": "as many other components as long"}
    known = sorted(value for value in values if value is not None)
    if not known:
        return f"{words.get(name, name)}: nothing measured"
    ends = _text(known[0]) if len(known) == 1 else f"{_text(known[0])} to {_text(known[-1])}"
    return f"{words.get(name, f'the control {name}')} {ends}"


def _text(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.4g}"
