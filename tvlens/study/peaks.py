"""The most memory that each stage holds at once, from shapes.

Peaks are anonymous bytes of the whole process: pages of the checkpoints' own files, which the
system takes back when it needs them, do not count. The factors count tensors that live at the same
time in the code of each stage; what Python, its libraries and their tables take was measured.
"""

import math
from collections.abc import Sequence

from tvlens.attribution.weights import chunks
from tvlens.components import Component
from tvlens.evaluation.likelihood import ReadyDistances
from tvlens.evaluation.representations import ROWS_AT_ONCE, TOKENS_AT_ONCE
from tvlens.evaluation.suite import Ready
from tvlens.geometry.measures import HEAD_PARTS
from tvlens.models.covariances import Input, bytes_needed
from tvlens.models.metrics import Metric
from tvlens.models.prompts import Batch
from tvlens.threads import at_once
from tvlens.weights.contents import CHUNK
from tvlens.weights.matching import Pair
from tvlens.weights.pair import SLAB, VOCABULARY_PARTS

from . import edge_counts
from .covariances import input_widths
from .row_counts import Rows, label_rows, weight_rows
from .work import entries

INTERPRETER = 270e6
"""Python with torch, pandas, pyarrow and scipy; 243 to 274 MB were measured."""
HOST = 150e6
"""What transformers and TransformerLens add."""
DOUBLE = 8
READING = 19
"""Bytes a number while it is read, beside base, difference and floor: its rounding energy."""
WORKING = 8
"""Matrices in float64 that live at once while one is measured and tested."""
WEIGHT_ROW, EVIDENCE_ROW, ATTRIBUTION_ROW = 1_100, 4_000, 2_000
"""Bytes of a row while its table is made, in lists, frames and columns."""
PASSED_ON = 12
"""Activations as wide as the residual stream that a block keeps for the backward pass."""
PATTERNS, PATTERN_CHANGES = 3, 3
"""Patterns that a block keeps for the backward pass, and those under other queries and keys."""
OF_THE_SUMS = 1.7
"""The sums over activations, with the moments of one and both sets of its tokens."""
LOGITS = 4
"""Copies of the logits that a metric and its gradient hold."""


def held_bytes(pair: Pair, components: Sequence[Component]) -> float:
    """Base and difference in float32, and the floor where there is one."""
    each = 8 if pair.adapter is not None else 12
    return float(each * entries(pair, components))


def matching_peak(pair: Pair) -> float:
    """Some rows of both models, as many as are read at once."""
    largest = max((entries(pair, [c]) for c in pair.components), default=0)
    return INTERPRETER + 20 * min(CHUNK, largest)


def decompose_peak(pair: Pair) -> float:
    """What is measured at once, and the rows so far."""
    return INTERPRETER + _measured_at_once(pair) + WEIGHT_ROW * weight_rows(pair).at_most


def classify_peak(pair: Pair, inputs: Sequence[Input] = ()) -> float:
    """The same with more products of an embedding, every row's evidence, and moments of inputs."""
    rows = WEIGHT_ROW * weight_rows(pair).at_most + EVIDENCE_ROW * label_rows(pair).at_most
    return INTERPRETER + _measured_at_once(pair, products=8) + rows + _moments(pair, inputs)


def _moments(pair: Pair, inputs: Sequence[Input]) -> float:
    if not inputs:
        return 0.0
    return float(bytes_needed(input_widths(pair.layout), inputs, layers=pair.layout.n_layers))


def covariances_peak(pair: Pair, inputs: Sequence[Input]) -> float:
    """The base, and the moments of what it reads."""
    return INTERPRETER + HOST + model_bytes(pair) + _moments(pair, inputs)


def _measured_at_once(pair: Pair, *, products: int = 4) -> float:
    """The largest of: the matrices of one attention layer, another matrix, a piece of tokens.

    With several threads as many of them as are measured at the same time. ``products`` is the
    number of d_model x d_model matrices that an embedding is reduced to.
    """
    groups = [
        group
        for block in pair.blocks()
        for group in (
            [c for c in block if c.part in HEAD_PARTS],
            *([c] for c in block if c.part not in HEAD_PARTS),
        )
    ]
    peaks = sorted((_group_peak(pair, group, products) for group in groups), reverse=True)
    return sum(peaks[: at_once()], 0.0)


def _group_peak(pair: Pair, group: Sequence[Component], products: int) -> float:
    """Components held together, the largest of them read and measured in float64."""
    if any(component.part in VOCABULARY_PARTS for component in group):
        kept = products * DOUBLE * pair.layout.d_model**2
        return float((READING + 12 + 3 * DOUBLE) * SLAB + kept)
    largest = max((entries(pair, [component]) for component in group), default=0)
    return held_bytes(pair, group) + float(max(READING, WORKING * DOUBLE) * largest)


