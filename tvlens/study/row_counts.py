"""How many rows each table of a study will have, from shapes and the number of prompts.

What the headers determine is exact: ``weights``, ``labels``, ``prompts``, the estimates in
``attribution``. What the numbers in the weights decide (which tests apply, which neurons are
largest in two methods, how large a graft is) or the time does (the exact sample) lies between two
bounds.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvlens.attribution.activations import ADDITIVE
from tvlens.attribution.directions import method_label
from tvlens.attribution.exchanges import (
    USUAL,
    Exchange,
    Exchanges,
    Words,
    exchanges,
    parts_there,
)
from tvlens.attribution.grafting import RANDOM_SETS
from tvlens.attribution.nodes import NODES
from tvlens.attribution.sampling import (
    CHECKED_PROMPTS,
    LEAST,
    MOST,
    Group,
    Sample,
    drawn_sizes,
)
from tvlens.attribution.series import group_of
from tvlens.attribution.tables import NEURONS_PER_PROMPT
from tvlens.attribution.weights import NEURONS_AT_RANDOM
from tvlens.components import KNOWN_PARTS, READING_PARTS, Component
from tvlens.geometry.blocks import circuits_of
from tvlens.geometry.contrasts import MEASURES, WRITES
from tvlens.geometry.measures import HEAD_PARTS, KV_PARTS, NEURON_PARTS
from tvlens.geometry.readings import ENERGY_RULES, PHI_GRID
from tvlens.geometry.writes import HEAD_KEPT, MATRIX_KEPT, NEURONS_KEPT, WRITERS
from tvlens.models.covariances import READ_BY
from tvlens.models.metrics import SHIPPED, Metric
from tvlens.selection import Selection
from tvlens.weights.layout import Layout
from tvlens.weights.matching import Pair

from . import edge_counts
from .selected_counts import activation_pieces, selected_counts, weight_pieces

WEIGHT_METHODS = ("weight_first_order_base", "weight_first_order_tuned", "weight_ig")
EXACT_QUESTIONS = 3
"""Alone into the base, alone out of the tuned model, averaged over the path."""
GATED_BIASES = ("b_Q", "b_K", "b_V", "b_gate", "b_in")
"""Biases that heads and neurons own, so that they are no candidates of their own."""
BANDS_OF_PARTS = 3
"""Gains, rewired, new."""
MOST_LABELS = 9
SETS_OF_A_SIZE = 2 * (2 + RANDOM_SETS)
"""Ranked by score, by length, and at random, on both splits."""


@dataclass(frozen=True)
class Rows:
    """Rows of a table, exactly or between two bounds.

    Attributes:
        at_least: The fewest.
        at_most: The most; equal to the fewest where the headers decide.
        by: The exact part by kind or method, empty where that says nothing more.
    """

    at_least: int
    at_most: int
    by: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def exactly(cls, count: int, by: Mapping[str, int] | None = None) -> "Rows":
        """Rows that are known."""
        return cls(count, count, by or {})

    @property
    def known(self) -> bool:
        """Whether both bounds are one number."""
        return self.at_least == self.at_most

    def plus(self, other: "Rows") -> "Rows":
        """The rows of two parts of a table."""
        by = {**self.by, **other.by}
        return Rows(self.at_least + other.at_least, self.at_most + other.at_most, by)

    def times(self, count: int) -> "Rows":
        """The rows of ``count`` parts alike."""
        by = {name: count * rows for name, rows in self.by.items()}
        return Rows(count * self.at_least, count * self.at_most, by)

    def to_dict(self) -> dict[str, Any]:
        """``rows`` where they are known, else ``at_least`` and ``at_most``; and ``by``."""
        if self.known:
            found: dict[str, Any] = {"rows": self.at_least}
        else:
            found = {"at_least": self.at_least, "at_most": self.at_most}
        return {**found, "by": dict(self.by)} if self.by else found


def _summed(by: Mapping[str, int]) -> Rows:
    return Rows.exactly(sum(by.values()), {name: count for name, count in by.items() if count})


def matrix_parts(block: Iterable[Component]) -> set[str]:
    """The parts of a block's matrices."""
    return {component.part or "" for component in block if component.kind == "matrix"}


