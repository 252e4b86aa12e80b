"""Directions by name, the paper's candidate readings, and fine-tunes against each other."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from .answer import percent
from .datatable import DataTable, signed
from .figures import NOTHING, number
from .folder import StudyFolder, rows_of

TOP = 12  # rows of a ranking that fit a screen with their captions
NAMED = 5  # tokens at each end
LONGEST = 24  # characters of a token
PARTS = ("W_Q", "W_K", "W_V", "W_O", "W_gate", "W_in", "W_out")
READINGS = ("sa_proj", "sa_phi", "sa_cos_mean")
SHOWN = (("sa_proj", "energy_0.9025"), ("sa_phi", "8_8"))
WRITES = ("W_O", "W_out")
FEW = 3  # pairs of fine-tunes whose every part is shown; beyond, what they write


def directions_table(frame: pd.DataFrame) -> DataTable | None:
    """Directions whose tokens stand out, then the new ones that hold most of a change."""
    if frame.empty:
        return None
    out = frame["stands_out"].fillna(False).astype(bool)
    first = frame[out].sort_values("top_z", ascending=False, kind="stable")
    new = frame[~out & (frame["label"] == "new_write")]
    shown = pd.concat([first, new.sort_values("share", ascending=False, kind="stable")])[:TOP]
    rows = tuple(
        (
            row.component,
            row.label.replace("_", " "),
            token_list(row.promoted),
            token_list(row.suppressed),
            percent(row.share),
            number(row.top_z),
            _stands_out(row.stands_out),
        )
        for row in rows_of(shown)
    )
    columns = ("direction", "label", "promotes", "suppresses", "share", "largest |z|", "stands out")
    return DataTable(_directions_caption(frame, out), columns, rows, text_columns=4)


def _stands_out(value: Any) -> str:
    return NOTHING if pd.isna(value) else "yes" if value else "no"


def _directions_caption(frame: pd.DataFrame, out: pd.Series) -> str:
    new = frame["label"] == "new_write"
    text = (
        f"What the weights write in new ways, read through the final norm and the unembedding: "
        f"{len(frame):,} directions, {int(new.sum()):,} of them new. "
    )
    known = frame.dropna(subset=["random_z"])
    if known.empty:
        return f"{text}No unembedding is known that could name them."
    chance = next(rows_of(known))
    return (
        f"{text}Some token always comes first: a random direction's most extreme token reaches "
        f"|z| {number(chance.random_z)} on average and stays below {number(chance.random_z_99)} in "
        f"99 of 100. {int(out.sum()):,} directions stand out from that (false discovery rate 5 %), "
        f"{int((out & new).sum()):,} of them new; read nothing into the tokens of the others. "
        "Share: of the change of its matrix or head. A matrix's direction has no sign of its own "
        "(the most extreme token is shown as promoted), a neuron's has."
    )


def token_list(tokens: Iterable[str] | None) -> str:
    """The first few tokens, blanks and what cannot be printed made visible."""
    if tokens is None:
        return NOTHING
    return " · ".join(visible(str(token)) for token in list(tokens)[:NAMED])


def visible(token: str) -> str:
    """A token in characters that can be seen, cut where it is long."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in token
    ).replace(" ", "\N{OPEN BOX}")
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}"


def readings_table(frame: pd.DataFrame) -> DataTable | None:
    """Means over layers of three readings by part: raw, of noise, and corrected for chance."""
    matrices = frame[frame["kind"] == "matrix"]
    wanted = matrices.set_index(["reading", "rule"]).index.isin(SHOWN)
    best = matrices["reading"] == "sa_cos_mean"  # its rule is the number of directions there are
    keys = ["part", "side", "reading"]
    means = matrices[wanted | best].groupby(keys)[["value", "noise", "corrected"]].mean()
    cells = {(row.part, row.reading): _cells(row) for row in rows_of(means.reset_index())}
    sides = dict(zip(matrices["part"], matrices["side"], strict=True))
    absent = (NOTHING, NOTHING, NOTHING)
    rows = [
        (part, sides[part], *(c for r in READINGS for c in cells.get((part, r), absent)))
        for part in PARTS
        if part in sides
    ]
    if not rows:
        return None
    return DataTable(
        "Subspace alignment of the change with the base, as a paper may have meant it, mean over "
        "layers. SA-proj: |P D| / |D| in the directions that hold 90.25 % of the base's energy; "
        "SA-phi: overlap of the top 8 of both; SA-cos: best single cosines. Raw values follow the "
        "base's spectrum, not the fine-tune: beside each stands what noise of the same size "
        "scores, and the value corrected for chance (0 at chance, 1 all inside). Only corrected "
        "values may be compared between rows.",
        (
            *("part", "side", "SA-proj", "of noise", "corrected", "SA-phi", "of noise"),
            *("corrected", "SA-cos", "of noise", "corrected"),
        ),
        tuple(rows),
        text_columns=2,
    )


def _cells(row: Any) -> tuple[str, str, str]:
    return f"{row.value:.2f}", f"{row.noise:.2f}", _two_digits(row.corrected)


def _two_digits(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}" if pd.notna(value) else NOTHING  # no -0.00


def overlap_table(study: StudyFolder) -> DataTable | None:
    """Every two fine-tunes: all weights, then by part."""
    frame = study.table("overlap")
    pairs = list(frame.groupby(["tuned", "other"], sort=False))
    parts = PARTS if len(pairs) <= FEW else WRITES
    rows = []
    for (tuned, other), mine in pairs:
        relation = str(mine["relation"].iloc[0])
        name = f"{tuned}, {other}" + (f" ({relation})" if relation != "fine-tune" else "")
        rows.append((name, "all weights", *_common(mine)))
        for part in (p for p in parts if p in set(mine["part"])):
            rows.append((name, part, *_common(mine[mine["part"] == part])))
    if not rows:
        return None
    return DataTable(
        "Cosine of two tuning vectors (chance 0, with its deviation), and overlap of the subspaces "
        "that stand above noise, mean over layers (0 to 1, with what random subspaces of the same "
        "size show). Shared: directions that meet more closely than 999 in 1,000 random subspaces "
        "do, of those that either fine-tune has. Ceiling: the same between two runs of one recipe. "
        "What is shared with a control is no trait of the domain.",
        (
            *("fine-tunes", "part", "cosine", "chance ±", "ceiling", "overlap", "at random"),
            *("ceiling", "shared", "of"),
        ),
        tuple(rows),
        text_columns=2,
    ).without_empty_columns()


def _common(rows: pd.DataFrame) -> tuple[str, ...]:
    lengths = (rows["norm_a"] ** 2).sum() * (rows["norm_b"] ** 2).sum()
    cosine = float(rows["inner"].sum() / np.sqrt(lengths)) if lengths > 0 else float("nan")
    entries = (rows["cosine_floor_sd"] ** -2.0).sum()
    known = rows.dropna(subset=["overlap"])
    compared = known[["rank_a", "rank_b"]].min(axis=1).sum()
    return (
        signed(cosine),
        number(float(entries**-0.5)),
        _mean(rows["cosine_ceiling"]),
        _mean(known["overlap"]),
        _mean(known["overlap_floor"]),
        _mean(known["overlap_ceiling"]),
        f"{int(known['shared'].sum()):,}" if len(known) else NOTHING,
        f"{int(compared):,}" if len(known) else NOTHING,
    )


def _mean(values: pd.Series) -> str:
    return number(float(values.mean())) if values.notna().any() else NOTHING
