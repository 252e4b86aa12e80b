"""What carries the effect: gains of what was there, rewiring, or new directions."""

from typing import NamedTuple

import pandas as pd

from .datatable import DataTable, interval, signed
from .figures import NOTHING, SVG_WIDTH, Tick, number
from .folder import rows_of

BANDS = ("gains", "rewired", "new")
COLOURS = {
    "global": "#d55e00",
    "scale": "#f0a35e",
    "within": "#009e73",
    "reroute": "#7fcdb4",
    "new_read": "#b88600",
    "new_write": "#3a9bdc",
    "new_both": "#0b3c6f",
    "bias": "#b0b0b8",
}
"""Orange for gains, green for rewiring, gold and blue for what is new."""
_DRAWN = ("place", "matrix", "kind")
_LEFT, _ROW, _BAR = 96.0, 22.0, 15.0


class Segment(NamedTuple):
    """One coloured piece of a bar; lengths in SVG units."""

    x: float
    width: float
    fill: str
    title: str


class Bar(NamedTuple):
    """The parts of one group, those below zero to the left of it."""

    name: str
    y: float
    segments: tuple[Segment, ...]
    total: float
    """Where the sum of all parts lies."""


class Bars(NamedTuple):
    """Stacked bars ready to draw."""

    name: str
    title: str
    caption: str
    width: float
    height: float
    left: float
    zero: float
    bars: tuple[Bar, ...]
    ticks: tuple[Tick, ...]
    unit: str
    legend: tuple[tuple[str, str], ...]
    bar_height: float = _BAR


def parts_bars(shares: pd.DataFrame, slug: str) -> Bars | None:
    """Every group's effect by part, in the metric's unit; None where nothing was divided."""
    rows = shares[shares["level"].isin(_DRAWN) & shares["geometric_part"].isin(list(COLOURS))]
    rows = rows.dropna(subset=["effect"])
    if rows.empty:
        return None
    unit = str(rows["unit"].iloc[0])
    ends = rows.groupby("of")["effect"].agg(
        low=lambda x: x[x < 0].sum(), high=lambda x: x[x > 0].sum()
    )
    low, high = min(float(ends["low"].min()), 0.0), max(float(ends["high"].max()), 0.0)
    if low == high:
        return None
    scale = (SVG_WIDTH - _LEFT - 16) / (high - low)
    zero = _LEFT - low * scale
    bars = tuple(
        _bar(str(of), place, group, zero, scale, unit)
        for place, (of, group) in enumerate(rows.groupby("of", sort=False))
    )
    shown = [part for part in COLOURS if part in set(rows["geometric_part"])]
    return Bars(
        name=f"{slug}-parts",
        title="Effect by geometric part of the change",
        caption="Mean effect on the metric of each group of weights by the part of their change "
        "that carries it: orange gains of what was there, green rewiring, gold and blue new "
        "directions. Parts that lower the metric lie left of zero; the black mark is the sum. "
        "Heads, kv heads and neurons are the same weights again, in coordinates of their own.",
        width=SVG_WIDTH,
        height=len(bars) * _ROW + 46,
        left=_LEFT,
        zero=round(zero, 1),
        bars=bars,
        ticks=tuple(
            Tick(round(zero + value * scale, 1), number(value, 2))
            for value in sorted({low, 0.0, high})
        ),
        unit=unit,
        legend=tuple((part.replace("_", " "), COLOURS[part]) for part in shown),
    )


def _bar(of: str, place: int, group: pd.DataFrame, zero: float, scale: float, unit: str) -> Bar:
    right = left = zero
    segments = []
    effects = group.set_index("geometric_part")["effect"].astype(float)
    for part in COLOURS:
        value = float(effects.get(part, 0.0))
        width = abs(value) * scale
        if width < 0.05:
            continue
        start = right if value > 0 else left - width
        right, left = (right + width, left) if value > 0 else (right, left - width)
        title = f"{of}, {part.replace('_', ' ')}: {value:+.3g} {unit}"
        segments.append(Segment(round(start, 1), round(width, 1), COLOURS[part], title))
    total = round(zero + float(effects.sum()) * scale, 1)
    return Bar(of.replace("_", " "), 8 + place * _ROW, tuple(segments), total)


def parts_table(shares: pd.DataFrame) -> DataTable | None:
    """Every group's share of the effect by band, beside the band's share of what was written."""
    rows = shares[shares["geometric_part"].isin(BANDS) & (shares["level"] != "contrast")]
    if rows.empty:
        return None
    lines = []
    for (level, of), group in rows.groupby(["level", "of"], sort=False):
        bands = {row.geometric_part: row for row in rows_of(group)}
        first = next(iter(bands.values()))
        cells = [cell for band in BANDS for cell in _cells(bands.get(band))]
        named = (str(of).replace("_", " "), str(level), number(first.components))
        lines.append((*named, signed(first.whole), *cells))
    headings = [
        heading
        for band in BANDS
        for heading in (f"{band}: of effect", f"{band}: 95 %", f"{band}: of what was written")
    ]
    unit = str(rows["unit"].iloc[0])
    return DataTable(
        "Share of each group's effect that is carried by gains of what was there, by rewiring and "
        "by new directions, with 95 % intervals over prompts, beside their share of the change's "
        "squared length. Compare the two: by this measure most of any change is new, noise "
        f"included. A dash: the group's effect ({unit}) is not surely different from 0, so that it "
        "has no shares, or nothing tells. By label: matrices by their own, heads by that of OV, "
        "neurons by that of their write vector; neurons have means over prompts alone.",
        ("weights", "group", "components", "effect", *headings),
        tuple(lines),
        text_columns=2,
    ).without_empty_columns()


def _cells(row: object) -> tuple[str, str, str]:
    if row is None:
        return NOTHING, NOTHING, NOTHING
    share, low, high, energy = (
        getattr(row, name) for name in ("share", "ci_low", "ci_high", "energy")
    )
    return number(share), interval(low, high), number(energy)
