"""The coordinates of the base in which a tuned block is to be compared with it.

Of all the copies of a tuned block that compute the same, one is chosen, by conditions that every
copy fulfils with the same result: what was done to the coordinates does not matter, and a copy of
the base ends as the base.

    order      neurons and heads are numbered as those they are most like (``pairing``)
    neuron     the factor of W_in's column, and its inverse of W_out's row
    key        with rotary positions one complex number a rotary pair; a sign where keys are
               normalised; else any basis of W_K, and its dual of W_Q
    value      any basis of W_V, and its dual of W_O's rows
    norm       the factor of each entry of the gain, and its inverse of the rows that read it

Each is the one in which both sides are nearest to the base, with one exception: a side that can be
made equal to the base's was not trained, is made so, and the other takes all the rest.

*Nearest* is by the sum over matrices of entries * |change|^2 / |base|^2, so that every entry counts
alike in units of its matrix, and what a norm and a thousand columns share stays with the norm.

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
from jaxtyping import Float, Float64
from scipy.linalg import solve_sylvester
from torch import Tensor

from .moves import READS, AxisMove, Moves
from .pairing import HeadOrder, Parts, Sizes, head_order, neuron_order

STEPS, SMALL_STEP = 30, 1e-12
"""Most Gauss-Newton steps, and the size from which on they change nothing: 8 to 18 steps in the
shipped fine-tunes."""
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
        axes |= _gain_axes("ln_final", base, tuned, ("W_U",), freedom)
    return Moves(axes)


def _attention(base: Parts, tuned: Parts, freedom: Freedom) -> dict[str, AxisMove]:
    folded = _folded(base, "ln1", ATTENTION), _folded(tuned, "ln1", ATTENTION)
    order = head_order(*folded, freedom.sizes)
    rows: dict[str, AxisMove] = {}
    if "ln1.w" in base:
        columns = Moves(_head_axes(*folded, freedom, order))
        rows = _gain_axes("ln1", base, _moved(tuned, columns, ATTENTION), ATTENTION, freedom)
    axes = {**rows, **_head_axes(base, _moved(tuned, Moves(rows), ATTENTION), freedom, order)}
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
        columns = Moves(neurons(*folded))
        rows = _gain_axes("ln2", base, _moved(tuned, columns, readers), readers, freedom)
    return {**rows, **neurons(base, _moved(tuned, Moves(rows), ("W_in",)))}


def _moved(parts: Parts, moves: Moves, chosen: tuple[str, ...]) -> Parts:
    """A block with the chosen parts moved."""
    return {**parts, **{part: moves.moved(part, parts[part]) for part in chosen}}


def _folded(parts: Parts, norm: str, readers: tuple[str, ...]) -> dict[str, Tensor]:
    """The block with its readers times the norm's gain, which no norm's freedom touches."""
    if f"{norm}.w" not in parts:
        return dict(parts)
    gain = rearrange(parts[f"{norm}.w"].double(), "d -> d 1")
    return {**parts, **{part: gain * parts[part].double() for part in readers}}


def _gain_axes(
    norm: str, base: Parts, tuned: Parts, readers: tuple[str, ...], freedom: Freedom
) -> dict[str, AxisMove]:
    """The norm's gain times factors, and its readers' rows divided by them.

    Args:
        norm: ``ln1``, ``ln2`` or ``ln_final``.
        base: The base's block.
        tuned: The tuned block, the columns of its readers in the base's coordinates.
        readers: Parts that read the norm and may tell the factors.
        freedom: What may move.
    """
    factors = _nearest_factors(norm, base, tuned, readers)
    least = torch.full_like(factors, freedom.roundoff)
    for part in readers:
        found, left = _row_factors(base[part], tuned[part])
        factors = torch.where(left < least, found, factors)
        least = torch.minimum(left, least)
    gain = AxisMove.scaling(factors)
    return {norm: gain, norm + READS: gain.dual()}


def _weight(base: Tensor) -> Float64[Tensor, ""]:
    """What a squared change is multiplied by so that entries count: 1 over their mean square."""
    return base.numel() / base.square().sum(dtype=torch.float64).clamp(min=TINY)


def _nearest_factors(
    norm: str, base: Parts, tuned: Parts, readers: tuple[str, ...]
) -> Float64[Tensor, " d_model"]:
    """The factors r of the gain, the rows of the readers divided by r, of the least distance."""
    gain = [rearrange(parts[f"{norm}.w"].double(), "d -> 1 d") for parts in (base, tuned)]
    rows = Overlaps(*[torch.zeros(gain[0].shape[1], dtype=torch.float64)] * 3)
    for part in readers:
        weight = _weight(base[part])
        columns = (parts[part].split(COLUMNS, dim=1) for parts in (base, tuned))
        for wanted, found in zip(*columns, strict=True):
            first, second = (rearrange(x.double(), "d n -> n d") for x in (wanted, found))
            rows = rows.plus(_overlaps(first, second, weight))
    return _nearest_scalars(_overlaps(gain[0], gain[1], _weight(gain[0])), rows)


def _row_factors(
    base: Float[Tensor, "d_model column"], tuned: Float[Tensor, "d_model column"]
) -> tuple[Float64[Tensor, " d_model"], Float64[Tensor, " d_model"]]:
    """The factor of each row of a reader beside the base's, and how far it is from a factor."""
    spread = torch.linspace(0, base.shape[1] - 1, COLUMNS).round().long().unique()
    wanted, found = base[:, spread].double(), tuned[:, spread].double()
    factors = torch.nanmedian(torch.where(wanted != 0, found / wanted, torch.nan), 1).values
    left = (found - rearrange(factors, "d -> d 1") * wanted).norm(dim=1) / found.norm(dim=1)
    known = torch.isfinite(factors) & torch.isfinite(left) & (factors != 0)
    return torch.where(known, factors, 1.0), torch.where(known, left, torch.inf)


