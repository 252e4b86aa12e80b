"""What is combined: tuning vectors on one base, each read a checkpoint tensor at a time.

A term is a tuning vector with a scale, and perhaps a selection and weights. Its vector may be in
memory, or be read when it is asked for: from a vector file, from two checkpoints, from an adapter's
factors. All terms meet in the base's stored tensors, in their stored orientation and with all their
rows: there a fused tensor is whole, as mergekit trims it, and fine-tunes with other vocabularies
have equal shapes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Float32, Int
from torch import Tensor

from tvlens.components import Component
from tvlens.errors import CheckpointError, StudyError
from tvlens.weights.applying import Application
from tvlens.weights.delta import Absent, Delta, weighted, without_zeros
from tvlens.weights.families.table import Place
from tvlens.weights.layout import Layout
from tvlens.weights.matching import load_pair
from tvlens.weights.pair import VOCABULARY_PARTS, Pair
from tvlens.weights.slices import Kept
from tvlens.weights.sources.folder import Source
from tvlens.weights.sources.memory import MemorySource
from tvlens.weights.sources.opening import DEMO, open_source
from tvlens.weights.stored import scattered
from tvlens.weights.vector import TuningVector, base_record, inputs_of, kept_by, restricted
from tvlens.weights.vector_file import open_vector

from .weighting import Share

TermKind = Literal["checkpoint", "adapter", "vector"]
VECTOR_SUFFIX = ".safetensors"


@dataclass(frozen=True, eq=False)
class Term:
    """One tuning vector of a merge.

    Attributes:
        vector: Tuned minus base; its deltas may be read from disk at each access.
        kind: What it was given as.
        spec: How it was named, empty where it was given as an object.
        scale: What it is multiplied by.
        rows: The base's row for each row of the vector's embeddings.
        kept: What a selection keeps of each component, None for everything.
        shares: What each component or slice is multiplied by besides, None for nothing.
        notes: What a reader should know, in sentences.
    """

    vector: TuningVector
    kind: TermKind
    spec: str
    scale: float = 1.0
    rows: Int[Tensor, " row"] = field(kw_only=True, repr=False)
    kept: Mapping[Component, Kept] | None = field(default=None, repr=False)
    shares: Mapping[Component, Share] | None = field(default=None, repr=False)
    notes: tuple[str, ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        """The vector's name."""
        return self.vector.name

    @property
    def layout(self) -> Layout:
        """The numbers of the base as this vector knows it."""
        return self.vector.base.layout

    @cached_property
    def parts(self) -> dict[str, list[tuple[Component, Place]]]:
        """The selected components by checkpoint tensor; several where a tensor is fused."""
        found: dict[str, list[tuple[Component, Place]]] = {}
        for component, place in self.layout.places.items():
            if self.kept is None or component in self.kept:
                found.setdefault(place.tensor, []).append((component, place))
        ends = self.layout.embedding_tensor, self.layout.unembedding_tensor
        if self.layout.tied and ends[0] in found:
            found[ends[1]] = found[ends[0]]
        return found

    def delta(self, component: Component) -> Delta:
        """What the term adds at a component, before its scale; absent where that is zero."""
        shape = self.layout.shape(component)
        if component not in self.vector or (self.kept is not None and component not in self.kept):
            return Absent(shape)
        delta = self.vector[component]
        if self.kept is not None:
            delta = restricted(delta, self.kept[component])
        if self.shares is not None:
            share = self.shares.get(component)
            delta = weighted(delta, share.axis, share.factors) if share else Absent(shape)
        return without_zeros(delta)

    def change(self, tensor: str, shape: Sequence[int]) -> Float32[Tensor, "..."] | None:
        """What the term adds to a checkpoint tensor of the base, before its scale.

        Args:
            tensor: The family's name of the tensor.
            shape: The base's stored shape.

        Returns:
            The change in stored orientation, None where it is zero.
        """
        parts = [(place, self.delta(c)) for c, place in self.parts.get(tensor, ())]
        acting = [(place, delta) for place, delta in parts if not isinstance(delta, Absent)]
        if not acting:
            return None
        total = _stored_orientation(self.layout, *acting[0])
        for place, delta in acting[1:]:
            total = total + _stored_orientation(self.layout, place, delta)
        if acting[0][0].part in VOCABULARY_PARTS:
            total = self._in_all_rows(total, shape[0])
        return total.reshape(tuple(shape))

    def entries(self, tensor: str) -> int:
        """How many entries of a checkpoint tensor the term speaks of."""
        return sum(self._entries(component) for component, _ in self.parts.get(tensor, ()))

    def _entries(self, component: Component) -> int:
        shape = torch.Size(self.layout.shape(component))
        kept = None if self.kept is None else self.kept[component]
        if kept is None or kept.axis is None or kept.entries is None:
            return shape.numel()
        return shape.numel() // shape[kept.axis] * int(kept.entries.sum())

    def _in_all_rows(self, change: Float[Tensor, "row d"], rows: int) -> Float[Tensor, "all d"]:
        """Matched rows at their places among the base's; the others do not change."""
        if len(self.rows) == rows:  # in order, so every row is at its place
            return change
        whole = change.new_zeros(rows, *change.shape[1:])
        whole[self.rows] = change
        return whole

    def selected(self, expression: str) -> "Term":
        """The term with only the part that a selection keeps.

        Raises:
            SelectionError: It cannot be read or selects nothing.
        """
        kept = kept_by(expression, self.vector.base, self.vector.name)
        return replace(self, kept=kept)


