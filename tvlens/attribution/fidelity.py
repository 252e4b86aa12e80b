"""Does an estimate say what an exact patch says? Checked on every run, on a sample.

Each estimate is held against the exact quantity that asks the same question:

    weight_first_order_base     exact_weight_insert     alone into the base
    weight_first_order_tuned    exact_weight_remove     alone out of the tuned model
    weight_ig                   exact_weight_path       average over the line
    cross_model_first_order     exact_activation        one activation carried over

Components are drawn in two strata: the largest of each kind, which are what people read, and
random ones, which alone can speak for the rest. Spearman's rho, slope (exact per estimate, least
squares through 0) and sign agreement are taken on scores averaged over prompts, and rho also
for the worst prompt; rho alone would hide a factor of two. The interval is a bootstrap over
components. What cannot be said (fewer than three components, a constant) is null.

Insert, remove and the average disagree with each other for good reasons (a fine-tune that is
redundant at its end makes every part look dispensable), so they are findings, never a check.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy import stats
from torch import Tensor

from tvlens.components import DISJOINT_KINDS, Component, key_columns
from tvlens.errors import StudyError
from tvlens.models.metrics import Metric
from tvlens.models.pair import HookedPair
from tvlens.models.prompts import Batch
from tvlens.tables import Table, concatenated, keyed_schema

from .exact import ExactMethod, exact_weight_table, noise_floor
from .tables import FIDELITY_SCHEMA, NEURONS_PER_PROMPT
from .weights import NODE_COUNTS, NOISE, chunks

logger = logging.getLogger(__name__)

SAME_QUESTION = {
    "weight_first_order_base": "exact_weight_insert",
    "weight_first_order_tuned": "exact_weight_remove",
    "weight_ig": "exact_weight_path",
    "cross_model_first_order": "exact_activation",
    "cross_model_ig": "exact_activation",
    "activation_first_order": "exact_activation",
}
"""The exact method that asks what an estimate estimates."""
CHECKED_KINDS = ("matrix", "head", "kv_head", "neuron", "norm", "bias", "embedding", "node")
CHECK_SCHEMA = FIDELITY_SCHEMA.append(pa.field("direction", pa.string())).append(
    pa.field("tuned", pa.string())
)
"""A cross-model estimate is made in two directions under one method label."""
WEIGHT_QUESTIONS: tuple[ExactMethod, ...] = (
    "exact_weight_insert",
    "exact_weight_remove",
    "exact_weight_path",
)
SPEARMAN_TO_PASS = 0.9
SLOPE_TO_PASS = (0.8, 1.25)
FEWEST = 3
"""Components below which a rank correlation says nothing."""
RESAMPLES = 1_000
"""Bootstrap draws; the interval's ends move by a few hundredths at most between seeds."""
CHECKED_PROMPTS = (16, 8, 4)
"""Prompts of the exact sample; fewer, in turn, where the time does not suffice otherwise."""
LEAST, WANTED, MOST = 21, 35, 210
"""Components of a plan: three of each kind, five of each kind (so that each has three random
ones), and what is enough for any interval."""
FEWER_NODES = (8, 5, 3)
"""Nodes of the exact average, in turn, where the run's own are too dear; on a mild fine-tune three
agree with eight to a rank correlation above 0.99."""
SHARE = 0.5
"""An effect alone counts if it is at least this share of the component's integrated score."""

FINDINGS_SCHEMA = keyed_schema(
    ("metric", pa.string()),
    ("unit", pa.string()),
    ("insert", pa.float64()),
    ("remove", pa.float64()),
    ("ig", pa.float64()),
    ("finding", pa.string()),
    ("role", pa.string()),
)
Series = tuple[str, str]
"""Method and direction."""
_KEY = ("kind", "layer", "index", "part")


class Agreement(NamedTuple):
    """How well an estimate agrees with its exact counterpart; None where it cannot be said."""

    n: int
    spearman: float | None = None
    spearman_worst: float | None = None
    slope: float | None = None
    sign_agreement: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None

    @property
    def passed(self) -> bool | None:
        """Spearman at least 0.9 and slope 0.8 to 1.25."""
        if self.spearman is None or self.slope is None:
            return None
        low, high = SLOPE_TO_PASS
        return self.spearman >= SPEARMAN_TO_PASS and low <= self.slope <= high


