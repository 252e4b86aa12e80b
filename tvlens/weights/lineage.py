"""Is this the parent? How alike two checkpoints are, from a sample of rows of their matrices.

A fine-tune keeps the directions of its base: the cosine of a matrix of the base with the tuned
model's is near 1. In an unrelated model of the same shape it is 0, give or take 1 / sqrt(entries).
Norms and biases say nothing (gains are all near 1 in every model) and are left out.

The figures are symmetric: they cannot tell parent from child, and a sibling (another fine-tune of
the same base) looks like a parent too. Of several candidates the parent is the nearest, because
the changes of unrelated siblings add up; but siblings that learned much in common can be as near
to each other as to their base. ``told_apart`` says whether distance decides.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.errors import AdapterError

from .contents import first_non_finite, non_finite
from .pair import VOCABULARY_PARTS, Pair
from .report import with_report
from .sources.folder import Source

Verdict = Literal["plausible", "in part", "implausible"]

RUNS, ROWS_OF_A_RUN = 2, 16
"""Rows read of each tensor: 32 of d_model entries spread a chance cosine by 0.02 at d_model 64."""
LAYERS = 8
"""Blocks that are sampled, evenly spread: opening files is what takes the time."""
ENTRIES_OF_A_RUN = 1 << 20
"""Fewer rows are read where one is very long, such as a whole expert of a fused tensor."""
KIN_COSINE = 0.5
"""Below it the base explains nothing: of two matrices of one length at a smaller cosine the
difference is longer than the matrix itself. The shipped fine-tunes have 0.98 and more, a
SmolLM2-135M fine-tuned at 5e-5 has 1.0000."""
CORNER = 0.2
"""Least difference of the cosines in ``told_apart``. Two siblings with little in common have 0.1
at the parent and 0.5 at the sibling (the shipped models); a medical fine-tune of SmolLM2 and its
format control, which learned the same form, have 0.52 and 0.49 and cannot be told from a chain."""


@dataclass(frozen=True)
class Likeness:
    """How much a model looks like a child of another.

    Attributes:
        base: The candidate for the parent.
        tuned: The model whose parent is asked for.
        rows: Rows read of each of the two.
        relative_delta: |tuned - base| / |base| over the sample; an unrelated model of the same
            norm has 1.41.
        cosine: Median over the sampled tensors of the cosine of base and tuned.
        cosine_by_part: The same for each part over its layers.
        chance: Standard deviation of that cosine between unrelated models: 1 / sqrt(entries
            read of a tensor), median.
        equal_fraction: Share of sampled entries that are the same number in both.
        norm_ratio: |tuned| / |base| over the sample.
        distance: |tuned - base| over the sample, in weight units.
    """

    base: str
    tuned: str
    rows: int
    relative_delta: float
    cosine: float
    cosine_by_part: dict[str, float]
    chance: float
    equal_fraction: float
    norm_ratio: float
    distance: float

    @property
    def unlike(self) -> list[str]:
        """The parts in which base and tuned look unrelated."""
        return [part for part, cosine in self.cosine_by_part.items() if cosine < KIN_COSINE]

    @property
    def verdict(self) -> Verdict:
        """``plausible`` if all parts are alike, ``implausible`` if none is."""
        if not self.unlike:
            return "plausible"
        return "implausible" if len(self.unlike) == len(self.cosine_by_part) else "in part"

    @property
    def warning(self) -> str:
        """A sentence where the base looks like no parent, else empty."""
        if self.verdict == "plausible":
            return ""
        found = (
            f"the median cosine over {self.rows:,} rows sampled of each is {self.cosine:.2g} "
            f"(unrelated models have 0 +- {self.chance:.1g}), and the change is "
            f"{self.relative_delta:.2g} times as long as the base"
        )
        if self.verdict == "implausible":
            return (
                f"{self.base} does not look like the parent of {self.tuned}: {found}. "
                "tvlens inspect --parents ranks candidates."
            )
        unlike = ", ".join(f"{p} ({self.cosine_by_part[p]:.2g})" for p in self.unlike)
        return (
            f"{self.base} looks like the parent of {self.tuned} only in part: cosines of {unlike} "
            "are those of unrelated weights. Their heads or neurons may be in another order, or "
            "they were trained anew; their tuning vectors mean nothing then."
        )

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "candidate": self.base,
            "verdict": self.verdict,
            "relative_delta": self.relative_delta,
            "cosine": self.cosine,
            "cosine_by_part": self.cosine_by_part,
            "chance": self.chance,
            "equal_fraction": self.equal_fraction,
            "norm_ratio": self.norm_ratio,
            "rows": self.rows,
        }


class _Sums(NamedTuple):
    """Sums over the sampled rows of one tensor."""

    part: str
    rows: int
    entries: int
    dot: float
    base: float
    tuned: float
    delta: float
    equal: int

    @property
    def cosine(self) -> float:
        length = math.sqrt(self.base * self.tuned)
        return self.dot / length if length else float(self.base == self.tuned)


def likeness(pair: Pair) -> Likeness:
    """How plausible it is that the pair's base is the parent of its tuned model.

    Reads ``RUNS`` times ``ROWS_OF_A_RUN`` rows of every matrix of ``LAYERS`` blocks and of the
    embeddings, evenly spread; embeddings by matched rows.

    Raises:
        AdapterError: The tuned model is an adapter, which holds nothing to compare.
        CheckpointError: A sampled row holds NaN or Inf.
    """
    if pair.adapter is not None:
        raise AdapterError(
            f"{pair.tuned_name} is an adapter, which holds no weights of its base to compare.",
            hint="Its adapter_config.json names its base; the load report says whether it fits.",
        )
    sums = [_sums(pair, *tensor) for tensor in _tensors(pair)]
    by_part: dict[str, list[float]] = defaultdict(list)
    for tensor in sums:
        by_part[tensor.part].append(tensor.cosine)
    base, tuned, delta = (sum(getattr(s, k) for s in sums) for k in ("base", "tuned", "delta"))
    return Likeness(
        base=pair.base_name,
        tuned=pair.tuned_name,
        rows=sum(s.rows for s in sums),
        relative_delta=math.sqrt(delta / base) if base else math.inf,
        cosine=median(s.cosine for s in sums),
        cosine_by_part={part: median(cosines) for part, cosines in by_part.items()},
        chance=median(1 / math.sqrt(s.entries) for s in sums),
        equal_fraction=sum(s.equal for s in sums) / sum(s.entries for s in sums),
        norm_ratio=math.sqrt(tuned / base) if base else math.inf,
        distance=math.sqrt(delta),
    )


def told_apart(nearest: float, other: float, between: float) -> bool:
    """Whether the nearest of two candidates is their child's branching point, by its angles.

    At the parent the way to the child and the way to a sibling or grandparent are nearly
    orthogonal (cosine near 0); at a sibling or grandparent, both ways begin alike.

    Args:
        nearest: Distance of the tuned model to its nearest candidate.
        other: Its distance to another candidate.
        between: The candidates' distance to each other.
    """
    if not nearest or not other or not between:
        return nearest < other
    at_nearest = (nearest**2 + between**2 - other**2) / (2 * nearest * between)
    at_other = (other**2 + between**2 - nearest**2) / (2 * other * between)
    return at_other - at_nearest >= CORNER


def _tensors(pair: Pair) -> Iterator[tuple[str, str, str]]:
    """Part, stored name in the base and in the tuned model of every matrix and embedding."""
    parts: dict[str, list[str]] = {}
    layers = {None, *_spread(pair.layout.n_layers, LAYERS)}
    for component, place in pair.layout.places.items():
        if component.kind in ("matrix", "embedding") and component.layer in layers:
            parts.setdefault(place.tensor, []).append(place.part)
    for tensor, held in parts.items():
        names = [
            names.get(tensor) or names[pair.layout.embedding_tensor]  # a tied W_U
            for names in (pair.base_tensors, pair.tuned_tensors)
        ]
        yield "/".join(held), names[0], names[1]


def _sums(pair: Pair, part: str, base_name: str, tuned_name: str) -> _Sums:
    shape = pair.base.tensors[base_name].shape
    vocabulary = part in VOCABULARY_PARTS
    first = pair.rows.base if vocabulary else torch.arange(shape[0])
    second = pair.rows.tuned if vocabulary else first
    chosen = _evenly(len(first), max(1, min(ROWS_OF_A_RUN, ENTRIES_OF_A_RUN // _width(shape))))
    base = _read(pair, pair.base, base_name, first[chosen])
    tuned = _read(pair, pair.tuned, tuned_name, second[chosen])
    return _Sums(
        part,
        len(chosen),
        base.numel(),
        float((base * tuned).sum()),
        float(base.square().sum()),
        float(tuned.square().sum()),
        float((tuned - base).square().sum()),
        int((base == tuned).sum()),
    )


def _width(shape: tuple[int, ...]) -> int:
    return max(1, math.prod(shape[1:]))


def _evenly(count: int, run: int) -> Int[Tensor, " row"]:
    """Row numbers in ``RUNS`` runs of ``run`` rows, spread over ``count``; all if there are few."""
    if count <= RUNS * run:
        return torch.arange(count)
    starts = _spread(count - run + 1, RUNS)
    return torch.cat([torch.arange(start, start + run) for start in starts])


def _spread(count: int, chosen: int) -> list[int]:
    """``chosen`` of the numbers below ``count``, in the middles of equal shares."""
    if count <= chosen:
        return list(range(count))
    return [int((i + 0.5) * count / chosen) for i in range(chosen)]


def _read(
    pair: Pair, source: Source, name: str, rows: Int[Tensor, " row"]
) -> Float[Tensor, " entry"]:
    """The given rows as one float64 vector; neighbouring rows are read at once."""
    breaks = [0, *((rows.diff() != 1).nonzero().flatten() + 1).tolist(), len(rows)]
    parts = []
    for start, stop in pairwise(breaks):
        first = int(rows[start])
        read = source.read_rows(name, first, first + stop - start).double()
        if (index := first_non_finite(read)) is not None:
            place = (index[0] + first, *index[1:])
            raise with_report(non_finite(source, name, place), pair.load_report)
        parts.append(read.flatten())
    return torch.cat(parts)
