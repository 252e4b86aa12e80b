"""From where to where: the largest edges beside exact patching, and what few edges carry."""

from dataclasses import dataclass

import pandas as pd

from .activation_maps import beside_exact, heading_of
from .datatable import DataTable, interval, signed
from .folder import StudyFolder, rows_of
from .graft_tables import percents, share
from .scores import group_decisions, mean_scores

TOP = 12  # edges of a table that fits a screen
SLOPES = (0.8, 1.25)
"""As a check needs them (``attribution.fidelity``, which would load torch here)."""
_FIGURES = "Spearman {:.2f}, exact {:.2f} times the estimate"
_CURVES = {
    "restored": "restored by exchanging these edges alone",
    "destroyed": "lost when all other edges are exchanged and these are not",
}


@dataclass(frozen=True)
class EdgePart:
    """One direction and estimate.

    Attributes:
        heading: Its name.
        text: What was done, and how far the scores agree with exact patching.
        table: The largest scores.
    """

    heading: str
    text: str
    table: DataTable


def edge_parts(study: StudyFolder, tuned: str) -> list[EdgePart]:
    """Every direction in which edges were exchanged, as the tables have them."""
    attribution = study.table("attribution", tuned)
    rows = attribution[attribution["space"] == "edge"]
    exact, found = rows[rows["estimator"] == "exact"], []
    series = rows[rows["estimator"] != "exact"].groupby(["method", "direction", "at"], sort=False)
    for (method, direction, at), estimates in series:
        same = (exact["direction"] == direction) & (exact["at"] == at)
        checks = study.table("fidelity", tuned)
        asked = (checks["method"] == method) & (checks["direction"] == direction)
        own = checks[asked & (checks["at"] == at) & (checks["kind"] == "edge")]
        found.append(
            EdgePart(
                heading_of(estimates), _text(own), _largest(estimates, exact[same])
            )
        )  # fmt: skip
    return found


def _text(checks: pd.DataFrame) -> str:
    """How the estimates did on edges drawn at random and on the largest, which are not alike."""
    said = group_decisions(checks).get(("edge", ""), "not checked")
    words = [f"Check against exact patching: {said}."]
    for stratum, which in (("random", "drawn at random"), ("top", "the largest by the estimate")):
        known = checks[(checks["stratum"] == stratum) & checks["spearman"].notna()]
        words += [
            f"Of {row.n:.0f} edges {which}: {_FIGURES.format(row.spearman, row.slope)}."
            for row in rows_of(known)
        ]
        low, high = SLOPES
        if stratum == "top" and not known["slope"].dropna().between(low, high).all():
            words.append("Do not read sizes off the largest estimates.")
    return " ".join(words)


def _largest(estimates: pd.DataFrame, exact: pd.DataFrame) -> DataTable:
    means, pairs = mean_scores(estimates), beside_exact(estimates, exact)
    order = means["score"].abs().sort_values(ascending=False, kind="stable").index[:TOP]
    nothing = (float("nan"), float("nan"))
    ends = estimates.drop_duplicates("component").set_index("component")[["source", "target"]]
    rows = []
    for row in rows_of(means.loc[order]):
        shown = map(signed, (float(row.score), *pairs.get(str(row.component), nothing)))
        rows.append((*ends.loc[row.component], *shown))
    unit = estimates["unit"].dropna()
    return DataTable(
        f"The {len(rows)} largest of {len(means):,} mean scores"
        + (f" ({unit.iloc[0]})" if len(unit) else "")
        + ", beside exact patching of those that were in the sample (a dash: not patched). Scores "
        "of edges do not add up to an effect.",
        ("what is written by", "as read by", "estimate", "estimate, same prompts", "exact"),
        tuple(rows),
        text_columns=2,
    )


def edge_circuit_tables(study: StudyFolder, tuned: str) -> list[DataTable]:
    """Share of the change against the number of edges, on the judging prompts; one each way."""
    frame = study.table("edge_circuits", tuned)
    frame = frame[frame["split"] == "judge"] if len(frame) else frame
    found = []
    for (direction, at, curve), rows in frame.groupby(["direction", "at", "curve"], sort=False):
        ranked = [name for name in dict.fromkeys(rows["ranked_by"]) if name != "random"]
        found.append(
            DataTable(
                f"Share of the change {_CURVES[str(curve)]}: {str(direction).replace('_', ' ')}, "
                f"in {at}, of {int(rows['of'].iloc[0]):,} edges, chosen on other prompts; 95 % "
                "intervals over prompts. Every value is a run, no estimate."
                + _changes(rows.iloc[0]),
                ("edges", *(head for name in ranked for head in (name, "95 %")), "at random"),
                tuple(_sizes(rows, ranked)),
                text_columns=0,
            )
        )
    return found


def _changes(row: pd.Series) -> str:
    """What the shares are of; nothing where a study does not say."""
    low, high = row["change_low"], row["change_high"]
    if pd.isna(low) or pd.isna(high):
        return ""
    text = f" The {row['metric']} changes by {signed(row['change'])} ({interval(low, high)})"
    unsure = ": not surely different from 0, so that shares of it mean nothing."
    return text + (unsure if low <= 0 <= high else ".")


def _sizes(rows: pd.DataFrame, ranked: list[str]) -> list[tuple[str, ...]]:
    found = []
    for k, of_size in rows.groupby("k"):
        cells = [f"{k:,}"]
        for name in ranked:
            own = of_size[of_size["ranked_by"] == name].iloc[0]
            cells += [share(own["value"]), percents(own["ci_low"], own["ci_high"])]
        drawn = of_size[of_size["ranked_by"] == "random"]["value"]
        cells.append(percents(drawn.min(), drawn.max()))
        found.append(tuple(cells))
    return found
