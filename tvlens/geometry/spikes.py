"""Structure in a change: singular triplets above the edge that its entries reach without any.

The matrix whose structure is sought is a change less gains of the base (``Remainder``). Only its
Gram matrix on the shorter side is kept, in float64, and that of one draw of its signs in float32,
of which nothing but the largest eigenvalue counts. Of the first, too, no more eigenvectors are
taken than stand above the edge: a third of the time of all of them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float32, Float64, Int
from torch import Tensor

from .changes import Change, Remainder, own_products, slabs, transposed, written_rows
from .eigen import largest_eigenvalue, strongest
from .matrices import RANK_TOLERANCE
from .nulls import Signs, edge


@dataclass(frozen=True, eq=False)
class Spikes:
    """Singular triplets of a change that stand above the noise edge, strongest first.

    Attributes:
        read: Left directions.
        values: Singular values.
        write: Right directions.
        total: Energy of the whole change.
        edge: The noise edge.
    """

    read: Float64[Tensor, "d_in spike"]
    values: Float64[Tensor, " spike"]
    write: Float64[Tensor, "d_out spike"]
    total: float
    edge: float

    @property
    def above(self) -> int:
        """How many stand above the edge: all of them, unless more were asked for."""
        return int((self.values > self.edge).sum())

    @property
    def shares(self) -> Float64[Tensor, " spike"]:
        """Share of the change's energy in each spike."""
        return self.values.square() / self.total


def spikes_above_edge(
    rest: Remainder,
    total: float,
    *,
    signs: Signs,
    products: Float64[Tensor, "short short"] | None = None,
    at_least: int = 0,
) -> Spikes:
    """The triplets of ``rest`` above its one-draw sign-flip edge.

    Args:
        rest: The change less gains.
        total: Its energy.
        signs: Those of its draw.
        products: Its Gram matrix on the shorter side, taken now where it is not known.
        at_least: Triplets wanted even where fewer stand above the edge, as far as the rank goes.
    """
    is_wide = rest.shape[0] < rest.shape[1]
    drawn = signs.of(rest.shape)
    tall, drawn = (rest.turned, transposed(drawn)) if is_wide else (rest, drawn)
    grams = _grams(tall, drawn, total, products)
    flipped = total * largest_eigenvalue(grams.flipped)
    limit = edge(torch.tensor(total).double(), flipped, rest.shape)
    energies, short = strongest(grams.own, float(limit.square()), at_least=at_least)
    values = energies.clamp(min=0).sqrt()
    kept = values > RANK_TOLERANCE * values[:1]
    values, short = values[kept], short[:, kept]
    long = tall.product(short) / values
    sides = (short, values, long) if is_wide else (long, values, short)
    return Spikes(*sides, total, float(limit))


def flipped_gram(change: Change, signs: Int[Tensor, "a b"]) -> Float64[Tensor, "b b"]:
    """D' D after every entry of D got another sign; its products are in float32."""
    found = torch.zeros((change.shape[1], change.shape[1]), dtype=torch.float64)
    for start, stop in slabs(change.shape):
        is_dense = isinstance(change, Tensor)
        rows = change[start:stop] if is_dense else written_rows(change, start, stop)
        scale = rows.abs().amax().double().clamp(min=torch.finfo(torch.float32).tiny)
        signed = (rows / scale).float().mul_(signs[start:stop])
        found += own_products(signed).double() * scale.square()
    return found


@dataclass(frozen=True, eq=False)
class _Grams:
    own: Float64[Tensor, "short short"]
    flipped: Float32[Tensor, "short short"]


def _grams(
    tall: Remainder,
    signs: Int[Tensor, "long short"],
    total: float,
    products: Float64[Tensor, "short short"] | None,
) -> _Grams:
    """Grams of a remainder and, of unit energy, of one with other signs, in one pass over it.

    Products are known only where the remainder is no small difference (``CANCELS``): float32 then
    does for the signs.
    """
    size = tall.shape[1]
    own = torch.zeros((size, size), dtype=torch.float64) if products is None else products
    flipped = torch.zeros((size, size), dtype=torch.float32)
    for start, stop in slabs(tall.shape):
        if products is None:
            rows = tall.rows(start, stop)
            own += own_products(rows)
            signed = rows.div_(total**0.5).float()
        else:
            signed = tall.rough_rows(start, stop).div_(total**0.5)
        flipped += own_products(signed.mul_(signs[start:stop]))
    return _Grams(own, flipped)
