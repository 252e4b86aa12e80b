"""What ``tvlens evaluate`` measured, for people: a table for the terminal."""

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .figures import NOTHING, with_ends
from .folder import rows_of


def evaluation_view(frame: pd.DataFrame) -> RenderableType:
    """The values of every task and measure, one column a model, as something rich can print."""
    models = [str(name) for name in frame["model"].unique()]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("task", "measure", "n"):
        table.add_column(column)
    for model in models:
        table.add_column(model, justify="right")
    for (task, measure), rows in frame.groupby(["task", "measure"], sort=False):
        first = next(rows_of(rows))
        cells = [_cell(rows[rows["model"] == model]) for model in models]
        style = "bold" if first.primary else ""
        table.add_row(str(task), str(measure), f"{int(first.n):,}", *cells, style=style)
    note = f"* differs from {models[0]} at p < 0.05, item by item" if models[1:] else ""
    return Group(table, Text(note, style="dim")) if note else table


def _cell(rows: pd.DataFrame) -> str:
    if rows.empty:
        return NOTHING
    row = next(rows_of(rows))
    star = "*" if pd.notna(row.p_value) and row.p_value < 0.05 else ""
    return with_ends(row.value, row.ci_low, row.ci_high) + star
