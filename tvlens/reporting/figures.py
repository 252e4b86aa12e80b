"""Geometry and colours of the page's figures: numbers in, rectangles and marks out.

The templates draw what is here as inline SVG, so a figure needs no script. Signed values take a
blue-white-red scale that is symmetric about zero; magnitudes take a scale that darkens from zero.
Labels differ by shape as well as by colour (Okabe and Ito's palette).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

Colour = tuple[int, int, int]

SIGNED: tuple[Colour, ...] = (
    (33, 102, 172),
    (146, 197, 222),
    (247, 247, 247),
    (244, 165, 130),
    (178, 24, 43),
)
MAGNITUDE: tuple[Colour, ...] = (
    (252, 251, 253),
    (203, 201, 226),
    (158, 154, 200),
    (106, 81, 163),
    (63, 0, 125),
)
NOTHING = "\N{EN DASH}"  # stands in a table where there is no value
EMPTY = "#e4e4e8"
MAX_POINTS = 4000  # a browser lays out this many marks at once without a pause
SVG_WIDTH = 680  # the column's width at 1280 px
SLANT_WIDTH, SLANT_HEIGHT = 4.0, 5.2  # of a letter written at 55 degrees


class Cell(NamedTuple):
    """One rectangle of a heat map."""

    x: float
    y: float
    fill: str
    ink: str
    text: str
    title: str


class Tick(NamedTuple):
    """A label at a place on an axis."""

    at: float
    text: str


@dataclass(frozen=True, eq=False)
class Grid:
    """Values to be drawn as a heat map.

    Attributes:
        name: Part of the figure's id.
        title: What a cell holds.
        values: Rows x columns; NaN where there is nothing.
        rows: Row names.
        columns: Column names.
        signed: Whether zero is the middle of the scale.
        unit: Unit of the values, empty for a ratio.
        what: How a tooltip names a row and a column: ``layer {} head {}``.
        axis: What the rows are.
        slanted: Column names are words: all of them are written, at an angle.
        ordinary: The share of cells that the colours are made for, see ``colour_limit``.
    """

    name: str
    title: str
    values: Float[np.ndarray, "row column"]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    signed: bool = False
    unit: str = ""
    what: str = "{} {}"
    axis: str = "layer"
    slanted: bool = False
    ordinary: float = 0.95


@dataclass(frozen=True)
class HeatMap:
    """A heat map ready to draw; lengths in SVG units, one unit a pixel at full width."""

    name: str
    title: str
    width: float
    height: float
    cell_width: float
    cell_height: float
    left: float
    top: float
    cells: tuple[Cell, ...]
    row_ticks: tuple[Tick, ...]
    column_ticks: tuple[Tick, ...]
    stops: tuple[str, ...]
    low: str
    high: str
    note: str
    axis: str
    slanted: bool


@dataclass(frozen=True)
class Mark:
    """How a label is drawn: a colour and an SVG path around the origin."""

    colour: str
    path: str


MARKS: dict[str, Mark] = {
    "unchanged": Mark("#b0b0b8", "M-1.5 0h3"),
    "unresolved": Mark("#8a8a94", "M-1.5 0a1.5 1.5 0 1 0 3 0a1.5 1.5 0 1 0-3 0"),
    "mixed": Mark("#000000", "M-2.2 0a2.2 2.2 0 1 0 4.4 0a2.2 2.2 0 1 0-4.4 0"),
    "amplified": Mark("#d55e00", "M0-4L3.5 2.5H-3.5Z"),
    "attenuated": Mark("#0072b2", "M0 4L3.5-2.5H-3.5Z"),
    "flipped": Mark("#cc79a7", "M0-4.4L3 0L0 4.4L-3 0Z"),
    "rewired": Mark("#009e73", "M-2.6-2.6h5.2v5.2h-5.2Z"),
    "new_read": Mark("#b88600", "M-1-4h2v3h3v2h-3v3h-2v-3h-3v-2h3Z"),
    "new_write": Mark("#3a9bdc", "M0-4.6L1.4-1.4L4.6 0L1.4 1.4L0 4.6L-1.4 1.4L-4.6 0L-1.4-1.4Z"),
}
SERIES: dict[str, Mark] = {
    "raw": Mark("#8a8a94", "M-2.6 0a2.6 2.6 0 1 0 5.2 0a2.6 2.6 0 1 0-5.2 0"),
    "minus controls": Mark("#0072b2", "M0-4.2L3.6 0L0 4.2L-3.6 0Z"),
    "random vector": Mark("#8a8a94", "M-2.6 0a2.6 2.6 0 1 0 5.2 0a2.6 2.6 0 1 0-5.2 0"),
    "random set": Mark("#b88600", "M-2.6-2.6h5.2v5.2h-5.2Z"),
    "tuning vector": Mark("#d55e00", "M0-4.2L3.6 0L0 4.2L-3.6 0Z"),
}
OTHER_MARK = Mark("#8a8a94", "M-1.5-1.5h3v3h-3Z")
LABELS = tuple(MARKS)


class Point(NamedTuple):
    """One mark of the scatter."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Group:
    """The points of one label, how many there are and how many are drawn.

    Attributes:
        label: The label.
        mark: How a point is drawn.
        points: The points.
        total: How many there are.
        line: An SVG path through points that belong together, with their intervals; or empty.
    """

    label: str
    mark: Mark
    points: tuple[Point, ...]
    total: int
    line: str = ""


