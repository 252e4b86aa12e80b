"""The coordinates of the base in which a tuned block is to be compared with it.

Of all the copies of a tuned block that compute the same, one is chosen, by conditions that every
copy fulfils with the same result: what was done to the coordinates does not matter, and a copy of
the base ends as the base.

    order      neurons and heads are numbered as those they are most like (``pairing``)
    neuron     W_in's column is as long as the base's, and of its sign; W_out's row takes the rest
    key        with rotary positions one complex number a rotary pair: of the base's length and
               phase, W_Q takes the rest; a sign where keys are normalised; else as value
    value      the basis in which |W_V - base|^2 / |base|^2 + |W_O - base|^2 / |base|^2 is least,
               W_O over the heads of the group. A matrix that was not trained is made equal to the
               base's, though, and the other takes all
    norm       the gain is the base's and the readers take the rest. Where a reader's row is the
               base's times a factor, the factor is the gain's instead: that reader was not trained

The norm's factors come first; the readers that tell them are compared with the gains multiplied
in, where norms have no freedom, so that no condition waits for another. The least distance is found
by Gauss-Newton steps from the basis in which the tuned columns are the base's turned into their own
span by the smallest rotation [1], singular values kept; each step solves a Sylvester equation.

[1] Schoenemann 1966, the orthogonal Procrustes problem, https://doi.org/10.1007/BF02289451
"""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float64
from scipy.linalg import solve_sylvester
from torch import Tensor

from .moves import READS, AxisMove, Moves
from .pairing import HeadOrder, Parts, Sizes, head_order, neuron_order

STEPS, SMALL_STEP = 30, 1e-12
"""Most Gauss-Newton steps, and the size from which on they change nothing."""
DEPENDENT = 1e-9
"""A head whose columns are this near to dependent has no basis, and is left as it is."""
EXACT = 1e-3
"""Share of a roundoff up to which nothing is left to be divided between two matrices."""
TINY = torch.finfo(torch.float64).tiny
COLUMNS = 1024
"""Columns of each reader that a norm's factors are estimated from, evenly spread."""
ATTENTION, MLP = ("W_Q", "W_K", "W_V"), ("W_gate", "W_in")


class Freedom(NamedTuple):
    """What may change in a model without changing its function.

    Attributes:
        sizes: Numbers and width of heads.
        rotary: Entries of a head that rotate, pairs being i and i + rotary / 2; 0 without rotation.
        qk_norm: What queries and keys are normalised over.
        neuron: Factors that a neuron's W_in may take: any, none, or positive ones.
        roundoff: Half the relative spacing of the coarsest dtype that weights are stored in; what
            differs by less was not trained.
    """

    sizes: Sizes
    rotary: int
    qk_norm: Literal["", "head", "projection"]
    neuron: Literal["any", "positive", "none"]
    roundoff: float


def block_moves(base: Parts, tuned: Parts, freedom: Freedom) -> Moves:
    """The moves that bring a tuned block into the base's coordinates.

    Args:
        base: Effective canonical weights by part, as far as the block has them.
        tuned: The same of the tuned model.
        freedom: What may move.
    """
    axes: dict[str, AxisMove] = {}
    if "W_V" in base:
        axes |= _attention(base, tuned, freedom)
    if "W_out" in base:
        axes |= _mlp(base, tuned, freedom)
    if "W_U" in base:
        axes |= _gain_axes("ln_final", base, tuned, Moves(), ("W_U",), freedom)
    return Moves(axes)


def _attention(base: Parts, tuned: Parts, freedom: Freedom) -> dict[str, AxisMove]:
    folded = _folded(base, "ln1", ATTENTION), _folded(tuned, "ln1", ATTENTION)
    order = head_order(*folded, freedom.sizes)
    rows: dict[str, AxisMove] = {}
    if "ln1.w" in base:
        columns = Moves(_head_axes(*folded, freedom, order))
        rows = _gain_axes("ln1", base, tuned, columns, ATTENTION, freedom)
    fixed = {**tuned, **{part: Moves(rows).moved(part, tuned[part]) for part in ATTENTION}}
    axes = {**rows, **_head_axes(base, fixed, freedom, order)}
    if freedom.qk_norm and freedom.rotary == freedom.sizes.d_head:
        axes |= _key_norm_axes(base, tuned, freedom, order)
    return axes


