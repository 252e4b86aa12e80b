"""A tuning vector on a base: new checkpoint tensors, or a model that holds it for a while.

    for name, tensor in tau.apply_to("demo:base"):      # only what changed, one at a time
        ...
    with (0.5 * tau).apply_to(model):                   # every bit is back afterwards
        ...

The base is checked before anything is written to it: where the vector changes a component, that
component must be the one the vector was taken from.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.components import Component
from tvlens.errors import CheckpointError, IncomparableModelsError

from .configs import STRUCTURE
from .delta import Absent
from .hooked import LiveWeights, is_hooked, live_weights
from .matching import load_pair
from .pair import Pair
from .provenance import digest
from .sources.memory import MemorySource
from .sources.opening import open_source
from .stored import StoredTensor, new_tensors
from .vector import TuningVector
from .vocabulary import RowMatch


@dataclass
class Application:
    """A vector and the base that it is added to; nothing happens until it is used.

    Iterating reads the base and yields the stored tensors that change. As a context manager it
    writes them into a model in memory and puts the old ones back on leaving, also after an
    exception; it needs the memory of the old tensors that change.

    Attributes:
        vector: What is added.
        model: The model in memory, None for a checkpoint.
        base: The base matched with itself, None for a hooked model.
        any_base: The base's weights are not compared with those the vector was taken from.
    """

    vector: TuningVector
    model: Any
    base: Pair | None
    any_base: bool = False
    _open: ExitStack | None = field(default=None, repr=False)

    @property
    def config_changes(self) -> dict[str, Any]:
        """Entries of config.json that must change with the tensors."""
        return {"tie_word_embeddings": False} if self._unties else {}

    def __iter__(self) -> Iterator[StoredTensor]:
        """The stored tensors that change, by their stored names.

        Raises:
            IncomparableModelsError: The base is another than the vector's.
            CheckpointError: A tensor cannot be read, or a new value does not fit its dtype.
        """
        if self.base is None:
            raise CheckpointError(
                "a hooked model has no stored tensors to list.",
                hint="Use it as a context: `with vector.apply_to(model):`.",
            )
        self.require_base()
        deltas = dict(self.vector.deltas)
        pair = self._under_its_layout(self.base)
        yield from new_tensors(pair, deltas)
        if self._unties and Component("embedding", None, None, "W_U") not in self._changed:
            yield self._untied_head(pair)

    def __enter__(self) -> Any:
        """Write the vector into the model; what was there is kept.

        Raises:
            IncomparableModelsError: The model is another base than the vector's.
            CheckpointError: The base is a checkpoint on disk, or this is already open.
        """
        if self.model is None:
            raise CheckpointError(
                "a checkpoint on disk is not changed.",
                hint="Iterate over apply_to(...) for its new tensors, or give a model in memory.",
            )
        if self._open is not None:
            raise CheckpointError("this application is already open.", hint="Make another one.")
        with ExitStack() as stack:
            if self.base is None:
                self._write_hooked(stack)
            else:
                self._write_module(stack, self.base)
            self._open = stack.pop_all()
        return self.model

    def __exit__(self, *error: object) -> None:
        """Put every bit back."""
        stack, self._open = self._open, None
        if stack is not None:
            stack.close()

    def require_base(self) -> None:
        """Check that the base is the one that the vector was taken from, where it acts.

        Raises:
            IncomparableModelsError: The base is another than the vector's.
        """
        if self.base is not None:
            self._require_base(self.base)

    @cached_property
    def _changed(self) -> list[Component]:
        return [c for c, delta in self.vector.items() if not isinstance(delta, Absent)]

    @property
    def _unties(self) -> bool:
        """Whether the vector gives a tied base an unembedding of its own."""
        if self.base is None or self.vector.base.layout.tied or not self.base.layout.tied:
            return False
        return any(component.kind == "embedding" for component in self._changed)

    def _untied_head(self, pair: Pair) -> StoredTensor:
        """The base's embedding, under the name that an unembedding of its own has."""
        stored = pair.base_tensors[pair.layout.embedding_tensor]
        name = pair.layout.unembedding_tensor
        return StoredTensor(pair.base_tensors.get(name, name), pair.base.read(stored))

    def _write_module(self, stack: ExitStack, base: Pair) -> None:
        if self._unties:
            raise IncomparableModelsError(
                f"{self.vector.name} gives the model an unembedding of its own, but this one ties "
                "it to the embedding.",
                hint="Load the model with tie_word_embeddings=False, or select other components.",
            )
        source = base.base
        if not isinstance(source, MemorySource):
            raise CheckpointError(f"{source.name} is not in memory.")
        for name, tensor in self:
            stack.enter_context(_holding(source.live[name], tensor))

    def _write_hooked(self, stack: ExitStack) -> None:
        live = live_weights(self.model)
        self._require_apart(live)
        for component in self._changed:
            delta = self.vector[component]
            if component not in live or _canonical_shape(live[component]) != delta.shape:
                raise IncomparableModelsError(
                    f"the hooked model has no {component} of shape {delta.shape}.",
                    hint="The vector belongs to another base.",
                )
            tensor = live[component]
            self._require_same(component, tensor.detach().cpu().float().reshape(delta.shape))
            change = delta.dense().to(tensor.device).reshape(tensor.shape)
            total = (tensor.double() + change).to(tensor.dtype)
            stack.enter_context(_holding(tensor, torch.where(change == 0, tensor, total)))

    def _require_apart(self, live: LiveWeights) -> None:
        """A vector that changes W_E and W_U apart needs a model that keeps them apart."""
        ends = [live.get(Component("embedding", None, None, part)) for part in ("W_E", "W_U")]
        pointers = {tensor.data_ptr() for tensor in ends if tensor is not None}
        embeddings = any(component.kind == "embedding" for component in self._changed)
        if embeddings and (len(pointers) == 1) != self.vector.base.layout.tied:
            raise IncomparableModelsError(
                f"{self.vector.name} and the hooked model differ in whether the unembedding is "
                "the embedding.",
                hint="Select other components, or load the base the vector belongs to.",
            )

    def _require_base(self, base: Pair) -> None:
        layouts = self.vector.base.layout, base.layout
        for name in STRUCTURE:
            wanted, found = (getattr(layout, name) for layout in layouts)
            if wanted != found:
                raise IncomparableModelsError(
                    f"{self.vector.name} belongs to a base with {name} {wanted!r}; "
                    f"{base.base_name} has {found!r}.",
                )
        if layouts[0].tied and not layouts[1].tied:
            raise IncomparableModelsError(
                f"{self.vector.name} belongs to a base whose unembedding is its embedding; "
                f"{base.base_name} stores two.",
            )
        self._require_rows(base)
        pair = self._under_its_layout(base)
        for component in self._changed if not self.any_base else ():
            self._require_same(component, pair.stored_weight(component))

    def _under_its_layout(self, base: Pair) -> Pair:
        """The base with the vector's numbers: of a longer embedding the first rows."""
        layout = self.vector.base.layout
        return replace(base, layout=layout, rows=RowMatch.by_number(layout.d_vocab))

    def _require_rows(self, base: Pair) -> None:
        """Of a longer embedding the first rows are taken, if they are known to be the same."""
        rows, found = self.vector.base.layout.d_vocab, base.layout.d_vocab
        embeddings = any(component.kind == "embedding" for component in self._changed)
        if rows > found or (rows != found and embeddings and self.any_base):
            raise IncomparableModelsError(
                f"{self.vector.name} has {rows} embedding rows; {base.base_name} has {found}."
            )

    def _require_same(self, component: Component, weight: Float[Tensor, "..."]) -> None:
        if self.any_base or digest(weight.contiguous()) == self.vector.base.digests[component]:
            return
        raise IncomparableModelsError(
            f"{component} of this model is not that of {self.vector.base_name}, which "
            f"{self.vector.name} was taken from.",
            hint="Pass any_base=True to add it to another base of the same shape all the same.",
        )


def application(vector: TuningVector, base: Any, *, any_base: bool = False) -> Application:
    """``vector`` on ``base``, which is only opened: headers of files, names of a model's tensors.

    Raises:
        CheckpointError: The base cannot be read.
    """
    if is_hooked(base):
        return Application(vector, base, None, any_base)
    source = open_source(base)
    pair = load_pair(source, source, names=(source.name, source.name), scan=False)
    model = pair.base.module if isinstance(pair.base, MemorySource) else None
    return Application(vector, model, pair, any_base)


def _canonical_shape(live: Float[Tensor, "..."]) -> tuple[int, ...]:
    """The shape of a live weight with its heads side by side."""
    return tuple(live.shape if live.ndim < 3 else live.flatten(1).shape)


@contextmanager
def _holding(live: Float[Tensor, "..."], new: Float[Tensor, "..."]) -> Iterator[None]:
    """``live`` holds the values of ``new`` for a while; its own bits come back."""
    before = live.detach().clone()
    try:
        with torch.no_grad():
            live.detach().copy_(new)
        yield
    finally:
        with torch.no_grad():
            live.detach().copy_(before)
