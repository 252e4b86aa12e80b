"""MLP against attention: both contrasts as a table, and layer by layer."""

from dataclasses import replace
from typing import Any

import pandas as pd

from .answer import QUESTIONS
from .datatable import DataTable, signed
from .figures import NOTHING, SERIES, Scatter, ScatterWords, number, scatter
from .folder import rows_of

HEIGHT = 150.0  # two of them and the table fit a screen


def contrasts_table(frame: pd.DataFrame) -> DataTable | None:
    """Every contrast: raw, minus controls, and with layers counted by their effect."""
    rows = tuple(
        (
            str(row.claim),
            str(row.against),
            "" if row.weighting == "none" else str(row.weighting),
            str(row.verdict),
            *(_value(value) for value in (row.attention, row.mlp, row.mean)),
            _interval(row.ci_low, row.ci_high),
            *(number(value, 2) for value in (row.p_value, row.p_block, row.detectable)),
        )
        for row in rows_of(frame)
    )
    columns = ("contrast", "against", "weights", "verdict", "W_O", "W_out", "difference")
    columns = (*columns, "95 % interval", "p", "in blocks", "would show")
    return DataTable(_caption(frame), columns, rows, text_columns=4) if rows else None


def _caption(frame: pd.DataFrame) -> str:
    if frame.empty:
        return ""
    first = next(rows_of(frame))
    return (
        "Attention (W_O) minus MLP (W_out), paired by layer; above 0 is the claim's side. newness: "
        "G_rel of what is written, so a positive difference says that the MLP writes newer. "
        "amplification: energy in gains less that in attenuations, as a share. Both are 0 at "
        "chance and 1 for a pure gain. Raw differences say nothing about the domain. p: by sign "
        f"flips of layers, and of blocks of {number(first.block)} neighbours; the smallest that so "
        f"many can reach are {number(first.p_floor, 2)} and {number(first.p_block_floor, 2)}. The "
        "interval takes neighbours together too. Would show: the smallest difference with "
        f"{number(100 * first.power)} % power at the {number(100 * first.level)} % level. "
        "weight_ig: layers count by what the metric owes to both matrices. One pair of models is "
        "one observation."
    )


def _value(value: float) -> str:
    return f"{value:+.3f}" if pd.notna(value) else NOTHING


def _interval(low: float, high: float) -> str:
    return f"{_value(low)} to {_value(high)}" if pd.notna(low) and pd.notna(high) else NOTHING


def contrast_plots(frame: pd.DataFrame, slug: str, *, tooltips: bool = True) -> list[Scatter]:
    """Both differences by layer, raw and minus controls."""
    shown = frame[(frame["weighting"] == "none") & frame["against"].isin(tuple(SERIES))]
    plots = []
    for claim, rows in shown.groupby("claim", sort=False):
        points = pd.concat([_points(row, tooltips=tooltips) for row in rows_of(rows)])
        if points.empty:
            continue
        words = ScatterWords(
            f"{claim} by layer",
            f"{QUESTIONS.get(str(claim), claim)} {rows['measure'].iloc[0]}, layer by layer; "
            "above 0 is the claim's side.",
            "layer",
            "W_O \u2212 W_out",
        )
        plot = scatter(f"{slug}-{claim}", words, points, height=HEIGHT)
        plots.append(replace(plot, x_zero=None))  # layer 0 is no zero
    return plots


def _points(row: Any, *, tooltips: bool) -> pd.DataFrame:
    points = pd.DataFrame({"x": row.layers, "y": row.attention_by_layer - row.mlp_by_layer})
    titles = [f"layer {x}: {signed(y)}" if tooltips else "" for x, y in points.to_numpy().tolist()]
    return points.assign(label=row.against, title=titles)
