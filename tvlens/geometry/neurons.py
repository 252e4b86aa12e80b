"""Measures of vectors: how a weight vector changed along itself and across itself.

For a base vector w and its tuning vector d (the tuned vector is w + d):

    gain     = <d, w> / |w|^2                 (signed; a tuned vector (1 + a) w has gain a)
    residual = |d - gain w| / |w|
    kappa    = cos(d, w)
    cos(w, w + d) = (1 + gain) / sqrt((1 + gain)^2 + residual^2)

The cosine is formed from gain and residual: subtracting nearly equal cosines loses all digits at
deltas of 0.1 %. Every component is one row here: a neuron is its d_model numbers, a head or a
matrix all of its entries. The sums of a whole follow from those of its pieces, the residual too:

    |d - g w|^2 = sum_i |d_i - g_i w_i|^2 + (g_i - g)^2 |w_i|^2

so a matrix is read once, at its finest cut. Inputs may be float32; sums are float64. NaN marks
what is undefined.

A residual is |d|^2 - gain <d, w>, unless it is so small a part of |d|^2 that the difference would
lose its digits: then it is the sum of the squares of d - gain w.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float64, Int
from torch import Tensor

from .changes import Change, Factored, product, slabs, transposed, turned

ENTRIES_AT_ONCE = 2**16
"""Entries upcast to float64 in one step: half a MiB, which a core's own cache holds."""
LOST_DIGITS = 1e-6
"""Share of |d|^2 below which a residual is summed by itself: a difference of float64 numbers is
then good to 1e-10 of its value or better above it."""