def weight_rows(pair: Pair) -> Rows:
    """Rows of ``weights`` by kind: the disjoint components, then heads, kv heads and neurons."""
    layout, counts = pair.layout, Counter(c.kind for c in pair.components)
    found: Counter[str] = Counter({str(kind): count for kind, count in counts.items()})
    for block in pair.blocks():
        parts = matrix_parts(block)
        circuits = [needed for _, *needed in circuits_of(layout) if parts >= {*needed}]
        own = len(parts & {*HEAD_PARTS} - {*KV_PARTS}) + len(circuits)
        found["head"] += layout.n_heads * own
        found["kv_head"] += layout.n_kv_heads * len(parts & {*KV_PARTS})
        found["neuron"] += layout.d_mlp * len(parts & {*NEURON_PARTS})
    return _summed(found)


def label_rows(pair: Pair) -> Rows:
    """Rows of ``labels`` by kind: the disjoint components, OV and QK of heads, parts of neurons."""
    layout, counts = pair.layout, Counter(c.kind for c in pair.components)
    found: Counter[str] = Counter({str(kind): count for kind, count in counts.items()})
    for block in pair.blocks():
        parts = matrix_parts(block)
        circuits = [needed for _, *needed in circuits_of(layout) if parts >= {*needed}]
        found["head"] += layout.n_heads * len(circuits)
        found["neuron"] += layout.d_mlp * len(parts & {*NEURON_PARTS})
    return _summed(found)


def tested_rows(pair: Pair, inputs: Collection[str]) -> Rows:
    """At most this many rows of ``tests``: all components above the rounding floor, with spikes.

    Args:
        pair: The pair.
        inputs: Those of a block whose covariances are known.
    """
    layout, labels = pair.layout, label_rows(pair).by
    peers = layout.n_heads - layout.n_heads // max(1, layout.n_kv_heads)
    statistics = {"matrix": 3 if layout.listed else 2, "head": 2 if peers >= 2 else 0}
    statistics |= {"neuron": 2, "norm": 2, "embedding": statistics["matrix"] + 1}
    known = sum(each * labels.get(kind, 0) for kind, each in statistics.items())
    return Rows(0, known + sum(_input_rows(pair, block, inputs) for block in pair.blocks()))


def _input_rows(pair: Pair, block: Sequence[Component], inputs: Collection[str]) -> int:
    """Rows of one block against the covariance-matched null (``geometry.input_evidence``)."""
    layout, rows = pair.layout, 0
    known = {part for part in matrix_parts(block) if READ_BY.get(part) in inputs}
    circuits = [needed for _, *needed in circuits_of(layout) if matrix_parts(block) >= {*needed}]
    rows += len(known) + len(known & {*READING_PARTS})
    rows += layout.n_heads * sum(first in known for first, _ in circuits)
    return rows + layout.d_mlp * len(known & {*NEURON_PARTS} & {*READING_PARTS})


def contrast_rows(pair: Pair, controls: int, *, weighted: bool) -> Rows:
    """Rows of ``contrasts``: each claim raw, minus every control and their mean; and weighted."""
    known = any(matrix_parts(block) & {*WRITES} for block in pair.blocks())
    subtracted = (controls if controls > 1 else 0) + (controls > 0) if known else 0
    return Rows.exactly(len(MEASURES) * (1 + subtracted) * (1 + weighted))


def direction_rows(pair: Pair) -> Rows:
    """At most this many rows of ``directions``: what is kept of each matrix, head and layer."""
    layout, most = pair.layout, 0
    for block in pair.blocks():
        parts = matrix_parts(block)
        most += MATRIX_KEPT * len(parts & {*WRITERS}) + NEURONS_KEPT * ("W_out" in parts)
        most += HEAD_KEPT * layout.n_heads * (parts >= {"W_V", "W_O"})
    return Rows(0, most)