def _stored_orientation(layout: Layout, place: Place, delta: Delta) -> Float32[Tensor, "..."]:
    dense = delta.dense().float()
    if place.fused:
        return scattered(layout, place, dense)
    return rearrange(dense, "d_in d_out -> d_out d_in") if place.transposed else dense


class PairDeltas(Mapping[Component, Delta]):
    """The differences of a pair, each read from the files when it is asked for."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair

    def __getitem__(self, component: Component) -> Delta:
        """The difference at a component."""
        if component not in self.pair.layout.places:
            raise KeyError(component)
        return self.pair.change(component)[1]

    def __iter__(self) -> Iterator[Component]:
        """The components, in model order."""
        return iter(self.pair.components)

    def __len__(self) -> int:
        """Number of components."""
        return len(self.pair.components)

    def __contains__(self, component: object) -> bool:
        """Whether the pair has a component; nothing is read."""
        return component in self.pair.layout.places


def opened_base(spec: Any) -> Pair:
    """The base matched with itself.

    Raises:
        CheckpointError: It cannot be read, or is an adapter.
    """
    source = open_source(spec)
    if source.is_adapter:
        raise CheckpointError(
            f"{source.name} is an adapter; the base of a merge must be a full checkpoint.",
            hint="Give the model it was trained on first, the adapter after it.",
        )
    return load_pair(source, source, names=(source.name, source.name), scan=False)


def opened_term(base: Pair, given: Any, *, any_base: bool = False) -> Term:
    """One vector of a merge, opened by its headers.

    Args:
        base: The base matched with itself.
        given: A vector file, a fine-tune's folder or name, an adapter's folder, a ``TuningVector``,
            a ``Pair`` of this base, or a model in memory.
        any_base: Take a vector of another base of the same shape too.

    Raises:
        CheckpointError: It cannot be read.
        IncomparableModelsError: It belongs to another base.
        AdapterError: The adapter does not fit the base.
    """
    if isinstance(given, TuningVector):
        return _of_vector(base, given, "", any_base)
    if isinstance(given, Pair):
        return _of_pair(base, given, spec_of(given.tuned))
    spec = str(given) if isinstance(given, str | Path) else ""
    if spec.endswith(VECTOR_SUFFIX):
        return _of_vector(base, open_vector(spec), spec, any_base)
    return _of_pair(base, load_pair(base.base, given, scan=False), spec)


def spec_of(source: Source) -> str:
    """What names a source to someone who wants to open it again, empty for one in memory."""
    if isinstance(source, MemorySource):
        return ""
    named = source.revision is not None or source.name.startswith(DEMO)
    return source.name if named else str(source.folder)


def _of_vector(base: Pair, vector: TuningVector, spec: str, any_base: bool) -> Term:
    Application(vector, None, base, any_base).require_base()
    return Term(vector, "vector", spec, rows=torch.arange(vector.base.layout.d_vocab))


def _of_pair(base: Pair, pair: Pair, spec: str) -> Term:
    if pair.base is not base.base:
        _require_same_files(base.base, pair.base)
    record = base_record(pair, {})
    vector = TuningVector(record, pair.tuned_name, PairDeltas(pair), inputs_of(pair))
    kind: TermKind = "adapter" if pair.adapter is not None else "checkpoint"
    notes = tuple(pair.load_report.warnings)
    if pair.rows.new:
        notes += (
            f"{pair.tuned_name} has {len(pair.rows.new)} embedding rows that {base.base_name} "
            "lacks; a merge has the base's vocabulary, so they are left out.",
        )
    return Term(vector, kind, spec, rows=pair.rows.base, notes=notes)


def _require_same_files(first: Source, second: Source) -> None:
    in_memory = isinstance(first, MemorySource) or isinstance(second, MemorySource)
    if in_memory or first.folder.resolve() != second.folder.resolve():
        raise StudyError(
            f"a pair on {second.name} cannot be merged into {first.name}.",
            hint="Make the pair from the base of the merge, or give the fine-tune itself.",
        )
