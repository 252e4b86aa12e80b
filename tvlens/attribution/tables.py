"""The tables of attribution: one row per component, method and prompt.

``score`` > 0 says that the metric is higher because the component is tuned rather than base
(within one model: clean rather than corrupt), whichever of the two models was run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from numpy import ndarray
from scipy import stats
from torch import Tensor

from tvlens.components import Component, Kind, key_columns
from tvlens.errors import HostError
from tvlens.tables import Table, concatenated, keyed_schema

Direction = Literal[
    "tuned_into_base",
    "base_into_tuned",
    "clean_into_corrupt",
    "corrupt_into_clean",
    "zero_ablation",
    "mean_ablation",
]

Estimator = Literal["first_order", "qk_fix", "atp_star", "ig_inputs"]
"""Of activations."""
EdgeEstimator = Literal["first_order", "ig_inputs"]

ATTRIBUTION_SCHEMA = keyed_schema(
    ("method", pa.string()),
    ("space", pa.string()),
    ("estimator", pa.string()),
    ("direction", pa.string()),
    ("at", pa.string()),
    ("prompt", pa.int32()),
    ("score", pa.float64()),
    ("metric", pa.string()),
    ("unit", pa.string()),
    ("n", pa.int32()),
    ("geometric_part", pa.string()),
    ("nodes", pa.int32()),
    ("gap", pa.float64()),
    ("n_tokens", pa.int32()),
    ("mean_abs", pa.float64()),
    ("sd", pa.float64()),
    ("ci_low", pa.float64()),
    ("ci_high", pa.float64()),
    ("status", pa.string()),
    ("source", pa.string()),
    ("target", pa.string()),
)
"""``source`` and ``target`` are the components of an edge, null in all other rows."""

FIDELITY_SCHEMA = pa.schema(
    [
        ("method", pa.string()),
        ("kind", pa.string()),
        ("stratum", pa.string()),
        ("n", pa.int32()),
        ("spearman", pa.float64()),
        ("spearman_worst", pa.float64()),
        ("slope", pa.float64()),
        ("sign_agreement", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("sum_insert", pa.float64()),
        ("sum_remove", pa.float64()),
        ("sum_ig", pa.float64()),
        ("metric_change", pa.float64()),
        ("passed", pa.bool_()),
    ]
)

NEURONS_PER_PROMPT = 1_000
"""Neurons with a row for every prompt; the contract's number, which keeps tables flat."""
EDGES_PER_PROMPT = 1_000
"""Edges with a row for every prompt, as of neurons."""
_INDEXED = ("head", "kv_head", "kv_group", "neuron")
_CONFIDENCE = 0.95


NO_COLUMNS: Mapping[str, Sequence[object]] = MappingProxyType({})


class Edge(NamedTuple):
    """What one component writes, as one other reads it."""

    source: Component
    target: Component

    @property
    def component(self) -> Component:
        """The key of its rows, with the target's layer."""
        return Component("edge", self.target.layer, None, f"{self.source}->{self.target}")


class Cut(NamedTuple):
    """What one tensor of scores is about.

    Attributes:
        kind: Kind of the components.
        part: The activation or the weight, None for a whole site.
        layered: Whether the components belong to blocks; embeddings and the final norm do not.
    """

    kind: Kind
    part: str | None = None
    layered: bool = True


