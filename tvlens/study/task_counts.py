"""How many models sweeps, combinations and representations measure, and how many rows come of it.

A task of most kinds gives a fixed number of rows a model. Where what a model writes decides (a text
too short for its repetitions has none), or which tensors two fine-tunes both changed, the rows lie
between two bounds. Tasks that lm-eval runs are not counted: it alone knows their documents.
"""

import math
from collections.abc import Mapping, Sequence

from tvlens.attribution.nodes import NODES
from tvlens.evaluation.harness import ReadyHarness
from tvlens.evaluation.representations import PARTS, TOKENS
from tvlens.evaluation.similarity import UNITS
from tvlens.evaluation.suite import Ready
from tvlens.evaluation.tasks import MEASURED, Instruction, Task
from tvlens.evaluation.texts import missing_packages
from tvlens.weights.layout import Layout
from tvlens.weights.matching import Pair

from .combination_gains import Target, targets
from .combination_points import Point, grid, points_with, stand_ins
from .combination_samples import splits_of
from .disturbances import PREDICTORS, added_at, of_domains
from .plan import StudyPlan, name_of, scales_in
from .row_counts import Rows
from .sweeping import start_of

ALWAYS_WRITTEN = ("loop", "length", "ended")
"""Measures of generation that every text has; the others need words, or a reference."""
REFERRED = ("chrf", "rouge_l")
"""Those that need a reference."""


def countable(tasks: Sequence[Ready]) -> list[Ready]:
    """The tasks whose items are known before a model runs."""
    return [one for one in tasks if not isinstance(one, ReadyHarness)]


def item_rows(task: Task, references: Sequence[str] = ()) -> dict[str, Rows]:
    """Rows of single items that one model gives, by measure.

    Args:
        task: The task.
        references: Models that distances are from: ``base``, ``tuned``.
    """
    kind, count = task.spec.kind, len(task.items)
    if kind == "kl":
        named = [f"{what}_{name}" for name in references for what in ("kl_to", "agree")]
        return {name: Rows.exactly(count) for name in named}
    if kind == "generation":
        return _written_rows(task)
    if kind == "instructions":
        asked = [i.constraints for i in task.items.values() if isinstance(i, Instruction)]
        each = {"prompt": count, "instruction": sum(map(len, asked))}
        return {name: Rows.exactly(each[name.split("_")[0]]) for name in MEASURED[kind]}
    return {name: Rows.exactly(count) for name in MEASURED[kind]}


def _written_rows(task: Task) -> dict[str, Rows]:
    count, lacking = len(task.items), missing_packages()
    referred = sum(getattr(item, "answer", None) is not None for item in task.items.values())
    found = {}
    for name in MEASURED["generation"]:
        if name in REFERRED:
            found[name] = Rows.exactly(0 if name in lacking else referred)
        else:
            found[name] = Rows(count if name in ALWAYS_WRITTEN else 0, count)
    return found


def value_rows(items: Mapping[str, Rows]) -> dict[str, Rows]:
    """One row a measure that has a value on some item."""
    return {n: Rows(min(1, rows.at_least), min(1, rows.at_most)) for n, rows in items.items()}


def total(rows: Sequence[Rows]) -> Rows:
    """The rows of several parts of a table."""
    return Rows(sum(one.at_least for one in rows), sum(one.at_most for one in rows))


def sweep_variants(plan: StudyPlan) -> int:
    """Doses of the tuning vector, and of all that stands in its place but where a sweep starts."""
    moved = len({*plan.doses} - {start_of(plan)})
    return len(plan.doses) + moved * sweep_stand_ins(plan)


def sweep_stand_ins(plan: StudyPlan) -> int:
    """What stands in a tuning vector's place: random vectors, other components, controls."""
    has_others = bool(plan.select or plan.top or plan.along)
    return plan.draws * (1 + has_others) + len(plan.controls)


def sweep_runs(plan: StudyPlan) -> int:
    """Models that a sweep runs: both ends once, each variant that is neither of them."""
    ends = {0.0, 1.0} if plan.is_whole else {start_of(plan)}
    return 2 + sweep_variants(plan) - len(ends & {*plan.doses})


def sweep_rows(plan: StudyPlan, tasks: Sequence[Ready]) -> dict[str, Rows]:
    """Rows of ``curves``, ``evaluation`` and ``evaluation_items`` of one fine-tune alone."""
    variants, curves, values, items = sweep_variants(plan), [], [], []
    for one in countable(tasks):
        found = item_rows(one.task, ("base", "tuned"))
        of_values = value_rows(found)
        curves.append(of_values[one.task.spec.primary].times(variants))
        values.append(total([*of_values.values()]).times(variants + 2))
        items.append(total([*found.values()]).times(variants + 2))
    return {
        "curves": total(curves),
        "evaluation": total(values),
        "evaluation_items": total(items),
    }