def _neuron_factors(
    base: Parts, tuned: Parts, order: AxisMove, freedom: Freedom
) -> Float64[Tensor, " neuron"]:
    """What each column of W_in is multiplied by, and each row of W_out divided by."""
    reads = base["W_in"].double(), order.along_last(tuned["W_in"].double())
    if freedom.neuron == "none":
        return torch.ones(reads[0].shape[1], dtype=torch.float64)
    writes = base["W_out"].double(), order.along_first(tuned["W_out"].double())
    first, second = (rearrange(x, "neuron d -> d neuron") for x in writes)
    read = _overlaps(reads[0], reads[1], _weight(reads[0]))
    factors = _scalars(read, _overlaps(first, second, _weight(first)), freedom.roundoff)
    return factors.abs() if freedom.neuron == "positive" else factors


class Overlaps(NamedTuple):
    """Weighted inner products of the vectors of base and tuned units.

    Attributes:
        base: |base|^2.
        tuned: |tuned|^2.
        shared: <tuned, base>, complex where the vectors are.
    """

    base: Float64[Tensor, " unit"]
    tuned: Float64[Tensor, " unit"]
    shared: Tensor

    @property
    def cosine(self) -> Tensor:
        """The cosine, 0 where a vector is zero."""
        lengths = (self.base * self.tuned).sqrt()
        return torch.where(lengths > 0, self.shared / lengths, 0.0)

    def plus(self, other: "Overlaps") -> "Overlaps":
        """Those of vectors that are made of both."""
        return Overlaps(*(x + y for x, y in zip(self, other, strict=True)))

    def equal_up_to_a_factor(self, roundoff: float) -> Tensor:
        """Whether tuned is a multiple of base, but for rounding."""
        return 1 - self.cosine.abs().square() <= roundoff**2


def _overlaps(base: Tensor, tuned: Tensor, weight: Tensor) -> Overlaps:
    """Of the vectors [entry, unit]."""
    own, theirs = (weight * x.abs().square().sum(0) for x in (base, tuned))
    return Overlaps(own, theirs, weight * (tuned.conj() * base).sum(0))


def _scalars(read: Overlaps, write: Overlaps, roundoff: float) -> Tensor:
    """The number z of each unit, ``z read`` and ``write / conj(z)``, that it is compared with.

    The nearest one, unless one of the two vectors is the base's times a factor: then that factor.
    """
    found = _nearest_scalars(read, write)
    reads, writes = (side.equal_up_to_a_factor(roundoff) for side in (read, write))
    found = torch.where(reads & ~writes, read.shared / read.tuned, found)
    return torch.where(writes & ~reads, write.tuned / write.shared.conj(), found)