def agreement(
    estimate: Float[Tensor, "component prompt"],
    exact: Float[Tensor, "component prompt"],
    *,
    seed: int = 0,
    noise: float = 0.0,
) -> Agreement:
    """Agreement of two sets of scores of the same components on the same prompts.

    Args:
        estimate: Estimated scores.
        exact: Exact scores, in the same order.
        seed: Of the bootstrap.
        noise: Size below which an exact score is rounding. Components that are no larger in
            both on every prompt have no rank and are left out; ``n`` counts the others.
    """
    guess, truth = (scores.double().numpy() for scores in (estimate, exact))
    if guess.size == 0:
        return Agreement(0)
    heard = np.maximum(np.abs(guess), np.abs(truth)).max(axis=1) > noise
    guess, truth = guess[heard], truth[heard]
    x, y = guess.mean(1), truth.mean(1)
    by_prompt = [_spearman(guess[:, i], truth[:, i]) for i in range(guess.shape[1])]
    known = [rho for rho in by_prompt if rho is not None]
    low, high = _interval(x, y, seed)
    return Agreement(
        n=len(x),
        spearman=_spearman(x, y),
        spearman_worst=min(known) if known else None,
        slope=_slope(x, y),
        sign_agreement=_sign_agreement(guess, truth, noise),
        ci_low=low,
        ci_high=high,
    )


def _spearman(x: ndarray, y: ndarray) -> float | None:
    if len(x) < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    ranks = (stats.rankdata(x), stats.rankdata(y))
    return float(np.corrcoef(*ranks)[0, 1])


def _slope(x: ndarray, y: ndarray) -> float | None:
    if len(x) < FEWEST or not np.any(x):
        return None
    return float((x * y).sum() / (x * x).sum())


def _sign_agreement(x: ndarray, y: ndarray, noise: float) -> float | None:
    """Share of scores with the same sign, among those that are not noise."""
    heard = np.abs(y) > noise
    return float((np.sign(x) == np.sign(y))[heard].mean()) if heard.any() else None


def _interval(x: ndarray, y: ndarray, seed: int) -> tuple[float | None, float | None]:
    """95 % of Spearman's rho over components drawn with replacement."""
    if _spearman(x, y) is None:
        return None, None
    drawn = np.random.default_rng(seed).integers(0, len(x), (RESAMPLES, len(x)))
    ranks = [stats.rankdata(values[drawn], axis=1) for values in (x, y)]
    centred = [r - r.mean(axis=1, keepdims=True) for r in ranks]
    size = np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))
    rho = (centred[0] * centred[1]).sum(1)[size > 0] / size[size > 0]
    low, high = np.quantile(rho, (0.025, 0.975))
    return float(low), float(high)


def fidelity_table(
    estimates: Table,
    exact: Table,
    strata: Mapping[str, Sequence[Component]],
    *,
    change: float | None = None,
    seed: int = 0,
    noise: float = 0.0,
) -> Table:
    """Agreement by method, direction, kind and stratum; ``kind`` ``all`` pools the kinds.

    One fine-tune's rows at a time.

    Args:
        estimates: Attribution rows; only methods with an exact counterpart are used.
        exact: Exact rows of the sampled components.
        strata: Which component was drawn how: ``random`` and ``top``.
        change: Mean of metric(tuned) - metric(base), printed beside the sums.
        seed: Of the bootstrap.
        noise: Size below which an exact score is rounding.
    """
    guesses, truths = _scores_by_series(estimates), _scores_by_series(exact)
    rows = []
    for (method, direction), guess in guesses.items():
        truth = truths.get((SAME_QUESTION.get(method, ""), direction))
        if truth is None:
            continue
        for kind, stratum, keys in _groups(strata, truth.index):
            found = agreement(*_aligned(guess, truth, keys), seed=seed, noise=noise)
            rows.append(
                {"method": method, "direction": direction, "kind": kind, "stratum": stratum}
                | {"metric_change": change, **found._asdict()}
                | {"passed": found.passed if stratum == "random" else None}
                | (_sums(guesses, truths, keys) if method.startswith("weight") else {})
            )
    columns = {name: [row.get(name) for row in rows] for name in CHECK_SCHEMA.names}
    columns["tuned"] = estimates.data["tuned"].to_pylist()[:1] * len(rows)
    return Table.of("fidelity", CHECK_SCHEMA, columns)


def _scores_by_series(table: Table) -> dict[Series, pd.DataFrame]:
    """Scores [component, prompt] of every method and direction, from rows that have a prompt."""
    frame = table.to_frame()
    frame = frame[frame["prompt"].notna()]
    frame = frame.assign(key=_keys(frame))
    return {
        (str(series[0]), str(series[1])): rows.drop_duplicates(["key", "prompt"]).pivot(
            index="key", columns="prompt", values="score"
        )
        for series, rows in frame.groupby(["method", "direction"], sort=False)
    }


