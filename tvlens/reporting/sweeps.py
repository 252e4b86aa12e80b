"""Curves of a sweep: each task's metric by dose, of the tuning vector and of its controls."""

import pandas as pd

from .figures import Scatter, ScatterWords, number, scatter
from .folder import StudyFolder, rows_of

NAMES = {"tuning": "tuning vector", "random": "random vector", "random_set": "random set"}


def sweep_plots(
    study: StudyFolder, tuned: str, slug: str, *, tooltips: bool = True
) -> list[Scatter]:
    """One plot a task, in the order of the tables."""
    curves = study.table("curves", tuned)
    rows = curves[(curves["curve"] == "sweep") & curves["value"].notna()]
    return [
        _plot(f"{slug}-sweep-{place}", str(task), of_task, tooltips=tooltips)
        for place, (task, of_task) in enumerate(rows.groupby("task", sort=False))
    ]


def sweep_notes(study: StudyFolder, tuned: str) -> list[str]:
    """The sentence of each task, as the sweep stated it."""
    facts = study.manifest.get("facts")
    found = facts.get(tuned, {}).get("sweep", {}) if isinstance(facts, dict) else {}
    return [str(task["sentence"]) for task in found.values() if "sentence" in task]


def _plot(name: str, task: str, rows: pd.DataFrame, *, tooltips: bool) -> Scatter:
    first = next(rows_of(rows))
    unit = f" ({first.unit})" if isinstance(first.unit, str) and first.unit else ""
    part = number(100 * first.share_of_norm) if first.share_of_norm < 1 else ""
    of = f" of the selected part ({part} % of the vector's length)" if part else ""
    words = ScatterWords(
        f"{task}: {first.metric} by dose",
        f"{task}: {first.metric} by dose{of}, n = {int(first.n):,}.",
        "dose of the tuning vector: 0 is the base, 1 the tuned model" if not part else "dose",
        f"{first.metric}{unit}",
    )
    return scatter(name, words, _points(rows, tooltips=tooltips), height=240.0)


def _points(rows: pd.DataFrame, *, tooltips: bool) -> pd.DataFrame:
    label = rows["ranked_by"].map(lambda control: NAMES.get(str(control), str(control)))
    tuning = rows["ranked_by"] == "tuning"
    title = [
        f"dose {number(row.scale)}: {number(row.value, 4)}" if tooltips else ""
        for row in rows_of(rows)
    ]
    return pd.DataFrame(
        {
            "x": rows["scale"],
            "y": rows["value"],
            "label": label,
            "title": title,
            "line": label + rows["draw"].astype("Int64").astype("string").fillna(""),
            "low": rows["ci_low"].where(tuning),
            "high": rows["ci_high"].where(tuning),
        }
    )
