"""Blocks of quantised GGUF tensors: their values, and how far apart the values they can hold lie.

A block of 32 or 256 neighbouring entries of a row stores a scale or two and a few bits an entry,
``value = scale * quant - offset``; K-types have a scale for each sub-block of 16 or 32. Flipping
the lowest bit of every quant moves every entry to a neighbour on its own grid, so the distance
between the two readings is the step of each entry, whatever the type makes of its scales.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
"""Types that are plain floats, with the dtype that tables name."""


class Lowest(NamedTuple):
    """Where a block of one type keeps the lowest bits of its quants.

    Attributes:
        start: First byte of the field that holds them.
        length: Bytes of the field.
        mask: The lowest bit of every quant in a byte.
    """

    start: int
    length: int
    mask: int


LOWEST_BITS = {
    "q4_0": Lowest(2, 16, 0x11),
    "q4_1": Lowest(4, 16, 0x11),
    "q5_0": Lowest(6, 16, 0x11),
    "q5_1": Lowest(8, 16, 0x11),
    "q8_0": Lowest(2, 32, 0x01),
    "q2_k": Lowest(16, 64, 0x55),
    "q3_k": Lowest(32, 64, 0x55),
    "q4_k": Lowest(16, 128, 0x11),
    "q5_k": Lowest(48, 128, 0x11),
    "q6_k": Lowest(0, 128, 0x11),
}
"""The quantised types that are read; fields as in ggml's ``ggml-common.h``."""
_LOWEST_OF_A_FLOAT = Lowest(0, 1, 0x01)


def values(stored: UInt8[np.ndarray, "row byte"], kind: str) -> Float32[np.ndarray, "row entry"]:
    """Rows of a tensor as numbers, a copy."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # scales of a damaged file may be infinite
        found = dequantize(np.asarray(stored), GGMLQuantizationType[kind.upper()])
    return np.array(found, dtype=np.float32)


def neighbours(
    stored: UInt8[np.ndarray, "row byte"], kind: str
) -> Float32[np.ndarray, "row entry"]:
    """The rows with every entry moved by one step of its block, up or down; floats by an ulp."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    _, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]]
    start, length, mask = LOWEST_BITS.get(kind, _LOWEST_OF_A_FLOAT)
    moved = np.array(stored)
    moved.reshape(-1, size)[:, start : start + length] ^= np.uint8(mask)
    return values(moved, kind)
