"""What matters, beside exact patching, and how far each estimate can be trusted."""

import numpy as np
import pandas as pd

from .datatable import DataTable, interval, signed
from .figures import NOTHING, number
from .folder import StudyFolder, rows_of
from .scores import (
    ESTIMATE,
    EXACT,
    decisions,
    direction_words,
    kind_words,
    mean_scores,
    of_method,
    part_words,
    split_prompts,
    verdict,
)

TOP = 12  # rows of a ranking that fit a screen with their captions
_FINER = ("head", "kv_head", "neuron")


def ranking_tables(study: StudyFolder, tuned: str) -> list[DataTable]:
    """The components with the largest scores: disjoint pieces, then their finer cuts."""
    attribution = study.table("attribution", tuned)
    rows = of_method(attribution, ESTIMATE)
    if rows.empty:
        return []
    prompts = study.table("prompts", tuned)
    joined = _beside_exact(rows, of_method(attribution, EXACT), prompts)
    joined = _with_findings(joined, study.table("findings", tuned))
    decided = decisions(study.table("fidelity", tuned), joined["kind"].unique().tolist())
    joined["check"] = joined["kind"].map(decided)
    finer = joined["kind"].isin(_FINER)
    unit = str(rows["unit"].dropna().iloc[0]) if rows["unit"].notna().any() else "metric units"
    tables = [
        _ranking(joined[~finer], f"Pieces of the model: they add up to the whole change ({unit})."),
        _ranking(joined[finer], f"Heads and neurons: finer cuts of the same matrices ({unit})."),
    ]
    return [table for table in tables if table.rows]


def _beside_exact(
    rows: pd.DataFrame, exact_rows: pd.DataFrame, prompts: pd.DataFrame
) -> pd.DataFrame:
    joined = mean_scores(rows).set_index("component")
    choose, judge = split_prompts(prompts, "choose"), split_prompts(prompts, "judge")
    tested = exact_rows[["component", "prompt"]].dropna().drop_duplicates()
    same = rows.merge(tested, on=["component", "prompt"])
    joined["same"] = same.groupby("component")["score"].mean()
    joined["exact"] = mean_scores(exact_rows).set_index("component")["score"]
    joined["rank"], joined["judge"] = joined["score"], np.nan
    if choose and judge:
        joined["rank"] = mean_scores(rows, choose).set_index("component")["score"]
        joined["judge"] = mean_scores(rows, judge).set_index("component")["score"]
    return joined.reset_index()


def _with_findings(joined: pd.DataFrame, findings: pd.DataFrame) -> pd.DataFrame:
    key = "site" if findings["component"].isna().all() else "component"
    found = findings.dropna(subset=["finding"]).drop_duplicates(key).set_index(key)
    columns = ("insert", "remove", "finding")
    return joined.assign(**{column: joined[key].map(found[column]) for column in columns})


def _ranking(frame: pd.DataFrame, what: str) -> DataTable:
    order = frame["rank"].abs().sort_values(ascending=False, kind="stable", na_position="last")
    split = bool(frame["judge"].notna().any())
    rows = []
    for row in rows_of(frame.reindex(order.index[:TOP])):
        scores = (signed(row.rank), signed(row.judge)) if split else (signed(row.score),)
        checked = (signed(row.same), signed(row.exact), signed(row.insert), signed(row.remove))
        finding = row.finding if isinstance(row.finding, str) else NOTHING
        rows.append((row.component, row.check, finding, *scores, *checked))
    how = (
        "Ranked on the prompts of the split 'choose'; the score on 'judge' stands beside it."
        if split
        else "Ranked by the mean over all prompts."
    )
    headings = ("on choose", "on judge") if split else ("estimate",)
    return DataTable(
        f"{what} {how} The exact swing averages what swapping the component in does along the path "
        "and is set against the estimate on the same prompts. A dash: not measured exactly. Read "
        "no order into rows whose kind did not pass its check.",
        (
            *("component", "check", "finding", *headings),
            *("estimate, same prompts", "exact swing", "alone into base", "alone out of tuned"),
        ),
        tuple(rows),
        text_columns=3,
    ).without_empty_columns()


def fidelity_tables(frame: pd.DataFrame) -> list[DataTable]:
    """Every check of an estimate against exact patching, then what the exact quantities sum to."""
    if frame.empty:
        return []
    rows = tuple(
        (
            str(row.method),
            direction_words(row) or NOTHING,
            part_words(row),
            str(row.stratum),
            verdict(row.passed) if row.stratum == "random" else NOTHING,
            number(row.n),
            number(row.spearman),
            interval(row.ci_low, row.ci_high),
            number(row.spearman_worst),
            number(row.slope),
            number(row.sign_agreement),
        )
        for row in rows_of(frame)
    )
    agreement = DataTable(
        "Estimates against the exact quantity that asks the same question. The random sample "
        "decides: passed needs Spearman ≥ 0.9 and a slope of 0.8 to 1.25; a kind with too few "
        "components is judged by all kinds together. A claim that rests on an estimate that did "
        "not pass is withheld.",
        (
            *("method", "direction", "kind", "sample", "claims", "n", "Spearman"),
            *("95 % interval", "worst prompt", "slope", "signs agree"),
        ),
        rows,
        text_columns=5,
    )
    tables = (agreement.without_empty_columns(), _sums_table(frame))
    return [table for table in tables if table.rows]


def _sums_table(frame: pd.DataFrame) -> DataTable:
    whole = (frame["method"] == ESTIMATE) & (frame["stratum"] == "random")
    rows = frame[whole].dropna(subset=["sum_insert", "sum_remove", "sum_ig"])
    return DataTable(
        "The same sampled components put alone into the base, taken alone out of the tuned model, "
        "and integrated along the line between the two: sums over the random sample, in the "
        "metric's unit. Only the integrated scores of all pieces add up to the change.",
        (
            "kind",
            "n",
            "alone into base",
            "alone out of tuned",
            "integrated",
            "change of the metric",
        ),
        tuple(
            (
                kind_words(str(row.kind)),
                number(row.n),
                *map(signed, (row.sum_insert, row.sum_remove, row.sum_ig, row.metric_change)),
            )
            for row in rows_of(rows)
        ),
    )
