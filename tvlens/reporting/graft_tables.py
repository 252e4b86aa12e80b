"""The smallest sets of components that carry a behaviour, beside sets chosen otherwise."""

import pandas as pd

from .datatable import DataTable, interval
from .figures import NOTHING, number
from .folder import StudyFolder, rows_of

TOP = 12  # components of a set that fit a screen with their captions
WORDS = {
    "restored": "restored by putting the set into the base",
    "destroyed": "destroyed by taking the set out of the tuned model",
}
_SETS = {"score": "by score", "delta_norm": "by length", "random": "others at random"}


def graft_tables(study: StudyFolder, tuned: str) -> list[DataTable]:
    """One table of sizes a question, and one of the components of each smallest set."""
    curves, sets = study.table("curves", tuned), study.table("grafts", tuned)
    tables = []
    for question in WORDS:
        judged = curves[(curves["curve"] == question) & (curves["split"] == "judge")]
        if judged.empty:
            continue
        chosen = sets[sets["curve"] == question]
        tables.append(_sizes(question, judged, len(chosen)))
        if len(chosen):
            tables.append(_members(question, chosen))
    return tables


def _sizes(question: str, judged: pd.DataFrame, smallest: int) -> DataTable:
    of = int(judged["of"].iloc[0])
    rows = []
    for k, at in judged.groupby("k"):
        mine = at[at["ranked_by"] == "score"].iloc[0]
        values = {name: at[at["ranked_by"] == name]["value"] for name in _SETS}
        drawn = values["random"]
        rows.append(
            (
                f"{k:,}" + (" *" if k == smallest else ""),
                share(mine["share_of_norm"]),
                share(mine["value"]),
                percents(mine["ci_low"], mine["ci_high"]),
                share(values["delta_norm"].iloc[0]),
                percents(drawn.min(), drawn.max()),
            )
        )
    note = (
        " * the smallest that was enough on the choosing prompts."
        if smallest
        else (" No size was enough on the choosing prompts.")
    )
    return DataTable(
        f"Share of the change {WORDS[question]}, on the judging prompts, of {of:,} components."
        + note,
        ("k", "share of |delta|", "by score", "95 %", "by length", "others at random"),
        tuple(rows),
        text_columns=0,
    )


def _members(question: str, chosen: pd.DataFrame) -> DataTable:
    shown = chosen.sort_values("place").head(TOP)
    rows = tuple(
        (row.component, row.kind.replace("_", " "), f"{row.score:+.3g}", number(row.delta_norm))
        for row in rows_of(shown)
    )
    return DataTable(
        f"The first {len(shown)} of the {len(chosen):,} components of the smallest set that was "
        f"enough: {question}.",
        ("component", "kind", "score", "|delta|"),
        rows,
        text_columns=2,
    )


def share(value: float) -> str:
    """A share in whole percent."""
    return f"{value:.0%}".replace("-0%", "0%") if pd.notna(value) else NOTHING


def percents(low: float, high: float) -> str:
    """Both ends of a range of shares."""
    known = pd.notna(low) and pd.notna(high)
    return f"{share(low)} to {share(high)}" if known else interval(low, high)