def reading_rows(pair: Pair) -> Rows:
    """At most this many rows of ``readings``: every rule for each matrix and slice of a head."""
    layout, read = pair.layout, 0
    for block in pair.blocks():
        parts = matrix_parts(block) & {*KNOWN_PARTS}
        read += len(parts) + layout.n_heads * len(parts & {*HEAD_PARTS} - {*KV_PARTS})
        read += layout.n_kv_heads * len(parts & {*KV_PARTS})
    return Rows(0, read * (len(ENERGY_RULES) + 1 + len(PHI_GRID) + 2))


def overlap_rows(pair: Pair, controls: int) -> Rows:
    """At most this many rows of ``overlap``: each component, every two of fine-tune and controls.

    Embeddings of other tokens have no row.
    """
    return Rows(0, len(pair.components) * math.comb(1 + controls, 2))


@dataclass(frozen=True)
class Asked:
    """What the rows of attribution depend on besides the model.

    Attributes:
        prompts: Number of prompts.
        corrupt: Those with a corrupt prompt of their length.
        all_neurons: Every neuron gets rows per prompt.
        check_exact: Components of the exact sample; None where time decides.
        check_prompts: Prompts of the exact sample; None for the usual number.
        words: The plan's activations and directions.
        metric: What is measured.
        longest: Tokens of the longest prompt.
        position: Scores by position are kept.
        only: What the exact sample is drawn from; everything where None.
        exact: There is an exact sample.
        parts: Weight scores are divided over geometric parts.
        circuits: And over the circuits of query heads.
    """

    prompts: int
    corrupt: int = 0
    all_neurons: bool = False
    check_exact: int | None = None
    check_prompts: int | None = None
    words: Words = USUAL
    metric: Metric = SHIPPED["logprob"]
    longest: int = 0
    position: bool = False
    only: Selection | None = None
    exact: bool = True
    parts: bool = False
    circuits: bool = False

    @property
    def samples(self) -> tuple[Sample, Sample]:
        """The smallest and the largest exact sample that may be drawn."""
        if self.check_exact is not None:
            prompts = self.check_prompts or CHECKED_PROMPTS[0]
            fixed = Sample(self.check_exact, 0, min(prompts, self.prompts))
            return fixed, fixed
        few, many = (min(size, self.prompts) for size in (CHECKED_PROMPTS[-1], CHECKED_PROMPTS[0]))
        return Sample(LEAST, 0, few), Sample(MOST, 0, many)

    def neurons(self, layout: Layout) -> int:
        """Neurons with a row for every prompt."""
        whole = layout.n_layers * layout.d_mlp
        top = whole if self.all_neurons else min(NEURONS_PER_PROMPT, whole)
        return top + min(NEURONS_AT_RANDOM, whole - top)

    def exchanges(self, layout: Layout) -> list[Exchange]:
        """The directions in which activations are exchanged, with their parts and prompts."""
        return self._exchanges(layout).found

    def left_out(self, layout: Layout) -> list[str]:
        """Sentences on what of the activations and directions is left out, and why."""
        return self._exchanges(layout).left_out

    def _exchanges(self, layout: Layout) -> Exchanges:
        there = parts_there(gated=layout.gated)
        return exchanges(
            self.words, self.metric, there=there, prompts=self.prompts, corrupt=self.corrupt
        )


def weight_sizes(pair: Pair, asked: Asked) -> dict[Group, int]:
    """Components with rows per prompt in weight space, by kind; a tied W_U is one of its own."""
    layout = pair.layout
    disjoint: Counter[str] = Counter(str(c.kind) for c in pair.components)
    disjoint["embedding"] += layout.tied
    fine = {
        "head": layout.n_layers * layout.n_heads,
        "kv_head": layout.n_layers * layout.n_kv_heads,
        "neuron": asked.neurons(layout),
    }
    return {(kind, None): count for kind, count in {**disjoint, **fine}.items()}


