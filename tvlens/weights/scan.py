"""One pass over the contents: is every number finite, and how much is equal."""

import math

import torch
from jaxtyping import Shaped
from torch import Tensor

from .sources.folder import Source

CHUNK = 1 << 24
"""Entries read at once: 64 MiB in float32."""


def row_ranges(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Consecutive ranges of rows of at most ``CHUNK`` entries."""
    rows = shape[0] if shape else 0
    step = max(1, CHUNK // max(1, math.prod(shape[1:])))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def non_finite_index(source: Source, name: str) -> tuple[int, ...] | None:
    """Index of the first NaN or Inf of a stored tensor, None if all is finite."""
    for start, stop in row_ranges(source.tensors[name].shape):
        rows = source.read_rows(name, start, stop)
        if (found := first_non_finite(rows)) is not None:
            return (found[0] + start, *found[1:])
    return None


def first_non_finite(tensor: Shaped[Tensor, "..."]) -> tuple[int, ...] | None:
    """Index of the first NaN or Inf, None if all is finite."""
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return None
    return tuple(int(i) for i in torch.nonzero(~finite)[0])


def equal_fraction(base: tuple[Source, str], tuned: tuple[Source, str]) -> float:
    """Share of equal entries in the rows that both tensors have, compared in float32."""
    shapes = [source.tensors[name].shape for source, name in (base, tuned)]
    if len(shapes[0]) != len(shapes[1]) or shapes[0][1:] != shapes[1][1:]:
        first, second = (source.read(name).float().flatten() for source, name in (base, tuned))
        return float((first == second).double().mean())
    equal, total = 0, 0
    for start, stop in row_ranges(min(shapes)):
        first, second = (
            source.read_rows(name, start, stop).float() for source, name in (base, tuned)
        )
        equal += int((first == second).sum())
        total += first.numel()
    return equal / total if total else 1.0
