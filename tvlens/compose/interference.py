"""The table ``interference``: how much two tuning vectors would disturb each other, by component.

Predicted before anything is merged, from the two changes a = s d_a and b = s' d_b of a component:

    sign_conflict    sum(|a| + |b| - |a + b|) / sum(|a| + |b|): the share of all magnitude that is
                     cancelled when the vectors are added, 0 without a conflict, 1 for b = -a
    sign_conflict_chance   the same if signs were drawn anew by fair coins: sum min(|a|, |b|) over
                     the same sum; unrelated vectors are at it, opposed ones above
    conflict_entries share of the entries that both change in which the signs differ
    cosine           <a, b> / (|a| |b|)
    overlap_read, overlap_write   |Q_A' Q_B|^2 / k for the k leading singular vectors of each, on
                     the input and the output side; chance is k / d of that side
    sti              TSV's singular task interference, sum |(U'U - I) S (V'V - I)| with U, S and V
                     the k leading singular triples of both, side by side (Gargiulo et al. 2025,
                     arXiv:2412.00081); the norm is taken entry by entry here
    sti_relative     sti / sum of S: 0 where both sides are orthogonal

Scales enter ``sign_conflict``, ``sti`` and the signs of ``cosine``. The subspaces are those of the
k largest singular values, signal or noise; the table ``overlap`` of a study keeps to directions
above the noise edge. Join the table with what a merge does (``evaluation``) on ``component``.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch
from einops import einsum, rearrange
from jaxtyping import Float64
from torch import Tensor

from tvlens.components import Component, key_columns
from tvlens.errors import StudyError
from tvlens.geometry.changes import gram, product, turned
from tvlens.tables import KEY_FIELDS, Table, keyed_schema
from tvlens.threads import one_thread
from tvlens.weights.delta import (
    Absent,
    Delta,
    LowRank,
    Spectrum,
    inner_product,
    scaled,
    spectrum,
)

from .combining import Merge, merge
from .merging import ENTRIES_AT_ONCE

RANK = 16
"""Singular directions a vector has at most in the measures of subspaces."""
RESOLVED = 1e-6
"""Relative to the largest singular value; a Gram matrix in float64 resolves no finer."""
MEASURES = (
    *("norm_a", "norm_b", "cosine"),
    *("sign_conflict", "sign_conflict_chance", "conflict_entries"),
    *("overlap_read", "overlap_read_chance", "overlap_write", "overlap_write_chance"),
    *("sti", "sti_relative"),
)
SCHEMA = keyed_schema(
    ("other", pa.string()),
    *((name, pa.float64()) for name in ("scale_a", "scale_b", *MEASURES)),
    ("rank_a", pa.int32()),
    ("rank_b", pa.int32()),
)
OWN_COLUMNS = tuple(SCHEMA.names[len(KEY_FIELDS) :])


@one_thread()
def interference(
    base: Any,
    vectors: Sequence[Any],
    *,
    scales: Sequence[float] | float = 1.0,
    select: str = "",
    rank: int = RANK,
) -> Table:
    """Every two vectors against each other, a component at a time.

    Args:
        base: The base, as for ``merge``.
        vectors: At least two, as for ``merge``.
        scales: One for all vectors, or one each.
        select: Only this part; see ``tvlens.selection``.
        rank: Singular directions of each vector that are compared.

    Returns:
        One row a component and pair of vectors that both change it; ``tuned`` is the first.

    Raises:
        StudyError: Fewer than two vectors, or numbers that do not fit.
        CheckpointError: An input cannot be read.
        IncomparableModelsError: A vector belongs to another base.
    """
    if len(vectors) < 2 or rank < 1:
        raise StudyError(
            f"interference needs two vectors and a rank of at least 1, got {len(vectors)} and "
            f"{rank}."
        )
    found = merge(base, vectors, scales=scales, select=select)
    rows: list[dict[str, Any]] = []
    components: list[Component] = []
    for component in found.layout.components():
        for row in _rows(found, component, rank):
            components.append(component)
            rows.append(row)
    columns: dict[str, list[Any]] = {
        name: [row.get(name) for row in rows] for name in ("tuned", *OWN_COLUMNS)
    }
    columns["base"] = [found.base.base_name] * len(rows)
    columns["tied"] = [found.layout.is_shared(component) for component in components]
    keyed = {**key_columns(components), **columns}
    return Table.of("interference", SCHEMA, keyed, order="sign_conflict")


def _rows(found: Merge, component: Component, rank: int) -> list[dict[str, Any]]:
    """All pairs of vectors that change a component alike in shape."""
    deltas: dict[int, Delta] = {}
    for number, term in enumerate(found.terms):
        if component in term.layout.places:
            delta = term.delta(component)
            if not isinstance(delta, Absent):
                deltas[number] = scaled(delta, term.scale)
    spectra = {number: leading(delta, rank) for number, delta in deltas.items()}
    rows = []
    for a, b in itertools.combinations(deltas, 2):
        if deltas[a].shape != deltas[b].shape:
            continue  # embeddings whose rows were matched differently
        first, second = found.terms[a], found.terms[b]
        row = {"tuned": first.name, "other": second.name}
        row |= {"scale_a": first.scale, "scale_b": second.scale}
        row |= between(deltas[a], deltas[b]) | subspaces_between(spectra[a], spectra[b])
        rows.append(row)
    return rows


def between(a: Delta, b: Delta) -> dict[str, float | None]:
    """What can be said entry by entry."""
    norms = a.norm(), b.norm()
    known = norms[0] * norms[1] > 0
    cosine = inner_product(a, b) / (norms[0] * norms[1]) if known else None
    return {"norm_a": norms[0], "norm_b": norms[1], "cosine": cosine, **_conflict(a, b)}


def _conflict(a: Delta, b: Delta) -> dict[str, float | None]:
    first, second = a.dense().reshape(-1), b.dense().reshape(-1)
    whole = cancelled = least = 0.0
    both = apart = 0
    for start in range(0, len(first), ENTRIES_AT_ONCE):
        x, y = (t[start : start + ENTRIES_AT_ONCE].double() for t in (first, second))
        whole += float(x.abs().sum() + y.abs().sum())
        cancelled += float((x.abs() + y.abs() - (x + y).abs()).sum())
        least += float(torch.minimum(x.abs(), y.abs()).sum())
        both += int(((x != 0) & (y != 0)).sum())
        apart += int((x.sign() * y.sign() < 0).sum())
    return {
        "sign_conflict": cancelled / whole if whole else None,
        "sign_conflict_chance": least / whole if whole else None,
        "conflict_entries": apart / both if both else None,
    }


def leading(delta: Delta, rank: int) -> Spectrum | None:
    """The leading singular triples of a change, at most ``rank``; None where it is no matrix.

    Of a matrix written out they come from its smaller Gram matrix: what lies below
    ``RESOLVED`` of the largest singular value is rounding and left out.
    """
    if len(delta.shape) != 2:
        return None
    if isinstance(delta, LowRank):
        found = spectrum(delta)
        kept = _resolved(found.values, rank)
        return Spectrum(found.left[:, :kept], found.values[:kept], found.right[:kept])
    matrix = delta.dense()
    wide = matrix.shape[1] > matrix.shape[0]
    tall = turned(matrix) if wide else matrix
    energies, vectors = torch.linalg.eigh(gram(tall))
    values = energies.flip(0).clamp(min=0).sqrt()
    kept = _resolved(values, rank)
    right = vectors.flip(1)[:, :kept]
    left = product(tall, right) / values[:kept]
    if wide:
        left, right = right, left
    return Spectrum(left, values[:kept], rearrange(right, "d_out k -> k d_out"))


def _resolved(values: Float64[Tensor, " k"], rank: int) -> int:
    return min(rank, int((values > RESOLVED * values[:1].sum()).sum()))


def subspaces_between(a: Spectrum | None, b: Spectrum | None) -> dict[str, float | int | None]:
    """What can be said of the leading directions of two matrices."""
    if a is None or b is None or not (len(a.values) and len(b.values)):
        return {}
    across = {
        "read": einsum(a.left, b.left, "d a, d b -> a b"),
        "write": einsum(a.right, b.right, "a d, b d -> a b"),
    }
    ranks = len(a.values), len(b.values)
    row: dict[str, float | int | None] = {"rank_a": ranks[0], "rank_b": ranks[1]}
    for side, d in (("read", len(a.left)), ("write", a.right.shape[1])):
        row[f"overlap_{side}"] = float(across[side].square().sum()) / min(ranks)
        row[f"overlap_{side}_chance"] = max(ranks) / d
    row["sti"] = task_interference([a, b])
    row["sti_relative"] = row["sti"] / float(a.values.sum() + b.values.sum())
    return row


def task_interference(spectra: Sequence[Spectrum]) -> float:
    """TSV's measure of several matrices' leading directions, entry by entry."""
    left = torch.cat([s.left for s in spectra], dim=1)
    right = torch.cat([s.right for s in spectra], dim=0)
    values = torch.cat([s.values for s in spectra])
    same = torch.eye(len(values), dtype=torch.float64)
    lefts = einsum(left, left, "d a, d b -> a b") - same
    rights = einsum(right, right, "a d, b d -> a b") - same
    return float(einsum(lefts, values, rights, "a k, k, k b -> a b").abs().sum())
