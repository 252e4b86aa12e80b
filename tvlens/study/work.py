"""How much work each stage does, counted from shapes and prompts.

A piece of work is an amount of each kind of operation:

    hash      bytes that pass through sha256
    entry     weights that pass once through the float64 sums of ``vector_measures``
    product   float64 multiplications and additions of matrix products, on one thread
    eigen     n^3 (1 + 200 / n) of every symmetric eigenvalue problem of size n, vectors included
    row       rows that go into a table
    label     components that are labelled, each with a sentence
    call      small operations, which cost what it takes to start them
    forward   float32 multiplications and additions of a model's passes, on its device

``rates`` measures what each costs here. The factors below count passes in the code of each stage;
those that stand for many small operations (reading a weight with its rounding, a hooked block)
were set by timing the shipped demo and models of SmolLM2-135M's width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tvlens.attribution.exchanges import Exchange
from tvlens.attribution.weights import NODE_COUNTS, chunks
from tvlens.components import READING_PARTS, Component
from tvlens.geometry.blocks import circuits_of
from tvlens.geometry.measures import HEAD_PARTS, KV_PARTS, NEURON_PARTS
from tvlens.geometry.readout import DRAWS
from tvlens.models.covariances import READ_BY, Input
from tvlens.models.metrics import Metric
from tvlens.models.prompts import Batch
from tvlens.weights.layout import Layout
from tvlens.weights.matching import Pair

from . import edge_counts
from .covariances import input_widths
from .row_counts import (
    SETS_OF_A_SIZE,
    Asked,
    attribution_tables,
    candidates,
    direction_rows,
    graft_sizes,
    label_rows,
    matrix_parts,
    position_shapes,
    tested_rows,
    weight_rows,
)

Work = Mapping[str, float | int]
"""Amounts by operation."""

READING = 2.5
"""A weight read with its difference and rounding energy, in passes of ``entry``."""
SCANNING = 1.0
"""Looking for NaN and comparing, of base and tuned together."""
VALUES_ONLY = 0.4
"""An eigenvalue problem without vectors, as a share of one with them."""
QR_SLOWNESS = 6.0
"""Multiplications of a QR of narrow matrices, in those of a matrix product of equal count."""
CALLS_OF_A_COMPONENT, CALLS_OF_A_BLOCK = 600, 6_000
"""Small operations of the measures of one component, and of the heads' and neurons' tables."""
CALLS_OF_A_TEST = 2_500
"""Small operations of one matrix's evidence, most of them in frames of one row."""
EVIDENCE = 2.0
"""What is tested, joined and sorted of a component, with its label, in labels."""
CALLS_OF_A_TENSOR, CALLS_OF_TWO_TOKENIZERS = 300, 60_000
"""Small operations of matching: opening a file for each tensor, reading two vocabularies."""
CALLS_OF_A_HOOKED_BLOCK = 650
"""Small operations of one block in a forward pass of the host."""
CALLS_OF_A_START = 1_400_000
"""Importing the host and building two hooked models, beside reading their weights."""
PASSES_OF_AN_ACTIVATION = 1 / 12
"""One elementwise pass over an activation, in passes of ``entry``."""
PASSES_OF_A_PLACED_SCORE = 1.0
"""A score by position that is moved, summed and written, in passes of ``entry``."""
NODES_ALONG_INPUTS = 40
"""Of an integral along the inputs: those that are tried on the embedding, and those it takes."""
PARTS_OF_A_NODE, CIRCUITS_OF_A_NODE = 1.6, 1.2
"""Dividing a node's scores over geometric parts or circuits, in passes of that node."""
LATER_ROWS = 4.0
"""What is joined, ranked and compared of an attribution row, in rows put into a table."""


def added(*parts: Work) -> Work:
    """The sum of several pieces of work."""
    total: dict[str, float | int] = {}
    for part in parts:
        for operation, amount in part.items():
            total[operation] = total.get(operation, 0.0) + amount
    return total


def times(factor: float | int, work: Work) -> Work:
    """The same work ``factor`` times."""
    return {operation: factor * amount for operation, amount in work.items()}


def stored_bytes(pair: Pair) -> tuple[int, int]:
    """Bytes of the tensors of base and tuned, as their headers say."""
    base, tuned = (
        sum(info.stored_bytes for info in source.tensors.values())
        for source in (pair.base, pair.tuned)
    )
    return base, tuned