def model_bytes(pair: Pair) -> float:
    """One model in float32, as it runs."""
    return 4.0 * entries(pair, pair.components)


def attribute_peak(
    pair: Pair,
    batch: Batch,
    metric: Metric,
    *,
    d_vocab: int,
    rows: Rows,
    estimators: Sequence[str] = ("first_order",),
    edges: bool = False,
) -> float:
    """Both models, the base's copy, a tied embedding twice more, one batch's graph, the rows.

    With edges also what all sources write.
    """
    tied = 2 * 4.0 * pair.layout.d_vocab * pair.layout.d_model if pair.layout.tied else 0.0
    changes = 0 if set(estimators) <= {"first_order"} else PATTERN_CHANGES
    graph = _graph(pair, batch, metric, d_vocab=d_vocab, patterns=PATTERNS + changes)
    tables = ATTRIBUTION_ROW * rows.at_least
    written = edge_counts.peak(pair, batch.ids.numel()) if edges else 0.0
    return INTERPRETER + HOST + 3 * model_bytes(pair) + tied + graph + tables + written


def graft_peak(pair: Pair, batch: Batch, metric: Metric, *, d_vocab: int) -> float:
    """The base, the whole tuning vector beside it, one batch's graph with gates."""
    graph = 2 * _graph(pair, batch, metric, d_vocab=d_vocab)
    return INTERPRETER + HOST + 2 * model_bytes(pair) + graph


def evaluate_peak(pair: Pair, texts: Sequence[Batch], *, d_vocab: int) -> float:
    """One model, and the logits of 16 texts."""
    wide = max((batch.ids.shape[1] * min(16, len(batch)) for batch in texts), default=0)
    return INTERPRETER + HOST + model_bytes(pair) + 4.0 * LOGITS * wide * d_vocab


def sweep_peak(pair: Pair, tasks: Sequence[Ready], *, d_vocab: int) -> float:
    """The base and the vector; what stands in its place, and the weights that it moved."""
    return INTERPRETER + HOST + 4 * model_bytes(pair) + _reading(tasks, d_vocab)


def combine_peak(pair: Pair, tasks: Sequence[Ready], *, vectors: int, d_vocab: int) -> float:
    """The same with every vector."""
    return sweep_peak(pair, tasks, d_vocab=d_vocab) + (vectors - 1) * model_bytes(pair)


def represent_peak(pair: Pair, batch: Batch, *, sums: int, d_vocab: int) -> float:
    """Two bases, vector, stand-in and moved weights; sums and what is made of them; one pass."""
    layout, width = pair.layout, batch.ids.shape[1]
    rows = min(len(batch), max(1, min(ROWS_AT_ONCE, TOKENS_AT_ONCE // max(1, width))))
    kept = 3 * layout.n_layers * layout.d_model + layout.n_layers * layout.n_heads * layout.d_head
    passed = 4.0 * rows * width * (kept + LOGITS * layout.d_mlp)
    return INTERPRETER + HOST + 5 * model_bytes(pair) + OF_THE_SUMS * sums + passed


def _reading(tasks: Sequence[Ready], d_vocab: int) -> float:
    """Logits of the largest batch, and those of other models that distances are from."""
    wide, held = 0, 0
    for one in tasks:
        parts = getattr(one, "parts", ())
        wide = max([wide, *(int(part.n_scored.sum()) + len(part) for part in parts)])
        if isinstance(one, ReadyDistances):
            held += 2 * sum(int(part.n_scored.sum()) + len(part) for part in parts)
    return 4.0 * d_vocab * (LOGITS * wide + held)


def _graph(
    pair: Pair, batch: Batch, metric: Metric, *, d_vocab: int, patterns: int = PATTERNS
) -> float:
    """What the backward pass of the largest batch keeps, and its logits."""
    layout, sizes = pair.layout, []
    for part in chunks(batch, d_vocab):
        tokens, width = part.ids.numel(), part.ids.shape[1]
        reads = part.reading_positions.numel() if metric.answers_only else tokens
        kept = PASSED_ON * layout.d_model + 5 * layout.d_mlp + patterns * layout.n_heads * width
        whole = LOGITS * reads * d_vocab + min(16, len(part)) * width * d_vocab
        sizes.append(4.0 * (layout.n_layers * tokens * kept + whole))
    return max(sizes, default=0.0) + 4.0 * math.prod((layout.d_model, d_vocab))
