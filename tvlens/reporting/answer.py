"""The answer first: plain sentences computed from a study's tables.

Each function gives the sentences of one question and no sentence where the tables cannot say.
A ranking is stated only where its estimate passed the check against exact patching.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import pandas as pd

from .figures import LABELS, number
from .folder import StudyFolder, rows_of
from .scores import (
    ESTIMATE,
    checks,
    completeness,
    decisions,
    direction_words,
    disjoint,
    energy_shares,
    kind_words,
    labelled_groups,
    mean_scores,
    of_method,
    part_words,
    relative_size,
)

GAP_BAR = 0.002  # contract: nodes are raised until the parts add up to within 0.2 %
QUESTIONS = {"newness": "Do MLPs write newer?", "amplification": "Does attention amplify?"}
FINEST = 1e-6  # below this a gap is the rounding of float32 forward passes
ROUNDING_FLOOR = "rounding floor"  # what geometry.classify says decided such a label


class Statement(NamedTuple):
    """One sentence of the answer.

    Attributes:
        question: What it answers, two to four words.
        text: The sentence.
        state: ``said``, ``withheld`` or ``missing``.
    """

    question: str
    text: str
    state: str = "said"


def percent(share: float) -> str:
    """A share as a percentage with three significant digits."""
    return f"{number(100 * share)} %"


def answer(study: StudyFolder, tuned: str) -> list[Statement]:
    """All that the tables let one say about ``tuned``, in the order a reader asks."""
    parts = (size, place, kinds, headline, matters, carried, agreement, grafted, losses)
    return [statement for part in parts for statement in part(study, tuned)]


def size(study: StudyFolder, tuned: str) -> list[Statement]:
    """How long the tuning vector is."""
    question = "How big is the change?"
    weights = study.table("weights", tuned)
    if weights.empty:
        return _without(study, question, "Not measured", "weights")
    delta, base, ratio = relative_size(weights)
    pieces = disjoint(weights)
    untouched = int((pieces["delta_norm"] == 0).sum())
    if delta == 0:
        text = f"The two checkpoints hold identical weights: the tuning vector of {tuned} is zero."
        return [Statement(question, text)]
    text = (
        f"The tuning vector of {tuned} has {percent(ratio)} of the base weights' length "
        f"({number(delta)} against {number(base)}), over {len(pieces):,} weight tensors"
    )
    if untouched:
        text += f", of which {untouched:,} did not change at all"
    return [Statement(question, f"{text}.")]


def place(study: StudyFolder, tuned: str) -> list[Statement]:
    """Where the tuning vector's energy is."""
    weights = study.table("weights", tuned)
    if weights.empty or not (weights["delta_norm"] > 0).any():
        return []
    shares = energy_shares(weights, "place")
    listed = ", ".join(f"{percent(s)} is in {name}" for name, s in shares.items() if s >= 0.0005)
    layers = energy_shares(weights, "layer")
    text = f"Of its squared length, {listed}."
    if len(layers):
        low, high = int(layers.index.min()), int(layers.index.max())
        text += (
            f" Among layers {low} to {high}, layer {int(layers.index[0])} holds most "
            f"({percent(layers.iloc[0])}; an even spread would give {percent(1 / len(layers))})."
        )
    return [Statement("Where is it?", text)]


def kinds(study: StudyFolder, tuned: str) -> list[Statement]:
    """How many components got which label."""
    question = "New, or more of the same?"
    labels = study.table("labels", tuned)
    if labels.empty:
        return _without(study, question, "Not labelled", "labels")
    sentences = []
    for things, rows in labelled_groups(labels):
        counts = rows["label"].value_counts()
        order = [*LABELS[::-1], *sorted(set(counts.index) - set(LABELS))]
        listed = [f"{counts[x]:,} {x.replace('_', ' ')}" for x in order if x in counts]
        sentences.append(f"{len(rows):,} {things}: {', '.join(listed)}")
    return [Statement(question, "; ".join(sentences) + "." + _near_rounding(labels))]


def _near_rounding(labels: pd.DataFrame) -> str:
    """Why labels are missing where storage has taken the change, empty where it has not."""
    near = int((labels["decided_by"] == ROUNDING_FLOOR).sum())
    if not near:
        return ""
    return (
        f" {percent(near / len(labels))} of these are unresolved because the change is too close "
        "to the rounding of the stored weights: what a coarse format kept of it says more about "
        "the format than about the training. Checkpoints stored in float32 would show more."
    )