def entries(pair: Pair, components: Sequence[Component]) -> int:
    """Numbers of some components."""
    return sum(math.prod(pair.layout.shape(component)) for component in components)


def read_bytes(pair: Pair, components: Sequence[Component]) -> int:
    """Bytes that are read of both files for some components; a fused tensor is read per part."""
    total = 0
    for component in components:
        name = pair.layout.places[component].tensor
        total += pair.base.tensors[pair.base_tensors[_stored(pair, name)]].stored_bytes
        for stored in _tuned_names(pair, name):
            total += pair.tuned.tensors[stored].stored_bytes
    return total


def _stored(pair: Pair, name: str) -> str:
    return name if name in pair.base_tensors else pair.layout.embedding_tensor


def _tuned_names(pair: Pair, name: str) -> list[str]:
    """The tuned file's tensors that a weight is read from, an adapter's factors among them."""
    adapter = pair.adapter
    if adapter is None:
        names = pair.tuned_tensors
        return [names.get(name) or names[pair.layout.embedding_tensor]]
    found = [adapter.replaced.get(name)]
    if factors := adapter.factors.get(name):
        found += [factors.first, factors.second, factors.magnitude]
    for changes in (adapter.shifts, adapter.rows):
        if change := changes.get(name):
            found.append(change.stored)
    return [stored for stored in found if stored]


def matching_work(pair: Pair) -> Work:
    """Two passes over all numbers (finite? equal?) and one of hashing."""
    tensors = len(pair.base.tensors) + len(pair.tuned.tensors)
    return {
        "hash": sum(stored_bytes(pair)),
        "entry": SCANNING * entries(pair, pair.components),
        "call": CALLS_OF_A_TENSOR * tensors + CALLS_OF_TWO_TOKENIZERS,
    }


def decompose_work(pair: Pair) -> Work:
    """Every block's measures; see ``geometry.decompose`` for what they are."""
    blocks = [_decomposed_block(pair, block) for block in pair.blocks() if block]
    return added(*blocks, {"row": weight_rows(pair).at_most})


def classify_work(pair: Pair, controls: int = 0) -> Work:
    """Every block's evidence and labels, and the writing matrices of each control."""
    blocks = [_classified_block(pair, block) for block in pair.blocks() if block]
    rows = {"label": EVIDENCE * label_rows(pair).at_most, "row": tested_rows(pair, ()).at_most}
    control = [
        _decomposed_block(pair, [c for c in block if c.part in ("W_O", "W_out")])
        for block in pair.blocks()
    ]
    control.append({"entry": SCANNING * entries(pair, pair.components)})
    return added(*blocks, rows, times(controls, added(*control)))


def covariances_work(pair: Pair, one: "Passes", tokens: int, inputs: Sequence[Input]) -> Work:
    """Running the base once, a product a token and input, and the null of every matrix."""
    layout, widths = pair.layout, input_widths(pair.layout)
    streamed = sum(2.0 * widths[name] ** 2 for name in inputs) * layout.n_layers * tokens
    loading = {"entry": SCANNING * one.parameters, "call": CALLS_OF_A_START / 2}
    tested = [_against_inputs(pair, block, inputs) for block in pair.blocks() if block]
    return added(loading, one.work, one.calls(1.0, 1), {"product": streamed}, *tested)


def _against_inputs(pair: Pair, block: Sequence[Component], inputs: Sequence[Input]) -> Work:
    """Roots, whitened changes, and the moments of every form in one block."""
    products = eigen = 0.0
    known = [c for c in block if c.kind == "matrix" and READ_BY.get(c.part or "") in inputs]
    for component in known:
        d_in, d_out = pair.layout.shape(component)
        products += d_in**3 / 3 + 3 * d_in**2 * d_out + 2 * min(d_in, d_out) ** 2 * max(d_in, d_out)
        if component.part in READING_PARTS:
            products += 8 * d_in**2 * min(d_in, d_out) + 4 * min(d_in, d_out) ** 3
        if component.part in ("W_Q", "W_V"):
            products += 6 * d_in**2 * pair.layout.d_head * pair.layout.n_heads
        if component.part in ("W_gate", "W_in"):
            products, eigen = products + 2 * d_in**2 * d_out, eigen + eigen_units(d_in)
    return {"product": products, "eigen": eigen, "call": CALLS_OF_A_TEST * len(known)}


