"""Differences of weights: dense, in two low-rank factors, DoRA's two parts, or absent.

Sums, scales and products are taken in float64 and rounded once to the dtype of the tensors, so a
result is the float32 number nearest to the exact one (for factors: each factor is). Products of
low-rank differences go through QR factors of their sides and are never written out; what cancels
between factors cancels there, before anything is squared.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from tvlens.errors import AdapterError, IncomparableModelsError

ENTRIES_AT_ONCE = 1 << 22
"""Entries upcast to float64 in one step (32 MiB), so that no matrix exists twice."""


@dataclass(frozen=True, eq=False)
class Dense:
    """A difference written out.

    Attributes:
        tensor: Tuned minus base, canonical orientation.
    """

    tensor: Float[Tensor, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the difference."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the entries."""
        return self.tensor.dtype

    def dense(self) -> Float[Tensor, "..."]:
        """The difference written out."""
        return self.tensor

    def norm(self) -> float:
        """Frobenius norm, summed in float64."""
        return float(torch.linalg.vector_norm(self.tensor, dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class LowRank:
    """A difference ``left @ right`` that is never written out unless asked for.

    Attributes:
        left: Reads the input.
        right: Writes the output; carries the adapter's scale.
    """

    left: Float[Tensor, "d_in rank"]
    right: Float[Tensor, "rank d_out"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the difference."""
        return (self.left.shape[0], self.right.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        return torch.promote_types(self.left.dtype, self.right.dtype)

    @property
    def rank(self) -> int:
        """Number of columns of the factors, an upper bound of the rank."""
        return self.left.shape[1]

    def dense(self) -> Float[Tensor, "d_in d_out"]:
        """The difference written out: the product in float64, rounded once."""
        return self.written_out().to(self.dtype)

    def written_out(self) -> Float64[Tensor, "d_in d_out"]:
        """The product in float64."""
        left, right = self.left.double(), self.right.double()
        return einsum(left, right, "d_in rank, rank d_out -> d_in d_out")

    def norm(self) -> float:
        """Frobenius norm through the triangular factor of ``left``, in float64."""
        triangle = torch.linalg.qr(self.left.double(), mode="r").R
        return float(torch.linalg.vector_norm(triangle @ self.right.double()))


@dataclass(frozen=True, eq=False)
class Dora:
    """DoRA's difference, length and direction apart; their sum is the difference.

    DoRA replaces W by ``length * (W + change) / norm(W + change)``, norms by output column and
    ``change`` of low rank (Liu et al. 2024, arXiv:2402.09353, eq. 5).

    Attributes:
        magnitude: ``(length / norm(W) - 1) * W``: the base's own columns, longer or shorter.
        direction: The rest, zero where ``change`` is zero.
    """

    magnitude: Float[Tensor, "d_in d_out"]
    direction: Float[Tensor, "d_in d_out"]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of both parts."""
        return torch.promote_types(self.magnitude.dtype, self.direction.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the difference."""
        return tuple(self.magnitude.shape)

    def dense(self) -> Float[Tensor, "d_in d_out"]:
        """The difference written out."""
        return self.magnitude + self.direction

    def norm(self) -> float:
        """Frobenius norm of the whole, summed in float64."""
        return float(torch.linalg.vector_norm(self.dense(), dtype=torch.float64))


@dataclass(frozen=True)
class Absent:
    """A difference that is zero because nothing was trained there.

    Attributes:
        shape: Shape of the weight.
    """

    shape: tuple[int, ...]

    def dense(self) -> Float[Tensor, "..."]:
        """Zeros."""
        return torch.zeros(self.shape)

    def norm(self) -> float:
        """Zero."""
        return 0.0


Delta = Dense | LowRank | Dora | Absent
Present = Dense | LowRank | Dora
UNTRAINED = 2.0**-21
"""Relative: a length this close to the base's norm is that norm, as float32 sums it up."""


def dora(
    base: Float[Tensor, "d_in d_out"], change: LowRank, length: Float[Tensor, " d_out"]
) -> Dora:
    """DoRA's difference to ``base``, computed in float64.

    Raises:
        AdapterError: A column of ``base + change`` is zero, so that DoRA divides by zero.
    """
    start = base.double()
    turned = start + change.left.double() @ change.right.double()
    before, after = (torch.linalg.vector_norm(w, dim=0) for w in (start, turned))
    if bool((after == 0).any()):
        raise AdapterError(
            f"column {int((after == 0).nonzero()[0])} of a weight with DoRA has no length to "
            "divide by.",
            hint="The adapter does not belong to this base, or training diverged.",
        )
    wanted = trained_length(before, length)
    longer = torch.where(before > 0, wanted / before - 1, torch.zeros_like(before))
    magnitude = start * longer
    direction = turned * (wanted / after) - start - magnitude
    return Dora(magnitude.to(base.dtype), direction.to(base.dtype))


def trained_length(
    before: Float[Tensor, " d_out"], length: Float[Tensor, " d_out"]
) -> Float[Tensor, " d_out"]:
    """DoRA's lengths in float64, those that are the norms ``before`` training set to them."""
    wanted = length.double()
    return torch.where((wanted - before).abs() <= UNTRAINED * before, before, wanted)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A singular value decomposition ``left @ diag(values) @ right``, float64.

    Attributes:
        left: Orthonormal columns, input side.
        values: Singular values, largest first; factors have as many as they have columns.
        right: Orthonormal rows, output side.
    """

    left: Float64[Tensor, "d_in rank"]
    values: Float64[Tensor, " rank"]
    right: Float64[Tensor, "rank d_out"]


def scaled(delta: Delta, factor: float | int) -> Delta:
    """``factor`` times a difference, in the same form."""
    match delta:
        case Dense():
            return Dense(_scaled(delta.tensor, factor))
        case LowRank():
            return LowRank(delta.left, _scaled(delta.right, factor))
        case Dora():
            return Dora(_scaled(delta.magnitude, factor), _scaled(delta.direction, factor))
        case Absent():
            return delta


def added(first: Delta, second: Delta) -> Delta:
    """The sum; two low-rank differences stay low rank, two of DoRA keep their parts.

    Raises:
        IncomparableModelsError: The shapes differ.
    """
    return combined([(1.0, first), (1.0, second)])


def combined(terms: Sequence[tuple[float | int, Delta]]) -> Delta:
    """The sum of factor times difference over ``terms``, added up in float64.

    Absent terms, and those with factor zero, add nothing; if all others are low rank the result
    is, with the factors side by side; else it is dense.

    Raises:
        IncomparableModelsError: The shapes differ.
    """
    for _, delta in terms:
        _refuse_other_shape(terms[0][1], delta)
    acting = [(factor, delta) for factor, delta in terms if factor and _is_present(delta)]
    if not acting:
        return Absent(terms[0][1].shape)
    if len(acting) == 1:
        return scaled(acting[0][1], acting[0][0])
    if all(isinstance(delta, Dora) for _, delta in acting):
        return _of_parts(acting)
    low = [(factor, delta) for factor, delta in acting if isinstance(delta, LowRank)]
    return _side_by_side(low) if len(low) == len(acting) else _added_up(acting)


def _side_by_side(terms: Sequence[tuple[float | int, LowRank]]) -> LowRank:
    """The sum of low-rank differences: their factors one after the other."""
    left = torch.cat([delta.left for _, delta in terms], dim=1)
    right = torch.cat([_scaled(delta.right, factor) for factor, delta in terms], dim=0)
    return LowRank(left, right)


def _added_up(terms: Sequence[tuple[float | int, Delta]]) -> Dense:
    """The sum of differences of any form, entry by entry."""
    total = torch.zeros(terms[0][1].shape, dtype=torch.float64)
    dtype = torch.float32
    for factor, delta in terms:
        for part in _summands(delta):
            total.add_(part, alpha=factor)
        dtype = torch.promote_types(dtype, _dtype(delta))
    return Dense(total.to(dtype))


def _summands(delta: Delta) -> tuple[Float[Tensor, "..."], ...]:
    """Tensors that sum to the difference, none of them rounded."""
    match delta:
        case LowRank():
            return (delta.written_out(),)
        case Dora():
            return delta.magnitude, delta.direction
        case _:
            return (delta.dense(),)


def _of_parts(terms: Sequence[tuple[float | int, Delta]]) -> Dora:
    """The sum of DoRA's differences, length and direction apart."""
    parts = [(factor, delta) for factor, delta in terms if isinstance(delta, Dora)]
    sums = (
        combined([(factor, Dense(getattr(delta, name))) for factor, delta in parts]).dense()
        for name in ("magnitude", "direction")
    )
    return Dora(*sums)


def _written(delta: Delta) -> Delta:
    return Dense(delta.dense()) if isinstance(delta, Dora) else delta


def inner_product(first: Delta, second: Delta) -> float:
    """The sum of products of entries, in float64; factors are not written out.

    Raises:
        IncomparableModelsError: The shapes differ.
    """
    _refuse_other_shape(first, second)
    match _written(first), _written(second):
        case Absent(), _:
            return 0.0
        case _, Absent():
            return 0.0
        case LowRank() as one, LowRank() as other:
            return _of_factors(one, other)
        case LowRank() as low, Dense() as dense:
            return _of_mixed(dense.tensor, low)
        case Dense() as dense, LowRank() as low:
            return _of_mixed(dense.tensor, low)
        case Dense() as one, Dense() as other:
            return _of_dense(one.tensor, other.tensor)
    raise TypeError(f"no inner product of {type(first).__name__} and {type(second).__name__}")


def spectrum(delta: Delta) -> Spectrum:
    """The singular value decomposition of a matrix, in float64.

    A low-rank difference goes through QR of its factors: O(rank^2 (d_in + d_out)).

    Raises:
        ValueError: The difference is no matrix.
    """
    if len(delta.shape) != 2:
        raise ValueError(f"a spectrum belongs to a matrix, got shape {delta.shape}.")
    match delta:
        case Absent():
            left, right = torch.zeros(delta.shape[0], 0), torch.zeros(0, delta.shape[1])
            return Spectrum(left.double(), torch.zeros(0).double(), right.double())
        case Dense():
            left, values, right = torch.linalg.svd(delta.tensor.double(), full_matrices=False)
            return Spectrum(left, values, right)
        case Dora():
            return spectrum(_written(delta))
        case LowRank():
            q_left, r_left = torch.linalg.qr(delta.left.double())
            q_right, r_right = torch.linalg.qr(
                rearrange(delta.right.double(), "rank d_out -> d_out rank")
            )
            core = einsum(r_left, r_right, "a rank, b rank -> a b")
            left, values, right = torch.linalg.svd(core, full_matrices=False)
            return Spectrum(
                einsum(q_left, left, "d_in a, a k -> d_in k"),
                values,
                einsum(right, q_right, "k b, d_out b -> k d_out"),
            )


def masked(delta: Delta, axis: int, entries: Bool[Tensor, " entry"]) -> Delta:
    """The difference with everything zero outside the kept ``entries`` of ``axis``, same form."""
    match delta:
        case Dense():
            return Dense(_masked(delta.tensor, axis, entries))
        case LowRank():
            if axis == 0:
                return LowRank(_masked(delta.left, 0, entries), delta.right)
            return LowRank(delta.left, _masked(delta.right, 1, entries))
        case Dora():
            parts = (delta.magnitude, delta.direction)
            return Dora(*(_masked(part, axis, entries) for part in parts))
        case Absent():
            return delta


def weighted(delta: Delta, axis: int | None, factors: Float[Tensor, " entry"]) -> Delta:
    """The difference with each entry of ``axis`` times its factor, all times one for None."""
    if axis is None:
        return scaled(delta, float(factors[0]))
    match delta:
        case Dense():
            return Dense(_weighted(delta.tensor, axis, factors))
        case LowRank():
            if axis == 0:
                return LowRank(_weighted(delta.left, 0, factors), delta.right)
            return LowRank(delta.left, _weighted(delta.right, 1, factors))
        case Dora():
            parts = (delta.magnitude, delta.direction)
            return Dora(*(_weighted(part, axis, factors) for part in parts))
        case Absent():
            return delta


def without_zeros(delta: Delta) -> Delta:
    """The difference itself, or ``Absent`` where all of it is zero."""
    match delta:
        case Dense() if not bool(delta.tensor.any()):
            return Absent(delta.shape)
        case LowRank() if not (bool(delta.left.any()) and bool(delta.right.any())):
            return Absent(delta.shape)
        case Dora() if not (bool(delta.magnitude.any()) or bool(delta.direction.any())):
            return Absent(delta.shape)
    return delta


def _scaled(tensor: Float[Tensor, "..."], factor: float | int) -> Float[Tensor, "..."]:
    return tensor if factor == 1 else (tensor.double() * factor).to(tensor.dtype)


def _masked(
    tensor: Float[Tensor, "..."], axis: int, entries: Bool[Tensor, " entry"]
) -> Float[Tensor, "..."]:
    kept = torch.zeros_like(tensor)
    indices = entries.nonzero()[:, 0]
    return kept.index_copy_(axis, indices, tensor.index_select(axis, indices))


def _weighted(
    tensor: Float[Tensor, "..."], axis: int, factors: Float[Tensor, " entry"]
) -> Float[Tensor, "..."]:
    along = factors.reshape([-1 if i == axis else 1 for i in range(tensor.ndim)])
    return (tensor.double() * along.double()).to(tensor.dtype)


def _is_present(delta: Delta) -> bool:
    return not isinstance(delta, Absent)


def _dtype(delta: Delta) -> torch.dtype:
    return torch.float32 if isinstance(delta, Absent) else delta.dtype


def _of_factors(first: LowRank, second: LowRank) -> float:
    """Both differences in coordinates of one basis of their left sides."""
    lefts = torch.cat([first.left.double(), second.left.double()], dim=1)
    triangle = torch.linalg.qr(lefts, mode="r").R
    one, other = triangle.split([first.rank, second.rank], dim=1)
    in_basis = (one @ first.right.double()) * (other @ second.right.double())
    return float(in_basis.sum())


def _of_mixed(dense: Float[Tensor, "d_in d_out"], low: LowRank) -> float:
    """``<D, L R> = <L' D, R>``, a few rows of D at a time."""
    read = torch.zeros(low.right.shape, dtype=torch.float64)
    for start, stop in _row_ranges(dense):
        rows = dense[start:stop].double(), low.left[start:stop].double()
        read += einsum(*rows, "d_in d_out, d_in rank -> rank d_out")
    return float((read * low.right.double()).sum())


def _of_dense(first: Float[Tensor, "..."], second: Float[Tensor, "..."]) -> float:
    ranges = _row_ranges(first)
    return math.fsum(
        float((first[start:stop].double() * second[start:stop].double()).sum())
        for start, stop in ranges
    )


def _row_ranges(tensor: Float[Tensor, "..."]) -> Iterator[tuple[int, int]]:
    rows = tensor.shape[0]
    step = max(1, ENTRIES_AT_ONCE // max(1, tensor[0].numel() if rows else 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _refuse_other_shape(first: Delta, second: Delta) -> None:
    if first.shape != second.shape:
        raise IncomparableModelsError(
            f"tuning vectors of shapes {first.shape} and {second.shape} cannot be combined.",
            hint="Both must belong to the same base model.",
        )