def headline(study: StudyFolder, tuned: str) -> list[Statement]:
    """The verdicts on MLP against attention, as the table of contrasts words them."""
    frame = study.table("contrasts", tuned)
    return [
        Statement(
            QUESTIONS.get(row.claim, str(row.claim)),
            str(row.sentence),
            "withheld" if str(row.verdict).startswith("cannot tell") else "said",
        )
        for row in rows_of(frame[frame["headline"].fillna(False).astype(bool)])
    ]


def matters(study: StudyFolder, tuned: str) -> list[Statement]:
    """Which pieces carry the metric's change, and whether the pieces add up to it."""
    question = "What matters most?"
    rows = of_method(study.table("attribution", tuned), ESTIMATE)
    if rows.empty:
        return _without(study, question, "Not traced", "attribution")
    means = disjoint(mean_scores(rows))
    means = means[means["score"].notna()]
    if means.empty:
        return []
    unit = str(rows["unit"].dropna().iloc[0]) if rows["unit"].notna().any() else ""
    metric = str(rows["metric"].dropna().iloc[0]) if rows["metric"].notna().any() else "the metric"
    total = float(means["score"].sum())
    by_place = means.groupby("place")["score"].sum().sort_values(key=abs, ascending=False)
    listed = ", ".join(f"{name} {value:+.3g}" for name, value in by_place.items())
    text = (
        f"From base to {tuned}, {metric} changes by {total:+.3g} {unit} on average over "
        f"{_prompt_count(rows)} prompts. Along the line between the two models this splits into "
        f"{listed}."
    )
    statements = [
        Statement("What does it do?", text),
        *_adds_up(study, tuned),
        *_scan(study, tuned),
    ]
    return [*statements, _ranking(study, tuned, means, question, total)]


def _scan(study: StudyFolder, tuned: str) -> list[Statement]:
    """Says so where the scores come from a run below float32."""
    facts = study.manifest.get("facts")
    found = facts.get(tuned) if isinstance(facts, dict) else None
    dtype = found.get("dtype", "float32") if isinstance(found, dict) else "float32"
    if dtype == "float32":
        return []
    text = (
        f"The scores are a scan in {dtype}: estimates good enough to find candidates, none of "
        "them checked exactly."
    )
    return [Statement("How exact is that?", text, "withheld")]


def carried(study: StudyFolder, tuned: str) -> list[Statement]:
    """Whether new directions carry more of the MLP's effect, as the table of shares words it."""
    frame = study.table("shares", tuned)
    rows = frame[(frame["level"] == "contrast") & frame["sentence"].notna()]
    return [
        Statement(
            "Does what is new do the work?",
            str(row.sentence),
            "withheld" if row.verdict == "cannot tell" else "said",
        )
        for row in rows_of(rows)
    ]


def _ranking(
    study: StudyFolder, tuned: str, means: pd.DataFrame, question: str, total: float
) -> Statement:
    decided = decisions(study.table("fidelity", tuned), dict.fromkeys(means["kind"]))
    may = [kind for kind, decision in decided.items() if decision == "passed"]
    may_not = [kind_words(kind) for kind, decision in decided.items() if decision == "withheld"]
    failed = f"the estimate did not pass its check against exact patching for {_and(may_not)}."
    if not may:
        why = failed if may_not else "the ranking was not checked against exact patching."
        return Statement(question, f"Withheld: {why}", "withheld")
    checked = means[means["kind"].isin(may)]
    top = checked.reindex(checked["score"].abs().sort_values(ascending=False, kind="stable").index)
    listed = ", ".join(
        f"{row.component} ({row.score:+.3g}{_of(row.score, total)})" for row in rows_of(top.head(3))
    )
    text = f"Among {_and([kind_words(kind) for kind in may])}: {listed}."
    return Statement(question, f"{text} Withheld: {failed}" if may_not else text)


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _of(score: float, total: float) -> str:
    return f", {percent(score / total)} of the change" if total and score / total > 0 else ""


def _adds_up(study: StudyFolder, tuned: str) -> list[Statement]:
    found = completeness(study.table("attribution", tuned), study.table("prompts", tuned))
    if found is None or pd.isna(found.gap):
        return []
    text = (
        f"The parts add up to the change to within {percent(max(found.gap, FINEST))} "
        f"(worst prompt: {number(max(found.worst, FINEST))} in the metric's unit)"
    )
    if found.gap <= GAP_BAR:
        return [Statement("Do the parts add up?", f"{text}.")]
    state = "withheld" if found.gap > 0.1 else "said"
    return [Statement("Do the parts add up?", f"{text}; the aim is {percent(GAP_BAR)}.", state)]