def activation_sizes(layout: Layout, asked: Asked, parts: Sequence[str]) -> dict[Group, int]:
    """The same of some activations; heads and neurons part by part."""
    each = {"head": layout.n_layers * layout.n_heads, "neuron": asked.neurons(layout)}
    each["kv_head"] = layout.n_layers * layout.n_kv_heads
    found: Counter[Group] = Counter()
    for cut, _ in (NODES[part] for part in parts):
        whole = layout.n_layers if cut.layered else 1
        found[group_of(Component(cut.kind, part=cut.part))] += each.get(cut.kind, whole)
    return dict(found)


def neuron_parts(parts: Sequence[str]) -> int:
    """How many of some activations are cut into neurons: each has a row over all prompts."""
    return sum(NODES[part][0].kind == "neuron" for part in parts)


def estimate_rows(pair: Pair, asked: Asked) -> Rows:
    """Rows of the estimates in ``attribution``, by method; neurons have one more over all prompts.

    Exact: the number of prompts and the shapes decide.
    """
    layout = pair.layout
    over_prompts = layout.n_layers * layout.d_mlp
    found: Counter[str] = Counter()
    for one in asked.exchanges(layout):
        sizes = activation_sizes(layout, asked, one.parts)
        rows = sum(sizes.values()) * one.prompts + neuron_parts(one.parts) * over_prompts
        for estimator in one.estimators:
            found[method_label(one.direction, estimator)] += rows
        for estimator in one.of_edges:
            by_prompt = edge_counts.rows_per_prompt(pair) * one.prompts
            found[f"edge_{estimator}"] += edge_counts.edge_count(pair) + by_prompt
    for method in WEIGHT_METHODS:
        sizes = weight_sizes(pair, asked)
        found[method] = sum(sizes.values()) * asked.prompts + over_prompts
    found["weight_ig"] += part_rows(pair, asked) if asked.parts else 0
    if asked.circuits:
        found["weight_ig"] += 2 * layout.n_layers * layout.n_heads * asked.prompts
    return _summed(found)


def _parts_of_kinds(pair: Pair) -> dict[str, int]:
    """Geometric parts of each kind; a bias that heads or neurons own is one more."""
    biases = {component.part for component in pair.components if component.kind == "bias"}
    owned = {"head": {"b_Q"}, "kv_head": {"b_K", "b_V"}, "neuron": {"b_gate", "b_in"}}
    plain = {"matrix": 6, "head": 7, "kv_head": 6, "neuron": 4}
    return {kind: n + bool(owned.get(kind, set()) & biases) for kind, n in plain.items()}


def part_rows(pair: Pair, asked: Asked) -> int:
    """Rows of ``attribution`` with a geometric part."""
    layout, parts, sizes = pair.layout, _parts_of_kinds(pair), weight_sizes(pair, asked)
    by_prompt = sum(count * sizes[kind, None] for kind, count in parts.items())
    return by_prompt * asked.prompts + parts["neuron"] * layout.n_layers * layout.d_mlp


def share_rows(pair: Pair) -> Rows:
    """Rows of ``shares``: parts and bands of every group, and two contrasts; groups of labels."""
    parts = _parts_of_kinds(pair)
    matrices = {c.part for c in pair.components if c.kind == "matrix"}
    groups = [7, 7, *[parts["matrix"]] * len(matrices)]
    groups += [parts[kind] for kind in ("head", "kv_head", "neuron")]
    known = sum(size + BANDS_OF_PARTS for size in groups) + 2
    labelled = sum(parts[kind] + BANDS_OF_PARTS for kind in ("matrix", "head", "neuron"))
    return Rows(known, known + MOST_LABELS * labelled)


def _drawn(sizes: Mapping[Group, int], count: int) -> int:
    return sum(top + drawn for top, drawn in drawn_sizes(sizes, count).values())


def sampled_sizes(
    pair: Pair, asked: Asked, parts: Sequence[str] | None = None
) -> tuple[dict[Group, int], dict[Group, int]]:
    """Components that an exact sample is drawn from, at least and at most; ``parts`` None: weights.

    Which neurons have rows for every prompt is known after they are scored: of those selected, the
    bounds are what must and what can be among them.
    """
    layout = pair.layout
    whole = weight_sizes(pair, asked) if parts is None else activation_sizes(layout, asked, parts)
    if asked.only is None:
        return whole, whole
    pieces = weight_pieces(pair) if parts is None else activation_pieces(layout, parts)
    chosen = selected_counts(pieces, asked.only, pair)
    low, high = {}, {}
    for group, size in whole.items():
        missing = layout.n_layers * layout.d_mlp - size if group[0] == "neuron" else 0
        low[group] = max(0, chosen[group] - missing)
        high[group] = min(size, chosen[group])
    return low, high


