"""Tuning vectors on a base, merged a checkpoint tensor at a time.

    merge = tv.merge("demo:base", ["demo:med", "demo:math"], scales=[0.7, 0.7], method="ties")
    merge.save("merged")                # a checkpoint
    merge.vector()                      # what is added, as a tuning vector: sweep it, patch it in

Nothing is read before it is needed. One checkpoint tensor is in memory at a time: the base's, the
change of each vector in float32, and the new one; what is computed in float64 goes through in
pieces of ``ENTRIES_AT_ONCE`` entries. Where a method trims over whole vectors, they are read twice
more before the first tensor is made.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor

from tvlens.components import Component
from tvlens.errors import CheckpointError, StudyError
from tvlens.tables import Table
from tvlens.weights.delta import Absent, Delta, Dense, combined, without_zeros
from tvlens.weights.layout import Layout
from tvlens.weights.pair import VOCABULARY_PARTS, Pair
from tvlens.weights.provenance import BaseRecord, digest
from tvlens.weights.stored import StoredTensor
from tvlens.weights.vector import TuningVector

from .merging import (
    ENTRIES_AT_ONCE,
    METHODS,
    Cut,
    Method,
    Sparsifier,
    effective_scales,
    kept_count,
    magnitude_cut,
    mixed,
    sparsifier,
)
from .terms import Term, opened_base, opened_term, spec_of
from .weighting import Share, score_shares

if TYPE_CHECKING:
    from .export import SavedMerge

Span = slice


class Piece(NamedTuple):
    """A stretch of a merged change.

    Attributes:
        span: Which entries of the flattened tensor.
        change: Merged minus base there, in the method's dtype.
    """

    span: Span
    change: Float[Tensor, " entry"]


@dataclass
class Rounding:
    """What storing a merged tensor loses of its change.

    Attributes:
        change: Squared length of the change.
        lost: Squared length of stored minus wanted change.
        entries: Entries that were to change.
        unchanged: Those of them that are stored as if they had not.
    """

    change: float = 0.0
    lost: float = 0.0
    entries: int = 0
    unchanged: int = 0

    def __add__(self, other: "Rounding") -> "Rounding":
        """Both together."""
        return Rounding(
            self.change + other.change,
            self.lost + other.lost,
            self.entries + other.entries,
            self.unchanged + other.unchanged,
        )

    @property
    def relative(self) -> float:
        """|stored - wanted change| / |wanted change|, 0 where nothing changes."""
        return math.sqrt(self.lost / self.change) if self.change else 0.0

    @property
    def share_lost(self) -> float:
        """Share of the entries to change that are stored as if they had not."""
        return self.unchanged / self.entries if self.entries else 0.0


class Rounded(NamedTuple):
    """A new checkpoint tensor.

    Attributes:
        tensor: As it is stored.
        rounding: What that lost.
    """

    tensor: Float[Tensor, "..."]
    rounding: Rounding


@dataclass(frozen=True, eq=False)
class Merge:
    """Tuning vectors on a base; see ``merge``.

    Attributes:
        base: The base matched with itself.
        base_spec: How it was named, empty where it was given as an object.
        terms: The vectors, in order.
        method: How they become one.
        density: Share of entries that is kept.
        seed: Of random draws.
        selection: What was selected, empty for everything.
        part: What a study chose of the vectors, as factors of the terms; for people.
        remarks: What a reader should know of that choice, in sentences.
    """

    base: Pair
    base_spec: str
    terms: tuple[Term, ...]
    method: Method
    density: float
    seed: int = 0
    selection: str = ""
    part: str = ""
    remarks: tuple[str, ...] = ()
    _cuts: dict[int, Cut] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The formula, for people."""
        names = ", ".join(f"{t.scale:g} * {t.name}" for t in self.terms)
        whole = f"{self.base.base_name} + {self.method.name}({names})"
        if self.method.name == "task":
            whole = _formula(self.base.base_name, self.terms)
        only = self.selection or self.part
        return f"{whole}, only {only}" if only else whole

    @property
    def notes(self) -> list[str]:
        """What a reader should know of the inputs, in sentences."""
        notes = (note for term in self.terms for note in term.notes)
        return list(dict.fromkeys((*notes, *self.remarks)))

    @cached_property
    def stored_names(self) -> dict[str, str]:
        """The family's name of each checkpoint tensor of the base, by its stored name."""
        return {stored: name for name, stored in self.base.base_tensors.items()}

    @cached_property
    def unties(self) -> bool:
        """Whether a tied base gets an unembedding of its own."""
        return self.base.layout.tied and any(_parts_the_ends(term) for term in self.terms)

    @property
    def untied_name(self) -> str:
        """The name of the unembedding that the base does not store, empty where there is none."""
        name = self.base.layout.unembedding_tensor
        return name if self.unties and name not in self.base.base_tensors else ""

    @property
    def config_changes(self) -> dict[str, Any]:
        """Entries of config.json that must change with the tensors."""
        return {"tie_word_embeddings": False} if self.unties else {}

    @property
    def layout(self) -> Layout:
        """The numbers of the merged model."""
        layout = self.base.layout
        return replace(layout, tied=False) if self.unties else layout

    def pieces(self, tensor: str, shape: Sequence[int]) -> Iterator[Piece]:
        """The merged change of a checkpoint tensor, none where no vector changes it.

        Args:
            tensor: The family's name of the tensor.
            shape: The base's stored shape.
        """
        acting: list[tuple[float, Float32[Tensor, " entry"], Sparsifier]] = []
        for number, (term, scale) in enumerate(zip(self.terms, self._scales, strict=True)):
            change = term.change(tensor, shape) if scale else None
            if change is not None:
                flat = change.reshape(-1)
                acting.append((scale, flat, self._sparsifier(number, tensor, flat)))
        if not acting:
            return
        scales = [scale for scale, _, _ in acting]
        for span in _spans(math.prod(shape)):
            changes = torch.stack([keep(flat[span]) for _, flat, keep in acting])
            yield Piece(span, mixed(changes, scales, self.method))

    def pieces_of(self, stored_name: str) -> Iterator[Piece]:
        """The merged change of a stored tensor, none where nothing changes it."""
        tensor = self.stored_names.get(stored_name, stored_name)
        if self.layout.tied and tensor == self.layout.unembedding_tensor:
            tensor = self.layout.embedding_tensor  # stored twice: both must stay equal
        if tensor in self.layout.stored_shapes:
            yield from self.pieces(tensor, self._shape(tensor))

    def base_tensor(self, stored_name: str) -> Shaped[Tensor, "..."]:
        """The base's tensor of a stored name; its embedding for an unembedding that it lacks."""
        is_new = stored_name == self.untied_name
        return self.base.base.read(self._stored_of(stored_name) if is_new else stored_name)

    def rounded(self, stored_name: str, dtype: torch.dtype | None = None) -> Rounded | None:
        """A new checkpoint tensor, None where the base's stays as it is.

        Args:
            stored_name: Its stored name, or ``untied_name``.
            dtype: What floats are stored as, the base's own by default.

        Raises:
            CheckpointError: It cannot be read, or does not fit the dtype.
        """
        pieces = self.pieces_of(stored_name)
        first = next(pieces, None)
        if first is None and dtype is None and stored_name != self.untied_name:
            return None
        stored = self.base_tensor(stored_name)
        floats = dtype is not None and stored.is_floating_point()
        wanted = dtype if dtype is not None and floats else stored.dtype
        old = stored.contiguous().reshape(-1)
        new, rounding = old.to(wanted, copy=True), Rounding()
        for span, change in itertools.chain([first] if first else [], pieces):
            rounding += _store(old[span], change, new[span])
        if not (rounding.entries or stored_name == self.untied_name or wanted != stored.dtype):
            return None
        _refuse_overflow(stored_name, new)
        return Rounded(new.reshape(stored.shape), rounding)

    def tensors(self) -> Iterator[StoredTensor]:
        """The stored tensors that change, in the base's dtype, one in memory at a time."""
        for name in [*self.base.base.tensors, *filter(None, [self.untied_name])]:
            found = self.rounded(name)
            if found is not None:
                yield StoredTensor(name, found.tensor)

    def delta(self, component: Component) -> Delta:
        """The merged change of a component of ``layout``, before it is rounded for storage.

        Where low-rank changes are only added, it stays in their factors.
        """
        place = self.layout.places[component]
        if self._is_a_sum and place.part not in VOCABULARY_PARTS:
            terms = [(s, t.delta(component)) for s, t in zip(self._scales, self.terms, strict=True)]
            return without_zeros(combined(terms))
        shape = self.layout.stored_shapes[place.tensor]
        whole = torch.zeros(math.prod(shape))
        for span, change in self.pieces(place.tensor, self._shape(place.tensor)):
            whole[span] = change.float()
        return without_zeros(Dense(self.layout.canonical(whole.reshape(shape), place).contiguous()))

    def vector(self) -> TuningVector:
        """What is added to the base, as a tuning vector in memory."""
        layout = self.layout
        deltas = {component: self.delta(component) for component in layout.components()}
        acting = {c: d for c, d in deltas.items() if not isinstance(d, Absent)}
        pair = replace(self.base, layout=layout)
        digests = {c: digest(pair.stored_weight(c)) for c in layout.components()}
        record = BaseRecord(self.base.base_name, self.base.base.config, layout, digests)
        inputs = tuple(dict.fromkeys(i for term in self.terms for i in term.vector.inputs))
        return TuningVector(record, self.name, acting, inputs, self.selection or "", None)

    def weighed(self, attribution: Table, **options: Any) -> "Merge":
        """The merge with each component times its share of the largest score; see ``weighting``.

        Args:
            attribution: The table of a study that holds every vector under its name.
            **options: Further arguments of ``score_shares``, but for ``tuned``.

        Raises:
            StudyError: The table lacks a vector, or has no score that weighs anything.
        """
        names = sorted(set(attribution.data["tuned"].to_pylist()))
        for term in self.terms:
            if term.name not in names:
                raise StudyError(
                    f"the table {attribution.name!r} has no scores of {term.name}; it has those of "
                    f"{', '.join(names)}.",
                    hint="Run `tvlens compare` on these fine-tunes, under these names.",
                )
        terms = [
            replace(t, shares=score_shares(attribution, t.layout, tuned=t.name, **options))
            for t in self.terms
        ]
        return replace(self, terms=tuple(terms))

    def save(self, out: Path | str, **options: Any) -> "SavedMerge":
        """Write a checkpoint, or an adapter with ``as_lora=RANK``: see ``export.save_merge``."""
        from .export import save_merge

        return save_merge(self, out, **options)

    @cached_property
    def _scales(self) -> list[float]:
        return effective_scales([term.scale for term in self.terms], self.method)

    @property
    def _is_a_sum(self) -> bool:
        """Whether the merge is linear in the vectors, in exact arithmetic."""
        trims = self.method.trim and self.density < 1
        return not trims and not self.method.elect and self.method.dtype == torch.float64

    def _stored_of(self, tensor: str) -> str:
        names = self.base.base_tensors
        return names.get(tensor) or names[self.layout.embedding_tensor]

    def _shape(self, tensor: str) -> tuple[int, ...]:
        return self.base.base.tensors[self._stored_of(tensor)].shape

    def _sparsifier(self, number: int, tensor: str, flat: Float32[Tensor, " entry"]) -> Sparsifier:
        term = self.terms[number]
        return sparsifier(
            self.method,
            self.density,
            lambda: (flat[span] for span in _spans(flat.numel())),
            count=kept_count(term.entries(tensor), self.density),
            seed=self.seed,
            label=f"{number} {tensor}",
            cut=self._vector_cut(number) if self.method.trim == "vector" else None,
        )

    def _vector_cut(self, number: int) -> Cut | None:
        """Where the whole of one vector is trimmed, found once."""
        if self.density < 1 and number not in self._cuts:
            term = self.terms[number]
            ends = {self.layout.unembedding_tensor} if self.layout.tied else set[str]()
            tensors = [tensor for tensor in self.layout.stored_shapes if tensor not in ends]
            count = kept_count(sum(map(term.entries, tensors)), self.density)
            self._cuts[number] = magnitude_cut(lambda: self._changes(term, tensors), count)
        return self._cuts.get(number)

    def _changes(self, term: Term, tensors: Sequence[str]) -> Iterator[Float32[Tensor, "..."]]:
        for tensor in tensors:
            change = term.change(tensor, self._shape(tensor))
            if change is not None:
                yield change


