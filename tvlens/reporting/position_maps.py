"""One prompt's scores by position: tokens across, layers or heads down."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .figures import Grid, HeatMap, heat_map
from .folder import StudyFolder, rows_of

HEADS = 10  # heads drawn, the largest of the prompt
PLACES = 96  # the last places of a long prompt, which hold its answer
DRAWN = ("tuned_into_base", "clean_into_corrupt")  # else the first direction there is
LETTERS = 14  # of a token
_NODES = {
    "resid_pre": "Residual stream before each block",
    "attn_out": "Attention outputs",
    "mlp_out": "MLP outputs",
    "resid_post": "Residual stream after each block",
}


@dataclass(frozen=True)
class PlacedPart:
    """One direction's maps of one prompt.

    Attributes:
        heading: The direction and the prompt.
        text: What is drawn and what is left out.
        maps: A map of every activation.
    """

    heading: str
    text: str
    maps: list[HeatMap]


def placed_parts(
    study: StudyFolder, tuned: str, slug: str, *, tooltips: bool = True
) -> list[PlacedPart]:
    """The prompt whose metric changes most, in at most two directions."""
    prompts = study.table("prompts", tuned)
    own = [s for s in study.positions.series if s["tuned"] == tuned] if study.positions else []
    drawn = [s for s in own if s["direction"] in DRAWN] or own[:1]
    found = []
    for number, series in enumerate(sorted(drawn, key=_place)[:2], 1):
        row = _largest(prompts, series["prompts"])
        if row is None:
            continue
        grids = _grids(study, series, row, f"{slug}-placed-{number}")
        maps = [heat_map(grid, tooltips=tooltips) for grid in grids]
        found.append(PlacedPart(_heading(series, row), _text(series, row), maps))
    return found


def _place(series: Mapping[str, Any]) -> int:
    return DRAWN.index(series["direction"]) if series["direction"] in DRAWN else len(DRAWN)


def _largest(prompts: pd.DataFrame, numbers: list[int]) -> Any:
    """The row of the prompt whose metric changes most among those with these numbers."""
    rows = prompts[prompts["prompt"].isin(numbers) & prompts["tokens"].notna()]
    change = (rows["metric_tuned"] - rows["metric_base"]).astype(float).abs()
    if not change.notna().any():
        return None
    return next(rows_of(rows.loc[[change.idxmax()]]))


def _heading(series: Mapping[str, Any], row: Any) -> str:
    words = str(series["direction"]).replace("_", " ")
    where = "" if series["at"] in series["direction"] else f", in {series['at']}"
    where += "" if series["method"].endswith("first_order") else f" ({series['method']})"
    return f"{words[:1].upper()}{words[1:]}{where}: prompt {int(row.prompt)}"


def _text(series: Mapping[str, Any], row: Any) -> str:
    change = float(row.metric_tuned) - float(row.metric_base)
    text = (
        f"The prompt whose {series['metric']} changes most from base to tuned "
        f"({change:+.3g} {series['unit']}). A column is one token's place; summed over places, a "
        "row's scores are its score on this prompt."
    )
    corrupt = row.corrupt_tokens
    if "corrupt" in series["direction"] and corrupt is not None and len(corrupt):
        text += f" The corrupt prompt has in these places: {' '.join(map(shown_token, corrupt))}."
    if len(row.tokens) > PLACES:
        text += f" The last {PLACES} of {len(row.tokens)} places are drawn."
    return text


def _grids(study: StudyFolder, series: Mapping[str, Any], row: Any, slug: str) -> list[Grid]:
    index, tensors = study.positions, series["tensors"]
    if index is None:
        return []
    place = series["prompts"].index(int(row.prompt))
    tokens = tuple(shown_token(token) for token in row.tokens[-PLACES:])
    grids = []
    for part, title in _NODES.items():
        if part in tensors:
            scores = index.of_prompt(series, part, place)[-PLACES:, :, 0].T
            rows = tuple(str(layer) for layer in range(len(scores)))
            grids.append(_grid(series, f"{slug}-{part}", f"{title} ({part})", scores, rows, tokens))
    for part in [part for part, tensor in tensors.items() if tensor["kind"] == "head"]:
        scores = index.of_prompt(series, part, place)[-PLACES:]
        names, top = _top_heads(scores)
        title = f"The {len(names)} largest heads ({part})"
        grid = _grid(series, f"{slug}-{part}", title, top, names, tokens)
        grids.append(grid)
    return grids


def _top_heads(scores: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and scores [head, pos] of the heads of largest |score| summed over places."""
    layers, heads = scores.shape[1:]
    flat = scores.reshape(len(scores), layers * heads).T
    order = np.argsort(-np.abs(flat).sum(1), kind="stable")[:HEADS]
    return tuple(f"L{i // heads}H{i % heads}" for i in order), flat[order]


def _grid(
    series: Mapping[str, Any],
    name: str,
    title: str,
    scores: np.ndarray,
    rows: tuple[str, ...],
    tokens: tuple[str, ...],
) -> Grid:
    layered = rows[0].isdigit()
    return Grid(
        name=name,
        title=title,
        values=scores.astype(float),
        rows=rows,
        columns=tokens,
        signed=True,
        unit=str(series["unit"]),
        what="layer {} at {}" if layered else "{} at {}",
        axis="layer" if layered else "head",
        slanted=True,
        ordinary=0.99,  # a few tokens carry most, and their layers are to be told apart
    )


def shown_token(token: object) -> str:
    """A token as a column's name: line ends and tabs as signs, long ones cut."""
    text = str(token).replace("\n", "↵").replace("\t", "⇥").strip() or "␣"
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"