def exact_rows(pair: Pair, asked: Asked) -> Rows:
    """Rows of exact patching in ``attribution``."""
    ends, weights = [], sampled_sizes(pair, asked)
    for end, sample in enumerate(asked.samples):
        rows = EXACT_QUESTIONS * _drawn(weights[end], sample.count) * sample.prompts
        for one in asked.exchanges(pair.layout):
            for sizes, estimators in _exchanged_sizes(pair, asked, one):
                drawn = _drawn(sizes[end], sample.count) * min(one.prompts, sample.prompts)
                # each further estimator may have others among its largest
                rows += drawn * (len(estimators) if end else bool(estimators))
        ends.append(rows)
    return Rows(ends[0], ends[1])


def _exchanged_sizes(
    pair: Pair, asked: Asked, one: Exchange
) -> list[tuple[tuple[dict[Group, int], dict[Group, int]], Sequence[str]]]:
    """What an exact sample of a direction's activations, and of its edges, is drawn from.

    Which edges a selection leaves is known after they are scored.
    """
    edges: dict[Group, int] = {("edge", None): edge_counts.rows_per_prompt(pair)}
    fewest = edges if asked.only is None else dict.fromkeys(edges, 0)
    return [
        (sampled_sizes(pair, asked, one.parts), one.estimators),
        ((fewest, edges), one.of_edges),
    ]


def fidelity_rows(pair: Pair, asked: Asked) -> Rows:
    """Rows of ``fidelity``: for each method a row a kind and stratum, and one for all kinds."""
    series = [sampled_sizes(pair, asked)] * len(WEIGHT_METHODS)
    for one in asked.exchanges(pair.layout):
        for sizes, estimators in _exchanged_sizes(pair, asked, one):
            series += [sizes] * len(estimators)
    few, many = (
        sum(_groups(sizes[end], sample.count) for sizes in series)
        for end, sample in enumerate(asked.samples)
    )
    return Rows(few, many)


def _groups(sizes: Mapping[Group, int], count: int) -> int:
    """Kinds and strata with a component, and one group for every stratum that has any."""
    drawn = drawn_sizes(sizes, count).values()
    filled = [sum(pair[stratum] > 0 for pair in drawn) for stratum in (0, 1)]
    return sum(filled) + sum(kinds > 0 for kinds in filled)


def finding_rows(pair: Pair, asked: Asked) -> Rows:
    """Rows of ``findings``: every component that was patched exactly."""
    sizes = sampled_sizes(pair, asked)
    few, many = (_drawn(sizes[end], sample.count) for end, sample in enumerate(asked.samples))
    return Rows(few, many)


def role_rows(pair: Pair, asked: Asked) -> Rows:
    """Rows of ``roles``: heads, and neurons that have rows per prompt in both spaces.

    Passing is the output, z or post, of the tuned model put into the base.
    """
    layout, chosen = pair.layout, asked.neurons(pair.layout)
    found = [one for one in asked.exchanges(layout) if one.direction == "tuned_into_base"]
    parts = found[0].parts if found else ()
    heads, neurons = layout.n_layers * layout.n_heads, layout.n_layers * layout.d_mlp
    heads, there = heads * ("z" in parts), "post" in parts
    return Rows(heads + there * max(0, 2 * chosen - neurons), heads + there * chosen)


def circuit_sizes(pair: Pair, asked: Asked) -> dict[Group, int]:
    """Components whose clean activation was put into the corrupt run of both models, at most."""
    within = [one for one in asked.exchanges(pair.layout) if one.direction == "clean_into_corrupt"]
    if len(within) < 2:
        return {}
    sizes = activation_sizes(pair.layout, asked, within[0].parts)
    if "first_order" in within[0].of_edges:
        sizes["edge", None] = edge_counts.rows_per_prompt(pair)
    return sizes