def agreement(study: StudyFolder, tuned: str) -> list[Statement]:
    """Which estimates agree with exact patching, and what is withheld because some do not."""
    question = "Do estimates agree with exact patching?"
    fidelity = study.table("fidelity", tuned)
    if fidelity.empty:
        return _without(study, question, "Not checked", "fidelity")
    decided = checks(fidelity)
    passed = decided[decided["verdict"] == "passed"]
    failed = decided[decided["verdict"] == "withheld"]
    open_count = int((decided["verdict"] == "too few").sum())
    listed = "; ".join(
        f"{_estimate(next(rows_of(rows)))} for "
        f"{_and(list(dict.fromkeys(part_words(row) for row in rows_of(rows))))} "
        f"(Spearman at least {number(rows['spearman'].min())})"
        for _, rows in passed.groupby(["method", "direction", "at"], sort=False, dropna=False)
    )
    text = f"These do: {listed}." if listed else "No estimate passed."
    if open_count:
        text += f" {open_count} checks of single kinds had too few components to decide."
    statements = [Statement(question, text, "said" if listed else "withheld")]
    if len(failed):
        reasons = "; ".join(_failure(row) for row in rows_of(failed))
        text = f"Rankings and sizes by these estimates: {reasons}."
        statements.append(Statement("What is withheld?", text, "withheld"))
    return statements


def grafted(study: StudyFolder, tuned: str) -> list[Statement]:
    """The smallest sets of components that carry the change, as the graft stage stated them."""
    facts = study.manifest.get("facts") or {}
    found = facts.get(tuned) if isinstance(facts, dict) else None
    sets = found.get("graft") if isinstance(found, dict) else None
    sentences = [str(one.get("sentence", "")) for one in (sets or {}).values()]
    question = "What is the smallest part that carries it?"
    return [
        Statement(
            question,
            sentence[:1].upper() + sentence[1:],
            "withheld" if sentence.startswith("cannot tell") else "said",
        )
        for sentence in sentences
        if sentence
    ]


def _failure(row: Any) -> str:
    return (
        f"{_estimate(row)} for {part_words(row)} (Spearman {number(row.spearman)}, "
        f"slope {number(row.slope)}, n = {number(row.n)})"
    )


def _estimate(row: Any) -> str:
    """An estimate's method; of activations also its direction, which one method has several of."""
    where = "" if str(row.method).startswith("weight") else direction_words(row)
    return f"{row.method} ({where})" if where else str(row.method)


def losses(study: StudyFolder, tuned: str) -> list[Statement]:
    """How the held-out losses moved."""
    frame = study.table("evaluation")
    measures = frame["measure"].astype(str)
    frame = frame[measures.str.contains("loss") & frame["value"].notna()]
    moves = []
    for keys, rows in frame.groupby(["task", "split", "measure"], sort=False, dropna=False):
        value = rows.drop_duplicates("model").set_index("model")["value"]
        base = next((name for name in ("base", *_base_names(study)) if name in value), None)
        if base is None or tuned not in value:
            continue
        controls = [f"{name} {number(value[name], 4)}" for name in _controls(study, value.index)]
        beside = f" ({', '.join(controls)})" if controls else ""
        moves.append(f"{keys[0]} {number(value[base], 4)} → {number(value[tuned], 4)}{beside}")
    if not moves:
        return []
    unit = next((f" ({u})" for u in frame["unit"].dropna()), "")
    return [
        Statement("And on held-out text?", f"Loss of base → {tuned}{unit}: {'; '.join(moves)}.")
    ]


def _controls(study: StudyFolder, models: Iterable[str]) -> list[str]:
    """The control fine-tunes among ``models``: what a gain of form alone looks like."""
    asked = [re.split(r"[:/]", str(spec))[-1] for spec in study.plan.get("controls") or ()]
    return [name for name in models if name in asked]


def _base_names(study: StudyFolder) -> list[str]:
    names = study.table("weights")["base"].dropna().astype(str).unique().tolist()
    return [*names, re.split(r"[:/]", str(study.plan.get("base", "")))[-1]]


def _prompt_count(rows: pd.DataFrame) -> str:
    count = rows["prompt"].nunique()
    return f"{count:,}" if count else number(rows["n"].max())


def _without(study: StudyFolder, question: str, word: str, name: str) -> list[Statement]:
    """That a model has no rows in a table; nothing where the study has no such table."""
    if study.missing(name):
        return []
    return [Statement(question, f"{word}: no rows for this model", "missing")]
