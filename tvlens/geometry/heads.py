"""Measures of attention heads: the circuits OV and QK from their factors.

A head writes x @ W_V @ W_O; its OV circuit has rank d_head in d_model x d_model. The change of a
product follows exactly, without a cross term, from the midpoint rule

    delta(V O) = V_mid dO + dV O_mid,        V_mid = V + dV / 2,  O_mid = O + dO / 2

which is 10^3 to 10^5 times more accurate in float32 than V' O' - V O. Both the base circuit and its
change live in span[V, dV] on the left and span[O', dO'] on the right, so the triangular factors of
two QR leave *cores* of at most 2 d_head x 2 d_head that hold every invariant measure; no
d_model x d_model matrix is formed. QK is the content part W_Q @ W_K' (no rotary phase).
W_V -> W_V A, W_O -> A^-1 W_O changes neither circuit; single columns of the factors do change.

Where no spectrum is wanted, a third of the time is enough: with X for V or dV and Y for O or dO,

    <X1 Y1, X2 Y2> = sum((X1' X2) * (Y1 Y2'))

so the d_head x d_head inner products of the factors' columns hold all norms. Squares cancel in
them: of a change of gauge is left 1e-8 of the factors' change, where cores leave 1e-15. They hold
the spectrum of the change too: with A = [V_mid dV] and B = [dO' O_mid'] it is A B', whose squared
singular values are the eigenvalues of R (B'B) R' for any R with R'R = A'A.
"""

from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Float64, Int
from torch import Tensor

from .changes import Change, Factored, cross, energies_of_gram, gram, transposed, turned
from .neurons import Sums, ratio


@dataclass(frozen=True, eq=False)
class Factor:
    """One factor of the circuits of a layer, one slice a head.

    Attributes:
        base: Base weights.
        delta: Tuning vector.
        floor: Expected rounding energy per entry, None where there is none.
    """

    base: Float[Tensor, "head a b"]
    delta: Change
    floor: Float[Tensor, "head a b"] | None = None

    @property
    def swapped(self) -> "Factor":
        """The factor with its two sides exchanged."""
        floor = None if self.floor is None else transposed(self.floor)
        return Factor(transposed(self.base), turned(self.delta), floor)

    def of_heads(self, kv_index: Int[Tensor, " head"]) -> "Factor":
        """The factor that each query head reads, one slice a query head."""
        floor = None if self.floor is None else self.floor[kv_index]
        return Factor(self.base[kv_index], change_of_heads(self.delta, kv_index), floor)


def change_of_heads(change: Change, kv_index: Int[Tensor, " head"]) -> Change:
    """The change that each query head reads; a side that all heads share stays shared."""
    if not isinstance(change, Factored):
        return change[kv_index]
    sides = (side[kv_index] if side.dim() > 2 else side for side in (change.left, change.right))
    return Factored(*sides)


@dataclass(frozen=True, eq=False)
class Coordinates:
    """A factor and its change in an orthonormal basis of their common span, one slice a head.

    Attributes:
        base: Base weights.
        delta: Tuning vector.
        floor: Expected rounding energy of each column, None where there is none.
    """

    base: Float64[Tensor, "head span d_head"]
    delta: Float64[Tensor, "head span d_head"]
    floor: Float64[Tensor, "head d_head"] | None

    @property
    def middle(self) -> Float64[Tensor, "head span d_head"]:
        """Halfway between base and tuned."""
        return self.base + self.delta / 2

    @property
    def middle_energy(self) -> Float64[Tensor, "head d_head"]:
        """Squared length of each column of the middle."""
        return self.middle.square().sum(1)

    def of_heads(self, kv_index: Int[Tensor, " head"]) -> "Coordinates":
        """Those that each query head reads, one slice a query head."""
        floor = None if self.floor is None else self.floor[kv_index]
        return Coordinates(self.base[kv_index], self.delta[kv_index], floor)


def coordinates(factor: Factor) -> Coordinates:
    """A factor [d_model, d_head] in the span of its columns and its change's.

    The triangular factor of QR holds them, so Q is never formed; of a change in factors only its
    ``left`` is needed.
    """
    base, delta = factor.base.double(), factor.delta
    floor = None if factor.floor is None else factor.floor.double().sum(1)
    columns = delta.left.double() if isinstance(delta, Factored) else delta.double()
    columns = columns.expand(len(base), *columns.shape[-2:])
    triangle = torch.linalg.qr(torch.cat([base, columns], dim=2), mode="r").R
    own, others = triangle.split([base.shape[2], columns.shape[2]], dim=2)
    if isinstance(delta, Factored):
        others = others @ delta.right.double()
    return Coordinates(own, others, floor)


@dataclass(frozen=True, eq=False)
class ColumnProducts:
    """Inner products of the columns of a factor and of its change, one slice a head.

    Attributes:
        values: X1' X2 for X1 and X2 each the base (0) or the change (1).
        floor: Expected rounding energy of each column, None where there is none.
    """

    values: Float64[Tensor, "head form other d_head d_head"]
    floor: Float64[Tensor, "head d_head"] | None

    @property
    def middle_energy(self) -> Float64[Tensor, "head d_head"]:
        """Squared length of each column halfway between base and tuned."""
        squares = torch.diagonal(self.values, dim1=-2, dim2=-1)
        return squares[:, 0, 0] + squares[:, 0, 1] + squares[:, 1, 1] / 4

    def of_heads(self, kv_index: Int[Tensor, " head"]) -> "ColumnProducts":
        """Those that each query head reads, one slice a query head."""
        floor = None if self.floor is None else self.floor[kv_index]
        return ColumnProducts(self.values[kv_index], floor)


