"""Tuning vectors combined: heat maps of the grid, its values, and whether weights foretold it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .datatable import DataTable
from .figures import NOTHING, Grid, HeatMap, heat_map, number, with_ends
from .folder import StudyFolder, rows_of

MAX_ROWS = 60  # points of a table; a finer grid is in the heat maps and the parquet file
PREDICTOR_WORDS = {
    "sign_conflict": "sign conflict",
    "conflict_entries": "entries of opposite sign",
    "overlap_read": "overlap of reads",
    "overlap_write": "overlap of writes",
    "sti": "STI",
    "sti_relative": "STI / sum of singular values",
    "norm_added": "length of what is added",
}


@dataclass(frozen=True)
class CombinedPart:
    """What the page says of combined vectors.

    Attributes:
        names: The fine-tunes whose vectors are combined.
        notes: What was found, a sentence each.
        maps: Each task's difference to the base, dose by dose; of two vectors alone.
        tables: The grid with intervals, what one vector does to the other's domain, and the ranks.
    """

    names: tuple[str, ...]
    notes: list[str]
    maps: list[HeatMap]
    tables: list[DataTable]


def combined_part(study: StudyFolder, *, tooltips: bool = True) -> CombinedPart | None:
    """The section on combined vectors; None where none were combined."""
    frame = study.table("combinations")
    rows = frame[frame["primary"].eq(True) & frame["value"].notna()]
    if rows.empty:
        return None
    names = tuple(str(name) for name in rows["vectors"].iloc[0])
    whole = rows["split"] == rows.groupby("task")["split"].transform("first")
    on_grid = rows[rows["by"].isna() & whole]
    by_task = enumerate(on_grid.groupby("task", sort=False)) if len(names) == 2 else ()
    grids = [_grid(f"combined-{place}", str(task), of, names) for place, (task, of) in by_task]
    tables = [
        _points_table(on_grid),
        disturbance_table(study.table("disturbance")),
        ranks_table(study.table("interference_ranks")),
    ]
    return CombinedPart(
        names,
        combined_notes(study),
        [heat_map(grid, tooltips=tooltips) for grid in grids],
        [table for table in tables if table is not None],
    )


def combined_notes(study: StudyFolder) -> list[str]:
    """The sentences that the study stated."""
    facts = study.manifest.get("facts")
    known = facts.values() if isinstance(facts, dict) else ()
    return [
        str(sentence) for one in known for sentence in one.get("combine", {}).get("sentences", ())
    ]


def _grid(name: str, task: str, rows: pd.DataFrame, names: Sequence[str]) -> Grid:
    """A task's difference to the base by the doses of two vectors."""
    first = next(rows_of(rows))
    doses = [sorted({float(scales[place]) for scales in rows["scales"]}) for place in range(2)]
    values = np.full((len(doses[0]), len(doses[1])), np.nan)
    for row in rows_of(rows):
        at = tuple(doses[place].index(float(row.scales[place])) for place in range(2))
        values[at] = row.difference
    better = f", {first.better} is better" if isinstance(first.better, str) else ""
    return Grid(
        name=name,
        title=f"{task}: {first.measure} minus the base's{better}; down: dose of {names[0]}, "
        f"across: dose of {names[1]}",
        values=values,
        rows=tuple(f"{dose:g}" for dose in doses[0]),
        columns=tuple(f"{dose:g}" for dose in doses[1]),
        signed=True,
        unit=first.unit if isinstance(first.unit, str) else "",
        what=f"{{}} {names[0]} + {{}} {names[1]}",
        axis="",
    )


def _points_table(rows: pd.DataFrame) -> DataTable | None:
    models = [str(model) for model in rows["model"].unique()][:MAX_ROWS]
    tasks = [str(task) for task in rows["task"].unique()]
    if not models:
        return None
    lines = []
    for model in models:
        of = rows[rows["model"] == model]
        cells = (_valued(of[of["task"] == task]) for task in tasks)
        lines.append((model, *cells))
    heads = (f"{task} ({rows.loc[rows['task'] == task, 'measure'].iloc[0]})" for task in tasks)
    return DataTable(
        "Every point of the grid on all items, with 95 % intervals; after the semicolon the "
        "interaction: how far the value is from where the effects of the vectors alone add up to.",
        ("model", *heads),
        tuple(lines),
    )


def _valued(rows: pd.DataFrame) -> str:
    if rows.empty:
        return NOTHING
    row = next(rows_of(rows))
    text = with_ends(row.value, row.ci_low, row.ci_high)
    if pd.isna(row.interaction):
        return text
    return f"{text}; {with_ends(row.interaction, row.interaction_low, row.interaction_high)}"


def disturbance_table(frame: pd.DataFrame) -> DataTable | None:
    """What adding one vector does to the domain of another, beside what stood in its place."""
    rows = frame[(frame["level"] == "whole") & frame["by"].isna()]
    if rows.empty:
        return None
    lines = tuple(
        (
            str(row.tuned),
            str(row.added),
            str(row.task),
            str(row.model),
            with_ends(row.fall, row.ci_low, row.ci_high),
            with_ends(row.beyond, row.beyond_low, row.beyond_high),
        )
        for row in rows_of(rows.head(MAX_ROWS))
    )
    return DataTable(
        "Measured interference: how far a domain's measure falls when another vector is added "
        "(positive: worse), and how much of that is beyond random vectors as long.",
        ("domain of", "added", "task", "model", "fall", "beyond random"),
        lines,
        text_columns=4,
    ).without_empty_columns()


def ranks_table(frame: pd.DataFrame) -> DataTable | None:
    """Whether what the weights foretell ranks the parts like what was measured."""
    if frame.empty:
        return None
    lines = tuple(
        (
            f"{row.added} to {row.tuned}",
            str(row.task),
            PREDICTOR_WORDS.get(str(row.predictor), str(row.predictor)),
            f"{int(row.n):,}",
            with_ends(row.spearman, row.ci_low, row.ci_high),
            number(row.p_value),
            str(row.verdict),
        )
        for row in rows_of(frame)
    )
    return DataTable(
        "Does prediction rank with what is measured? Spearman's rho over the parts of a vector "
        "that were added one by one, with its 95 % interval; p by permutation. A conflict that "
        "ranks no better than the length of what is added foretells nothing of its own.",
        ("added", "task", "predicted by", "parts", "rho", "p", "verdict"),
        lines,
        text_columns=3,
    )
