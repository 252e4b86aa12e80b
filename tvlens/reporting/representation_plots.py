"""Representations block by block: of the fine-tune, of random vectors as long, of controls."""

import pandas as pd

from .figures import Scatter, ScatterWords, number, scatter
from .folder import StudyFolder, rows_of
from .sweeps import NAMES

SHOWN = {
    "effective_rank_share": "Effective rank of the difference from the base, as a share of d_model",
    "cka": "Linear CKA with the base",
    "cosine": "Mean cosine with the base, token by token",
}
"""The measures that are drawn, and what they are."""


def representation_plots(
    study: StudyFolder, tuned: str, slug: str, *, tooltips: bool = True
) -> list[Scatter]:
    """One plot a measure of the residual stream after every block, first tokens left out."""
    rows = study.table("representations", tuned)
    rows = rows[(rows["part"] == "resid_post") & (rows["tokens"] == "without_first")]
    rows = rows.dropna(subset=["value"])
    return [
        _plot(f"{slug}-represent-{place}", words, rows[rows["measure"] == measure], tooltips)
        for place, (measure, words) in enumerate(SHOWN.items())
        if (rows["measure"] == measure).any()
    ]


def representation_note(study: StudyFolder, tuned: str) -> str:
    """The sentence of the stage; empty where it did not run."""
    facts = study.manifest.get("facts")
    found = facts.get(tuned, {}).get("represent", {}) if isinstance(facts, dict) else {}
    return str(found.get("sentence", ""))


def _plot(name: str, what: str, rows: pd.DataFrame, tooltips: bool) -> Scatter:
    first = next(rows_of(rows))
    few = (rows["status"] == "few_tokens").any() and first.measure == "effective_rank_share"
    words = ScatterWords(
        f"{what}, by block",
        f"{what}: the residual stream after every block; {int(first.n_tokens):,} tokens of "
        f"{int(first.n_documents):,} documents, the first of each left out."
        + (" Too few tokens: no rank here is to be believed." if few else ""),
        "block",
        str(first.measure).replace("_", " "),
    )
    return scatter(name, words, _points(rows, tooltips=tooltips), height=240.0)


def _points(rows: pd.DataFrame, *, tooltips: bool) -> pd.DataFrame:
    label = rows["control"].fillna("tuning").map(lambda name: NAMES.get(str(name), str(name)))
    own = rows["control"].isna()
    titles = [
        f"block {int(row.layer)}: {number(row.value, 4)}" if tooltips else ""
        for row in rows_of(rows)
    ]
    return pd.DataFrame(
        {
            "x": rows["layer"].astype(float),
            "y": rows["value"],
            "label": label,
            "title": titles,
            "line": rows["model"],
            "low": rows["ci_low"].where(own),
            "high": rows["ci_high"].where(own),
        }
    )