@dataclass(frozen=True, eq=False)
class VectorMeasures:
    """The basic measures, one number a component, float64, NaN where undefined.

    Attributes:
        base_norm: |w|.
        delta_norm: |d|.
        relative_delta: |d| / |w|.
        cos_base_tuned: Cosine of base and tuned; exactly 1 for an unchanged component.
        gain: <d, w> / |w|^2.
        residual: |d - gain w| / |w|.
        kappa: cos(d, w).
        snr: |d|^2 over the expected rounding energy.
        floor_norm: Square root of the expected rounding energy.
    """

    base_norm: Float[Tensor, " component"]
    delta_norm: Float[Tensor, " component"]
    relative_delta: Float[Tensor, " component"]
    cos_base_tuned: Float[Tensor, " component"]
    gain: Float[Tensor, " component"]
    residual: Float[Tensor, " component"]
    kappa: Float[Tensor, " component"]
    snr: Float[Tensor, " component"]
    floor_norm: Float[Tensor, " component"]

    def columns(self) -> dict[str, Tensor]:
        """The measures by their column names."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, eq=False)
class Sums:
    """What the measures of a component are made of, one number a component, float64.

    Attributes:
        base: |w|^2.
        delta: |d|^2.
        inner: <d, w>.
        residual: |d - gain w|^2.
        floor: Expected rounding energy, NaN where there is none.
        equal: Number of entries with d = 0, NaN for factors whose product is not written out.
        entries: Number of entries.
    """

    base: Float64[Tensor, " component"]
    delta: Float64[Tensor, " component"]
    inner: Float64[Tensor, " component"]
    residual: Float64[Tensor, " component"]
    floor: Float64[Tensor, " component"]
    equal: Float64[Tensor, " component"]
    entries: Float64[Tensor, " component"]

    @property
    def gain(self) -> Float64[Tensor, " component"]:
        """<d, w> / |w|^2."""
        return ratio(self.inner, self.base)

    def grouped(self, count: int) -> "Sums":
        """The sums of ``count`` wholes, each of as many consecutive components."""
        parts = {
            field.name: rearrange(
                getattr(self, field.name), "(group piece) -> group piece", group=count
            )
            for field in fields(self)
        }
        sums = {name: part.sum(1) for name, part in parts.items()}
        gain = rearrange(ratio(sums["inner"], sums["base"]).nan_to_num(), "group -> group 1")
        own = ratio(parts["inner"], parts["base"]).nan_to_num()
        sums["residual"] = (parts["residual"] + (own - gain).square() * parts["base"]).sum(1)
        return Sums(**sums)

    def measures(self) -> VectorMeasures:
        """The measures."""
        gain, base_norm, delta_norm = self.gain, self.base.sqrt(), self.delta.sqrt()
        residual = ratio(self.residual.sqrt(), base_norm)
        return VectorMeasures(
            base_norm=base_norm,
            delta_norm=delta_norm,
            relative_delta=ratio(delta_norm, base_norm),
            cos_base_tuned=ratio(1 + gain, torch.hypot(1 + gain, residual)),
            gain=gain,
            residual=residual,
            kappa=ratio(self.inner, base_norm * delta_norm).clamp(-1, 1),
            snr=ratio(self.delta, self.floor),
            floor_norm=self.floor.sqrt(),
        )

    def columns(self) -> dict[str, Tensor]:
        """The measures and the share of equal entries by their column names."""
        return {**self.measures().columns(), "equal_fraction": self.equal / self.entries}


def joined_sums(parts: Sequence[Sums]) -> Sums:
    """The sums of the components of several groups, in order."""
    names = [field.name for field in fields(Sums)]
    return Sums(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def ratio(over: Tensor, under: Tensor) -> Tensor:
    """``over / under``, NaN where there is nothing to divide by."""
    return torch.where(under > 0, over / under, torch.nan)


def sums_of_rows(
    base: Float[Tensor, "component entry"],
    change: Change,
    floor: Float[Tensor, "component part"] | None = None,
) -> Sums:
    """The sums of every row, a few rows at a time."""
    if isinstance(change, Factored):
        return _sums_of_factored_rows(base, change, floor)
    energy, delta, inner, zeros = _products(base, change)
    residual = delta - ratio(inner, energy).nan_to_num() * inner
    if len(small := torch.nonzero((residual < LOST_DIGITS * delta) & (energy > 0)).flatten()):
        residual[small] = _residuals(base, change, small, inner[small] / energy[small])
    floors = torch.full_like(energy, torch.nan)
    if floor is not None:
        floors = floor.sum(1).double()  # of positive terms: no digits cancel
    entries = torch.full_like(energy, base.shape[1])
    return Sums(energy, delta, inner, residual, floors, zeros, entries)


def _products(
    base: Float[Tensor, "component entry"], change: Float[Tensor, "component entry"]
) -> Float64[Tensor, "4 component"]:
    """|w|^2, |d|^2, <d, w> and the number of zeros of d of every row, in the order of storage."""
    found = np.zeros((4, base.shape[0]))
    sides = base.numpy(), change.numpy()
    if change.stride(0) >= change.stride(1):
        for start, stop in slabs(base.shape, ENTRIES_AT_ONCE):
            w, d = (side[start:stop].astype(np.float64, order="C") for side in sides)
            found[:3, start:stop] = np.vecdot(w, w), np.vecdot(d, d), np.vecdot(d, w)
            found[3, start:stop] = np.count_nonzero(d == 0, axis=1)
        return torch.from_numpy(found)
    for start, stop in slabs((base.shape[1], base.shape[0]), ENTRIES_AT_ONCE):
        w, d = (side.T[start:stop].astype(np.float64, order="C") for side in sides)
        for row, (left, right) in enumerate(((w, w), (d, d), (d, w))):
            found[row] += np.einsum("ij, ij -> j", left, right)
        found[3] += np.count_nonzero(d == 0, axis=0)
    return torch.from_numpy(found)


def _residuals(
    base: Float[Tensor, "component entry"],
    change: Float[Tensor, "component entry"],
    rows: Int[Tensor, " row"],
    gains: Float64[Tensor, " row"],
) -> Float64[Tensor, " row"]:
    """|d - gain w|^2 of some rows."""
    parts = []
    for start, stop in slabs((len(rows), base.shape[1]), ENTRIES_AT_ONCE):
        w, d = (side[rows[start:stop]].double() for side in (base, change))
        across = d - rearrange(gains[start:stop], "row -> row 1") * w
        parts.append(across.square().sum(1))
    return torch.cat(parts)


def _sums_of_factored_rows(
    base: Float[Tensor, "component entry"],
    change: Factored,
    floor: Float[Tensor, "component part"] | None,
) -> Sums:
    """Through the factors: <d, w> from W R', |d|^2 from R R'."""
    left, right = change.left.double(), change.right.double()
    delta = ((left @ (right @ transposed(right))) * left).sum(1).clamp(min=0)
    inner = (product(base, transposed(right)) * left).sum(1)
    energy = torch.cat(
        [base[i:j].double().square().sum(1) for i, j in slabs(base.shape, ENTRIES_AT_ONCE)]
    )
    gain = ratio(inner, energy).nan_to_num()
    entries = torch.full_like(energy, base.shape[1])
    unchanged = (left == 0).all(1) | (right == 0).all()
    floors = torch.full_like(energy, torch.nan)
    if floor is not None:
        floors = floor.double().sum(1)
    residual = (delta - gain * inner).clamp(min=0)
    equal = torch.where(unchanged, entries, torch.nan)
    return Sums(energy, delta, inner, residual, floors, equal, entries)


def vector_measures(
    base: Float[Tensor, "component entry"],
    delta: Float[Tensor, "component entry"],
    floor_energy: Float[Tensor, " component"] | None = None,
) -> VectorMeasures:
    """The basic measures of every row; ``floor_energy`` is the expected rounding energy."""
    floor = None if floor_energy is None else rearrange(floor_energy, "component -> component 1")
    return sums_of_rows(base, delta, floor).measures()


def rows_of_neurons(
    matrix: Float[Tensor, "d_in d_out"], part: str
) -> Float[Tensor, "neuron d_model"]:
    """One row a neuron: W_out already is; a column of W_gate and W_in belongs to a neuron."""
    return matrix if part == "W_out" else transposed(matrix)


def change_of_neurons(change: Change, part: str) -> Change:
    """A change with one row a neuron."""
    return change if part == "W_out" else turned(change)
