"""Merge methods: several changes of one tensor become one. Pure functions, and a table of names.

With base weights B, tuning vectors d_i, scales s_i and a_i = s_i d_i, the merged weights are B + m:

    task      m = sum a_i                                                    (arXiv:2212.04089)
    linear    m = sum a_i / sum s_i, the weighted mean of the fine-tuned models
    ties      trim each d_i to its share ``density`` of largest entries, counted over the whole
              vector; g = sign(sum a_i) by entry; m = mean of the a_i whose sign is g
                                                                   (arXiv:2306.01708, alg. 1)
    dare      keep each entry of d_i with probability ``density``, divided by it; m = sum a_i
                                                                             (arXiv:2311.03099)

The paper of TIES has one scale for the sum; one per vector is put before the election here, and
equal scales give the paper's result. Where the sum is exactly zero its sign is zero and m is zero.

mergekit (read in its source, version 0.1.5) calls other things by these names, and computes in
float32 throughout. Its methods carry its own names:

    mergekit:task_arithmetic   ``task``, rounded at each step
    mergekit:ties              trims each checkpoint tensor for itself; a zero sum counts as
                               positive; divides by the sum of the agreeing *scales*, so equal
                               scales cancel; keeps everything unless a density is given. Of
                               entries as large as the last one kept, mergekit keeps those that an
                               unstable sort puts first, tvlens the first in storage order
    mergekit:dare_linear       divides by what keeps the tensor's sum of magnitudes, not by density
    mergekit:dare_ties         the same drop, then the election of mergekit:ties, not divided

Everything else is computed in float64, so that a merged weight is rounded once: when it is stored.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float32
from torch import Tensor

Trim = Literal["", "vector", "tensor", "random"]
Rescale = Literal["", "density", "magnitude"]
Divide = Literal["", "scales", "agreeing", "agreeing scales"]
ENTRIES_AT_ONCE = 1 << 18
"""Entries that are merged in one step: 2 MiB a vector in float64, of which a dozen are alive."""
NO_MAGNITUDE = 1e-7
"""mergekit leaves tensors whose magnitudes sum to less as they are."""


@dataclass(frozen=True)
class Method:
    """What a merge method does, step by step.

    Attributes:
        name: What it is called.
        text: One clause for people.
        source: Where it is defined.
        trim: Which entries are kept: all, the largest of the vector or of the checkpoint tensor,
            or random ones.
        density: The share that is kept where no other is asked for.
        rescale: What kept entries are divided by.
        elect: Only entries with the sign of the sum are merged.
        ties_up: A sum of zero counts as positive.
        divide: What the sum is divided by.
        dtype: What is computed in.
    """

    name: str
    text: str
    source: str
    trim: Trim = ""
    density: float = 1.0
    rescale: Rescale = ""
    elect: bool = False
    ties_up: bool = False
    divide: Divide = ""
    dtype: torch.dtype = torch.float64


_MERGEKIT = {"source": "mergekit 0.1.5", "dtype": torch.float32}
METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("task", "the scaled vectors are added", "arXiv:2212.04089"),
        Method("linear", "the weighted mean of the fine-tuned models", "", divide="scales"),
        Method(
            "ties",
            "the largest entries of each vector, signs elected, mean of those that agree",
            "arXiv:2306.01708",
            trim="vector",
            density=0.2,
            elect=True,
            divide="agreeing",
        ),
        Method(
            "dare",
            "random entries of each vector, scaled up, are added",
            "arXiv:2311.03099",
            trim="random",
            density=0.1,
            rescale="density",
        ),
        Method("mergekit:task_arithmetic", "task in mergekit's arithmetic", **_MERGEKIT),
        Method(
            "mergekit:ties",
            "ties as mergekit does it: by tensor, divided by the agreeing scales",
            trim="tensor",
            elect=True,
            ties_up=True,
            divide="agreeing scales",
            **_MERGEKIT,
        ),
        Method(
            "mergekit:dare_linear",
            "dare as mergekit does it: the sum of magnitudes is kept",
            trim="random",
            rescale="magnitude",
            **_MERGEKIT,
        ),
        Method(
            "mergekit:dare_ties",
            "mergekit's dare, then signs elected",
            trim="random",
            rescale="magnitude",
            elect=True,
            ties_up=True,
            **_MERGEKIT,
        ),
    )
}
"""The methods by name. A further one is a ``Method`` passed instead of a name."""


class Cut(NamedTuple):
    """Where a vector is trimmed.

    Attributes:
        value: Larger magnitudes are kept.
        equal: How many entries of just this magnitude are kept, in storage order.
    """

    value: float
    equal: int


def mixed(
    changes: Float[Tensor, "vector ..."], scales: Sequence[float], method: Method
) -> Float[Tensor, "..."]:
    """Trimmed changes become one: scaled, elected, summed, divided; in the method's dtype.

    Args:
        changes: One change for each vector.
        scales: What ``effective_scales`` gives, one for each vector.
        method: What to do.

    Returns:
        Merged minus base.
    """
    ones = " ".join("1" for _ in changes.shape[1:])
    factors = torch.tensor(list(scales), dtype=method.dtype)
    factors = rearrange(factors, f"vector -> vector {ones}")
    scaled = changes.to(method.dtype) * factors
    if not method.elect:
        return scaled.sum(0)
    agreeing = _agreeing(scaled, method)
    total = (scaled * agreeing).sum(0)
    if not method.divide:
        return total
    weights = factors * agreeing if method.divide == "agreeing scales" else agreeing
    divisor = weights.sum(0)
    return total / torch.where(divisor == 0, 1, divisor)


def effective_scales(scales: Sequence[float], method: Method) -> list[float]:
    """What each vector is multiplied by: its scale, divided by their sum for a mean.

    Raises:
        ValueError: A scale is NaN or infinite, or the scales of a mean sum to zero.
    """
    if not scales or not all(math.isfinite(scale) for scale in scales):
        raise ValueError(f"a merge needs at least one finite scale, got {list(scales)}.")
    total = math.fsum(scales)
    if method.divide == "scales" and not total:
        raise ValueError(f"{method.name} is a mean, and the scales {list(scales)} sum to zero.")
    return [scale / total if method.divide == "scales" else float(scale) for scale in scales]


def _agreeing(scaled: Float[Tensor, "vector ..."], method: Method) -> Tensor:
    """Which entries have the sign of their sum; where it is zero none has, or the positive."""
    total = scaled.sum(0)
    if method.ties_up:
        elected = torch.where(total >= 0, 1.0, -1.0)
        return scaled.sign() == elected
    return (scaled.sign() == total.sign()) & (scaled != 0)


def kept_count(entries: int, density: float) -> int:
    """How many of so many entries a density keeps: rounded down, but at least one."""
    return max(1, int(density * entries))


def magnitude_cut(pieces: Callable[[], Iterator[Float32[Tensor, "..."]]], count: int) -> Cut:
    """Where to trim a vector to its ``count`` largest entries, which is exact.

    The bits of a positive float32 are ordered like the number, so two histograms of 16 bits find
    the entry without sorting and without holding the vector.

    Args:
        pieces: Gives the entries in pieces; called twice.
        count: How many entries to keep.
    """
    coarse = np.zeros(1 << 15, dtype=np.int64)
    for bits in _magnitude_bits(pieces()):
        coarse += np.bincount(bits >> 16, minlength=len(coarse))
    upper, above = _bin_of(coarse, count)
    fine = np.zeros(1 << 16, dtype=np.int64)
    for bits in _magnitude_bits(pieces()):
        within = bits[(bits >> 16) == upper] & 0xFFFF
        fine += np.bincount(within, minlength=len(fine))
    lower, more = _bin_of(fine, count - above)
    value = np.array([(upper << 16) + lower], dtype=np.int32).view(np.float32)
    return Cut(float(value[0]), count - above - more)


def _magnitude_bits(pieces: Iterator[Float32[Tensor, "..."]]) -> Iterator[np.ndarray]:
    for piece in pieces:
        flat = piece.detach().reshape(-1)
        for start in range(0, len(flat), ENTRIES_AT_ONCE):
            yield flat[start : start + ENTRIES_AT_ONCE].numpy().view(np.int32) & 0x7FFFFFFF


def _bin_of(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """The bin that holds the ``rank``-th largest entry, and how many lie in higher bins."""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, rank))
    place = min(place, len(counts) - 1)
    above = int(from_top[place] - counts[::-1][place])
    return len(counts) - 1 - place, above


Sparsifier = Callable[[Float32[Tensor, "..."]], Float32[Tensor, "..."]]
"""Takes the pieces of one change in storage order and gives them back with entries set to zero."""


def untouched(piece: Float32[Tensor, "..."]) -> Float32[Tensor, "..."]:
    """Every entry is kept."""
    return piece


def largest(cut: Cut, *, all_equal: bool) -> Sparsifier:
    """Keeps entries beyond the cut; of those on it all, or as many as the cut says."""
    left = cut.equal

    def keep(piece: Float32[Tensor, "..."]) -> Float32[Tensor, "..."]:
        nonlocal left
        magnitude = piece.abs()
        if all_equal:
            return torch.where(magnitude >= cut.value, piece, 0)
        kept = magnitude > cut.value
        equal = (magnitude == cut.value).flatten().nonzero()[:left, 0]
        left -= len(equal)
        kept.view(-1)[equal] = True
        return torch.where(kept, piece, 0)

    return keep


def drawn(density: float, factor: float, *, seed: int, label: str) -> Sparsifier:
    """Keeps each entry with probability ``density``, times ``factor``.

    The draw depends on seed, label and storage order alone (Philox, keyed by their sha256): not on
    the pieces, on what is merged besides, or on the machine.
    """
    digest = hashlib.sha256(f"{seed} {label}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))

    def keep(piece: Float32[Tensor, "..."]) -> Float32[Tensor, "..."]:
        draws = torch.from_numpy(generator.random(piece.numel(), dtype=np.float32))
        return torch.where(draws.reshape(piece.shape) < density, piece * factor, 0)

    return keep


def magnitude_factor(
    pieces: Iterator[Float32[Tensor, "..."]], density: float, *, seed: int, label: str
) -> float:
    """What makes the magnitudes of the drawn entries sum to those of all, as mergekit does."""
    keep = drawn(density, 1.0, seed=seed, label=label)
    before = after = 0.0
    for piece in pieces:
        before += float(piece.abs().sum(dtype=torch.float64))
        after += float(keep(piece).abs().sum(dtype=torch.float64))
    return 1.0 if min(before, after) < NO_MAGNITUDE else before / after


def merged(
    changes: Sequence[Float32[Tensor, "*entry"]],
    scales: Sequence[float],
    method: Method,
    *,
    density: float | None = None,
    seed: int = 0,
    label: str = "",
) -> Float[Tensor, "*entry"]:
    """Several changes of one tensor as one, trimmed by this tensor alone.

    ``compose.combining`` does the same to whole checkpoints a piece at a time, where ``ties``
    counts over the whole vector.

    Args:
        changes: Tuned minus base, one for each vector, float32.
        scales: One for each vector.
        method: One of ``METHODS``, or another.
        density: Share of entries that are kept; the method's own by default.
        seed: Of random draws.
        label: Tells draws for this tensor from those for others.

    Returns:
        Merged minus base, in the method's dtype.

    Raises:
        ValueError: A scale is NaN or infinite, or the scales of a mean sum to zero.
    """
    density = method.density if density is None else density
    trimmed = [
        sparsifier(
            method,
            density,
            lambda change=change: iter((change,)),
            count=kept_count(change.numel(), density),
            seed=seed,
            label=f"{number} {label}",
        )(change)
        for number, change in enumerate(changes)
    ]
    return mixed(torch.stack(trimmed), effective_scales(scales, method), method)


def sparsifier(
    method: Method,
    density: float,
    pieces: Callable[[], Iterator[Float32[Tensor, "..."]]],
    *,
    count: int,
    seed: int,
    label: str,
    cut: Cut | None = None,
) -> Sparsifier:
    """How one vector's change of one tensor is trimmed.

    Args:
        method: The method.
        density: Share of entries that are kept.
        pieces: Gives the change in pieces, read where the method needs to know it beforehand.
        count: How many entries of it are kept where the largest are.
        seed: Of random draws.
        label: Tells this draw from others.
        cut: Where the whole vector is trimmed, found from ``pieces`` where it is not given.
    """
    if density >= 1 or not method.trim:
        return untouched
    if method.trim == "random":
        factor = 1 / density
        if method.rescale == "magnitude":
            factor = magnitude_factor(pieces(), density, seed=seed, label=label)
        return drawn(density, factor if method.rescale else 1.0, seed=seed, label=label)
    return largest(cut or magnitude_cut(pieces, count), all_equal=method.trim == "vector")
