"""Layers x heads and layers x parts, gathered from a study's tables for the heat maps."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from .figures import Grid
from .folder import StudyFolder
from .scores import ESTIMATE, mean_scores, of_method

PARTS = ("W_Q", "W_K", "W_V", "W_O", "W_gate", "W_in", "W_out")
_PRODUCTS = ("OV", "QK")  # of the same factors as W_O, W_V, W_Q, W_K: never added to them


def size_grids(weights: pd.DataFrame, slug: str) -> list[Grid]:
    """Heat maps of relative change: heads, kv heads, matrices."""
    grids = [
        _head_grid(weights, kind, words, f"{slug}-size-{kind}")
        for kind, words in (("head", "head"), ("kv_head", "key-value head"))
    ]
    matrices = weights[(weights["kind"] == "matrix") & weights["part"].isin(PARTS)]
    grids.append(
        grid_of(
            matrices.assign(value=matrices["relative_delta"], column=matrices["part"]),
            f"{slug}-size-matrix",
            "Matrices: |delta| / |base|",
            what="layer {} {}",
        )
    )
    return [grid for grid in grids if grid is not None]


def _head_grid(weights: pd.DataFrame, kind: str, words: str, name: str) -> Grid | None:
    rows = weights[(weights["kind"] == kind) & ~weights["part"].isin(_PRODUCTS)]
    squares = rows.assign(delta=rows["delta_norm"] ** 2, whole=rows["base_norm"] ** 2)
    sums = squares.groupby(["layer", "index"], as_index=False)[["delta", "whole"]].sum()
    sums = sums.assign(value=np.sqrt(sums["delta"] / sums["whole"].where(sums["whole"] > 0)))
    parts = "W_Q, W_O" if kind == "head" else "W_K, W_V"
    return grid_of(
        sums.assign(column=sums["index"]),
        name,
        f"{words.capitalize()}s ({parts} together): |delta| / |base|",
        what=f"layer {{}} {words} {{}}",
    )


def score_grids(study: StudyFolder, tuned: str, slug: str) -> list[Grid]:
    """Heat maps of mean weight-space scores: heads, kv heads, matrices."""
    rows = of_method(study.table("attribution", tuned), ESTIMATE)
    means = mean_scores(rows)
    unit = str(rows["unit"].dropna().iloc[0]) if rows["unit"].notna().any() else ""
    grids = []
    for kind, words in (("head", "head"), ("kv_head", "key-value head"), ("matrix", "")):
        here = means[(means["kind"] == kind) & means["layer"].notna()]
        here = here[here["part"].isin(PARTS)] if kind == "matrix" else here
        placed = here.assign(column=here["part" if kind == "matrix" else "index"])
        summed = placed.groupby(["layer", "column"], as_index=False)["score"].sum()
        title = f"{words.capitalize()}s" if words else "Matrices"
        grids.append(
            grid_of(
                summed.assign(value=summed["score"]),
                f"{slug}-score-{kind}",
                f"{title}: mean {ESTIMATE} score",
                what=f"layer {{}} {words}".rstrip() + " {}",
                signed=True,
                unit=unit,
            )
        )
    return [grid for grid in grids if grid is not None]


def grid_of(
    frame: pd.DataFrame,
    name: str,
    title: str,
    *,
    what: str,
    signed: bool = False,
    unit: str = "",
    order: Sequence[str] = PARTS,
) -> Grid | None:
    """Layers x columns of ``frame`` (``layer column value``); None where it has no value.

    Columns are numbers from 0 on, or words in the order of ``order``.
    """
    frame = frame.dropna(subset=["layer", "column", "value"])
    if frame.empty:
        return None
    words = isinstance(frame["column"].iloc[0], str)
    present = set(frame["column"])
    columns = [part for part in order if part in present] if words else range(int(max(present)) + 1)
    wide = frame.pivot_table(index="layer", columns="column", values="value", aggfunc="first")
    layers = range(int(frame["layer"].max()) + 1)
    return Grid(
        name=name,
        title=title,
        values=wide.reindex(index=list(layers), columns=list(columns)).to_numpy(float),
        rows=tuple(str(layer) for layer in layers),
        columns=tuple(str(column) for column in columns),
        signed=signed,
        unit=unit,
        what=what,
    )