def merge(
    base: Any,
    vectors: Sequence[Any],
    *,
    scales: Sequence[float] | float = 1.0,
    method: str | Method = "task",
    density: float | None = None,
    select: str = "",
    shares: Mapping[Component, Share] | Sequence[Mapping[Component, Share] | None] | None = None,
    seed: int = 0,
    any_base: bool = False,
) -> Merge:
    """Tuning vectors on a base, ready to be made into tensors; only headers are read now.

    Args:
        base: Folder, hub id or ``demo:`` name of the base, or a transformers model in memory.
        vectors: Fine-tunes, adapters, vector files, ``TuningVector`` or ``Pair`` objects.
        scales: One for all vectors, or one each.
        method: A name of ``merging.METHODS``, or a ``Method``.
        density: Share of entries kept by methods that trim; their own default where it is None.
        select: Merge only this part; see ``tvlens.selection``.
        shares: Factors for components and slices (``weighting.score_shares``), for all vectors or
            for each.
        seed: Of random draws.
        any_base: Take vectors of another base of the same shape too.

    Raises:
        CheckpointError: An input cannot be read.
        IncomparableModelsError: A vector belongs to another base.
        SelectionError: The selection cannot be read or selects nothing.
        StudyError: Numbers that do not fit: scales, density, shares; an unknown method.
    """
    chosen = method_named(method)
    factors = _one_each(scales, len(vectors))
    if not vectors or not all(map(math.isfinite, factors)):
        raise StudyError(f"a merge needs at least one vector and finite scales, got {factors}.")
    if density is not None and not 0 < density <= 1:
        raise StudyError(f"a density is more than 0 and at most 1, got {density!r}.")
    try:
        effective_scales(factors, chosen)
    except ValueError as error:
        raise StudyError(str(error), hint="Give other scales, or the method task.") from error
    pair = opened_base(base)
    terms = [opened_term(pair, vector, any_base=any_base) for vector in vectors]
    terms = [replace(t, scale=scale) for t, scale in zip(terms, factors, strict=True)]
    if select:
        terms = [term.selected(select) for term in terms]
    if shares is not None:
        each = [shares] * len(terms) if isinstance(shares, Mapping) else list(shares)
        if len(each) != len(terms):
            raise StudyError(f"got shares for {len(each)} of {len(terms)} vectors.")
        terms = [replace(t, shares=own) for t, own in zip(terms, each, strict=True)]
    return Merge(
        pair,
        str(base) if isinstance(base, str | Path) else spec_of(pair.base),
        tuple(terms),
        chosen,
        chosen.density if density is None else density,
        seed,
        select,
    )


