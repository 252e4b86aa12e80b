"""Where a difference passes: every direction in which activations were exchanged, part by part.

An activation's score is about what passes through it, wherever it arose, so nothing here adds up.
Heads are drawn part by part (a query is not an output), residual streams apart from what a
sub-layer adds to them, since their scores are much larger; neurons are too many for a map and
stand in the table alone.
"""

from dataclasses import dataclass

import pandas as pd

from .datatable import DataTable, interval, signed
from .figures import Grid, HeatMap, heat_map
from .folder import StudyFolder, rows_of
from .grids import grid_of
from .scores import direction_words, group_decisions, mean_scores, part_words

MOST_MOVED = 12
TOP = 4  # rows of each kind and part
_BY_PART = ("head", "kv_head", "neuron")  # as the checks group them
_NUMBERED = {"head": "head", "kv_head": "key-value head"}
_STREAMS = ("resid_pre", "resid_post")
_NODES = ((("attn_out", "mlp_out"), "What sub-layers add"), (_STREAMS, "Residual stream"))
_DONE = {
    "tuned_into_base": "The base runs with the tuned model's activation put in.",
    "base_into_tuned": "The tuned model runs with the base's activation put in.",
    "clean_into_corrupt": "The corrupt prompt runs with the prompt's own activation put in "
    "(denoising).",
    "corrupt_into_clean": "The prompt runs with the corrupt prompt's activation put in (noising).",
    "zero_ablation": "The activation is set to zero.",
    "mean_ablation": "The activation is set to its mean over the real tokens of all prompts.",
}
_HIGHER = {
    "tuned_into_base": "the tuned model's activation than with the base's",
    "base_into_tuned": "the tuned model's activation than with the base's",
    "clean_into_corrupt": "the clean prompt's activation than with the corrupt one's",
    "corrupt_into_clean": "the clean prompt's activation than with the corrupt one's",
}


@dataclass(frozen=True)
class PassingPart:
    """One direction.

    Attributes:
        heading: Its name.
        text: What was done and what a score above 0 says.
        maps: Heat maps of mean scores.
        table: The largest scores beside exact patching.
    """

    heading: str
    text: str
    maps: list[HeatMap]
    table: DataTable


def passing_parts(
    study: StudyFolder, tuned: str, slug: str, *, tooltips: bool = True
) -> list[PassingPart]:
    """Every direction in which activations of ``tuned`` were exchanged, as the table has them."""
    attribution = study.table("attribution", tuned)
    whole = attribution["geometric_part"].isna()
    rows = attribution[(attribution["space"] == "activation") & whole]
    exact = rows[rows["estimator"] == "exact"]
    found = []
    series = rows[rows["estimator"] != "exact"].groupby(["method", "direction", "at"], sort=False)
    for number, ((method, direction, at), estimates) in enumerate(series, 1):
        same = (exact["direction"] == direction) & (exact["at"] == at)
        fidelity = study.table("fidelity", tuned)
        asked = (fidelity["method"] == method) & (fidelity["direction"] == direction)
        checked = group_decisions(fidelity[asked & (fidelity["at"] == at)])
        means = mean_scores(estimates)
        grids = _grids(means, checked, f"{slug}-passing-{number}", unit=_unit(estimates))
        found.append(
            PassingPart(
                heading=heading_of(estimates),
                text=_text(str(direction)),
                maps=[heat_map(grid, tooltips=tooltips) for grid in grids],
                table=_table(means, beside_exact(estimates, exact[same]), checked),
            )
        )
    return found


def heading_of(estimates: pd.DataFrame) -> str:
    """The direction in words and the method, of rows that share both."""
    first = next(rows_of(estimates))
    words = direction_words(first)
    return f"{words[:1].upper()}{words[1:]}: {first.method}"


def _text(direction: str) -> str:
    higher = _HIGHER.get(direction, "the activation there than without it")
    done = _DONE.get(direction, direction.replace("_", " "))
    return f"{done} Above 0: the metric is higher with {higher}."


def _unit(estimates: pd.DataFrame) -> str:
    return str(estimates["unit"].dropna().iloc[0]) if estimates["unit"].notna().any() else ""