def _of_method(scores: Mapping[Series, pd.DataFrame], method: str) -> pd.DataFrame | None:
    """The scores of a weight method, which has one direction."""
    return next((frame for (name, _), frame in scores.items() if name == method), None)


def _keys(frame: pd.DataFrame) -> pd.Series:
    """The component of every row."""
    columns = [frame[name].astype(object).where(frame[name].notna(), None) for name in _KEY]
    components = [
        Component(kind, _whole(layer), _whole(index), part)
        for kind, layer, index, part in zip(*columns, strict=True)
    ]
    return pd.Series(components, index=frame.index, dtype=object)


def _whole(number: Any) -> int | None:
    return None if number is None else int(number)


def _groups(
    strata: Mapping[str, Sequence[Component]], known: pd.Index
) -> list[tuple[str, str, list[Component]]]:
    there = set(known)
    groups = []
    for stratum, drawn in strata.items():
        components = [c for c in drawn if c in there]
        for kind in dict.fromkeys(c.kind for c in components):
            groups.append((kind, stratum, [c for c in components if c.kind == kind]))
        if components:
            groups.append(("all", stratum, components))
    return groups


def _aligned(
    guess: pd.DataFrame, truth: pd.DataFrame, keys: Sequence[Component]
) -> tuple[Tensor, Tensor]:
    """Scores of the components and prompts that both frames know."""
    prompts = [prompt for prompt in truth.columns if prompt in guess.columns]
    g = guess.reindex(index=pd.Index(list(keys), tupleize_cols=False), columns=prompts)
    t = truth.reindex(index=pd.Index(list(keys), tupleize_cols=False), columns=prompts)
    both = (g.notna() & t.notna()).all(axis=1).to_numpy()
    return torch.tensor(g.to_numpy()[both]), torch.tensor(t.to_numpy()[both])


def _sums(
    guesses: Mapping[Series, pd.DataFrame],
    truths: Mapping[Series, pd.DataFrame],
    keys: Sequence[Component],
) -> dict[str, float | None]:
    """Sums over the group; a pooled group sums its disjoint kinds, since heads overlap matrices."""
    if len({c.kind for c in keys}) > 1:
        keys = [c for c in keys if c.kind in DISJOINT_KINDS]
    insert = _of_method(truths, "exact_weight_insert")
    prompts = None if insert is None else insert.columns
    return {
        "sum_insert": _sum(insert, keys, prompts),
        "sum_remove": _sum(_of_method(truths, "exact_weight_remove"), keys, prompts),
        "sum_ig": _sum(_of_method(guesses, "weight_ig"), keys, prompts),
    }


def _sum(
    scores: pd.DataFrame | None, keys: Sequence[Component], prompts: pd.Index | None
) -> float | None:
    if scores is None or prompts is None:
        return None
    rows = scores.reindex(index=pd.Index(list(keys), tupleize_cols=False), columns=prompts)
    return float(rows.mean(axis=1).sum()) if rows.notna().to_numpy().all() else None


def check_fidelity(
    hooked: HookedPair,
    batch: Batch,
    metric: Metric,
    attribution: Table,
    *,
    count: int | None = None,
    seconds: float = 60.0,
    seed: int = 0,
    nodes: int | None = None,
    prompts: int = CHECKED_PROMPTS[0],
) -> tuple[Table, Table]:
    """Patch a sample of components exactly and say how the estimates did: (exact, fidelity).

    Args:
        hooked: The pair the estimates were made on.
        batch: The prompts they were made on.
        metric: The metric they were made with.
        attribution: The estimates, weight-space methods among them.
        count: Components of the sample; None plans the sample with ``planned_sample``, which
            depends on this machine's speed: record the plan to repeat a run.
        seconds: What the exact runs may take, as far as a plan can tell.
        seed: Of the draw of prompts and components and of the bootstrap.
        nodes: Of the exact average; None takes the run's own, or fewer if planned so.
        prompts: How many prompts, drawn at random, the exact runs use at most.

    Raises:
        StudyError: ``attribution`` has no estimate in weight space.
    """
    methods = _weight_methods(attribution)
    own = _own_nodes(attribution.where(method=methods[0]))
    if count is None:
        count, planned, prompts = planned_sample(
            hooked, batch, metric, seconds=seconds, nodes=own, seed=seed
        )
        nodes = nodes or planned
    checked = _checked_rows(batch, seed, prompts)
    strata = sampled_strata(attribution.where(method=methods[0]), count=count, seed=seed)
    wanted = [component for drawn in strata.values() for component in drawn]
    logger.info("checking %d components exactly with %s nodes", len(wanted), nodes or own)
    questions: list[ExactMethod] = [
        q for q in WEIGHT_QUESTIONS if q != "exact_weight_path" or "weight_ig" in methods
    ]
    tables = [
        exact_weight_table(hooked, checked, metric, wanted, method=question, nodes=nodes or own)
        for question in questions
    ]
    for exact, drawn in _checked_activations(
        hooked, batch, metric, attribution, count, size=len(checked), seed=seed
    ):
        tables.append(exact)
        strata = {name: [*strata[name], *drawn[name]] for name in strata}
    exact = concatenated("attribution", tables, order="score")
    change, noise = _mean_change(hooked, metric, checked), noise_floor(hooked, checked, metric)
    found = fidelity_table(attribution, exact, strata, change=change, seed=seed, noise=noise)
    return exact, found