def directions_work(pair: Pair) -> Work:
    """Singular directions of matrices, slices of heads and both changes; tokens of directions."""
    layout, works = pair.layout, []
    head = _directed(*sorted((layout.d_head, layout.d_model))) if layout.n_heads else {}
    for block in pair.blocks():
        works += [_directed(*_sides(pair, c)) for c in block if c.kind == "matrix"]
        parts = matrix_parts(block)
        of_kv, own = parts & {*KV_PARTS}, parts & {*HEAD_PARTS} - {*KV_PARTS}
        works.append(times(layout.n_kv_heads * len(of_kv) + layout.n_heads * len(own), head))
    read_out = 2.0 * (DRAWS + direction_rows(pair).at_most) * layout.d_model * layout.d_vocab
    return added(*works, {"product": read_out})


def _directed(short: int, long: int) -> Work:
    """Directions of a matrix and of its change, and one onto the other."""
    products = 10 * short**2 * long + 6 * short**3
    return {"product": products, "eigen": eigen_units(short, whole=2.0), "entry": 3 * short * long}


def eigen_units(size: int, *, values_only: float = 0.0, whole: float = 1.0) -> float:
    """Eigenvalue problems of one size: ``whole`` with vectors and ``values_only`` without."""
    return (whole + VALUES_ONLY * values_only) * size**3 * (1 + 200 / max(1, size))


def _measured(short: int, long: int) -> Work:
    """All spectral measures of a matrix: three Grams, their products with V, two spectra."""
    products = 6 * short**2 * long + 4 * short**3
    return {"product": products, "eigen": eigen_units(short, values_only=1.0)}


def measured_matrix(pair: Pair, component: Component) -> Work:
    """All spectral measures of the change of one matrix."""
    return _measured(*_sides(pair, component))


def _sides(pair: Pair, component: Component) -> tuple[int, int]:
    short, long = sorted(pair.layout.shape(component))
    return short, long


def _decomposed_block(pair: Pair, block: Sequence[Component]) -> Work:
    layout, parts = pair.layout, matrix_parts(block)
    works = [_decomposed(pair, component) for component in block]
    head = times(layout.n_heads, _measured(*sorted((layout.d_head, layout.d_model))))
    works += [head for part in parts & {"W_Q", "W_O"}]
    kv_head = times(layout.n_kv_heads, _measured(*sorted((layout.d_head, layout.d_model))))
    works += [kv_head for part in parts & {*KV_PARTS}]
    works += [_circuit(layout) for _, *needed in circuits_of(layout) if parts >= {*needed}]
    calls = CALLS_OF_A_COMPONENT * len(block) + CALLS_OF_A_BLOCK * bool(parts)
    return added(*works, {"call": calls})


def _decomposed(pair: Pair, component: Component) -> Work:
    """Reading, the vector measures whole and cut finer, and the spectra of one component."""
    size = math.prod(pair.layout.shape(component))
    if component.kind == "matrix":
        return added(_measured(*_sides(pair, component)), {"entry": (READING + 2) * size})
    if component.kind == "embedding":
        short, long = _sides(pair, component)
        products = 4 * short**2 * long + 6 * short**3
        spectra = eigen_units(short, values_only=1.0)
        return {"product": products, "eigen": spectra, "entry": (READING + 1) * size}
    return {"entry": (READING + 1) * size}


def _circuit(layout: Layout) -> Work:
    """OV or QK of every head: two QR of twice its width, and the measures of the core."""
    width, d_model = layout.d_head, layout.d_model
    core = min(2 * width, d_model)
    products = (QR_SLOWNESS * 8 * core**2 + 6 * core * width * 2) * d_model
    one = added({"product": products}, _measured(core, core))
    return times(layout.n_heads, one)


def _classified_block(pair: Pair, block: Sequence[Component]) -> Work:
    layout, parts = pair.layout, matrix_parts(block)
    works = [_evidence(pair, component) for component in block]
    circuits = [needed for _, *needed in circuits_of(layout) if parts >= {*needed}]
    if circuits:
        heads, width, d_model = layout.n_heads, layout.d_head, layout.d_model
        swapped = (2 * heads**2 * width * d_model * (2 + width)) + heads * _spikes(width, d_model)
        spectra = 2 * heads * eigen_units(min(width, d_model), values_only=1.0)
        works.append(times(len(circuits), {"product": swapped, "eigen": spectra}))
    calls = CALLS_OF_A_TEST * len(parts) + CALLS_OF_A_BLOCK * bool(parts)
    return added(*works, {"call": calls})


