"""A list of tasks on a model, and the tables of several models on the same tasks.

    evaluation         model x task x measure: value, interval, and how far it is from one model
    evaluation_items   the values of single items that these are means of, with what was written

A model is anything that makes logits: one that was loaded, or one in an edit.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from tvlens.errors import HostError
from tvlens.models.prompts import Chat
from tvlens.models.reading import MakesLogits
from tvlens.tables import Table

from .harness import ReadyHarness, ready_harness
from .intervals import Comparison, Interval, Values, comparison, interval
from .likelihood import (
    ReadyChoices,
    ReadyDistances,
    ReadyTexts,
    ready_choices,
    ready_distances,
    ready_texts,
)
from .losses import EVALUATION_SCHEMA
from .measures import MEASURES, Item
from .tasks import MEASURED, WRITTEN, Task
from .writing import ReadyWriting, ready_writing

Ready = ReadyTexts | ReadyDistances | ReadyChoices | ReadyWriting | ReadyHarness
ITEMS_SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("task", pa.string()),
        ("kind", pa.string()),
        ("split", pa.string()),
        ("measure", pa.string()),
        ("item", pa.int32()),
        ("detail", pa.string()),
        ("value", pa.float64()),
        ("weight", pa.float64()),
        ("control", pa.string()),
        ("draw", pa.int32()),
        ("scale", pa.float64()),
        ("response", pa.string()),
    ]
)


class Variant(NamedTuple):
    """One model that is measured.

    Attributes:
        model: What tables call it.
        control: ``tuning`` for an edit by the tuning vector, else what stands in its place; None
            for a model that is no edit.
        draw: Which of several random draws.
        scale: The dose.
    """

    model: str
    control: str | None = None
    draw: int | None = None
    scale: float | None = None


@dataclass(frozen=True)
class Measured:
    """What one model did on all tasks.

    Attributes:
        variant: Which model.
        items: The rows of every task, by its name.
    """

    variant: Variant
    items: dict[str, list[Item]] = field(repr=False)


def ready(tasks: Sequence[Task], tokenizer: Any, *, chat: Chat = "auto") -> list[Ready]:
    """Tokenise tasks once for all models that share a tokenizer.

    Raises:
        HostError: There is no tokenizer.
        PromptError: A prompt has no token.
    """
    if tokenizer is None:
        raise HostError(
            "no model has a tokenizer.", hint="Put the tokenizer's files beside the weights."
        )
    return [_ready(task, tokenizer, chat) for task in tasks]


def _ready(task: Task, tokenizer: Any, chat: Chat) -> Ready:
    if task.spec.kind in WRITTEN:
        return ready_writing(task, tokenizer, chat)
    make: dict[str, Callable[[Task, Any, Chat], Ready]] = {
        "loss": ready_texts,
        "kl": ready_distances,
        "choice": ready_choices,
        "lm_eval": ready_harness,
    }
    return make[task.spec.kind](task, tokenizer, chat)


def with_reference(tasks: Sequence[Ready], name: str, lens: MakesLogits) -> list[Ready]:
    """The tasks with the logits of ``base`` or ``tuned`` where they are compared with.

    Raises:
        BudgetError: The logits would take too much memory.
    """
    return [
        one.with_reference(name, lens) if isinstance(one, ReadyDistances) else one for one in tasks
    ]


def measured(variant: Variant, lens: MakesLogits, tasks: Iterable[Ready]) -> Measured:
    """One model on all tasks."""
    return Measured(variant, {one.task.spec.name: list(one.items(lens)) for one in tasks})


def evaluation_tables(
    found: Sequence[Measured],
    tasks: Sequence[Task],
    *,
    against: str | None = None,
    seed: int = 0,
    without: Collection[str] = (),
) -> tuple[Table, Table]:
    """The tables of several models on the same tasks.

    Args:
        found: What each did.
        tasks: The tasks.
        against: The model that the others are compared with, item by item; None for no comparison.
        seed: Seed of the bootstrap.
        without: Models that get no rows.
    """
    rows, items = [], []
    first = next((one for one in found if one.variant.model == against), None)
    for one in (one for one in found if one.variant.model not in without):
        for task in tasks:
            rows += _rows(one, task, None if one is first else first, seed)
            items += _item_rows(one, task)
    return (
        _table("evaluation", EVALUATION_SCHEMA, rows),
        _table("evaluation_items", ITEMS_SCHEMA, items),
    )


def _table(name: str, schema: pa.Schema, rows: list[dict[str, Any]]) -> Table:
    columns = {column: [row.get(column) for row in rows] for column in schema.names}
    return Table.of(name, schema, columns)


def _rows(one: Measured, task: Task, first: Measured | None, seed: int) -> list[dict[str, Any]]:
    rows = []
    for name in MEASURED[task.spec.kind]:
        values = values_of(one.items[task.spec.name], name)
        if not len(values.items):
            continue
        measure = MEASURES[name]
        found: Interval = interval(values, measure.transform, seed=seed)
        row = {
            **one.variant._asdict(),
            **_named(task),
            "measure": name,
            "primary": name == task.spec.primary,
            "value": found.value,
            "ci_low": found.low,
            "ci_high": found.high,
            "n": found.n,
            "unit": measure.unit,
            "better": measure.better or None,
        }
        rows.append({**row, **_compared(values, first, task, name, seed)})
    return rows


def _compared(
    values: Values, first: Measured | None, task: Task, name: str, seed: int
) -> dict[str, Any]:
    """The columns of the paired comparison, empty where there is nothing to compare with."""
    if first is None:
        return {}
    other = values_of(first.items[task.spec.name], name)
    both = np.intersect1d(values.items, other.items)
    if not len(both):
        return {}
    mine, theirs = (_restricted(one, both) for one in (values, other))
    found: Comparison = comparison(mine, theirs, MEASURES[name].transform, seed=seed)
    return {
        "against": first.variant.model,
        "difference": found.difference,
        "difference_low": found.low,
        "difference_high": found.high,
        "p_value": found.p_value,
        "test": found.test,
    }


def _restricted(values: Values, items: np.ndarray) -> Values:
    kept = np.isin(values.items, items)
    return Values(*(column[kept] for column in values))


def _named(task: Task) -> dict[str, str]:
    return {"task": task.spec.name, "kind": task.spec.kind, "split": task.spec.split}


def values_of(items: Sequence[Item], measure: str) -> Values:
    """The values of one measure, in the order of the items."""
    chosen = sorted((one for one in items if one.measure == measure), key=lambda one: one.item)
    return Values(
        np.array([one.item for one in chosen], dtype=np.int64),
        np.array([one.value for one in chosen], dtype=np.float64),
        np.array([one.weight for one in chosen], dtype=np.float64),
    )


def _item_rows(one: Measured, task: Task) -> list[dict[str, Any]]:
    shared = {**one.variant._asdict(), **_named(task)}
    return [{**shared, **item._asdict()} for item in one.items[task.spec.name]]


def primary_rows(evaluation: Table) -> pd.DataFrame:
    """The rows of each task's own metric."""
    frame = evaluation.to_frame()
    return frame[frame["primary"].fillna(False).astype(bool)]


def warnings_of(tasks: Iterable[Ready]) -> list[str]:
    """What the tasks say of their prompts and packages, each with its task's name."""
    found = []
    for one in tasks:
        name = one.task.spec.name
        found += [text if text.startswith(name) else f"{name}: {text}" for text in one.warnings]
    return found