def _own_nodes(scores: Table) -> int:
    """The nodes a run used; the usual number where it was no integral."""
    used = scores.to_frame()["nodes"].max()
    return int(used) if used > 1 else NODE_COUNTS[0]


def _weight_methods(attribution: Table) -> list[str]:
    """The weight methods of a table, integrated gradients first."""
    frame = attribution.to_frame()
    found = set(frame.loc[frame["space"] == "weight", "method"])
    known = [m for m in SAME_QUESTION if m in found]
    if not known:
        raise StudyError(
            f"expected an estimate in weight space, got methods {sorted(set(frame['method']))}.",
            hint="Call attribute_weights first.",
        )
    return sorted(known, key=lambda method: method != "weight_ig")


def _checked_activations(
    hooked: HookedPair,
    batch: Batch,
    metric: Metric,
    attribution: Table,
    count: int,
    *,
    size: int,
    seed: int,
) -> Iterator[tuple[Table, dict[str, list[Component]]]]:
    """Exact rows and strata of every activation series that is in ``attribution``."""
    from .activations import exact_activations

    frame = attribution.to_frame()
    frame = frame[(frame["space"] == "activation") & frame["method"].isin(SAME_QUESTION)]
    for method, direction, at in frame[["method", "direction", "at"]].drop_duplicates().to_numpy():
        rows = batch.with_corrupt() if direction == "clean_into_corrupt" else batch
        series = attribution.where(method=method, direction=direction)
        drawn = sampled_strata(series, count=count, seed=seed)
        wanted = [component for part in drawn.values() for component in part]
        checked = _checked_rows(rows, seed, size)
        yield exact_activations(hooked, checked, metric, wanted, direction=direction, at=at), drawn


def _checked_rows(batch: Batch, seed: int, size: int) -> Batch:
    drawn = np.random.default_rng(seed).permutation(len(batch))[:size]
    return batch.rows(sorted(int(i) for i in drawn))


def _mean_change(hooked: HookedPair, metric: Metric, batch: Batch) -> float:
    total = 0.0
    for part in chunks(batch, hooked.base.d_vocab):
        tuned, base = (hooked.values(m, metric, part) for m in (hooked.tuned, hooked.base))
        total += float((tuned - base).double().sum())
    return total / len(batch)


class Sample(NamedTuple):
    """The size of an exact check: components, nodes of the exact average, prompts."""

    count: int
    nodes: int
    prompts: int


def planned_sample(
    hooked: HookedPair,
    batch: Batch,
    metric: Metric,
    *,
    seconds: float,
    nodes: int,
    seed: int = 0,
) -> Sample:
    """Components, nodes and prompts that fit into ``seconds``, or the fewest of each.

    Args:
        hooked: The pair to check.
        batch: Its prompts.
        metric: Its metric.
        seconds: What the exact weight runs may take on this machine.
        nodes: The estimate's own nodes, which are kept if time allows.
        seed: Of the draw of prompts.
    """
    planned = Sample(0, nodes, 0)
    for prompts in CHECKED_PROMPTS:
        checked = _checked_rows(batch, seed, prompts)
        count, kept = planned_check(hooked, checked, metric, seconds=seconds, nodes=nodes)
        planned = Sample(count, kept, prompts)
        if count >= LEAST:
            break
    return planned._replace(count=max(planned.count, LEAST))