def column_products(factor: Factor) -> ColumnProducts:
    """The inner products of a factor [d_model, d_head]."""
    base, delta = factor.base.double(), factor.delta
    delta = delta if isinstance(delta, Factored) else delta.double()
    own, mixed, changed = gram(base), cross(base, delta), gram(delta)
    forms = torch.stack([own, mixed], 1), torch.stack([transposed(mixed), changed], 1)
    floor = None if factor.floor is None else factor.floor.sum(1).double()
    return ColumnProducts(torch.stack(forms, 1), floor)


def circuit_sums(left: ColumnProducts, right: ColumnProducts) -> Sums:
    """Norms and inner products of the circuits left @ right' and of their changes."""
    pairs = einsum(left.values, right.values, "head a b i j, head c d i j -> head a c b d")
    pairs = rearrange(pairs, "head a c b d -> head (a c) (b d)")  # VO, V dO, dV O, dV dO
    base, delta = pairs[:, 0, 0], pairs[:, 1:, 1:].sum((1, 2)).clamp(min=0)
    inner = pairs[:, 0, 1:].sum(1)
    unknown, floor = torch.full_like(base, torch.nan), _floor_energy(left, right)
    return Sums(
        base=base,
        delta=delta,
        inner=inner,
        residual=(delta - ratio(inner, base).nan_to_num() * inner).clamp(min=0),
        floor=unknown if floor is None else floor,
        equal=unknown,
        entries=unknown,
    )


def circuit_energies(
    left: ColumnProducts, right: ColumnProducts
) -> Float64[Tensor, "head direction"]:
    """Squared singular values, largest first, of the changes of the circuits left @ right'."""
    middle_first = _bordered(left.values, first="middle")
    root = _root(middle_first)
    products = root @ _bordered(right.values, first="change") @ transposed(root)
    return energies_of_gram((products + transposed(products)) / 2)


def _bordered(
    values: Float64[Tensor, "head form other d_head d_head"], *, first: str
) -> Float64[Tensor, "head both both"]:
    """Inner products of the columns halfway between base and tuned and of those of the change."""
    base, mixed, changed = values[:, 0, 0], values[:, 0, 1], values[:, 1, 1]
    middle = base + (mixed + transposed(mixed)) / 2 + changed / 4
    across = mixed + changed / 2
    rows = torch.cat([middle, across], 2), torch.cat([transposed(across), changed], 2)
    if first == "change":
        rows = tuple(row.roll(across.shape[2], 2) for row in reversed(rows))
    return torch.cat(rows, 1)


def _root(products: Float64[Tensor, "head k k"]) -> Float64[Tensor, "head k k"]:
    """R with R'R = ``products``: of Cholesky, or of eigenvectors where columns are dependent."""
    found, failed = torch.linalg.cholesky_ex(products, upper=True)
    dependent = failed != 0
    if bool(dependent.any()):
        energies, vectors = torch.linalg.eigh(products[dependent])
        scaled = vectors * rearrange(energies.clamp(min=0).sqrt(), "head k -> head 1 k")
        found[dependent] = transposed(scaled)
    return found


@dataclass(frozen=True, eq=False)
class CircuitCores:
    """A circuit and its change in coordinates of their common spans.

    Attributes:
        base: Core of the base circuit.
        delta: Core of its change.
        floor_energy: Expected rounding energy of the change, None where there is none.
    """

    base: Float[Tensor, "head left right"]
    delta: Float[Tensor, "head left right"]
    floor_energy: Float[Tensor, " head"] | None


def slices_of_heads(
    matrix: Float[Tensor, "d_in d_out"], part: str, n_heads: int
) -> Float[Tensor, "head a b"]:
    """Cut a matrix into heads: W_O by its rows, W_Q W_K W_V by their columns."""
    if part == "W_O":
        return rearrange(matrix, "(head d_head) d_model -> head d_head d_model", head=n_heads)
    return rearrange(matrix, "d_model (head d_head) -> head d_model d_head", head=n_heads)


def changes_of_heads(change: Change, part: str, n_heads: int) -> Change:
    """Cut a change into heads; of one in factors only one side is cut."""
    if not isinstance(change, Factored):
        return slices_of_heads(change, part, n_heads)
    if part == "W_O":
        return Factored(slices_of_heads(change.left, part, n_heads), change.right)
    return Factored(change.left, slices_of_heads(change.right, part, n_heads))


def kv_index_of_heads(n_heads: int, n_kv_heads: int) -> Int[Tensor, " head"]:
    """The kv head that each query head reads; empty where no head is known."""
    return torch.arange(n_heads) // max(1, n_heads // max(1, n_kv_heads))


Columns = Coordinates | ColumnProducts
"""The columns of a factor and of its change, up to a rotation."""


def _floor_energy(left: Columns, right: Columns) -> Float64[Tensor, " head"] | None:
    """Expected |V_mid nO + nV O_mid|^2 of independent rounding errors nO, nV."""
    if left.floor is None or right.floor is None:
        return None
    from_right = einsum(left.middle_energy, right.floor, "head k, head k -> head")
    return from_right + einsum(left.floor, right.middle_energy, "head k, head k -> head")


def cores_of(left: Coordinates, right: Coordinates) -> CircuitCores:
    """Cores of the circuits left @ right' of two sides in coordinates."""
    base = left.base @ transposed(right.base)
    delta = left.middle @ transposed(right.delta) + left.delta @ transposed(right.middle)
    return CircuitCores(base, delta, _floor_energy(left, right))


def circuit_cores(left: Factor, right: Factor) -> CircuitCores:
    """Cores of the circuits left @ right; ``left`` is [d_model, d_head], ``right`` its reverse."""
    return cores_of(coordinates(left), coordinates(right.swapped))