def _spikes(width: int, d_model: int) -> float:
    """Both factors' spikes, and how far they leave the head's own directions."""
    return 2.0 * (6 + 4 * QR_SLOWNESS + 2) * width**2 * d_model


def _evidence(pair: Pair, component: Component) -> Work:
    """Gains, spikes and their edge of a matrix; those of its rows as neurons."""
    size = math.prod(pair.layout.shape(component))
    read = {"entry": READING * size}
    if component.kind not in ("matrix", "embedding"):
        return read
    short, long = _sides(pair, component)
    if component.kind == "embedding":
        products = {"product": 3 * short**2 * long, "eigen": eigen_units(short, whole=2.0)}
        return added(read, products, {"entry": 3 * size})
    spectra = eigen_units(short, whole=2.0, values_only=1.0)
    whole = {"product": 12 * short**2 * long, "eigen": spectra}
    if component.part not in NEURON_PARTS:
        return added(read, whole, {"entry": 3 * size})
    return added(
        read,
        whole,
        {"product": 12 * short**2 * long, "eigen": eigen_units(short, values_only=1.0)},
        {"entry": 5 * size},
    )


@dataclass(frozen=True)
class Passes:
    """What one forward pass over all prompts is made of.

    Attributes:
        work: The pass, with logits where the metric reads them.
        whole_logits: What logits at all places cost beyond that.
        parameters: Numbers of the model.
        tokens: Places of all prompts, padding included.
        chunks: Batches that a pass is cut into for the weights.
        blocks: Blocks of the model.
    """

    work: Work
    whole_logits: Work
    parameters: int
    tokens: int
    chunks: int
    blocks: int

    def calls(self, passes: float, batches: int) -> Work:
        """What it takes to start the blocks of ``passes`` hooked passes over some batches."""
        return {"call": CALLS_OF_A_HOOKED_BLOCK * passes * self.blocks * batches}


def passes_of(pair: Pair, batch: Batch, metric: Metric, *, d_vocab: int) -> Passes:
    """One forward pass of a pair's models over prompts: products, and what lies between them."""
    layout = pair.layout
    parts = chunks(batch, d_vocab)
    tokens = sum(part.ids.numel() for part in parts)
    reads = sum(part.reading_positions.numel() for part in parts)
    reads = reads if metric.answers_only else tokens
    inside = entries(pair, [c for c in pair.components if c.kind == "matrix"])
    scores = sum(part.ids.numel() * part.ids.shape[1] for part in parts) * layout.n_heads
    one_logit = 2.0 * layout.d_model * d_vocab
    flops = 2.0 * inside * tokens + one_logit * reads
    flops += 4.0 * layout.n_layers * layout.d_head * scores
    between = tokens * (14 * layout.d_model + 4 * layout.d_mlp) + 2 * scores
    passes = PASSES_OF_AN_ACTIVATION * layout.n_layers * between
    return Passes(
        work={"forward": flops, "entry": passes},
        whole_logits={"forward": one_logit * (tokens - reads)},
        parameters=entries(pair, pair.components),
        tokens=tokens,
        chunks=len(parts),
        blocks=layout.n_layers,
    )


def first_order_activations(one: Passes, prompts: int) -> Work:
    """A whole pass of the donor, forward and backward of the receiver, 16 prompts at a time."""
    batches = math.ceil(prompts / 16)
    return added(times(3, one.work), one.whole_logits, one.calls(4.0, batches))


def repaired_activations(one: Passes, prompts: int, estimator: str, layers: int) -> Work:
    """First order with the softmax made anew; for AtP* a backward pass a layer beside it."""
    batches = math.ceil(prompts / 16)
    dropped = layers if estimator == "atp_star" else 0
    more = added(times(2 + 2 * dropped, one.work), one.calls(2.0 + 2.0 * dropped, batches))
    return added(first_order_activations(one, prompts), more)


def weight_node(one: Passes) -> Work:
    """One node of a path: forward, backward, a product a site, and moving the weights."""
    moved = {"entry": PASSES_OF_AN_ACTIVATION * 8 * one.parameters}
    return added(times(3, one.work), times(one.chunks, moved), one.calls(3.8, one.chunks))