def method_named(method: str | Method) -> Method:
    """A method by its name.

    Raises:
        StudyError: There is none of that name.
    """
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise StudyError(f"there is no merge method {method!r}; there are {', '.join(METHODS)}.")
    return METHODS[method]


def _one_each(scales: Sequence[float] | float, count: int) -> list[float]:
    given = [scales] if isinstance(scales, int | float) else list(scales)
    if len(given) not in (1, count):
        raise StudyError(
            f"got {len(given)} scales for {count} {'vectors' if count > 1 else 'vector'}.",
            hint="Give one scale for all, or one each, in the order of the vectors.",
        )
    return [float(scale) for scale in (given * count if len(given) == 1 else given)]


def _formula(base: str, terms: Sequence[Term]) -> str:
    text = base
    for term in terms:
        size = "" if abs(term.scale) == 1 else f"{abs(term.scale):g} * "
        text += f" {'-' if term.scale < 0 else '+'} {size}{term.vector.term}"
    return text


def _parts_the_ends(term: Term) -> bool:
    """Whether a vector whose embedding and unembedding are two changes one of them."""
    layout = term.layout
    ends = [c for c in layout.components() if c.part in VOCABULARY_PARTS]
    return not layout.tied and any(not isinstance(term.delta(c), Absent) for c in ends)


def _spans(entries: int) -> Iterator[Span]:
    for start in range(0, entries, ENTRIES_AT_ONCE):
        yield slice(start, min(start + ENTRIES_AT_ONCE, entries))


def _store(
    old: Float[Tensor, " entry"], change: Float[Tensor, " entry"], new: Float[Tensor, " entry"]
) -> Rounding:
    """Write old + change into ``new``, rounded once; what does not change keeps its bits."""
    acting = change != 0
    wanted = (old.double() + change).to(new.dtype)
    start = new.clone()
    new.copy_(torch.where(acting, wanted, start))
    stored = torch.where(acting, new.double() - start.double(), 0)
    target = change.double()
    return Rounding(
        float((target * target).sum()),
        float((stored - target).square().sum()),
        int(acting.sum()),
        int((acting & (new == start)).sum()),
    )


def _refuse_overflow(name: str, new: Float[Tensor, " entry"]) -> None:
    if not all(bool(torch.isfinite(new[span]).all()) for span in _spans(len(new))):
        raise CheckpointError(
            f"{name} overflows {str(new.dtype).removeprefix('torch.')} when the vectors are added.",
            hint="Scale them down, or give --dtype float32.",
        )
