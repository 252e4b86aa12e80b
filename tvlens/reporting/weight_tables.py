"""Where the weights changed and what the change was called: tables and the neuron scatter."""

import pandas as pd

from .answer import percent
from .datatable import DataTable
from .figures import LABELS, NOTHING, Scatter, label_scatter, number
from .folder import StudyFolder, rows_of
from .scores import disjoint, energy_shares, labelled_groups, labels_for, relative_size

PRODUCTS = ("OV", "QK")  # two factors change: not to be ranked beside slices of one tensor
TOP = 12  # rows of a ranking that fit a screen with their captions
INPUTS_NULL = "covariance_matched"
LEVEL = 0.05
INPUT_STATISTICS = {
    "g_read": "reads along the base's reads",
    "share_in_own_space": "reads in the head's own space",
    "kappa": "gain of a matrix",
    "gain": "gain of a neuron",
}


def places_table(weights: pd.DataFrame) -> DataTable:
    """Length of the tuning vector by place in the model."""
    pieces = disjoint(weights)
    shares = energy_shares(weights, "place")
    rows = []
    for name, share in shares.items():
        here = pieces[pieces["place"] == name]
        delta, base, ratio = relative_size(here)
        cells = (f"{len(here):,}", number(base), number(delta), percent(ratio), percent(share))
        rows.append((str(name), *cells))
    return DataTable(
        "The tuning vector by place. Shares are of its squared length, so they add up to 100 %.",
        ("place", "tensors", "|base|", "|delta|", "|delta| / |base|", "share of |delta|²"),
        tuple(rows),
    )


def largest_table(study: StudyFolder, tuned: str) -> DataTable:
    """The pieces and heads that changed most for their size."""
    weights = study.table("weights", tuned).dropna(subset=["relative_delta"])
    order = weights["relative_delta"].abs().sort_values(ascending=False, kind="stable").index
    ranked = weights.reindex(order)
    pieces = disjoint(ranked).head(TOP)
    slices = ranked["kind"].isin(("head", "kv_head")) & ~ranked["part"].isin(PRODUCTS)
    heads = ranked[slices].head(TOP)
    shown = pd.concat([pieces, heads])
    shown = shown.assign(label=labels_for(study, tuned, shown))
    rows = tuple(
        (
            row.component,
            row.kind.replace("_", " "),
            row.label.replace("_", " "),
            percent(row.relative_delta),
            number(row.gain),
            number(row.residual),
            number(row.snr),
        )
        for row in rows_of(shown)
    )
    return DataTable(
        f"The {len(pieces)} tensors and the {len(heads)} head slices that changed most for their "
        "size. gain > 0: longer along its own base direction; residual: the rest, relative to the "
        "base; snr: energy over the expected rounding energy. A head's label is that of its whole "
        "OV circuit.",
        ("component", "kind", "label", "|delta| / |base|", "gain", "residual", "snr"),
        rows,
        text_columns=3,
    )


def label_table(study: StudyFolder, tuned: str) -> DataTable | None:
    """How many components of each kind got which label."""
    frame = study.table("labels", tuned).dropna(subset=["label"])
    if frame.empty:
        return None
    present = set(frame["label"])
    labels = [x for x in LABELS if x in present]
    labels += sorted(present - set(labels))
    rows = []
    for things, of in labelled_groups(frame):
        counts = of["label"].value_counts()
        rows.append((things, f"{len(of):,}", *(f"{counts.get(label, 0):,}" for label in labels)))
    return DataTable(
        "Labels by kind. Heads, kv heads and neurons are finer cuts of the matrices: never add "
        "them. “New direction” is new read or new write; any gradient update looks like one, so "
        "read the contrasts above before this table.",
        ("kind", "all", *(label.replace("_", " ") for label in labels)),
        tuple(rows),
    )


def inputs_table(tests: pd.DataFrame) -> DataTable | None:
    """Gains and reads against what the base's inputs explain; None where these are unknown."""
    frame = tests[tests["null"] == INPUTS_NULL].dropna(subset=["effect"])
    if frame.empty:
        return None
    rows = []
    for statistic, words in INPUT_STATISTICS.items():
        for part, of in frame[frame["statistic"] == statistic].groupby("part", sort=False):
            found = of["q_value"] < LEVEL
            more, less = ((found & (of["effect"] * sign > 0)).sum() for sign in (1, -1))
            median = number(float(of["effect"].median()))
            rows.append((words, str(part), f"{len(of):,}", median, f"{more:,}", f"{less:,}"))
    return DataTable(
        "Against what the base reads on the prompts (covariance-matched null): how many components "
        "exceed, or fall short of, what such inputs alone would make of their change (false "
        "discovery rate 5 %). A gradient's reads follow its inputs, so that reads resemble the "
        "base's is no finding by itself.",
        ("what", "part", "all", "median excess", "more", "less"),
        tuple(rows),
        text_columns=2,
    )


def neuron_scatter(
    study: StudyFolder, tuned: str, slug: str, *, tooltips: bool = True
) -> Scatter | None:
    """Gain against residual of the neurons' write vectors, by label."""
    weights = study.table("weights", tuned)
    rows = weights[(weights["kind"] == "neuron") & (weights["part"] == "W_out")]
    rows = rows.dropna(subset=["gain", "residual"])
    if rows.empty:
        return None
    frame = rows[["component", "gain", "residual"]].assign(label=labels_for(study, tuned, rows))
    frame["label"] = frame["label"].replace(NOTHING, "no label")
    return label_scatter(f"{slug}-neurons", frame.reset_index(drop=True), tooltips=tooltips)