class ScatterWords(NamedTuple):
    """The texts of a scatter."""

    title: str
    caption: str
    x_title: str
    y_title: str


@dataclass(frozen=True)
class Scatter:
    """A scatter ready to draw."""

    name: str
    words: ScatterWords
    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    groups: tuple[Group, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_zero: float | None
    y_zero: float | None


def with_ends(value: Any, low: Any, high: Any, digits: int = 3) -> str:
    """A number and the ends of its interval, where there is one."""
    known = low is not None and high is not None and np.isfinite(low) and np.isfinite(high)
    ends = f" [{number(low, digits)}, {number(high, digits)}]" if known else ""
    return number(value, digits) + ends


def number(value: Any, digits: int = 3) -> str:
    """A number for people with ``digits`` significant digits; a dash where there is none."""
    if value is None or not np.isfinite(value):
        return NOTHING
    return f"{float(value):.{digits}g}"


def colour_at(scale: tuple[Colour, ...], position: float) -> Colour:
    """The colour at ``position`` in 0..1 of a scale of equally spaced anchors."""
    place = min(max(position, 0.0), 1.0) * (len(scale) - 1)
    start = min(int(place), len(scale) - 2)
    share = place - start
    low, high = scale[start], scale[start + 1]
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
    return red, green, blue


def hex_code(colour: Colour) -> str:
    """``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def ink_on(colour: Colour) -> str:
    """Black or white, whichever has more contrast with ``colour`` (WCAG relative luminance)."""
    channels = [c / 255 for c in colour]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#fff" if luminance < 0.179 else "#1b1b24"  # 0.179: equal contrast with both


def heat_map(grid: Grid, *, tooltips: bool = True) -> HeatMap:
    """The drawing of ``grid``; cells wide enough carry their value as text."""
    n_rows, n_columns = grid.values.shape
    cell_width = float(np.clip((SVG_WIDTH - 60) // max(n_columns, 1), 13, 58))
    cell_height = float(np.clip(440 // max(n_rows, 1), 13, 26))
    limit, largest = colour_limit(grid.values, grid.ordinary)
    scale = SIGNED if grid.signed else MAGNITUDE
    longest = max((len(name) for name in grid.columns), default=0) if grid.slanted else 0
    left, top = 44.0, 22.0 + SLANT_HEIGHT * longest
    cells = [
        _cell(grid, row, column, limit, tooltips=tooltips, written=cell_width >= 44)._replace(
            x=left + column * cell_width, y=top + row * cell_height
        )
        for row in range(n_rows)
        for column in range(n_columns)
    ]
    return HeatMap(
        name=grid.name,
        title=grid.title,
        width=max(left + n_columns * cell_width + 8 + SLANT_WIDTH * longest, 330.0),
        height=top + n_rows * cell_height + 46,
        cell_width=cell_width,
        cell_height=cell_height,
        left=left,
        top=top,
        cells=tuple(cells),
        row_ticks=_ticks(grid.rows, top, cell_height),
        column_ticks=_ticks(grid.columns, left, cell_width, every=1 if grid.slanted else None),
        stops=tuple(hex_code(colour) for colour in scale),
        low=number(-limit if grid.signed else 0.0),
        high=number(limit),
        note=f"{grid.unit} (largest {number(largest)})" if largest > limit else grid.unit,
        axis=grid.axis,
        slanted=grid.slanted,
    )


def colour_limit(
    values: Float[np.ndarray, "row column"], ordinary: float = 0.95
) -> tuple[float, float]:
    """The magnitude of full colour, and the largest magnitude.

    They are the same unless the largest stands so far out that all the rest would look empty:
    then the scale ends at three times the quantile ``ordinary`` and what is beyond has full colour.
    """
    finite = np.abs(values[np.isfinite(values)])
    largest = float(finite.max()) if finite.size else 0.0
    most = 3 * float(np.quantile(finite, ordinary)) if finite.size else 0.0
    return (most if 0 < most < largest else largest) or 1.0, largest


def _ticks(
    names: tuple[str, ...], start: float, step: float, *, every: int | None = None
) -> tuple[Tick, ...]:
    room = max(len(name) for name in names) * 7 if names else 0
    every = every or (1 if step >= 26 or room <= step + 3 else -(-room // int(step)))
    return tuple(
        Tick(start + (place + 0.5) * step, name)
        for place, name in enumerate(names)
        if place % every == 0
    )


def _cell(
    grid: Grid, row: int, column: int, limit: float, *, tooltips: bool, written: bool
) -> Cell:
    value = float(grid.values[row, column])
    where = grid.what.format(grid.rows[row], grid.columns[column])
    if not np.isfinite(value):
        return Cell(0, 0, EMPTY, "", "", f"{where}: no value" if tooltips else "")
    position = value / limit / 2 + 0.5 if grid.signed else value / limit
    colour = colour_at(SIGNED if grid.signed else MAGNITUDE, position)
    said = f"{where}: {number(value, 4)} {grid.unit}".rstrip() if tooltips else ""
    return Cell(0, 0, hex_code(colour), ink_on(colour), number(value, 2) if written else "", said)


def sampled_by_label(labels: pd.Series, limit: int = MAX_POINTS) -> np.ndarray:
    """Positions of at most ``limit`` rows, evenly spaced within each label, rare labels whole.

    Labels are served from the rarest on; each may take an equal share of what is left, so the
    common ones (usually ``unresolved``) give way first. Nothing is drawn at random.
    """
    counts = labels.value_counts().sort_index(kind="stable").sort_values(kind="stable")
    left, kept = limit, []
    for served, (label, count) in enumerate(counts.items()):
        quota = min(int(count), left // (len(counts) - served))
        rows = np.flatnonzero((labels == label).to_numpy())
        kept.append(rows[(np.arange(quota) * len(rows)) // max(quota, 1)])
        left -= quota
    return np.sort(np.concatenate(kept)) if kept else np.arange(0)


def label_scatter(name: str, frame: pd.DataFrame, *, tooltips: bool = True) -> Scatter:
    """Gain against residual of the rows of ``frame``, by label.

    Args:
        name: Part of the figure's id.
        frame: Columns ``component gain residual label``, no nulls.
        tooltips: Whether each mark names its component.
    """
    drawn = frame.iloc[sampled_by_label(frame["label"])]
    titles = [
        f"{component}: gain {number(gain)}, residual {number(residual)}"
        for component, gain, residual in zip(
            *(drawn[c] for c in ("component", "gain", "residual")), strict=True
        )
    ]
    few = ": evenly spaced within each label, rare labels first" if len(drawn) < len(frame) else ""
    words = ScatterWords(
        "Neurons: gain against residual",
        "Neurons (write vectors, W_out): gain against residual, coloured by label. "
        f"{len(drawn):,} of {len(frame):,} neurons are drawn{few}.",
        "gain along the base vector  ⟨delta, w⟩ / |w|²",
        "residual",
    )
    points = drawn[["label"]].assign(x=drawn["gain"], y=drawn["residual"], title=titles)
    points = points if tooltips else points.assign(title="")
    return scatter(name, words, points, totals=frame["label"].value_counts(), positive=True)


def scatter(
    name: str,
    words: ScatterWords,
    points: pd.DataFrame,
    *,
    totals: pd.Series | None = None,
    positive: bool = False,
    height: float = 358.0,
) -> Scatter:
    """Points to be drawn, grouped by label.

    Args:
        name: Part of the figure's id.
        words: Its texts.
        points: Columns ``x y label title``, no nulls; with ``line`` (points of one are joined),
            ``low`` and ``high`` (ends of intervals, may be null) where curves are drawn.
        totals: How many there are of each label, where not all are drawn.
        positive: Whether y starts at 0.
        height: Of the area that holds the points.
    """
    left, right, top, width = 62.0, 664.0, 14.0, 680.0
    bottom = top + height
    x_low, x_high = _limits(points["x"])
    heights = points[[name for name in ("y", "low", "high") if name in points]]
    y_low, y_high = _limits(pd.Series(heights.to_numpy().ravel()), from_zero=positive)
    x = left + (points["x"] - x_low) / (x_high - x_low) * (right - left)
    ys = {
        str(n): bottom - (heights[n] - y_low) / (y_high - y_low) * (bottom - top) for n in heights
    }
    placed = points.assign(x=x.round(1), **{name: y.round(1) for name, y in ys.items()})
    totals = points["label"].value_counts() if totals is None else totals
    return Scatter(
        name=name,
        words=words,
        width=width,
        height=bottom + 52,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        groups=_groups(placed, totals),
        x_ticks=_round_ticks(x_low, x_high, left, right),
        y_ticks=_round_ticks(y_low, y_high, bottom, top),
        x_zero=left - x_low / (x_high - x_low) * (right - left) if x_low < 0 < x_high else None,
        y_zero=bottom + y_low / (y_high - y_low) * (bottom - top) if y_low < 0 < y_high else None,
    )


def _groups(placed: pd.DataFrame, totals: pd.Series) -> tuple[Group, ...]:
    marks = {**MARKS, **SERIES}
    known = [label for label in marks if label in totals.index]
    others = sorted(set(totals.index) - set(marks))
    groups = []
    for label in [*others, *known]:
        rows = placed[placed["label"] == label]
        points = (Point(*row) for row in zip(*(rows[c] for c in Point._fields), strict=True))
        mark, total = marks.get(label, OTHER_MARK), int(totals[label])
        groups.append(Group(label, mark, tuple(points), total, _line(rows)))
    return tuple(groups)


def _line(rows: pd.DataFrame) -> str:
    """The path through the points of each ``line`` from left to right, and their intervals."""
    if "line" not in rows:
        return ""
    path = ""
    for _, points in rows.sort_values("x", kind="stable").groupby("line", sort=False):
        places = [f"{x:g} {y:g}" for x, y in zip(points["x"], points["y"], strict=True)]
        path += "M" + "L".join(places)
    for x, low, high in zip(rows["x"], rows["low"], rows["high"], strict=True):
        if np.isfinite(low) and np.isfinite(high):
            path += f"M{x:g} {low:g}V{high:g}"
    return path


def _limits(values: pd.Series, *, from_zero: bool = False) -> tuple[float, float]:
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    low = min(low, 0.0) if from_zero else low
    room = 0.05 * (high - low) or 0.5 * abs(high) or 0.5
    return (low if from_zero and low == 0.0 else low - room), high + room


def _round_ticks(low: float, high: float, start: float, end: float) -> tuple[Tick, ...]:
    rough = (high - low) / 5
    size = 10.0 ** np.floor(np.log10(rough))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough)
    places = np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step
    return tuple(
        Tick(round(start + (v - low) / (high - low) * (end - start), 1), number(v + 0.0))
        for v in places.tolist()
    )