def exact_sample(one: Passes, batch: Batch, *, prompts: int) -> tuple[Work, Work]:
    """A whole and a patched pass over the prompts of the exact sample."""
    share = min(1.0, prompts / max(1, len(batch)))
    some = max(1, math.ceil(share * one.chunks))
    whole = added(times(share, one.work), one.calls(1.0, some))
    patched = added(times(share / 2, one.work), one.calls(0.5, some))
    return whole, patched


def attribute_work(
    pair: Pair, one: Passes, asked: Asked, *, nodes: Sequence[int] = NODE_COUNTS[:1]
) -> Work:
    """All estimates and their tables; the exact sample is planned by time, see ``forecast``.

    Args:
        pair: The pair.
        one: A pass over the prompts.
        asked: What the tables hold.
        nodes: The numbers of nodes that the integral tries in turn.
    """
    loading = {"entry": 2 * SCANNING * one.parameters, "call": CALLS_OF_A_START}
    found = asked.exchanges(pair.layout)
    estimates = added(*(_activations(one, asked, e) for way in found for e in way.estimators))
    edges = edges_work(pair, one, found)
    again = PARTS_OF_A_NODE * asked.parts + CIRCUITS_OF_A_NODE * asked.circuits
    integral = times(2 + (1 + again) * sum(nodes), weight_node(one))
    ends = times(2 * 4 + 3, added(one.work, one.calls(1.0, math.ceil(asked.prompts / 16))))
    tables = attribution_tables(pair, asked, joined=True)
    rows = {"row": (1 + LATER_ROWS) * tables["attribution"].at_least}
    placed = {"entry": PASSES_OF_A_PLACED_SCORE * position_numbers(pair, asked)}
    return added(loading, estimates, edges, integral, ends, rows, placed)


def edges_work(pair: Pair, one: Passes, found: Sequence[Exchange]) -> Work:
    """Edges of every direction, and sets of them."""
    estimators = [estimator for way in found for estimator in way.of_edges]
    sets = sum(edge_counts.circuit_sets(pair, way) for way in found) / edge_counts.SPLITS
    along = NODES_ALONG_INPUTS * estimators.count("ig_inputs")
    passes = 5 * len(estimators) + 3 * along + edge_counts.PASSES_OF_ONE_SET * sets
    products = edge_counts.products(pair, one.tokens) * (len(estimators) + along + sets)
    return added(times(passes, one.work), {"forward": products}, one.calls(passes, one.chunks))


def position_numbers(pair: Pair, asked: Asked) -> int:
    """Scores that ``positions/`` holds, those of padding counted."""
    return sum(math.prod(shape) for shape in position_shapes(pair, asked))


def _activations(one: Passes, asked: Asked, estimator: str) -> Work:
    """One estimate of one direction."""
    if estimator == "first_order":
        return first_order_activations(one, asked.prompts)
    if estimator == "ig_inputs":
        return times(NODES_ALONG_INPUTS, first_order_activations(one, asked.prompts))
    return repaired_activations(one, asked.prompts, estimator, one.blocks)


def graft_work(pair: Pair, one: Passes) -> Work:
    """Scores by gates, then a gated pass for every set; a gate doubles the products."""
    gated = added(times(2, one.work), one.calls(2.0, one.chunks))
    scores = times(NODE_COUNTS[0] * 2, gated)
    sizes = graft_sizes(candidates(pair))
    sets = 2 * (sizes + SETS_OF_A_SIZE / 2 * (sizes + 1))
    loading = {"entry": (READING + SCANNING) * one.parameters, "call": CALLS_OF_A_START / 2}
    return added(loading, scores, times(sets, gated))


def evaluate_work(
    pair: Pair, texts: Sequence[Batch], metric: Metric, *, models: int, d_vocab: int
) -> Work:
    """A forward pass of every model over every text."""
    found = []
    for batch in texts:
        one = passes_of(pair, batch, metric, d_vocab=d_vocab)
        found.append(added(one.work, one.calls(1.0, math.ceil(len(batch) / 16))))
    loading = {"entry": SCANNING * entries(pair, pair.components), "call": CALLS_OF_A_START / 2}
    return times(models, added(loading, *found))
