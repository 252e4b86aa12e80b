"""Does an estimate say what an exact patch says? Checked on every run, on a sample.

Each estimate is held against the exact quantity that asks the same question:

    weight_first_order_base     exact_weight_insert     alone into the base
    weight_first_order_tuned    exact_weight_remove     alone out of the tuned model
    weight_ig                   exact_weight_path       average over the line, at equal nodes
    cross_model_first_order     exact_activation        one activation carried over
    (and every other estimate of an activation)
    edge_first_order            exact_edge              one reader sees what another run writes

The exact average costs two passes a node, so it is often taken at fewer nodes than the estimate;
the estimate is then made once more at just those nodes for the comparison, and how well the nodes
integrate is what completeness says.

Components are drawn in two strata: the largest of each kind, which are what people read, and
random ones, which alone can speak for the rest. Spearman's rho, slope (exact per estimate, least
squares through 0) and sign agreement are taken on scores averaged over prompts, and rho also
for the worst prompt; rho alone would hide a factor of two. The interval is a bootstrap over
components. What cannot be said (fewer than three components, a constant) is null.

Insert, remove and the average disagree with each other for good reasons (a fine-tune that is
redundant at its end makes every part look dispensable), so they are findings, never a check.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from tvlens.components import DISJOINT_KINDS, Component
from tvlens.errors import StudyError
from tvlens.models.metrics import Metric
from tvlens.models.pair import HookedPair
from tvlens.models.prompts import Batch
from tvlens.tables import Table, concatenated

from .directions import CORRUPTED
from .edge_graph import EdgeGraph
from .edge_patching import exact_edges
from .exact import ExactMethod, exact_weight_table, noise_floor
from .patching import exact_activations
from .sampling import CHECKED_PROMPTS, checked_rows, own_nodes, planned_sample, sampled_strata
from .series import (
    FEWEST,
    SAME_QUESTION,
    Series,
    group_of,
    of_method,
    rank_agreement,
    scores_by_series,
    spearman,
)
from .tables import FIDELITY_SCHEMA, sampled_table
from .weights import chunks, method_run, weight_scores

logger = logging.getLogger(__name__)

CHECK_SCHEMA = pa.schema(
    [
        *FIDELITY_SCHEMA,
        ("direction", pa.string()),
        ("tuned", pa.string()),
        ("at", pa.string()),
        ("part", pa.string()),
    ]
)
"""One method label stands for several directions and models; heads and neurons have several
activations."""
WEIGHT_QUESTIONS: tuple[ExactMethod, ...] = (
    "exact_weight_insert",
    "exact_weight_remove",
    "exact_weight_path",
)
SPEARMAN_TO_PASS = 0.9
FEWEST_TO_PASS = 5
"""Three components are in the right order by chance one time in six, five one in 120."""
SLOPE_TO_PASS = (0.8, 1.25)


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
        """Spearman at least 0.9 and slope 0.8 to 1.25; None with too few components to say."""
        if self.n < FEWEST_TO_PASS or self.spearman is None or self.slope is None:
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
    by_prompt = [spearman(guess[:, i], truth[:, i]) for i in range(guess.shape[1])]
    known = [rho for rho in by_prompt if rho is not None]
    rho, low, high = rank_agreement(x, y, seed=seed)
    return Agreement(
        n=len(x),
        spearman=rho,
        spearman_worst=min(known) if known else None,
        slope=_slope(x, y),
        sign_agreement=_sign_agreement(guess, truth, noise),
        ci_low=low,
        ci_high=high,
    )


def _slope(x: ndarray, y: ndarray) -> float | None:
    if len(x) < FEWEST or not np.any(x):
        return None
    return float((x * y).sum() / (x * x).sum())


def _sign_agreement(x: ndarray, y: ndarray, noise: float) -> float | None:
    """Share of scores with the same sign, among those that are not noise."""
    heard = np.abs(y) > noise
    return float((np.sign(x) == np.sign(y))[heard].mean()) if heard.any() else None


def fidelity_table(
    estimates: Table,
    exact: Table,
    strata: Mapping[str, Sequence[Component]],
    *,
    change: float | None = None,
    seed: int = 0,
    noise: float = 0.0,
    at_equal_nodes: Table | None = None,
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
        at_equal_nodes: The integrated estimate at the nodes of the exact average, which is compared
            in place of the one in ``estimates``.
    """
    guesses, truths = scores_by_series(estimates), scores_by_series(exact)
    alike = scores_by_series(at_equal_nodes) if at_equal_nodes is not None else {}
    rows = []
    for (method, direction, at), guess in {**guesses, **alike}.items():
        truth = truths.get((SAME_QUESTION.get(method, ""), direction, at))
        if truth is None:
            continue
        for (kind, part), stratum, keys in _groups(strata, guess, truth):
            found = agreement(*_aligned(guess, truth, keys), seed=seed, noise=noise)
            rows.append(
                {"method": method, "direction": direction, "at": at}
                | {"kind": kind, "part": part, "stratum": stratum}
                | {"metric_change": change, **found._asdict()}
                | {"passed": found.passed if stratum == "random" else None}
                | (_sums(guesses, truths, keys) if method.startswith("weight") else {})
            )
    columns = {name: [row.get(name) for row in rows] for name in CHECK_SCHEMA.names}
    columns["tuned"] = estimates.data["tuned"].to_pylist()[:1] * len(rows)
    return Table.of("fidelity", CHECK_SCHEMA, columns)


