"""Summaries of a study's tables that both the sentences and the figures of the page use.

Everything here is about one tuned model. Rows of kinds matrix, norm, bias and embedding cut the
parameters into disjoint pieces; only these are ever summed (``components.DISJOINT_KINDS``).
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tvlens.components import ATTENTION_PARTS, DISJOINT_KINDS, MLP_PARTS

from .figures import NOTHING
from .folder import StudyFolder

ESTIMATE = "weight_ig"
EXACT = "exact_weight_path"
PRODUCTS = ("OV", "QK")
"""Shares of attention by query head: never added to the heads."""
PLACES = ("attention", "MLP", "embeddings", "norms", "biases", "other matrices")


KIND_WORDS = {
    "head": "heads",
    "kv_head": "key-value heads",
    "kv_group": "key-value groups",
    "neuron": "neurons",
    "matrix": "matrices",
    "norm": "norms",
    "bias": "biases",
    "embedding": "embeddings",
    "direction": "directions",
    "node": "activations",
    "all": "all kinds",
}
"""Plural of every kind of component that a table may hold, in the order of the answer."""


class Completeness(NamedTuple):
    """Whether the parts of the metric's change add up to it, over prompts.

    Attributes:
        change: Mean of metric(tuned) - metric(base).
        total: Mean of the sum of the parts.
        gap: mean |sum of the parts - change| / mean |change|, NaN where nothing changes.
        worst: Largest |sum of the parts - change| of a prompt, in metric units.
        prompts: How many prompts.
    """

    change: float
    total: float
    gap: float
    worst: float
    prompts: int


def kind_words(kind: str, count: int = 2) -> str:
    """The plural, or for one thing the singular, of a kind of component."""
    plural = KIND_WORDS.get(kind, f"{kind}s")
    if count != 1 or kind == "all":
        return plural
    return {"matrices": "matrix", "biases": "bias"}.get(plural, plural.removesuffix("s"))


def place_of(kind: str, part: str | None) -> str:
    """Where in a model a disjoint piece is, one of ``PLACES``."""
    if kind in ("embedding", "norm", "bias"):
        return {"embedding": "embeddings", "norm": "norms", "bias": "biases"}[kind]
    if part in ATTENTION_PARTS:
        return "attention"
    return "MLP" if part in MLP_PARTS else "other matrices"


def disjoint(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that cut the parameters into pieces, with their ``place``."""
    rows = frame[frame["kind"].isin(DISJOINT_KINDS)]
    places = [place_of(k, p) for k, p in zip(rows["kind"], rows["part"], strict=True)]
    return rows.assign(place=np.array(places, dtype=object))


def energy_shares(weights: pd.DataFrame, by: str) -> pd.Series:
    """Share of the tuning vector's squared length by ``place`` or ``layer``, largest first."""
    pieces = disjoint(weights)
    energy = (pieces["delta_norm"].astype(float) ** 2).groupby(pieces[by]).sum()
    return (energy / energy.sum()).sort_values(ascending=False, kind="stable")


def relative_size(weights: pd.DataFrame) -> tuple[float, float, float]:
    """|tuning vector|, |base| over all pieces, and their ratio."""
    pieces = disjoint(weights)
    delta, base = (
        float(np.sqrt((pieces[c].astype(float) ** 2).sum())) for c in ("delta_norm", "base_norm")
    )
    return delta, base, delta / base if base > 0 else float("nan")


def of_method(attribution: pd.DataFrame, method: str) -> pd.DataFrame:
    """Rows of one method for whole components, of the first metric that the table holds for it.

    Parts of a component's score and the circuits' shares of attention are left out.
    """
    shared = (attribution["space"] == "weight") & attribution["part"].isin(PRODUCTS)
    whole = attribution["geometric_part"].isna() & ~shared
    rows = attribution[(attribution["method"] == method) & whole]
    metrics = rows["metric"].dropna().unique()
    return rows if len(metrics) < 2 else rows[rows["metric"] == metrics[0]]


def mean_scores(rows: pd.DataFrame, prompts: set[float] | None = None) -> pd.DataFrame:
    """Mean score by component over ``prompts`` (all if None), with its keys and ``prompts`` count.

    A row without a prompt is already a mean over all prompts; it stands where no prompt is asked
    for or where its component has no rows by prompt.
    """
    whole = rows[rows["prompt"].isna()]
    single = rows[rows["prompt"].notna()]
    chosen = single if prompts is None else single[single["prompt"].isin(prompts)]
    if prompts is None:
        chosen = chosen[~chosen["component"].isin(whole["component"])]
    else:
        whole = whole[~whole["component"].isin(single["component"])]
    keys = ["component", "site", "kind", "layer", "index", "part"]
    means = chosen.groupby(keys, dropna=False, sort=False, as_index=False).agg(
        score=("score", "mean"), prompts=("prompt", "nunique")
    )
    kept = whole[[*keys, "score"]].assign(prompts=whole["n"])
    tables = [table for table in (means, kept) if len(table)]
    return pd.concat(tables, ignore_index=True) if tables else means


