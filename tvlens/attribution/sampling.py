"""Which components are patched exactly, and how many the time allows."""

import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from tvlens.components import Component
from tvlens.errors import StudyError
from tvlens.models.metrics import Metric
from tvlens.models.pair import HookedPair
from tvlens.models.prompts import Batch
from tvlens.models.replay import replay
from tvlens.selection import Selection
from tvlens.tables import Table

from .series import group_of, keys, whole_rows
from .tables import EDGES_PER_PROMPT, NEURONS_PER_PROMPT
from .weights import NODE_COUNTS, chunks

CHECKED_KINDS = (
    "matrix",
    "head",
    "kv_head",
    "neuron",
    "norm",
    "bias",
    "embedding",
    "node",
    "edge",
)
CHECKED_PROMPTS = (16, 8, 4)
"""Prompts of the exact sample; fewer, in turn, where the time does not suffice otherwise."""
LEAST, WANTED, MOST = 21, 35, 210
"""Components of a plan: three of each kind, five of each kind (so that each has three random
ones), and what is enough for any interval."""
SOME_PER_PROMPT = {"neuron": NEURONS_PER_PROMPT, "edge": EDGES_PER_PROMPT}
"""Kinds of which only the largest, and some drawn at random, have rows per prompt."""
Group = tuple[str, str | None]
"""A kind, and the activation's name where components of it have several."""
FEWER_NODES = (8, 5, 3)
"""Nodes of the exact average, in turn, where the run's own are too dear; the estimate is compared
at the same nodes."""


class Sample(NamedTuple):
    """The size of an exact check: components, nodes of the exact average, prompts."""

    count: int
    nodes: int
    prompts: int


def planned_sample(
    hooked: HookedPair,
    batch: Batch,
    metric: Metric,
    attribution: Table,
    *,
    seconds: float,
    seed: int = 0,
) -> Sample:
    """Components, nodes and prompts that fit into ``seconds``, or the fewest of each.

    Args:
        hooked: The pair to check.
        batch: Its prompts.
        metric: Its metric.
        attribution: The estimates; their own nodes are kept if time allows.
        seconds: What the exact runs may take on this machine.
        seed: Of the draw of prompts.
    """
    frame = attribution.to_frame()
    activations = frame[frame["space"] != "weight"]
    series = len(activations[["method", "direction", "at"]].drop_duplicates())
    nodes = own_nodes(attribution)
    planned = Sample(0, nodes, 0)
    for prompts in CHECKED_PROMPTS:
        checked = checked_rows(batch, seed, prompts)
        cost = patching_cost(hooked, checked, metric, activation_series=series)
        planned = Sample(*affordable(cost, seconds=seconds, nodes=nodes), prompts)
        if planned.count >= LEAST:
            break
    return planned._replace(count=max(planned.count, LEAST))


class Cost(NamedTuple):
    """Seconds of exact patching on some prompts.

    Attributes:
        whole: Of a whole pass: each node, and each series of activations, needs some.
        patched: Of a pass that begins half way up, which is what a patch costs on average.
        activation_series: Series of activations or edges, each of which patches as many of them
            once; of several estimators each may draw others.
    """

    whole: float
    patched: float
    activation_series: int

    def of(self, count: int, nodes: int) -> float:
        """Seconds to patch ``count`` components: alone in, alone out, two a node, activations."""
        series = self.activation_series
        return (nodes + 4 + 3 * series) * self.whole + count * (2 + 2 * nodes + series) * (
            self.patched
        )


def patching_cost(
    hooked: HookedPair, batch: Batch, metric: Metric, *, activation_series: int
) -> Cost:
    """What exact patching costs here and now: one pass of each kind is timed, after a warm-up."""
    part, times = chunks(batch, hooked.base.d_vocab)[0], []
    reading = hooked.reading(metric, part)
    begun = replay(hooked.base, part.ids, part.mask, reading.positions, reading.beside)
    middle = hooked.base.n_layers // 2
    for run in (lambda: begun.record({middle}), lambda: begun.logits(middle)):
        started = time.perf_counter()
        with torch.no_grad():
            reading.value(run())
        times.append((time.perf_counter() - started) * len(batch) / len(part))
    return Cost(times[0], times[1], activation_series)


def affordable(cost: Cost, *, seconds: float, nodes: int) -> tuple[int, int]:
    """How many components, and how many nodes of the exact average, fit into ``seconds``.

    The run's own ``nodes`` are kept if ``WANTED`` components fit, else some of ``FEWER_NODES`` are
    taken.
    """
    count = 0
    for tried in (nodes, *(fewer for fewer in FEWER_NODES if fewer < nodes)):
        one = cost.of(1, tried) - cost.of(0, tried)
        count = max(0, int((seconds - cost.of(0, tried)) / max(one, 1e-9)))
        nodes = tried
        if count >= WANTED:
            break
    return min(count, MOST), nodes