def representation_sizes(layout: Layout) -> dict[str, int]:
    """Components of each activation that is compared, by its part."""
    return {
        part: (layout.n_layers if NODES[part][0].layered else 1)
        * (layout.n_heads if NODES[part][0].kind == "head" else 1)
        for part in PARTS
    }


def represented_models(plan: StudyPlan) -> int:
    """Models that the base is compared with for one fine-tune."""
    return 1 + plan.draws + len(plan.controls)


def representation_rows(pair: Pair, plan: StudyPlan) -> Rows:
    """Rows of ``representations`` of one fine-tune, by activation."""
    each = len(TOKENS) * len(UNITS) * represented_models(plan)
    by = {part: each * count for part, count in representation_sizes(pair.layout).items()}
    return Rows.exactly(sum(by.values()), by)


def combined_points(plan: StudyPlan) -> list[Point]:
    """Every point of the grid, and every one at which something stands in."""
    count, controls = len(plan.tuned), [name_of(spec) for spec in plan.controls]
    points = grid(scales_in(plan.grid), count)
    stood = (points_with(points, one) for one in stand_ins(count, plan.draws, controls))
    return [*points, *(point for some in stood for point in some)]


def combined_references(plan: StudyPlan, task: Task) -> tuple[str, ...]:
    """What a task's distances are from: the base, and the fine-tune of its domain if there is."""
    return ("base", "tuned") if task.spec.domain in plan.names else ("base",)


def combine_rows(
    pair: Pair, plan: StudyPlan, tasks: Sequence[Ready]
) -> dict[str, Rows]:  # fmt: skip
    """Rows of every table that a combination makes."""
    points, known = combined_points(plan), [one.task for one in countable(tasks)]
    values, items = [], []
    for task in known:
        found = item_rows(task, combined_references(plan, task))
        each = total([*value_rows(found).values()])
        values.append(each.times(len(points) * len(splits_of(task))))
        items.append(total([*found.values()]).times(len(points) + len(plan.tuned)))
    pairs_of = math.comb(len(plan.tuned), 2)
    whole, parts = _whole_falls(plan, known, points), _part_falls(plan, known)
    most = _most_parts(pair, plan)
    return {
        "combinations": total(values),
        "combination_items": total(items),
        "combination_gains": total([_gain_rows(plan, one) for one in targets(known, plan.names)]),
        "disturbance": Rows(whole, whole + parts * most),
        "interference": Rows(0, pairs_of * len(pair.components)),
        "interference_ranks": Rows(0, len(PREDICTORS) * parts * (most > 0)),
    }


def _gain_rows(plan: StudyPlan, target: Target) -> Rows:
    """Comparisons of the chosen point: with the base, fine-tunes, vectors alone and stand-ins."""
    if not target.can_be_judged:
        return Rows.exactly(1)
    count = len(plan.tuned)
    others = [name for name in map(name_of, plan.controls) if name not in target.owners]
    beside = plan.draws + len(others)
    return Rows(1 + 2 * count + 2 * beside, 1 + 2 * count + count * beside)


def _whole_falls(plan: StudyPlan, tasks: Sequence[Task], points: Sequence[Point]) -> int:
    return sum(
        len(added_at(point, place))
        for place, _ in of_domains(tasks, plan.names)
        for point in points
    )


def _part_falls(plan: StudyPlan, tasks: Sequence[Task]) -> int:
    """Tasks of a domain times vectors whose parts are added to it."""
    losses = [task for task in tasks if task.spec.kind == "loss"]
    return len([*of_domains(losses, plan.names)]) * (len(plan.tuned) - 1)


def _most_parts(pair: Pair, plan: StudyPlan) -> int:
    matrices = sum(component.kind == "matrix" for component in pair.components)
    return {"none": 0, "layer": pair.layout.n_layers, "matrix": matrices}[plan.places]


def combine_runs(pair: Pair, plan: StudyPlan, tasks: Sequence[Ready]) -> tuple[int, int]:
    """Models that run all tasks, and those with one part added that run one domain's losses."""
    points, count = combined_points(plan), len(plan.tuned)
    known = [one.task for one in countable(tasks) if one.task.spec.kind == "loss"]
    domains = {place for place, _ in of_domains(known, plan.names)}
    parts = _most_parts(pair, plan) * (count - 1) * len(domains)
    stored = (
        count if plan.method == "task" and not plan.select and 1.0 in scales_in(plan.grid) else 0
    )
    return len(points) + count - stored, parts + (count - 1) * len(domains)