def _mlp(base: Parts, tuned: Parts, freedom: Freedom) -> dict[str, AxisMove]:
    readers = tuple(part for part in MLP if part in base)
    folded = _folded(base, "ln2", readers), _folded(tuned, "ln2", readers)
    order = neuron_order(*folded)
    gate = AxisMove.scaling(torch.ones(len(order), dtype=torch.float64), order)

    def neurons(base: Parts, tuned: Parts) -> dict[str, AxisMove]:
        factors = _neuron_factors(base, tuned, gate, freedom)
        move = AxisMove.scaling(factors, order)
        return {"gate": gate, "neuron": move, "activation": move.dual()}

    rows: dict[str, AxisMove] = {}
    if "ln2.w" in base:  # a gate has no factor of its own
        readers = readers[:1] if freedom.neuron == "any" else readers
        rows = _gain_axes("ln2", base, tuned, Moves(neurons(*folded)), readers, freedom)
    return {**rows, **neurons(base, {**tuned, "W_in": Moves(rows).moved("W_in", tuned["W_in"])})}


def _folded(parts: Parts, norm: str, readers: tuple[str, ...]) -> dict[str, Tensor]:
    """The block with its readers times the norm's gain, which no norm's freedom touches."""
    if f"{norm}.w" not in parts:
        return dict(parts)
    gain = rearrange(parts[f"{norm}.w"].double(), "d -> d 1")
    return {**parts, **{part: gain * parts[part].double() for part in readers}}


def _gain_axes(
    norm: str,
    base: Parts,
    tuned: Parts,
    columns: Moves,
    readers: tuple[str, ...],
    freedom: Freedom,
) -> dict[str, AxisMove]:
    """The norm's gain times factors, and its readers' rows divided by them.

    Args:
        norm: ``ln1``, ``ln2`` or ``ln_final``.
        base: The base's block.
        tuned: The tuned block.
        columns: What brings the readers' columns into the base's coordinates.
        readers: Parts that read the norm and may tell the factors.
        freedom: What may move.
    """
    gains = base[f"{norm}.w"].double(), tuned[f"{norm}.w"].double()
    factors = torch.where((gains[0] != 0) & (gains[1] != 0), gains[0] / gains[1], 1.0)
    least = torch.full_like(factors, freedom.roundoff)
    for part in readers:
        found, left = _row_factors(base, tuned, columns, part)
        factors = torch.where(left < least, found, factors)
        least = torch.minimum(left, least)
    gain = AxisMove.scaling(factors)
    return {norm: gain, norm + READS: gain.dual()}


def _row_factors(
    base: Parts, tuned: Parts, columns: Moves, part: str
) -> tuple[Float64[Tensor, " d_model"], Float64[Tensor, " d_model"]]:
    """The factor of each row of a reader beside the base's, and how far it is from a factor."""
    spread = torch.linspace(0, base[part].shape[1] - 1, COLUMNS).round().long().unique()
    moved = columns.moved(part, tuned[part]) if columns.axes else tuned[part]
    wanted, found = base[part][:, spread].double(), moved[:, spread].double()
    factors = torch.nanmedian(torch.where(wanted != 0, found / wanted, torch.nan), 1).values
    left = (found - rearrange(factors, "d -> d 1") * wanted).norm(dim=1) / found.norm(dim=1)
    known = torch.isfinite(factors) & torch.isfinite(left) & (factors != 0)
    return torch.where(known, factors, 1.0), torch.where(known, left, torch.inf)


def _neuron_factors(
    base: Parts, tuned: Parts, order: AxisMove, freedom: Freedom
) -> Float64[Tensor, " neuron"]:
    """What brings each column of W_in to the base's length and sign."""
    reads = base["W_in"].double(), order.along_last(tuned["W_in"].double())
    if freedom.neuron == "none":
        return torch.ones(reads[0].shape[1], dtype=torch.float64)
    writes = base["W_out"].double(), order.along_first(tuned["W_out"].double())
    factors = _ratios(reads[0].norm(dim=0), reads[1].norm(dim=0))
    if freedom.neuron == "positive":
        return factors
    cosines = torch.nn.functional.cosine_similarity
    sign = cosines(*reads, dim=0) + cosines(*writes, dim=1)  # a joint flip turns both
    return factors * torch.where(sign < 0, -1.0, 1.0)