def own_nodes(scores: Table) -> int:
    """The nodes a run used; the usual number where it was no integral."""
    used = scores.to_frame()["nodes"].max()
    return int(used) if used > 1 else NODE_COUNTS[0]


def checked_rows(batch: Batch, seed: int, size: int) -> Batch:
    """``size`` prompts drawn at random, or all of them, in their order."""
    drawn = np.random.default_rng(seed).permutation(len(batch))[:size]
    return batch.rows(sorted(int(i) for i in drawn))


def sampled_strata(attribution: Table, *, count: int, seed: int = 0) -> dict[str, list[Component]]:
    """About ``count`` components spread over the kinds: half the largest, half random.

    Activations of heads and neurons are spread part by part. A kind with fewer components than
    its share gives the rest of its share to the others. Rows over all prompts (``prompt`` null)
    are passed over, since there is nothing to compare by prompt, and so are parts of a component's
    score, which no patch can exchange.
    """
    frame = whole_rows(attribution.to_frame())
    frame = frame[frame["prompt"].notna()]
    frame = frame.assign(key=keys(frame), size=frame["score"].abs())
    sizes = frame.groupby("key", sort=False)["size"].mean()
    ranked = [*sizes.sort_values(ascending=False, kind="stable").index]
    groups = sorted(dict.fromkeys(map(group_of, ranked)), key=_place)
    by_group = {group: [c for c in ranked if group_of(c) == group] for group in groups}
    sizes = drawn_sizes({group: len(found) for group, found in by_group.items()}, count)
    rng, strata = np.random.default_rng(seed), {"random": [], "top": []}
    for group, (top, at_random) in sizes.items():
        found = by_group[group]
        rest = found[_first_of_rest(group, len(found), top) :]
        drawn = rng.permutation(len(rest))[:at_random]
        strata["top"] += found[:top]
        strata["random"] += [rest[i] for i in sorted(drawn)]
    return strata


def selected(attribution: Table, only: Selection | None) -> Table:
    """The rows that an exact sample may be drawn from; all of them where ``only`` is None.

    Args:
        attribution: Estimates.
        only: A selection over the columns of the key.

    Raises:
        StudyError: A name in it was not scored, or no row in weight space is selected: what
            activations say is only ever read beside the weights.
    """
    if only is None:
        return attribution
    frame = attribution.to_frame()
    if unknown := set(only.names) - {*frame["site"], *frame["component"]}:
        raise StudyError(f"--select names {min(unknown)!r}, which was not scored.")
    columns = sorted(only.columns)
    known = frame[columns].astype(object).where(frame[columns].notna(), None)
    rows = known.drop_duplicates()
    taken = {
        row
        for row in rows.itertuples(index=False, name=None)
        if only.accepts(dict(zip(columns, row, strict=True)))
    }
    keep = np.array([row in taken for row in known.itertuples(index=False, name=None)], dtype=bool)
    if not (keep & frame["prompt"].notna() & (frame["space"] == "weight")).any():
        raise StudyError(
            f"--select {only.text!r} selects nothing with weights and a score for every prompt.",
            hint="Heads and neurons are rows without a part there: select them by site, kind, "
            "layer or index. --neurons all gives every neuron a score for every prompt.",
        )
    return Table(attribution.name, attribution.data.filter(pa.array(keep)), attribution.order)


def drawn_sizes(sizes: Mapping[Group, int], count: int) -> dict[Group, tuple[int, int]]:
    """How many of each group ``sampled_strata`` takes as the largest and how many at random.

    Args:
        sizes: Components of each group that have a row for every prompt; groups in any order.
        count: Components that are asked for in all.
    """
    drawn = {}
    there = {group: sizes[group] for group in sorted(sizes, key=_place) if sizes[group]}
    for group, share in _shares(there, count).items():
        top = share // 2
        rest = there[group] - _first_of_rest(group, there[group], top)
        drawn[group] = top, min(share - top, rest)
    return drawn


def _place(group: Group) -> tuple[int, str]:
    """Groups in the order of ``CHECKED_KINDS``, parts of a kind by name."""
    kind, part = group
    return CHECKED_KINDS.index(kind), part or ""


def _first_of_rest(group: Group, size: int, top: int) -> int:
    """Where those begin that are drawn at random: beyond the top some have rows of their own."""
    with_rows = SOME_PER_PROMPT.get(group[0], size)
    return with_rows if size > with_rows else top


def _shares(sizes: Mapping[Group, int], count: int) -> dict[Group, int]:
    """``count`` dealt evenly, none getting more than its size; smallest groups first."""
    shares, left = {}, count
    order = sorted(sizes, key=lambda group: sizes[group])
    for place, group in enumerate(order):
        shares[group] = min(sizes[group], left // (len(order) - place))
        left -= shares[group]
    return {group: shares[group] for group in sizes}