@dataclass(frozen=True, kw_only=True)
class MethodRun:
    """How scores were made: everything that their rows have in common.

    Attributes:
        method: Label of the four that follow.
        space: ``activation``, ``weight`` or ``edge``.
        estimator: ``first_order``, ``qk_fix``, ``atp_star``, ``ig``, ``ig_inputs``, ``exact``.
        direction: What was put where.
        at: Where gradients were taken: ``base``, ``tuned`` or ``path``.
        metric: Name of the metric.
        unit: Its unit.
        base: Name of the base model.
        tuned: Name of the fine-tune.
        prompts: Number of every batch row in its prompt set.
        n_tokens: Tokens of every batch row.
        nodes: Integration nodes.
        gap: Per prompt: what completeness leaves unexplained, in metric units.
        status: ``ok`` or ``incomplete``.
        geometric_part: The part of the difference that was used, None for all of it.
        heads_per_kv: Query heads that share a kv head.
        tied: Parts whose tensor is shared with another row.
    """

    method: str
    space: str
    estimator: str
    direction: str
    at: str
    metric: str
    unit: str
    base: str
    tuned: str
    prompts: Sequence[int]
    n_tokens: Sequence[int] = ()
    nodes: int | None = None
    gap: Sequence[float] = ()
    status: str = "ok"
    geometric_part: str | None = None
    heads_per_kv: int = 1
    tied: frozenset[str] = frozenset()


def attribution_table(
    scores: Mapping[Cut, Float[Tensor, "batch layer index"]],
    run: MethodRun,
    *,
    neurons: int | None = NEURONS_PER_PROMPT,
    at_random: int = 0,
    ranked_by: Float[Tensor, "batch layer index"] | None = None,
) -> Table:
    """The rows of ``scores``.

    Every component has a row per prompt. Neurons instead have one row over all prompts (``prompt``
    null, ``score`` the mean) and rows per prompt only where ``mean_abs`` is largest.
    Intervals of means are Student's t at 95 %.

    Args:
        scores: One tensor per cut; layer and index are the component's own numbers.
        run: What the rows have in common.
        neurons: How many neurons get rows per prompt, over all layers; None for all of them.
        at_random: How many of the other neurons get them too, for a check that is not of the
            largest alone.
        ranked_by: The neurons' scores that decide which are largest; their own unless given.
    """
    tables = []
    for cut, values in scores.items():
        array = values.detach().double().cpu().numpy()
        components = cut_components(cut, array.shape[1], array.shape[2])
        flat = array.reshape(len(array), -1)
        if cut.kind != "neuron":
            tables.append(_per_prompt(components, flat, run))
            continue
        tables.append(_over_prompts(components, flat, run))
        ranks = flat if ranked_by is None else ranked_by.double().cpu().numpy().reshape(flat.shape)
        chosen = _chosen(ranks, len(components) if neurons is None else neurons, at_random)
        tables.append(_per_prompt([components[i] for i in chosen], flat[:, chosen], run))
    return concatenated("attribution", tables, order="score")


def sampled_table(
    components: Sequence[Component], scores: Float[Tensor, "batch component"], run: MethodRun
) -> Table:
    """One row per prompt for each of a chosen list of components, neurons included."""
    return _per_prompt(list(components), scores.detach().double().cpu().numpy(), run)


def edge_table(
    edges: Sequence[Edge],
    scores: Float[Tensor, "batch edge"],
    run: MethodRun,
    *,
    largest: int | None,
    at_random: int = 0,
) -> Table:
    """One row over all prompts for every edge, and rows per prompt where ``mean_abs`` is largest.

    Args:
        edges: The edges.
        scores: Their scores.
        run: What the rows have in common.
        largest: How many get rows per prompt; None for all.
        at_random: How many of the others get them too.
    """
    flat = scores.detach().double().cpu().numpy()
    components, ends = [edge.component for edge in edges], _ends(edges)
    over = _over_prompts(components, flat, run, ends)
    chosen = _chosen(flat, len(edges) if largest is None else largest, at_random)
    some = sampled_edges_table([edges[i] for i in chosen], scores[:, chosen], run)
    return concatenated("attribution", [over, some], order="score")


def sampled_edges_table(
    edges: Sequence[Edge], scores: Float[Tensor, "batch edge"], run: MethodRun
) -> Table:
    """One row per prompt for each of a chosen list of edges."""
    flat = scores.detach().double().cpu().numpy()
    return _per_prompt([edge.component for edge in edges], flat, run, _ends(edges))


