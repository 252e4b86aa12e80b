"""A change of weights as geometry reads it: written out, or in two factors that stay factors.

Every product goes through float64 a slab of rows at a time, so that neither form exists a second
time in double precision and the product of two factors never exists whole.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Float, Float32, Float64, Shaped
from torch import Tensor

ENTRIES_AT_ONCE = 2**20
"""Entries upcast to float64 in one step: 8 MiB."""


@dataclass(frozen=True, eq=False)
class Factored:
    """A change ``left @ right``; a leading component axis of one side may be absent: shared.

    Attributes:
        left: Input side.
        right: Output side.
    """

    left: Float[Tensor, "*left a rank"]
    right: Float[Tensor, "*right rank b"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the product."""
        leading = torch.broadcast_shapes(self.left.shape[:-2], self.right.shape[:-2])
        return (*leading, self.left.shape[-2], self.right.shape[-1])

    @property
    def turned(self) -> "Factored":
        """The same with its two sides exchanged."""
        return Factored(transposed(self.right), transposed(self.left))


Change = Tensor | Factored
"""Tuned minus base."""


def transposed(matrix: Shaped[Tensor, "*component a b"]) -> Shaped[Tensor, "*component b a"]:
    """The matrices with their two sides exchanged."""
    return rearrange(matrix, "... a b -> ... b a")


def turned(change: Change) -> Change:
    """A change with its two sides exchanged."""
    if isinstance(change, Factored):
        return change.turned
    return transposed(change)


def slabs(shape: tuple[int, ...], entries: int = 0) -> Iterator[tuple[int, int]]:
    """Ranges of rows (the last axis but one) of a bounded number of entries."""
    rows = shape[-2]
    step = max(1, (entries or ENTRIES_AT_ONCE) * rows // max(1, math.prod(shape)))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def written_rows(change: Change, start: int, stop: int) -> Float64[Tensor, "*component row b"]:
    """Rows ``start`` to ``stop`` of a change, written out in float64."""
    if isinstance(change, Factored):
        return change.left[..., start:stop, :].double() @ change.right.double()
    return change[..., start:stop, :].double()


def own_products(matrix: Float[Tensor, "*component a b"]) -> Float[Tensor, "*component b b"]:
    """X' X in the precision of X: numpy's matmul makes half of the products, which mirror."""
    rows = matrix.numpy()
    return torch.from_numpy(np.matmul(rows.swapaxes(-1, -2), rows))


def gram(change: Change) -> Float64[Tensor, "*component b b"]:
    """D' D."""
    if isinstance(change, Factored):
        left, right = change.left.double(), change.right.double()
        return transposed(right) @ (transposed(left) @ left) @ right
    return cross(change, change)


def cross(
    base: Float[Tensor, "*component a b"], change: Change
) -> Float64[Tensor, "*component b c"]:
    """W' D; of a matrix with itself half the products are made, as numpy's matmul knows."""
    if isinstance(change, Factored):
        return product(transposed(base), change.left) @ change.right.double()
    shape = (*base.shape[:-2], base.shape[-1], change.shape[-1])
    found: Tensor | None = None
    for start, stop in slabs(base.shape):
        rows = base[..., start:stop, :].double().numpy()
        others = rows if change is base else change[..., start:stop, :].double().numpy()
        made = torch.from_numpy(np.matmul(rows.swapaxes(-1, -2), others))
        found = made if found is None else found.add_(made)
    return base.new_zeros(shape, dtype=torch.float64) if found is None else found


def cross_and_gram(
    base: Float[Tensor, "*component a b"], change: Change
) -> tuple[Float64[Tensor, "*component b c"], Float64[Tensor, "*component c c"]]:
    """W' D and D' D, a dense change upcast once for both."""
    if isinstance(change, Factored):
        return cross(base, change), gram(change)
    shape = (*base.shape[:-2], base.shape[-1], change.shape[-1])
    mixed = base.new_zeros(shape, dtype=torch.float64)
    own = base.new_zeros((*shape[:-2], shape[-1], shape[-1]), dtype=torch.float64)
    for start, stop in slabs(base.shape):
        rows, others = (side[..., start:stop, :].double() for side in (base, change))
        mixed += torch.from_numpy(np.matmul(rows.numpy().swapaxes(-1, -2), others.numpy()))
        own += own_products(others)
    return mixed, own


def product(
    change: Change, vectors: Float[Tensor, "*given b k"]
) -> Float64[Tensor, "*component a k"]:
    """D V."""
    vectors = vectors.double()
    if isinstance(change, Factored):
        return change.left.double() @ (change.right.double() @ vectors)
    parts = [change[..., i:j, :].double() @ vectors for i, j in slabs(change.shape)]
    return torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0]