def _grids(
    means: pd.DataFrame, checked: dict[tuple[str, str], str], slug: str, *, unit: str
) -> list[Grid]:
    grids = []
    for kind, words in _NUMBERED.items():
        of_kind = means[means["kind"] == kind]
        for part in of_kind["part"].drop_duplicates():
            rows = of_kind[of_kind["part"] == part]
            grids.append(
                grid_of(
                    rows.assign(column=rows["index"], value=rows["score"]),
                    f"{slug}-{kind}-{part}",
                    f"{words.capitalize()}s, {part}{_said(checked, kind, str(part))}",
                    what=f"layer {{}} {words} {{}} {part}",
                    signed=True,
                    unit=unit,
                )
            )
    nodes = means[(means["kind"] == "node") & means["layer"].notna()]
    for parts, words in _NODES:
        rows = nodes[nodes["part"].isin(parts)]
        grids.append(
            grid_of(
                rows.assign(column=rows["part"], value=rows["score"]),
                f"{slug}-{parts[0]}",
                words + _said(checked, "node", ""),
                what="layer {} {}",
                signed=True,
                unit=unit,
                order=parts,
            )
        )
    return [grid for grid in grids if grid is not None]


def _decision(checked: dict[tuple[str, str], str], kind: str, part: str) -> str:
    """The verdict of a group's own check, else of all kinds together."""
    return checked.get((kind, part), checked.get(("all", ""), "not checked"))


def _said(checked: dict[tuple[str, str], str], kind: str, part: str) -> str:
    said = _decision(checked, kind, part)
    return {"passed": "", "withheld": " (check not passed)"}.get(said, f" ({said})")


def beside_exact(estimates: pd.DataFrame, exact: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Mean estimate and exact mean on the same prompts, by component of the exact sample."""
    keys = ["component", "prompt"]
    both = estimates.merge(exact, on=keys, suffixes=("", "_exact"))
    means = both.groupby("component")[["score", "score_exact"]].mean()
    named = zip(means.index, means["score"], means["score_exact"], strict=True)
    return {str(name): (float(guess), float(truth)) for name, guess, truth in named}


def _table(
    means: pd.DataFrame,
    exact: dict[str, tuple[float, float]],
    checked: dict[tuple[str, str], str],
) -> DataTable:
    means = means.assign(part=means["part"].where(means["kind"].isin(_BY_PART)))
    rows = []
    for _, group in means.groupby(["kind", "part"], sort=False, dropna=False):
        order = group["score"].abs().sort_values(ascending=False, kind="stable").index
        for row in rows_of(group.loc[order[:TOP]]):
            part = row.part if isinstance(row.part, str) else ""
            pair = exact.get(str(row.component), (float("nan"), float("nan")))
            said = _decision(checked, str(row.kind), part)
            shown = map(signed, (float(row.score), *pair))
            rows.append((str(row.component), part_words(row), said, *shown))
    return DataTable(
        f"The {TOP} largest mean scores of each kind, beside exact patching of those that were in "
        "the sample (a dash: not patched). They say where a difference passes, not where it was "
        "written, and do not add up.",
        ("component", "kind", "check", "estimate", "estimate, same prompts", "exact"),
        tuple(rows),
        text_columns=3,
    )


def circuits_table(frame: pd.DataFrame) -> DataTable | None:
    """Where clean activations matter more, or less, in the tuned model than in the base."""
    rows = frame[frame["difference"].notna()]
    if rows.empty:
        return None
    order = rows["difference"].abs().sort_values(ascending=False, kind="stable").index
    unit = str(rows["unit"].dropna().iloc[0]) if rows["unit"].notna().any() else "metric units"
    return DataTable(
        "The clean prompt's activations put into the corrupt run, in the base and in the tuned "
        f"model: the {min(MOST_MOVED, len(rows))} of {len(rows):,} components whose mean scores "
        f"differ most ({unit}), with the 95 % interval of the difference over prompts.",
        ("component", "in the base", "in the tuned model", "difference", "95 % interval"),
        tuple(
            (
                str(row.component),
                signed(float(row.score_base)),
                signed(float(row.score_tuned)),
                signed(float(row.difference)),
                interval(row.ci_low, row.ci_high),
            )
            for row in rows_of(rows.loc[order[:MOST_MOVED]])
        ),
    )