def split_prompts(prompts: pd.DataFrame, split: str) -> set[float]:
    """Ids of the prompts of a split; the row numbers where the table has no ids."""
    ids = prompts["prompt"]
    if ids.isna().any():
        ids = pd.Series(np.arange(len(prompts)), index=prompts.index)
    return {float(i) for i in ids[prompts["split"] == split]}


def completeness(attribution: pd.DataFrame, prompts: pd.DataFrame) -> Completeness | None:
    """Sum of the ``weight_ig`` pieces against the metric's change; None where one is unknown."""
    rows = of_method(attribution, ESTIMATE)
    pieces = rows[rows["kind"].isin(DISJOINT_KINDS) & rows["prompt"].notna()]
    if pieces.empty:
        return None
    totals = pieces.groupby("prompt")["score"].sum()
    change = (prompts["metric_tuned"] - prompts["metric_base"]).astype(float)
    change.index = pd.Index(prompts["prompt"].astype(float))
    both = pd.DataFrame({"total": totals}).join(change.rename("change")).dropna()
    if both.empty:
        return None
    error = (both["total"] - both["change"]).abs()
    scale = float(both["change"].abs().mean())
    gap = float(error.mean()) / scale if scale > 0 else float("nan")
    mean_change, mean_total = float(both["change"].mean()), float(both["total"].mean())
    return Completeness(mean_change, mean_total, gap, float(error.max()), len(both))


def verdict(passed: bool | float | None) -> str:
    """``passed``, ``withheld``, or ``too few`` where the sample could not decide."""
    if passed is None or pd.isna(passed):
        return "too few"
    return "passed" if passed else "withheld"


def checks(fidelity: pd.DataFrame) -> pd.DataFrame:
    """The rows that decide: the random stratum, with ``verdict``."""
    rows = fidelity[fidelity["stratum"] == "random"]
    return rows.assign(verdict=[verdict(p) for p in rows["passed"]])


def decisions(fidelity: pd.DataFrame, kinds: Iterable[str]) -> dict[str, str]:
    """Whether ``ESTIMATE`` may be read as a ranking of each kind.

    A kind's own check decides. Where its sample is too small, the check over all kinds together
    does; where neither could, the kind is ``not checked``.
    """
    found = group_decisions(fidelity[fidelity["method"] == ESTIMATE])
    overall = found.get(("all", ""), "not checked")
    return {kind: found.get((kind, ""), overall) for kind in kinds}


def group_decisions(fidelity: pd.DataFrame) -> dict[tuple[str, str], str]:
    """The verdict on each kind and part of one estimate's checks; the worst of several."""
    rows = checks(fidelity)
    rows = rows[rows["verdict"] != "too few"].assign(part=rows["part"].fillna(""))
    ordered = rows.sort_values("verdict", kind="stable")  # of several, withheld comes last
    named = zip(ordered["kind"], ordered["part"], ordered["verdict"], strict=True)
    return {(str(kind), str(part)): str(said) for kind, part, said in named}


def direction_words(row: Any) -> str:
    """What was put where, with the model that ran where the direction leaves that open."""
    if not isinstance(row.direction, str):
        return ""
    words = row.direction.replace("_", " ")
    weight = str(row.method).startswith("weight")
    known = weight or not isinstance(row.at, str) or row.at in row.direction
    return words if known else f"{words}, in {row.at}"


def part_words(row: Any) -> str:
    """The plural of a row's kind, with the activation's name where it is cut part by part."""
    words, part = kind_words(str(row.kind)), getattr(row, "part", None)
    return f"{words} ({part})" if isinstance(part, str) else words


def labels_for(study: StudyFolder, tuned: str, rows: pd.DataFrame) -> list[str]:
    """The label of each row's component, else of its head's OV circuit, else a dash."""
    labels = study.table("labels", tuned).dropna(subset=["component", "label"])
    own = labels.drop_duplicates("component").set_index("component")["label"]
    heads = labels[(labels["kind"] == "head") & (labels["part"] == "OV")].drop_duplicates("site")
    found = rows["component"].map(own)
    of_site = rows["site"].map(heads.set_index("site")["label"])
    return found.fillna(of_site).fillna(NOTHING).astype(str).tolist()


def labelled_groups(labels: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Labelled rows by what they are, in words: a head has two circuits, a neuron its vectors."""
    groups: list[tuple[str, pd.DataFrame]] = []
    for kind in [kind for kind in KIND_WORDS if kind in set(labels["kind"].dropna())]:
        rows = labels[labels["kind"] == kind]
        if kind == "head":
            circuits = [(part, rows[rows["part"] == part]) for part in rows["part"].unique()]
            groups += [(f"{kind_words(kind, len(of))} ({part})", of) for part, of in circuits]
        elif kind == "neuron" and rows["site"].nunique() < len(rows):
            groups.append(("neuron vectors", rows))
        else:
            groups.append((kind_words(kind, len(rows)), rows))
    return groups
