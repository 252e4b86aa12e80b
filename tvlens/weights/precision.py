"""How much of a difference could be rounding: the energy of the stored dtypes.

A weight that was rounded to the nearest number of its dtype carries an error that is uniform on
one spacing, so its expected square is ``ulp**2 / 12``. A difference whose energy is no larger than
the sum of these says nothing about training.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from tvlens.errors import CheckpointError

from .sources.gguf_blocks import LOWEST_BITS


class Precision(NamedTuple):
    """A binary floating-point format.

    Attributes:
        mantissa_bits: Stored bits of the significand.
        min_exponent: Exponent of the smallest normal number; below it the spacing is constant.
    """

    mantissa_bits: int
    min_exponent: int


PRECISIONS = {
    "float64": Precision(52, -1022),
    "float32": Precision(23, -126),
    "float16": Precision(10, -14),
    "bfloat16": Precision(7, -126),
}
EXPONENT_BITS, BIAS = 0x7F80_0000, 127
"""Layout of a float32: where its exponent is stored, and that of 1."""
ENTRIES_AT_ONCE = 2**17
"""Entries that are worked on at once: half a MiB."""
LARGEST_STEP = 2.0**63.5
"""Its square, 2**127, is still a float32."""
ARITHMETIC = "float32"
"""Differences are taken in float32, so nothing is known more finely than that."""
SMALLEST_ENERGY = torch.finfo(torch.float32).tiny
"""Energies that float32 cannot hold are given as this, so that a ratio to the floor exists."""


def coarsest_dtype(*dtypes: str) -> str:
    """The dtype with the fewest bits of significand, float32 at best.

    Raises:
        CheckpointError: A dtype is none that a floor is known for.
    """
    for dtype in dtypes:
        if dtype not in PRECISIONS:
            raise CheckpointError(
                f"weights of dtype {dtype} have no known rounding; expected one of "
                f"{', '.join(PRECISIONS)}.",
                hint="Dequantise the model and save it in float32, float16 or bfloat16 first.",
            )
    return min((ARITHMETIC, *dtypes), key=lambda dtype: PRECISIONS[dtype].mantissa_bits)


def spacing(weights: Float[Tensor, "..."], dtype: str) -> Float[Tensor, "..."]:
    """The distance between neighbouring numbers of ``dtype`` at each weight (its ulp), float64.

    Zeros and subnormals have the spacing of the smallest normal number.
    """
    precision = PRECISIONS[dtype]
    # frexp writes w = m * 2**e with 0.5 <= m < 1, so floor(log2 |w|) = e - 1
    exponent = torch.frexp(weights.double()).exponent - 1
    exponent = torch.where(weights == 0, precision.min_exponent, exponent)
    exponent = exponent.clamp(min=precision.min_exponent) - precision.mantissa_bits
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)


def rounding_energy(
    weights: Float32[Tensor, "..."], dtype: str, *, change: Float32[Tensor, "..."] | None = None
) -> Float32[Tensor, "..."]:
    """Expected squared rounding error per entry, ``ulp**2 / 12``, of ``weights + change``.

    The same as ``uniform_energy(spacing(weights, dtype))``: the exponent's bits alone are a power
    of two. Many times faster, and every parameter of a model passes through here; so it goes in
    pieces that a core's cache holds, in the order of storage.
    """
    mantissa_bits, min_exponent = PRECISIONS[dtype]
    lowest = 2.0 ** max(min_exponent - mantissa_bits, 1 - BIAS)
    energy = torch.empty_like(weights)
    for piece, given, added in _pieces(energy, weights, change):
        summed = given if added is None else given + added
        torch.bitwise_and(summed.view(torch.int32), EXPONENT_BITS, out=piece.view(torch.int32))
        piece.mul_(2.0**-mantissa_bits).clamp_(lowest, LARGEST_STEP)
        piece.square_().div_(12).clamp_(min=SMALLEST_ENERGY)
    return energy


def _pieces(
    first: Tensor, second: Tensor, third: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Views of a few entries of tensors of one shape, along the axis that is longest in storage."""
    if first.dim() == 0 or not first.numel():
        yield first, second, third
        return
    axis = max(range(first.dim()), key=first.stride)
    step = max(1, ENTRIES_AT_ONCE * first.shape[axis] // first.numel())
    sides = (first, second) if third is None else (first, second, third)
    for cut in zip(*(side.split(step, dim=axis) for side in sides), strict=True):
        yield cut[0], cut[1], None if third is None else cut[2]


def uniform_energy(step: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Expected squared error per entry of rounding to multiples of ``step``, in float32."""
    return (step.double().square() / 12).clamp(min=SMALLEST_ENERGY).float()


def is_block_type(dtype: str) -> bool:
    """Whether a tensor is stored in blocks, each with a step of its own."""
    return dtype in LOWEST_BITS


def stored_dtype(dtype: str, rounding: Mapping[str, Any] | None) -> str:
    """The dtype that weights were really rounded to: a storage note says more than the file.

    Blocks are read as float32; their own rounding is that of their steps.
    """
    dtype = ARITHMETIC if is_block_type(dtype) else dtype
    noted = (rounding or {}).get("dtype")
    return coarsest_dtype(dtype, noted) if noted in PRECISIONS else dtype


def stored_step(
    rounding: Mapping[str, Any] | None, tensor: str
) -> Float[Tensor, ""] | Float[Tensor, " rows"] | None:
    """The step of the grid that a tensor's difference was rounded to, None if there was none.

    A storage note gives a number for the tensor, a list with one for each of its rows, or an
    object whose ``rms`` is the root mean square of the rows' steps.
    """
    steps = (rounding or {}).get("step") or {}
    if tensor not in steps:
        return None
    step = steps[tensor]
    return torch.tensor(step["rms"] if isinstance(step, dict) else step, dtype=torch.float64)
