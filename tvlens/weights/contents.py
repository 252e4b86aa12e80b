"""One pass over the contents: is every number finite, and how much is equal."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tvlens.errors import CheckpointError

from .delta import trained_length
from .draft import Draft
from .report import TensorMatch
from .sources.adapter import Adapter, Factors
from .sources.folder import Source
from .vocabulary import RowMatch

CHUNK = 1 << 24
"""Entries read at once: 64 MiB in float32."""


def row_ranges(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Consecutive ranges of rows of at most ``CHUNK`` entries."""
    rows = shape[0] if shape else 0  # a scalar has no rows and is read whole
    step = max(1, CHUNK // max(1, math.prod(shape[1:])))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def non_finite_index(source: Source, name: str) -> tuple[int, ...] | None:
    """Index of the first NaN or Inf of a stored tensor, None if all is finite."""
    shape = source.tensors[name].shape
    if not shape:
        return first_non_finite(source.read(name))
    for start, stop in row_ranges(shape):
        rows = source.read_rows(name, start, stop)
        if (found := first_non_finite(rows)) is not None:
            return (found[0] + start, *found[1:])
    return None


def first_non_finite(tensor: Shaped[Tensor, "..."]) -> tuple[int, ...] | None:
    """Index of the first NaN or Inf, None if all is finite.

    A sum is finite only if every term is, and costs a tenth of looking at each; an overflow of
    finite terms is settled by looking.
    """
    if bool(torch.isfinite(tensor.sum())):
        return None
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return None
    return tuple(int(i) for i in torch.nonzero(~finite)[0])


def equal_fraction(
    base: tuple[Source, str], tuned: tuple[Source, str], *, rows: int | None = None
) -> float:
    """Share of equal entries in the rows that both tensors have, compared in float32.

    Tensors of different rank are compared entry by entry; different sizes share nothing. ``rows``
    compares the first so many rows of tensors of one shape alone.
    """
    shapes = [source.tensors[name].shape for source, name in (base, tuned)]
    if not shapes[0] or len(shapes[0]) != len(shapes[1]) or shapes[0][1:] != shapes[1][1:]:
        if math.prod(shapes[0]) != math.prod(shapes[1]):
            return 0.0
        first, second = (source.read(name).float().flatten() for source, name in (base, tuned))
        return float((first == second).double().mean())
    equal, total = 0, 0
    common = min(shapes)
    for start, stop in row_ranges((min(common[0], rows or common[0]), *common[1:])):
        first, second = (
            source.read_rows(name, start, stop).float() for source, name in (base, tuned)
        )
        equal += int((first == second).sum())
        total += first.numel()
    return equal / total if total else 1.0


def equal_fraction_of_rows(
    base: tuple[Source, str], tuned: tuple[Source, str], rows: RowMatch
) -> float:
    """Share of equal entries in the matched rows of two embeddings, compared in float32."""
    equal, total = 0, 0
    for start, stop in row_ranges((len(rows), *base[0].tensors[base[1]].shape[1:])):
        first = chosen_rows(base[0].read_rows, base[1], rows.base[start:stop]).float()
        second = chosen_rows(tuned[0].read_rows, tuned[1], rows.tuned[start:stop]).float()
        equal += int((first == second).sum())
        total += first.numel()
    return equal / total if total else 1.0


def chosen_rows(
    read_rows: Callable[[str, int, int], Shaped[Tensor, "row ..."]],
    name: str,
    rows: Int[Tensor, " row"],
) -> Shaped[Tensor, "row ..."]:
    """Rows of a stored tensor in the given order; what lies between them is read and dropped."""
    if not len(rows):
        return read_rows(name, 0, 0)
    first, last = int(rows.min()), int(rows.max())
    read = read_rows(name, first, last + 1)
    return read if len(read) == len(rows) and bool((rows.diff() == 1).all()) else read[rows - first]


def non_finite_tensors(draft: Draft) -> list[CheckpointError]:
    """Read everything once, in search of NaN and Inf; such tensors are marked in the report."""
    return [*_non_finite(draft, draft.base), *_non_finite(draft, draft.tuned)]


def measure_new_rows(draft: Draft) -> None:
    """Enter in the report how long the embedding rows are that have no counterpart in the base."""
    rows, found = draft.rows, draft.report.vocabulary
    if rows is None or found is None or not rows.new:
        return
    norms = _row_norms(draft.tuned, draft.tuned_tensors[draft.embedding])
    found["new"] |= _norms(norms[list(rows.new)], norms[rows.tuned])
    found["sentence"] += f". {_norm_sentence(found['new'])}"


def _row_norms(source: Source, name: str) -> Float[Tensor, " row"]:
    ranges = row_ranges(source.tensors[name].shape)
    parts = [source.read_rows(name, *bounds).float().norm(dim=1) for bounds in ranges]
    return torch.cat(parts)


def _norms(new: Float[Tensor, " new"], matched: Float[Tensor, " row"]) -> dict[str, float]:
    median = float(new.median())
    return {
        "norm_low": float(new.min()),
        "norm_median": median,
        "norm_high": float(new.max()),
        "norm_median_matched": float(matched.median()),
        "share_of_matched_shorter": float((matched < median).double().mean()),
    }


def _norm_sentence(norms: dict[str, Any]) -> str:
    return (
        f"In the embedding the new rows are {norms['norm_low']:.3g} to {norms['norm_high']:.3g} "
        f"long, median {norms['norm_median']:.3g}; the matched rows' median is "
        f"{norms['norm_median_matched']:.3g}, and {norms['share_of_matched_shorter']:.0%} of them "
        "are shorter than the median new row"
    )


def settle_identity(draft: Draft) -> None:
    """Enter the share of equal entries everywhere, and whether all is equal."""
    for entry in draft.report.tensors:
        _settle_equality(draft, entry)
    changed = [entry for entry in draft.report.tensors if _differs(entry)]
    acting = draft.adapter is not None and any(_actions(draft, draft.adapter))
    function = any(d.effect == "function" for d in draft.report.config_differences)
    draft.report.identical = not (changed or acting or function)
    if draft.report.identical:
        draft.warn(
            f"{draft.base.name} and {draft.tuned.name} are identical: every tuning vector is zero."
        )


def non_finite(source: Source, name: str, index: tuple[int, ...]) -> CheckpointError:
    """The error that names the checkpoint, the tensor and the index of a NaN or Inf."""
    place = ", ".join(map(str, index))
    return CheckpointError(
        f"{source.name}: {name}[{place}] in {source.tensors[name].file} is NaN or Inf.",
        hint="Training diverged or the file is damaged; use an earlier checkpoint.",
    )


def _settle_equality(draft: Draft, entry: TensorMatch) -> None:
    if entry.base is None or entry.tuned is None or entry.status in ("buffer", "tied"):
        return
    if draft.adapter is None or entry.tuned in draft.adapter.replaced.values():
        sides = (draft.base, entry.base), (draft.tuned, entry.tuned)
        if entry.status == "aligned" and draft.rows is not None:
            entry.equal_fraction = equal_fraction_of_rows(*sides, draft.rows)
        else:
            entry.equal_fraction = equal_fraction(*sides)


def _differs(entry: TensorMatch) -> bool:
    if entry.equal_fraction is not None and entry.equal_fraction < 1:
        return True
    return entry.status in ("only_in_base", "only_in_tuned", "aligned")


def _actions(draft: Draft, adapter: Adapter) -> Iterator[bool]:
    """Whether each change of an adapter is more than zeros; what it stores whole is left out."""
    for name, factors in adapter.factors.items():
        yield _acts(draft.tuned, factors)
        if factors.magnitude is not None:
            yield _is_longer(draft, adapter, name, factors.magnitude)
    for change in adapter.shifts.values():
        yield change.scaling != 0 and bool(draft.tuned.read(change.stored).count_nonzero())
    for name, rows in adapter.rows.items():
        before = _stored_base(draft, name).float()[list(rows.numbers)]
        yield not torch.equal(before, draft.tuned.read(rows.stored).float())


def _acts(source: Source, factors: Factors) -> bool:
    """Whether a pair of factors is not zero."""
    names = factors.first, factors.second
    return factors.scaling != 0 and all(bool(source.read(n).count_nonzero()) for n in names)


def _is_longer(draft: Draft, adapter: Adapter, name: str, magnitude: str) -> bool:
    """Whether DoRA's lengths are other than the norms of the base's output columns."""
    whole = adapter.replaced.get(name)
    weight = draft.tuned.read(whole) if whole else _stored_base(draft, name)
    turned = any(p.transposed and p.tensor == name for p in draft.layout.places.values())
    before = torch.linalg.vector_norm(weight.double(), dim=1 if turned else 0)
    return bool((trained_length(before, draft.tuned.read(magnitude)) != before).any())


def _stored_base(draft: Draft, name: str) -> Shaped[Tensor, "..."]:
    """The base's tensor; a tied model's W_U is its embedding."""
    names = draft.base_tensors
    return draft.base.read(names.get(name) or names[draft.embedding])


def _non_finite(draft: Draft, source: Source) -> Iterator[CheckpointError]:
    side = "base" if source is draft.base else "tuned"
    for name in source.tensors:
        if draft.layout.is_buffer(draft.layout.canonical_name(name)):
            continue
        if (index := non_finite_index(source, name)) is None:
            continue
        for entry in draft.report.tensors:
            if getattr(entry, side) == name:
                entry.status = "refused"
                entry.reason = f"NaN or Inf at {list(index)} of the {side} tensor"
        yield non_finite(source, name, index)