def circuit_rows(pair: Pair, asked: Asked) -> Rows:
    """Rows of ``circuits``: neurons and edges count where both models have rows of them."""
    layout, sizes = pair.layout, circuit_sizes(pair, asked)
    all_of = {"neuron": layout.n_layers * layout.d_mlp, "edge": edge_counts.edge_count(pair)}
    in_both = {
        group: max(0, 2 * size - all_of[group[0]]) if group[0] in all_of else size
        for group, size in sizes.items()
    }
    return Rows(sum(in_both.values()), sum(sizes.values()))


def position_shapes(pair: Pair, asked: Asked) -> list[tuple[int, int, int, int]]:
    """Shapes of the tensors in ``positions``: prompts, places, layers, numbers."""
    layout = pair.layout
    indices = {"head": layout.n_heads, "kv_head": layout.n_kv_heads, "neuron": layout.d_mlp}
    found = []
    for one in asked.exchanges(layout) if asked.position else ():
        cuts = [NODES[part][0] for part in one.parts]
        shapes = [
            (
                one.prompts,
                asked.longest,
                layout.n_layers if cut.layered else 1,
                indices.get(cut.kind, 1),
            )
            for cut in cuts
        ]
        found += shapes * sum(estimator in ADDITIVE for estimator in one.estimators)
    return found


def join_rows(pair: Pair, asked: Asked, *, sizes: bool = True) -> Rows:
    """Rows of ``joins``: two measures of size for every kind, and every activation of a circuit."""
    measured = 2 * len(weight_rows(pair).by) if sizes else 0
    return Rows.exactly(measured + len(circuit_sizes(pair, asked)))


def candidates(pair: Pair) -> int:
    """Components that a graft chooses from: each weight has one owner."""
    layout = pair.layout
    whole = [c for c in pair.components if c.kind != "matrix" and c.part not in GATED_BIASES]
    fine = layout.n_heads + layout.n_kv_heads + layout.d_mlp
    return layout.n_layers * fine + len(whole) + layout.tied


def graft_sizes(count: int) -> int:
    """Sizes of the sets that a graft tries: powers of two up to ``count``, and ``count``."""
    return count.bit_length() + (count & (count - 1) > 0)


def graft_rows(pair: Pair) -> dict[str, Rows]:
    """Rows of ``curves`` and ``grafts``; the smallest set's own size may be one more point."""
    count = candidates(pair)
    sizes = 2 * SETS_OF_A_SIZE * graft_sizes(count)
    return {"curves": Rows(sizes, sizes + 2 * SETS_OF_A_SIZE), "grafts": Rows(0, 2 * count)}


def attribution_tables(pair: Pair, asked: Asked, *, joined: bool) -> dict[str, Rows]:
    """Rows of every table that attribution makes; ``joined``: the weights side is there too."""
    tables = {
        "prompts": Rows.exactly(asked.prompts),
        "attribution": estimate_rows(pair, asked),
        "roles": role_rows(pair, asked),
        **({"shares": share_rows(pair)} if asked.parts else {}),
    }
    if asked.exact:
        tables["attribution"] = tables["attribution"].plus(exact_rows(pair, asked))
        tables["fidelity"] = fidelity_rows(pair, asked)
        tables["findings"] = finding_rows(pair, asked)
    if sets := sum(edge_counts.circuit_sets(pair, one) for one in asked.exchanges(pair.layout)):
        tables["edge_circuits"] = Rows(0, sets)  # prompts without splits have none
    if circuit_sizes(pair, asked):
        tables["circuits"] = circuit_rows(pair, asked)
    joins = join_rows(pair, asked, sizes=joined)
    return {**tables, "joins": joins} if joins.at_most else tables


def evaluation_rows(models: Sequence[str], tasks: Sequence[str]) -> Rows:
    """Rows of ``evaluation``: a loss for each model and task."""
    return Rows.exactly(len(models) * len(tasks))
