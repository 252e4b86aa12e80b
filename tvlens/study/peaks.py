"""The most memory that each stage holds at once, from shapes.

Peaks are resident bytes of the whole process. The factors count tensors that live at the same
time in the code of each stage; what Python, its libraries and their tables take was measured.
"""

import math
from collections.abc import Sequence

from tvlens.attribution.weights import chunks
from tvlens.components import Component
from tvlens.models.metrics import Metric
from tvlens.models.prompts import Batch
from tvlens.weights.contents import CHUNK
from tvlens.weights.matching import Pair

from .row_counts import Rows, label_rows, weight_rows
from .work import entries

INTERPRETER = 400e6
"""Python with torch, pandas, pyarrow and scipy; 370 to 430 MB were measured."""
HOST = 150e6
"""What transformers and TransformerLens add."""
DOUBLE = 8
READING = 19
"""Bytes a number while it is read, beside base, difference and floor: its rounding energy."""
MEASURED, TESTED = 11, 14
"""Matrices in float64 that live at once while the largest of a block is measured, or tested."""
SCATTERED = 32
"""The same for matrices below ``MAPPED`` bytes, which the C library keeps in pieces."""
MAPPED = 32e6
WEIGHT_ROW, EVIDENCE_ROW, ATTRIBUTION_ROW = 1_500, 4_000, 2_000
"""Bytes of a row while its table is made, in lists, frames and columns."""
PASSED_ON = 12
"""Activations as wide as the residual stream that a block keeps for the backward pass."""
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
    """The largest block with the working space of its largest matrix, and the rows so far."""
    blocks = [_block_peak(pair, block, MEASURED) for block in pair.blocks() if block]
    return INTERPRETER + max(blocks, default=0) + WEIGHT_ROW * weight_rows(pair).at_most


def classify_peak(pair: Pair) -> float:
    """The same with the spectra of all of a block's matrices, and every row's evidence."""
    blocks = [
        _block_peak(pair, block, TESTED) + _spectra(pair, block) for block in pair.blocks() if block
    ]
    return INTERPRETER + max(blocks, default=0) + EVIDENCE_ROW * label_rows(pair).at_most


def _block_peak(pair: Pair, block: Sequence[Component], copies: int) -> float:
    return max(_reading_peak(pair, block), held_bytes(pair, block) + _working(pair, block, copies))


def _reading_peak(pair: Pair, block: Sequence[Component]) -> float:
    """What is held before each component, and that component while it is read."""
    peak, held = 0.0, 0.0
    for component in block:
        held += held_bytes(pair, [component])
        peak = max(peak, held + READING * entries(pair, [component]))
    return peak


def _working(pair: Pair, block: Sequence[Component], copies: int) -> float:
    sizes = [DOUBLE * entries(pair, [c]) for c in block if c.kind == "matrix"]
    small = max((size for size in sizes if size < MAPPED), default=0)
    return float(max(copies * max(sizes, default=0), SCATTERED * small))


def _spectra(pair: Pair, block: Sequence[Component]) -> float:
    """Both sides of every matrix's singular directions in float64."""
    shapes = [sorted(pair.layout.shape(c)) for c in block if c.kind == "matrix"]
    return float(sum(DOUBLE * short * (short + long) for short, long in shapes))


def model_bytes(pair: Pair) -> float:
    """One model in float32, as it runs."""
    return 4.0 * entries(pair, pair.components)


def attribute_peak(pair: Pair, batch: Batch, metric: Metric, *, d_vocab: int, rows: Rows) -> float:
    """Both models, the base's copy, a tied embedding twice more, one batch's graph, the rows."""
    tied = 2 * 4.0 * pair.layout.d_vocab * pair.layout.d_model if pair.layout.tied else 0.0
    graph = _graph(pair, batch, metric, d_vocab=d_vocab)
    tables = ATTRIBUTION_ROW * rows.at_least
    return INTERPRETER + HOST + 3 * model_bytes(pair) + tied + graph + tables


def graft_peak(pair: Pair, batch: Batch, metric: Metric, *, d_vocab: int) -> float:
    """The base, the whole tuning vector beside it, one batch's graph with gates."""
    graph = 2 * _graph(pair, batch, metric, d_vocab=d_vocab)
    return INTERPRETER + HOST + 2 * model_bytes(pair) + graph


def evaluate_peak(pair: Pair, texts: Sequence[Batch], *, d_vocab: int) -> float:
    """One model, and the logits of 16 texts."""
    wide = max((batch.ids.shape[1] * min(16, len(batch)) for batch in texts), default=0)
    return INTERPRETER + HOST + model_bytes(pair) + 4.0 * LOGITS * wide * d_vocab


def _graph(pair: Pair, batch: Batch, metric: Metric, *, d_vocab: int) -> float:
    """What the backward pass of the largest batch keeps, and its logits."""
    layout, sizes = pair.layout, []
    for part in chunks(batch, d_vocab):
        tokens, width = part.ids.numel(), part.ids.shape[1]
        reads = part.reading_positions.numel() if metric.answers_only else tokens
        kept = PASSED_ON * layout.d_model + 5 * layout.d_mlp + 3 * layout.n_heads * width
        whole = LOGITS * reads * d_vocab + min(16, len(part)) * width * d_vocab
        sizes.append(4.0 * (layout.n_layers * tokens * kept + whole))
    return max(sizes, default=0.0) + 4.0 * math.prod((layout.d_model, d_vocab))