def energy(change: Change) -> Float64[Tensor, "*component"]:
    """|D|^2."""
    if isinstance(change, Factored):
        left, right = change.left.double(), change.right.double()
        inner, outer = transposed(left) @ left, right @ transposed(right)
        return (inner * outer).sum((-2, -1)).clamp(min=0)
    return change.double().square().sum((-2, -1))


def singular_energies(change: Change) -> Float64[Tensor, "*component direction"]:
    """Squared singular values, largest first: of factors as many as their rank.

    A dense change goes through the smaller Gram matrix in float64, factors through QR of each.
    """
    if isinstance(change, Factored):
        if not change.right.shape[-2]:  # no direction: as if one had no energy
            return change.right.new_zeros((*change.shape[:-2], 1)).double()
        left = torch.linalg.qr(change.left.double(), mode="r").R
        right = torch.linalg.qr(transposed(change.right.double()), mode="r").R
        core = einsum(left, right, "... a rank, ... b rank -> ... a b")
        return torch.linalg.svdvals(core).square()
    tall = transposed(change) if change.shape[-2] < change.shape[-1] else change
    return energies_of_gram(gram(tall))


def energies_of_gram(
    products: Float64[Tensor, "*component b b"],
) -> Float64[Tensor, "*component direction"]:
    """Squared singular values, largest first, of what has this Gram matrix."""
    return torch.from_numpy(np.linalg.eigvalsh(products.numpy())).clamp(min=0).flip(-1)


@dataclass(frozen=True, eq=False)
class Remainder:
    """A change less gains of the base, ``D - g W``; only rows of it are ever written out.

    Attributes:
        base: W.
        change: D.
        gain: g, of the whole [1, 1], of each row [a, 1] or of each column [1, b].
    """

    base: Float[Tensor, "a b"]
    change: Change
    gain: Float64[Tensor, "rows columns"]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix."""
        return (self.base.shape[0], self.base.shape[1])

    @property
    def turned(self) -> "Remainder":
        """The same with its two sides exchanged."""
        return Remainder(transposed(self.base), turned(self.change), transposed(self.gain))

    def rows(self, start: int, stop: int) -> Float64[Tensor, "row b"]:
        """Some rows, written out."""
        gain = self.gain[start:stop] if len(self.gain) > 1 else self.gain
        return written_rows(self.change, start, stop) - gain * self.base[start:stop]

    def rough_rows(self, start: int, stop: int) -> Float32[Tensor, "row b"]:
        """The same in float32: 6e-8 of the change off, which a small remainder does not bear."""
        gain = (self.gain[start:stop] if len(self.gain) > 1 else self.gain).float()
        if isinstance(self.change, Factored):
            rows = written_rows(self.change, start, stop).float()
        else:
            rows = self.change[start:stop].float()
        return rows - gain * self.base[start:stop].float()

    def product(self, vectors: Float64[Tensor, "b k"]) -> Float64[Tensor, "a k"]:
        """(D - g W) V."""
        if self.gain.shape[1] > 1:
            return product(self.change, vectors) - product(
                self.base, transposed(self.gain) * vectors
            )
        return product(self.change, vectors) - self.gain * product(self.base, vectors)