def planned_check(
    hooked: HookedPair, batch: Batch, metric: Metric, *, seconds: float, nodes: int
) -> tuple[int, int]:
    """How many components, and how many nodes of the exact average, fit into ``seconds``.

    Times one forward of ``batch``. The run's own ``nodes`` are kept if ``WANTED`` components fit,
    else some of ``FEWER_NODES`` are taken.
    """
    _mean_change(hooked, metric, batch)
    started = time.perf_counter()
    _mean_change(hooked, metric, batch)
    forward = (time.perf_counter() - started) / 2
    count = 0
    for tried in (nodes, *(fewer for fewer in FEWER_NODES if fewer < nodes)):
        nodes, count = tried, int(seconds / max(forward * (2 + 2 * tried), 1e-9))
        if count >= WANTED:
            break
    return min(count, MOST), nodes


def sampled_strata(attribution: Table, *, count: int, seed: int = 0) -> dict[str, list[Component]]:
    """About ``count`` components spread over the kinds: half the largest, half random.

    A kind with fewer components than its share gives the rest of its share to the others. Rows
    over all prompts (``prompt`` null) are passed over: there is nothing to compare by prompt.
    """
    frame = attribution.to_frame()
    frame = frame[frame["prompt"].notna()]
    frame = frame.assign(key=_keys(frame), size=frame["score"].abs())
    sizes = frame.groupby("key", sort=False)["size"].mean()
    ranked = [*sizes.sort_values(ascending=False, kind="stable").index]
    by_kind = {kind: [c for c in ranked if c.kind == kind] for kind in CHECKED_KINDS}
    shares = _shares({kind: len(found) for kind, found in by_kind.items() if found}, count)
    rng, strata = np.random.default_rng(seed), {"random": [], "top": []}
    for kind, share in shares.items():
        found = by_kind[kind]
        top = share // 2
        rest = found[NEURONS_PER_PROMPT:] if kind == "neuron" else []
        rest = rest or found[top:]
        drawn = rng.permutation(len(rest))[: share - top]
        strata["top"] += found[:top]
        strata["random"] += [rest[i] for i in sorted(drawn)]
    return strata


def _shares(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """``count`` dealt evenly, none getting more than its size; smallest kinds first."""
    shares, left = {}, count
    order = sorted(sizes, key=lambda kind: sizes[kind])
    for place, kind in enumerate(order):
        shares[kind] = min(sizes[kind], left // (len(order) - place))
        left -= shares[kind]
    return {kind: shares[kind] for kind in sizes}


def findings_table(attribution: Table) -> Table:
    """What each exactly patched component does alone, beside its integrated score.

    ``attribution`` holds ``weight_ig`` and the exact insert and remove rows; means are over the
    prompts of the exact sample. An effect counts if it has the sign and at least half the size of
    the integrated score: ``insert`` alone makes the component *sufficient*, ``remove`` alone
    *necessary*, both *both*; neither, with a score that is not noise, *redundant*: it works only
    together with others. *none* where nothing is above the noise. ``role`` is filled where
    activations are known too.

    Raises:
        StudyError: One of the three methods has no rows.
    """
    scores = _scores_by_series(attribution)
    wanted = ("exact_weight_insert", "exact_weight_remove", "weight_ig")
    found = [_of_method(scores, method) for method in wanted]
    if missing := [m for m, frame in zip(wanted, found, strict=True) if frame is None]:
        raise StudyError(f"findings need rows of {', '.join(missing)}.")
    known = [frame for frame in found if frame is not None]
    prompts = known[0].columns
    insert, remove, ig = (frame.reindex(columns=prompts).mean(axis=1) for frame in known)
    components = [c for c in insert.index if c in ig.index]
    triples = [(float(insert[c]), float(remove[c]), float(ig[c])) for c in components]
    columns: dict[str, Sequence[object]] = {
        **key_columns(components),
        **_constant_columns(attribution, len(components)),
        "insert": [t[0] for t in triples],
        "remove": [t[1] for t in triples],
        "ig": [t[2] for t in triples],
        "finding": [finding(*t) for t in triples],
    }
    return Table.of("findings", FINDINGS_SCHEMA, columns, order="ig")


def finding(insert: float, remove: float, ig: float) -> str:
    """``sufficient``, ``necessary``, ``both``, ``redundant`` or ``none``."""
    if max(abs(insert), abs(remove), abs(ig)) <= NOISE:
        return "none"
    alone, missing = (x * ig > 0 and abs(x) >= SHARE * abs(ig) for x in (insert, remove))
    names = {(True, True): "both", (True, False): "sufficient", (False, True): "necessary"}
    return names.get((alone, missing), "redundant")


def _constant_columns(scores: Table, count: int) -> dict[str, list[object]]:
    first = scores.data.slice(0, 1).to_pylist()
    names = ("base", "tuned", "metric", "unit")
    row = first[0] if first else dict.fromkeys(names, "")
    return {**{name: [row[name]] * count for name in names}, "tied": [False] * count}
