"""Tables of strings, as the page shows them, and the words in their cells."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from .figures import NOTHING, number


@dataclass(frozen=True)
class DataTable:
    """A table of strings.

    Attributes:
        caption: One sentence on what the rows are.
        columns: Headings.
        rows: Cells, as many a row as there are headings.
        text_columns: How many of the first columns are words, so aligned left.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1

    def without_empty_columns(self) -> "DataTable":
        """The same table less the columns that hold nothing but dashes."""
        kept = [i for i in range(len(self.columns)) if any(row[i] != NOTHING for row in self.rows)]
        return replace(
            self,
            columns=tuple(self.columns[i] for i in kept),
            rows=tuple(tuple(row[i] for i in kept) for row in self.rows),
            text_columns=sum(i < self.text_columns for i in kept),
        )


def signed(value: Any) -> str:
    """A number with its sign; a dash where there is none."""
    return f"{value:+.3g}" if isinstance(value, float) and math.isfinite(value) else NOTHING


def interval(low: float, high: float) -> str:
    """Both ends of an interval; a dash where one is missing."""
    return f"{number(low)} to {number(high)}" if pd.notna(low) and pd.notna(high) else NOTHING


def words(value: object) -> str:
    """A value of a JSON file in words."""
    if value is None:
        return NOTHING
    if isinstance(value, dict):
        return ", ".join(f"{key} {words(inner)}" for key, inner in value.items())
    return str(value)


def described(items: object) -> list[str]:
    """Config differences or warnings, one line each, whatever form they are stored in."""
    if isinstance(items, dict):
        return [f"{key}: {words(value)}" for key, value in items.items()]
    if isinstance(items, str):
        return [items]
    if not isinstance(items, Iterable):
        return []
    return [words(item) for item in items]
