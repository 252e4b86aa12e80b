"""How many edges a model has and what exchanging them takes, from its layout."""

from typing import TYPE_CHECKING

from tvlens.attribution.directions import CORRUPTED
from tvlens.attribution.edge_circuits import RANDOM_SETS, sizes_of_sets
from tvlens.attribution.edges import EDGES_AT_RANDOM, FLOATS_AT_ONCE
from tvlens.attribution.grafting import QUESTIONS
from tvlens.attribution.tables import EDGES_PER_PROMPT
from tvlens.weights.matching import Pair

if TYPE_CHECKING:
    from tvlens.attribution.exchanges import Exchange

SPLITS = 2
PASSES_OF_ONE_SET = 3.0
"""A run with a set of edges exchanged, in forward passes, beside the products over its edges."""


def source_count(pair: Pair) -> int:
    """Everything that writes to the residual stream."""
    return 1 + pair.layout.n_layers * (_attention(pair) + 1)


def edge_count(pair: Pair) -> int:
    """Edges: of every reader the sources before it."""
    layout, attention = pair.layout, _attention(pair)
    heads = layout.n_heads + 2 * layout.n_kv_heads
    before = [1 + layer * (attention + 1) for layer in range(layout.n_layers)]
    to_mlp = sum(seen + (0 if layout.parallel else attention) for seen in before)
    return heads * sum(before) + to_mlp + source_count(pair)


def _attention(pair: Pair) -> int:
    """Sources of one block's attention: one where what it writes is normed."""
    parts = {str(component.part) for component in pair.components}
    if any(part.startswith("ln1_post") for part in parts):
        return 1
    return pair.layout.n_heads + ("b_O" in parts)


def rows_per_prompt(pair: Pair) -> int:
    """Edges with a row for every prompt."""
    whole = edge_count(pair)
    top = min(EDGES_PER_PROMPT, whole)
    return top + min(EDGES_AT_RANDOM, whole - top)


def circuit_sets(pair: Pair, one: "Exchange") -> int:
    """Sets of edges whose share is measured in one direction, both ways and on both splits."""
    if one.direction not in CORRUPTED or not one.of_edges:
        return 0
    sizes = len(sizes_of_sets(edge_count(pair)))
    return len(QUESTIONS) * SPLITS * (len(one.of_edges) * sizes + RANDOM_SETS * (sizes - 1))


def products(pair: Pair, tokens: int) -> float:
    """Floating point operations of differences times gradients, of every edge."""
    return 2.0 * tokens * pair.layout.d_model * edge_count(pair)


def peak(pair: Pair, tokens: int) -> float:
    """Bytes of what all sources write, of the run that gives and of their difference."""
    return 8.0 * min(FLOATS_AT_ONCE, source_count(pair) * tokens * pair.layout.d_model)
