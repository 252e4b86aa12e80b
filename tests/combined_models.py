"""Planted combinations: models whose losses are known, and tiny models in memory."""

import torch

from tvlens.evaluation.measures import Item
from tvlens.evaluation.suite import Measured, Variant
from tvlens.evaluation.tasks import Task, TaskSpec
from tvlens.models.prompts import Prompt
from tvlens.study.combination_points import Point, grid, points_with, stand_ins
from tvlens.study.combining import COMBINED, Found

from . import attribution_pairs as pairs

ITEMS = 12
NAMES = ("one", "two")


def loss_task(name, domain=None, *, split=None, items=ITEMS, metric=None):
    """A task of losses; its items alternate between ``choose`` and ``judge``."""
    spec = TaskSpec(name=name, kind="loss", file="x", domain=domain, metric=metric)
    splits = [split or ("choose", "judge")[number % 2] for number in range(items)]
    return Task(spec, {n: Prompt(f"{name} {n}", split=s) for n, s in enumerate(splits)})


def rows(task, value):
    """One loss an item: ``value(split)`` and a spread that is the same for every model."""
    return [
        Item(number, "loss", value(item.split) + 0.01 * (number % 5))
        for number, item in task.items.items()
    ]


def planted(tasks, value, *, scales=(0.0, 0.5, 1.0), draws=1, controls=(), alone=None):
    """What models do whose loss is ``value(task name, point, split)``.

    Args:
        tasks: Tasks of losses.
        value: The loss of a point of the grid or of a stand-in.
        scales: Doses.
        draws: Random vectors.
        controls: Names of controls.
        alone: The loss of a stored fine-tune, by its place; that of dose 1 where not given.
    """
    points = grid(scales, len(NAMES))
    for stand in stand_ins(len(NAMES), draws, controls):
        points = [*points, *points_with(grid(scales, len(NAMES)), stand)]

    def measured(name, point, control=None):
        items = {
            task.spec.name: rows(task, lambda split, t=task: value(t.spec.name, point, split))
            for task in tasks
        }
        return Measured(Variant(name, control), items)

    found = {p: measured(p.name(NAMES), p, COMBINED if p.acting else None) for p in points}
    ends = {"one": Point((1.0, 0.0)), "two": Point((0.0, 1.0))}
    return Found("base", NAMES, found, {name: measured(name, p) for name, p in ends.items()})


def models(*changes, tied=False):
    """A tiny base in memory and one changed copy for each of ``changes``."""
    base = pairs.hf_model("llama", tied=tied)
    changed = []
    for change in changes:
        model = pairs.hf_model("llama", tied=tied)
        change(model)
        changed.append(model)
    return base, changed


def embedding_rows(first, last, *, scale=0.3, seed=1):
    """A change of some rows of the embedding alone."""

    def change(model):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            weight = model.get_input_embeddings().weight
            weight[first:last] += scale * torch.randn(weight[first:last].shape, generator=generator)

    return change


def texts(first, last, *, count=6, seed=5):
    """Texts of tokens from ``first`` to ``last``; the last three of each count."""
    from tvlens.models.prompts import Batch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(first, last, (count, 8), generator=generator).tolist()
    return Batch.of_ids([row[:5] for row in ids], answers=[row[5:] for row in ids])


def ready_texts(name, domain, batch):
    """A ready task of losses on a batch."""
    from tvlens.evaluation.likelihood import ReadyTexts

    task = loss_task(name, domain, items=len(batch))
    return ReadyTexts(task, [batch], dict.fromkeys(range(len(batch)), 10))


def combining(base, tuned, tasks=(), *, names=NAMES, **given):
    """Tiny models in memory, ready to be combined."""
    import tvlens
    from tvlens.study.combining import Combining, _editable
    from tvlens.study.plan import StudyPlan

    asked = {"base": "base", "tuned": names, "stages": ("combine",), "draws": 1}
    plan = StudyPlan.model_validate({**asked, "grid": "0,0.5,1", "tasks": "none.yaml", **given})
    found = [
        tvlens.load_pair(base, model, names=("base", name))
        for model, name in zip(tuned, names, strict=True)
    ]
    return Combining(plan, found, _editable(found, "cpu"), list(tasks), lambda text: None)
