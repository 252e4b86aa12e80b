"""The table ``weights``: the measures of every component of a pair, block by block.

Rows: every matrix, norm, bias and embedding (disjoint); every query head (W_Q, W_O, OV, QK), kv
head (W_K, W_V) and neuron (W_gate, W_in, W_out), which are finer cuts of the same matrices.

The new side of e_* is named by what it touches. On a matrix that reads the residual stream (W_Q,
W_K, W_V, W_gate, W_in) a new write lives in head or neuron coordinates, so it counts as
``e_reroute`` and ``e_new_write`` is null; on one that writes it (W_O, W_out) a new read does, and
``e_new_read`` is null. OV has both. Both sides of QK read: ``e_new_read`` holds both, its
``g_read`` is the query side, its ``g_write`` the key side. OV and QK have k = d_head, their full
rank, and ``e_new_both`` is null there: a product of small changes has none to first order. The
e_* that are not null sum to 1. Where a family normalises queries and keys before they meet there
is no QK row: W_Q W_K' is not the form that its attention computes. Embeddings go through their
d_model Gram: spectra and the alignment of the d_model side only. A part whose orientation is
unknown (a family without a table) has no measure of one side: g_*, k_*, e_reroute, e_new_read and
e_new_write are null, and the rest of the e_* is what they would hold.
"""

from collections.abc import Sequence

from tvlens.components import Component
from tvlens.tables import Table, concatenated

from .blocks import Ask, Progress, findings_of_block, findings_of_blocks
from .measures import SPLIT_COLUMNS, WEIGHTS_SCHEMA, Spectra
from .reading import Pair

__all__ = ["SPLIT_COLUMNS", "WEIGHTS_SCHEMA", "decompose", "weights_of_block"]


def weights_of_block(pair: Pair, block: Sequence[Component], *, spectra: Spectra = "both") -> Table:
    """The rows of one block: its disjoint components, then heads, then neurons."""
    return findings_of_block([Ask(pair, block, spectra)])[0].weights


def decompose(pair: Pair, progress: Progress | None = None, *, spectra: Spectra = "both") -> Table:
    """The table ``weights`` of a pair.

    Args:
        pair: Base and tuned checkpoint.
        progress: Called after every block.
        spectra: Whose singular values are taken; columns that need others are null. Norms, gains
            and cosines of every component, head and neuron need none.
    """
    blocks = [[Ask(pair, block, spectra)] for block in pair.blocks() if block]
    tables = [found.weights for (found,) in findings_of_blocks(blocks, progress)]
    return concatenated("weights", tables, order="relative_delta", as_one=False)
