"""What each stage of a plan would read, take and write, before it runs."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvlens.attribution.sampling import CHECKED_PROMPTS, LEAST, Cost, affordable
from tvlens.attribution.weights import NODE_COUNTS
from tvlens.evaluation.representations import MEMORY
from tvlens.evaluation.suite import Ready
from tvlens.models.metrics import Metric
from tvlens.models.prompts import Batch
from tvlens.selection import parse_selection
from tvlens.threads import at_once
from tvlens.weights.matching import Pair

from . import peaks, task_work, work
from .attributing import words_of
from .covariances import planned_inputs
from .plan import StudyPlan
from .rates import Rates
from .row_counts import (
    Asked,
    Rows,
    attribution_tables,
    contrast_rows,
    direction_rows,
    evaluation_rows,
    graft_rows,
    label_rows,
    overlap_rows,
    position_shapes,
    reading_rows,
    tested_rows,
    weight_rows,
)
from .task_counts import combine_rows, countable, representation_rows, sweep_rows

UNCERTAINTY = 2.0
"""Expected seconds are right within this factor, on a core that nothing else uses."""
ALONE = 0.2
"""Share of the geometry's time in which Python itself is at work, on one thread whatever there is:
judged, not measured."""
DISK, SLOW_DISK = 1e9, 0.15e9
"""Bytes a second that a local disk gives, and a network disk."""


@dataclass(frozen=True)
class Seconds:
    """Expected time, and between what it lies."""

    expected: float
    low: float
    high: float

    def plus(self, other: "Seconds") -> "Seconds":
        """One after the other."""
        return Seconds(self.expected + other.expected, self.low + other.low, self.high + other.high)

    def to_dict(self) -> dict[str, float]:
        """JSON values, three figures each."""
        return {name: float(f"{value:.3g}") for name, value in vars(self).items()}


@dataclass(frozen=True)
class Forecast:
    """One stage, before it runs.

    Attributes:
        bytes_read: Bytes it reads from the files, every pass counted.
        seconds: Time.
        peak: Anonymous bytes at most; see ``peaks``.
        tables: Rows of what it writes.
        positions: Shapes of the scores by position that it writes.
    """

    bytes_read: int
    seconds: Seconds
    peak: float
    tables: Mapping[str, Rows] = field(default_factory=dict)
    positions: Sequence[tuple[int, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        found = {
            "bytes_read": self.bytes_read,
            "seconds": self.seconds.to_dict(),
            "peak_memory_bytes": round(self.peak),
            "tables": {name: rows.to_dict() for name, rows in self.tables.items()},
        }
        if self.positions:
            size = 4 * sum(map(math.prod, self.positions))
            found["positions"] = {"tensors": len(self.positions), "bytes": size}
        return found


@dataclass(frozen=True)
class Prompted:
    """Prompts as the models would read them.

    Attributes:
        batch: Their tokens.
        metric: What is measured on them.
        d_vocab: Rows of the embedding that both models have.
    """

    batch: Batch
    metric: Metric
    d_vocab: int


def seconds_of(work_done: work.Work, rates: Rates) -> float:
    """What an amount of work takes on one machine."""
    return math.fsum(amount * rates[operation] for operation, amount in work_done.items())


def weights_side(pair: Pair, plan: StudyPlan, rates: Rates) -> dict[str, Forecast]:
    """Matching, and what needs no model."""
    every = work.read_bytes(pair, pair.components)
    files = sum(work.stored_bytes(pair))
    controls, inputs = len(plan.controls), planned_inputs(plan, pair.layout)
    made = {
        "match": (3 * files, work.matching_work(pair), peaks.matching_peak(pair), {}),
        "decompose": (
            every,
            work.decompose_work(pair),
            peaks.decompose_peak(pair),
            {"weights": weight_rows(pair)},
        ),
        "classify": (
            every + controls * 4 * files,
            work.classify_work(pair, controls),
            peaks.classify_peak(pair, inputs),
            {
                "tests": tested_rows(pair, inputs),
                "labels": label_rows(pair),
                "contrasts": contrast_rows(pair, controls, weighted="attribute" in plan.stages),
            },
        ),
        "directions": (
            every,
            work.directions_work(pair),
            peaks.classify_peak(pair),
            {
                "directions": direction_rows(pair),
                "readings": reading_rows(pair),
                **({"overlap": overlap_rows(pair, controls)} if controls else {}),
            },
        ),
    }
    wanted = tuple(made) if "decompose" in plan.stages else ("match",)
    lanes = {"decompose": at_once(), "classify": at_once()}
    return {name: _forecast(*made[name], rates=rates, lanes=lanes.get(name, 1)) for name in wanted}


def _forecast(
    read: int,
    done: work.Work,
    peak: float,
    tables: Mapping[str, Rows],
    *,
    rates: Rates,
    lanes: int = 1,
) -> Forecast:
    """What is rated on one thread, shared out over ``lanes``."""
    alone = seconds_of(done, rates)
    shared = alone * (ALONE + (1 - ALONE) / lanes)
    return Forecast(read, _with_disk(shared, alone / lanes, alone, read), peak, tables)


def _with_disk(expected: float, least: float, most: float, read: int) -> Seconds:
    """Files that fit into free memory come from there once read; others from the disk each time."""
    from_disk = read if read > free_memory() else 0
    return Seconds(
        expected + from_disk / DISK,
        least / UNCERTAINTY,
        UNCERTAINTY * most + read / SLOW_DISK,
    )


def free_memory() -> float:
    """Bytes of memory that nobody uses, infinite where the system does not say."""
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return math.inf


def attribution_side(
    pair: Pair, plan: StudyPlan, prompted: Prompted, rates: Rates
) -> dict[str, Forecast]:
    """The stages that run the models on the prompts, as far as they are asked for."""
    found = {}
    one = work.passes_of(pair, prompted.batch, prompted.metric, d_vocab=prompted.d_vocab)
    inputs = planned_inputs(plan, pair.layout) if "decompose" in plan.stages else ()
    if inputs:
        tokens = int(prompted.batch.mask.sum())
        done = work.covariances_work(pair, one, tokens, inputs)
        peak = peaks.covariances_peak(pair, inputs)
        found["covariances"] = _forecast(work.stored_bytes(pair)[0], done, peak, {}, rates=rates)
    if "attribute" in plan.stages:
        found["attribute"] = _attribute(pair, plan, prompted, one, rates)
    if "graft" in plan.stages:
        peak = peaks.graft_peak(pair, prompted.batch, prompted.metric, d_vocab=prompted.d_vocab)
        done = work.graft_work(pair, one)
        read = sum(work.stored_bytes(pair)) + work.stored_bytes(pair)[0]
        found["graft"] = _forecast(read, done, peak, graft_rows(pair), rates=rates)
    return found


def asked_of(plan: StudyPlan, batch: Batch, metric: Metric) -> Asked:
    """What the tables of attribution depend on."""
    return Asked(
        prompts=len(batch),
        corrupt=sum(len(ids) > 0 for ids in batch.corrupt_ids),
        all_neurons=plan.neurons == "all",
        check_exact=plan.check_exact,
        check_prompts=plan.check_prompts,
        words=words_of(plan),
        metric=metric,
        longest=int(batch.lengths.max()) if len(batch) else 0,
        position=plan.position,
        exact=plan.dtype == "float32",
        only=parse_selection(plan.select) if plan.select else None,
        parts=plan.parts,
        circuits=plan.circuits,
    )


def _attribute(
    pair: Pair, plan: StudyPlan, prompted: Prompted, one: work.Passes, rates: Rates
) -> Forecast:
    batch, metric = prompted.batch, prompted.metric
    asked = asked_of(plan, batch, metric)
    tables = attribution_tables(pair, asked, joined="decompose" in plan.stages)
    checks = _checking(plan, one, batch, rates, series=_series(pair, asked))
    usual = seconds_of(work.attribute_work(pair, one, asked), rates)
    longest = seconds_of(work.attribute_work(pair, one, asked, nodes=NODE_COUNTS), rates)
    rows = tables["attribution"]
    peak = peaks.attribute_peak(
        pair,
        batch,
        metric,
        d_vocab=prompted.d_vocab,
        rows=rows,
        estimators=plan.estimators,
        edges=plan.edges,
    )
    read = sum(work.stored_bytes(pair))
    seconds = _with_disk(usual + checks, usual + checks, longest + checks, read)
    return Forecast(read, seconds, peak, tables, position_shapes(pair, asked))


def _series(pair: Pair, asked: Asked) -> int:
    """Series of activations and edges that are checked: every direction by every estimator."""
    found = asked.exchanges(pair.layout)
    return sum(len(one.estimators) + len(one.of_edges) for one in found)


def _checking(
    plan: StudyPlan, one: work.Passes, batch: Batch, rates: Rates, *, series: int
) -> float:
    """Exact patching: of the sample that is asked for, or of what fits the time, as is planned."""
    nodes = NODE_COUNTS[0]
    if plan.dtype != "float32":
        return 0.0

    def cost(prompts: int) -> Cost:
        passes = work.exact_sample(one, batch, prompts=prompts)
        whole, patched = (seconds_of(done, rates) for done in passes)
        return Cost(whole, patched, series)

    if plan.check_exact is not None:
        prompts = plan.check_prompts or CHECKED_PROMPTS[0]
        return cost(prompts).of(plan.check_exact, plan.check_nodes or 3)
    count, seconds = 0, 0.0
    for prompts in CHECKED_PROMPTS:
        count, tried = affordable(cost(prompts), seconds=plan.check_seconds, nodes=nodes)
        seconds = cost(prompts).of(max(count, LEAST), tried)
        if count >= LEAST:
            break
    return seconds


def evaluation_side(
    pair: Pair, plan: StudyPlan, texts: Mapping[str, Batch], metric: Metric, rates: Rates
) -> dict[str, Forecast]:
    """The held-out losses, where they are asked for."""
    if "evaluate" not in plan.stages or not texts:
        return {}
    models = ["base", *plan.names, *plan.controls]
    d_vocab, batches = pair.layout.d_vocab, list(texts.values())
    done = work.evaluate_work(pair, batches, metric, models=len(models), d_vocab=d_vocab)
    rows = {"evaluation": evaluation_rows(models, list(texts))}
    peak = peaks.evaluate_peak(pair, batches, d_vocab=d_vocab)
    read = len(models) * work.stored_bytes(pair)[0]
    return {"evaluate": _forecast(read, done, peak, rows, rates=rates)}


@dataclass(frozen=True)
class Measuring:
    """What models are measured on, as they would read it.

    Attributes:
        tasks: Those of a sweep or a combination, tokenised.
        texts: The documents that representations are compared on.
        d_vocab: Rows of the embedding that all models have.
    """

    tasks: Sequence[Ready]
    texts: Batch | None
    d_vocab: int


def measuring_side(
    pair: Pair, plan: StudyPlan, asked: Measuring, rates: Rates
) -> dict[str, Forecast]:
    """Sweep, combination and comparison of representations, as far as they are asked for.

    Args:
        pair: Base and fine-tune; of a combination the last one.
        plan: What is asked, with all fine-tunes where they are combined.
        asked: What the models are measured on.
        rates: Seconds a unit of each operation.
    """
    found, files = {}, sum(work.stored_bytes(pair))
    tasks, same = countable(asked.tasks), {"d_vocab": asked.d_vocab}
    if "sweep" in plan.stages:
        tables = sweep_rows(plan, tasks)
        done = task_work.sweep_work(pair, plan, tasks, tables["evaluation_items"], **same)
        peak = peaks.sweep_peak(pair, tasks, **same)
        read = (2 + len(plan.controls)) * files
        found["sweep"] = _forecast(read, done, peak, tables, rates=rates)
    if "represent" in plan.stages and asked.texts is not None:
        rows = representation_rows(pair, plan)
        done = task_work.represent_work(pair, plan, asked.texts, rows, **same)
        sums = min(task_work.sums_bytes(pair), MEMORY)
        peak = peaks.represent_peak(pair, asked.texts, sums=sums, **same)
        read = (2 + len(plan.controls)) * files + work.stored_bytes(pair)[0]
        found["represent"] = _forecast(read, done, peak, {"representations": rows}, rates=rates)
    if "combine" in plan.stages:
        tables, count = combine_rows(pair, plan, tasks), len(plan.tuned)
        done = task_work.combine_work(pair, plan, tasks, tables["combination_items"], **same)
        peak = peaks.combine_peak(pair, tasks, vectors=count, **same)
        read = (2 * count + len(plan.controls)) * files
        found["combine"] = _forecast(read, done, peak, tables, rates=rates)
    return found


def total_seconds(stages: Sequence[Forecast]) -> Seconds:
    """All stages one after the other."""
    total = Seconds(0.0, 0.0, 0.0)
    for stage in stages:
        total = total.plus(stage.seconds)
    return total