def cut_components(cut: Cut, layers: int, indices: int) -> list[Component]:
    """The components of a cut in the order of its flattened layer and index axes.

    Raises:
        HostError: The cut has no layer or no index, but the tensor has several.
    """
    numbered = cut.kind in _INDEXED
    if (not cut.layered and layers > 1) or (not numbered and indices > 1):
        raise HostError(f"{cut.kind} {cut.part}: expected one number, got {layers} by {indices}.")
    return [
        Component(cut.kind, layer if cut.layered else None, i if numbered else None, cut.part)
        for layer in range(layers)
        for i in range(indices)
    ]


def _chosen(flat: ndarray, largest: int, at_random: int) -> list[int]:
    """Columns of the largest mean magnitude, then a fixed random draw of the others."""
    order = np.argsort(-np.abs(flat).mean(axis=0), kind="stable")
    drawn = np.random.default_rng(0).permutation(order[largest:])[:at_random]
    return [*np.sort(order[:largest]).tolist(), *np.sort(drawn).tolist()]


def _shared_columns(components: list[Component], run: MethodRun) -> dict[str, Sequence[object]]:
    count = len(components)
    same = ("base", "tuned", "method", "space", "estimator", "direction", "at", "metric", "unit")
    same = (*same, "geometric_part", "nodes", "status")
    return {
        **key_columns(components, kv_index=[_kv_index(c, run.heads_per_kv) for c in components]),
        **{name: [getattr(run, name)] * count for name in same},
        "tied": [c.part in run.tied for c in components],
    }


def _kv_index(component: Component, heads_per_kv: int) -> int | None:
    if component.index is None or component.kind == "neuron":
        return None
    return component.index // heads_per_kv if component.kind == "head" else component.index


def _ends(edges: Sequence[Edge]) -> dict[str, Sequence[object]]:
    return {
        "source": [str(edge.source) for edge in edges],
        "target": [str(edge.target) for edge in edges],
    }


def _per_prompt(
    components: list[Component],
    flat: ndarray,
    run: MethodRun,
    own: Mapping[str, Sequence[object]] = NO_COLUMNS,
) -> Table:
    batch = len(run.prompts)
    repeated = _repeated({**_shared_columns(components, run), **own}, batch)
    each = len(components)
    columns: dict[str, Sequence[object]] = {
        **repeated,
        "prompt": np.repeat(run.prompts, each).tolist(),
        "score": flat.reshape(-1).tolist(),
    }
    if len(run.n_tokens):
        columns["n_tokens"] = np.repeat(run.n_tokens, each).tolist()
    if len(run.gap):
        columns["gap"] = np.repeat(run.gap, each).tolist()
    return Table.of("attribution", ATTRIBUTION_SCHEMA, columns, order="score")


def _repeated(columns: Mapping[str, Sequence[object]], times: int) -> dict[str, Sequence[object]]:
    return {name: list(values) * times for name, values in columns.items()}


def _over_prompts(
    components: list[Component],
    flat: ndarray,
    run: MethodRun,
    own: Mapping[str, Sequence[object]] = NO_COLUMNS,
) -> Table:
    batch = len(flat)
    mean = flat.mean(axis=0)
    columns = {
        **_shared_columns(components, run),
        **own,
        "score": mean.tolist(),
        "n": [batch] * len(components),
        "mean_abs": np.abs(flat).mean(axis=0).tolist(),
    }
    if batch > 1:
        sd = flat.std(axis=0, ddof=1)
        half = stats.t.ppf((1 + _CONFIDENCE) / 2, batch - 1) * sd / np.sqrt(batch)
        interval = {"sd": sd, "ci_low": mean - half, "ci_high": mean + half}
        columns |= {name: values.tolist() for name, values in interval.items()}
    return Table.of("attribution", ATTRIBUTION_SCHEMA, columns, order="score")
