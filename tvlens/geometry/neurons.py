"""Measures of vectors: how a weight vector changed along itself and across itself.

For a base vector w and its tuning vector d (the tuned vector is w + d):

    gain     = <d, w> / |w|^2                 (signed; a tuned vector (1 + a) w has gain a)
    residual = |d - gain w| / |w|
    kappa    = cos(d, w)
    cos(w, w + d) = (1 + gain) / sqrt((1 + gain)^2 + residual^2)

The cosine is formed from gain and residual: subtracting nearly equal cosines loses all digits at
deltas of 0.1 %. Every component is one row here: a neuron is its d_model numbers, a head or a
matrix all of its entries. Inputs may be float32; sums are float64. NaN marks what is undefined.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

ENTRIES_AT_ONCE = 2**20
"""Columns upcast to float64 in one step: an embedding of 10^8 entries never exists twice."""


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


def _chunks(
    base: Float[Tensor, "component entry"], delta: Float[Tensor, "component entry"]
) -> Iterator[tuple[Tensor, Tensor]]:
    pairs = zip(base.split(ENTRIES_AT_ONCE, 1), delta.split(ENTRIES_AT_ONCE, 1), strict=True)
    for some_base, some_delta in pairs:
        yield some_base.double(), some_delta.double()


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    return torch.where(under > 0, over / under, torch.nan)


def vector_measures(
    base: Float[Tensor, "component entry"],
    delta: Float[Tensor, "component entry"],
    floor_energy: Float[Tensor, " component"] | None = None,
) -> VectorMeasures:
    """The basic measures of every row; ``floor_energy`` is the expected rounding energy."""
    zeros = base.new_zeros(base.shape[0], dtype=torch.float64)
    base_energy, delta_energy, inner, residual_energy = (zeros.clone() for _ in range(4))
    for some_base, some_delta in _chunks(base, delta):
        base_energy += some_base.square().sum(1)
        delta_energy += some_delta.square().sum(1)
        inner += (some_base * some_delta).sum(1)
    gain = _ratio(inner, base_energy)
    for some_base, some_delta in _chunks(base, delta):
        along = rearrange(gain.nan_to_num(), "component -> component 1") * some_base
        residual_energy += (some_delta - along).square().sum(1)
    base_norm, delta_norm = base_energy.sqrt(), delta_energy.sqrt()
    residual = _ratio(residual_energy.sqrt(), base_norm)
    floor = zeros + torch.nan if floor_energy is None else floor_energy.double()
    return VectorMeasures(
        base_norm=base_norm,
        delta_norm=delta_norm,
        relative_delta=_ratio(delta_norm, base_norm),
        cos_base_tuned=_ratio(1 + gain, torch.hypot(1 + gain, residual)),
        gain=gain,
        residual=residual,
        kappa=_ratio(inner, base_norm * delta_norm).clamp(-1, 1),
        snr=_ratio(delta_energy, floor),
        floor_norm=floor.sqrt(),
    )


def rows_of_neurons(
    matrix: Float[Tensor, "d_in d_out"], part: str
) -> Float[Tensor, "neuron d_model"]:
    """One row a neuron: W_out already is; a column of W_gate and W_in belongs to a neuron."""
    return matrix if part == "W_out" else rearrange(matrix, "d_model neuron -> neuron d_model")