def _groups(
    strata: Mapping[str, Sequence[Component]], guess: pd.DataFrame, truth: pd.DataFrame
) -> list[tuple[tuple[str, str | None], str, list[Component]]]:
    """Kind and part, stratum, components; of what was patched, groups that the estimate knows."""
    there, known = set(truth.index), set(map(group_of, guess.index))
    groups = []
    for stratum, drawn in strata.items():
        components = [c for c in drawn if c in there and group_of(c) in known]
        for group in dict.fromkeys(map(group_of, components)):
            groups.append((group, stratum, [c for c in components if group_of(c) == group]))
        if components:
            groups.append((("all", None), stratum, components))
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
    insert = of_method(truths, "exact_weight_insert")
    prompts = None if insert is None else insert.columns
    return {
        "sum_insert": _sum(insert, keys, prompts),
        "sum_remove": _sum(of_method(truths, "exact_weight_remove"), keys, prompts),
        "sum_ig": _sum(of_method(guesses, "weight_ig"), keys, prompts),
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
    own = own_nodes(attribution)
    if count is None:
        count, planned, prompts = planned_sample(
            hooked, batch, metric, attribution, seconds=seconds, seed=seed
        )
        nodes = nodes or planned
    checked = checked_rows(batch, seed, prompts)
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
    alike = None
    if "weight_ig" in methods and nodes not in (None, own):
        alike = _at_nodes(hooked, checked, metric, wanted, nodes)
    exact = concatenated("attribution", tables, order="score")
    series = [(attribution.where(space="weight"), exact, strata)]
    exchanged = _Exchanged(hooked, batch, metric, count, len(checked), seed)
    series += [
        *exchanged.checked(attribution, "activation"),
        *exchanged.checked(attribution, "edge"),
    ]
    change, noise = _mean_change(hooked, metric, checked), noise_floor(hooked, checked, metric)
    found = [
        fidelity_table(*each, change=change, seed=seed, noise=noise, at_equal_nodes=alike)
        for each in series
    ]
    patched = concatenated("attribution", [exact for _, exact, _ in series], order="score")
    return patched, concatenated("fidelity", found)


def _at_nodes(
    hooked: HookedPair,
    batch: Batch,
    metric: Metric,
    components: Sequence[Component],
    nodes: int | None,
) -> Table:
    """The integrated estimate of ``components`` at a fixed number of nodes."""
    scores = weight_scores(hooked, batch, metric, nodes=nodes)
    rows = {component: row for row, component in enumerate(scores.components)}
    values = scores.values[[rows[component] for component in components]]
    run = method_run("weight_ig", hooked, batch, metric, nodes=scores.nodes)
    return sampled_table(components, values.mT, run)


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


class _Exchanged(NamedTuple):
    """What the exact samples of exchanged activations and edges have in common."""

    hooked: HookedPair
    batch: Batch
    metric: Metric
    count: int
    size: int
    seed: int

    def checked(
        self, attribution: Table, space: str
    ) -> Iterator[tuple[Table, Table, dict[str, list[Component]]]]:
        """Estimates, exact rows and strata of every series of a space in ``attribution``."""
        frame = attribution.to_frame()
        frame = frame[(frame["space"] == space) & frame["method"].isin(SAME_QUESTION)]
        for direction, at in frame[["direction", "at"]].drop_duplicates().to_numpy():
            same = attribution.where(space=space, direction=direction, at=at)
            drawn = _drawn(same, self.count, self.seed)
            wanted = [component for part in drawn.values() for component in part]
            rows = self.batch.with_corrupt() if direction in CORRUPTED else self.batch
            how: dict[str, Any] = {"direction": direction, "at": at, "mean_over": rows}
            asked = self.hooked, checked_rows(rows, self.seed, self.size), self.metric
            if space == "edge":
                exact = exact_edges(*asked, EdgeGraph(self.hooked.base).named(wanted), **how)
            else:
                exact = exact_activations(*asked, wanted, **how)
            yield same, exact, drawn


def _drawn(series: Table, count: int, seed: int) -> dict[str, list[Component]]:
    """The sample of a series; of several estimators each draws what none before it has drawn."""
    drawn: dict[str, list[Component]] = {"random": [], "top": []}
    for method in dict.fromkeys(series.data["method"].to_pylist()):
        known = {component for part in drawn.values() for component in part}
        found = sampled_strata(series.where(method=method), count=count, seed=seed)
        for stratum, components in found.items():
            drawn[stratum] += [c for c in components if c not in known]
    return drawn


def _mean_change(hooked: HookedPair, metric: Metric, batch: Batch) -> float:
    total = 0.0
    for part in chunks(batch, hooked.base.d_vocab):
        tuned, base = (hooked.values(m, metric, part) for m in (hooked.tuned, hooked.base))
        total += float((tuned - base).double().sum())
    return total / len(batch)