def _ratios(wanted: Tensor, found: Tensor) -> Tensor:
    """``wanted / found``, 1 where either is zero."""
    return torch.where((wanted > 0) & (found > 0), wanted / found, 1.0)


def _head_axes(
    base: Parts, tuned: Parts, freedom: Freedom, order: HeadOrder
) -> dict[str, AxisMove]:
    first, second = (_head_sides(parts, freedom) for parts in (base, tuned))
    groups = rearrange(order.query, "(kv share) -> kv share", kv=len(order.kv))
    keys, values = [], []
    for kv, former in enumerate(order.kv.tolist()):
        own = first.of(kv, range(kv * groups.shape[1], (kv + 1) * groups.shape[1]))
        theirs = second.of(former, groups[kv].tolist())
        values.append(_free_basis(own["value"], theirs["value"], freedom.roundoff))
        keys.append(_key_basis(own["key"], theirs["key"], freedom))
    value, key = (AxisMove(order.kv, torch.stack(found)) for found in (values, keys))
    return {
        "value": value,
        "result": value.dual(order.query),
        "key": key,
        "query": key.dual(order.query),
    }


class Sides(NamedTuple):
    """Two matrices with a basis between them: ``read @ A`` and ``inverse(A) @ write``."""

    read: Float64[Tensor, "d_model width"]
    write: Float64[Tensor, "width column"]


class _HeadSides(NamedTuple):
    """The matrices of all heads of a block, [head, d_model, d_head]."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor

    def of(self, kv: int, heads: Iterable[int]) -> dict[str, Sides]:
        """Both sides of the two bases of a kv group."""
        together = "head d a -> a (head d)"
        chosen = list(heads)
        return {
            "value": Sides(self.value[kv], rearrange(self.output[chosen], together)),
            "key": Sides(self.key[kv], rearrange(self.query[chosen], together)),
        }


def _head_sides(parts: Parts, freedom: Freedom) -> _HeadSides:
    width = freedom.sizes.d_head
    read = (
        rearrange(parts[part].double(), "d (head a) -> head d a", a=width)
        for part in ("W_Q", "W_K", "W_V")
    )
    return _HeadSides(*read, rearrange(parts["W_O"].double(), "(head a) d -> head d a", a=width))


def _key_basis(base: Sides, tuned: Sides, freedom: Freedom) -> Float64[Tensor, "width width"]:
    """The basis of one kv head's keys."""
    rotary, width = freedom.rotary, base.read.shape[1]
    matrix = torch.eye(width, dtype=torch.float64)
    if rotary:
        signs = bool(freedom.qk_norm)
        matrix[:rotary, :rotary] = _pair_basis(base.read[:, :rotary], tuned.read[:, :rotary], signs)
    if rotary < width and not freedom.qk_norm:
        rest = (Sides(side.read[:, rotary:], side.write[rotary:]) for side in (base, tuned))
        matrix[rotary:, rotary:] = _free_basis(*rest, freedom.roundoff)
    return matrix


def _free_basis(base: Sides, tuned: Sides, roundoff: float) -> Float64[Tensor, "width width"]:
    """The basis that a pair of matrices is compared in where any would do.

    The nearest one, unless another makes a matrix equal to the base's and this one does not.
    """
    turned = "width column -> column width"
    by_read = _span_basis(base.read, tuned.read)
    left = _distances(base, tuned, by_read)
    if max(left) <= EXACT * roundoff:
        return by_read
    nearest = _nearest_basis(base, tuned, by_read)
    if left[0] > roundoff:
        by_write = _span_basis(rearrange(base.write, turned), rearrange(tuned.write, turned))
        by_write = rearrange(torch.linalg.inv(by_write), "a b -> b a")
        return by_write if _distances(base, tuned, by_write)[1] <= roundoff else nearest
    return nearest if max(_distances(base, tuned, nearest)) <= roundoff else by_read