def _nearest_scalars(read: Overlaps, write: Overlaps) -> Tensor:
    """The z of least |z read - base|^2 + |write / conj(z) - base|^2, by Gauss-Newton in log z."""
    alike = read.cosine * read.base + write.cosine.conj() * write.base
    phase = torch.where(alike.abs() > 0, alike / alike.abs(), 1.0)
    found = phase * (_ratios(read.base, read.tuned) * _ratios(write.tuned, write.base)) ** 0.25
    for _ in range(STEPS):
        square = found.abs().square()
        lengths = square * read.tuned, write.tuned / square
        slope = found.conj() * read.shared - write.shared.conj() / found.conj()
        step = (slope - lengths[0] + lengths[1]) / (lengths[0] + lengths[1]).clamp(min=TINY)
        found = found * torch.exp(step / step.abs().clamp(min=1))
    dead = (read.tuned == 0) | (write.tuned == 0)  # any number would do
    return torch.where(dead, 1.0, found)


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

    def part(self, start: int, stop: int) -> "Sides":
        """Both, of a part of the basis."""
        return Sides(self.read[:, start:stop], self.write[start:stop])


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
    query, key, value = (
        rearrange(parts[part].double(), "d (head a) -> head d a", a=width) for part in ATTENTION
    )
    output = rearrange(parts["W_O"].double(), "(head a) d -> head d a", a=width)
    return _HeadSides(query, key, value, output)


def _key_basis(base: Sides, tuned: Sides, freedom: Freedom) -> Float64[Tensor, "width width"]:
    """The basis of one kv head's keys."""
    rotary, width = freedom.rotary, base.read.shape[1]
    matrix = torch.eye(width, dtype=torch.float64)
    if rotary:
        own, theirs = (side.part(0, rotary) for side in (base, tuned))
        matrix[:rotary, :rotary] = _pair_basis(own, theirs, freedom)
    if rotary < width and not freedom.qk_norm:
        own, theirs = (side.part(rotary, width) for side in (base, tuned))
        matrix[rotary:, rotary:] = _free_basis(own, theirs, freedom.roundoff)
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
    weights, identity = [_weight(side) for side in base], torch.eye(len(start)).double()
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


def _pair_basis(base: Sides, tuned: Sides, freedom: Freedom) -> Float64[Tensor, "width width"]:
    """One complex number for each rotary pair, or its sign alone."""
    reads = [_complex(side.read) for side in (base, tuned)]
    writes = [_complex(rearrange(side.write, "width x -> x width")) for side in (base, tuned)]
    read = _overlaps(reads[0], reads[1], _weight(base.read))
    write = _overlaps(writes[0], writes[1], _weight(base.write))
    if freedom.qk_norm:
        opposite = (read.cosine + write.cosine.conj()).real < 0
        factors = torch.where(opposite, -1.0, 1.0).to(read.shared.dtype)
    else:
        factors = _scalars(read, write, freedom.roundoff)
    real, imaginary = torch.diag(factors.real), torch.diag(factors.imag)
    return torch.cat([torch.cat([real, imaginary], 1), torch.cat([-imaginary, real], 1)])


def _complex(columns: Float64[Tensor, "entry width"]) -> Tensor:
    """Rotary pairs, i and i + width / 2, as complex numbers."""
    return torch.complex(*columns.contiguous().chunk(2, dim=1))


def _key_norm_axes(
    base: Parts, tuned: Parts, freedom: Freedom, order: HeadOrder
) -> dict[str, AxisMove]:
    """Gains after the norms of queries and keys: what one of a rotary pair gains, the other loses.

    A norm within heads has one gain for all of them, a norm over the projection one for each.
    """
    shared = HeadOrder(*(torch.zeros(1, dtype=torch.long),) * 2)
    query, kv = order if freedom.qk_norm == "projection" else shared

    def overlaps(part: str, former: Tensor) -> Overlaps:
        """Of the gains of a rotary pair of a kv group."""
        sides = []
        for parts, units in ((base, torch.arange(len(former))), (tuned, former)):
            gains = rearrange(parts[part].double(), "(unit a) -> unit a", unit=len(former))[units]
            pairs = "(kv share) (two pair) -> (share two) (kv pair)"
            sides.append(rearrange(gains, pairs, kv=len(kv), two=2))
        return _overlaps(sides[0], sides[1], _weight(sides[0]))

    factors = _scalars(overlaps("k_norm.w", kv), overlaps("q_norm.w", query), freedom.roundoff)
    by_unit = rearrange(factors, "(kv pair) -> kv pair", kv=len(kv))
    key = AxisMove(kv, torch.diag_embed(torch.cat([by_unit, by_unit], 1)))
    return {"k_norm": key, "q_norm": key.dual(query)}