def _nearest_basis(base: Sides, tuned: Sides, start: Tensor) -> Float64[Tensor, "width width"]:
    """The basis of the least distance to the base, by Gauss-Newton steps from ``start``."""
    weights = [1 / side.square().sum().clamp(min=TINY) for side in base]
    identity = torch.eye(len(start), dtype=torch.float64)
    basis, least = start, math.inf
    for _ in range(STEPS):
        read, write = tuned.read @ basis, torch.linalg.solve(basis, tuned.write)
        left = base.read - read, base.write - write
        distance = sum(
            float(w * side.square().sum()) for w, side in zip(weights, left, strict=True)
        )
        if not distance < least:
            break
        # (1 + X) changes read by read X and write by -X write, to first order
        step = solve_sylvester(
            (weights[0] * read.mT @ read).numpy(),
            (weights[1] * write @ write.mT).numpy(),
            (weights[0] * read.mT @ left[0] - weights[1] * left[1] @ write.mT).numpy(),
        )
        start, least = basis, distance
        basis = basis @ (identity + torch.from_numpy(step))
        if abs(step).max() < SMALL_STEP:
            break
    return start


def _distances(base: Sides, tuned: Sides, basis: Tensor) -> tuple[float, float]:
    """|tuned - base| / |base| of the read and of the write side in a basis of the tuned ones."""
    read, write = tuned.read @ basis, torch.linalg.solve(basis, tuned.write)
    left = (read - base.read).norm(), (write - base.write).norm()
    first, second = (x / y.norm().clamp(min=TINY) for x, y in zip(left, base, strict=True))
    return float(first), float(second)


def _span_basis(base: Tensor, tuned: Tensor) -> Float64[Tensor, "width width"]:
    """The basis in which tuned columns are the base's, turned into their own span [1]."""
    identity = torch.eye(base.shape[1], dtype=torch.float64)
    if torch.equal(base, tuned) or len(base) < base.shape[1]:
        return identity
    (wanted, base_part), (found, tuned_part) = torch.linalg.qr(base), torch.linalg.qr(tuned)
    for part in (base_part, tuned_part):
        values = torch.linalg.svdvals(part)
        if float(values[-1]) <= DEPENDENT * float(values[0]):
            return identity
    left, _, right = torch.linalg.svd(einsum(found, wanted, "d a, d b -> a b"))
    return torch.linalg.solve(tuned_part, left @ right @ base_part)


def _pair_basis(base: Tensor, tuned: Tensor, signs: bool) -> Float64[Tensor, "width width"]:
    """One complex number for each rotary pair: the base's length and phase, or its sign alone."""
    pairs = base.shape[1] // 2
    wanted, found = (torch.complex(x[:, :pairs], x[:, pairs:]) for x in (base, tuned))
    inner = (found.conj() * wanted).sum(0)
    if signs:
        factors = torch.where(inner.real < 0, -1.0, 1.0).to(inner.dtype)
    else:
        phase = torch.where(inner.abs() > 0, inner / inner.abs(), 1.0)
        factors = phase * _ratios(wanted.norm(dim=0), found.norm(dim=0))
    real, imaginary = torch.diag(factors.real), torch.diag(factors.imag)
    return torch.cat([torch.cat([real, imaginary], 1), torch.cat([-imaginary, real], 1)])


def _key_norm_axes(
    base: Parts, tuned: Parts, freedom: Freedom, order: HeadOrder
) -> dict[str, AxisMove]:
    """Gains after the norms of queries and keys: what one of a rotary pair gains, the other loses.

    A norm within heads has one gain for all of them, a norm over the projection one for each.
    """
    shared = HeadOrder(*(torch.zeros(1, dtype=torch.long),) * 2)
    query, kv = order if freedom.qk_norm == "projection" else shared
    wanted, tuned_gains = (
        rearrange(
            parts["k_norm.w"].double(), "(unit two pair) -> unit two pair", unit=len(kv), two=2
        )
        for parts in (base, tuned)
    )
    found = tuned_gains[kv]
    lengths = _ratios(wanted.norm(dim=1), found.norm(dim=1))
    factors = lengths * torch.where((wanted * found).sum(1) < 0, -1.0, 1.0)
    matrices = torch.diag_embed(torch.cat([factors, factors], 1))
    key = AxisMove(kv, matrices)
    return {"k_norm": key, "q_norm": key.dual(query)}
