"""Forward passes that begin at a block: what lies before an edit is not computed again.

A change of block l leaves the residual stream before l as it was. ``Replay`` keeps that stream
of one forward pass, with what the host handed to each block beside it (attention mask, rotary
phases), and runs the rest of the model from any block on: the same modules in the same order, so
hooks fire and the numbers are those of a whole pass. Edits of the embeddings come before all
streams and need a whole pass.
"""

import logging
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .hosts import submodule
from .lens import LensModel, at_positions
from .reading import Beside, read

logger = logging.getLogger(__name__)
_SAME = 1e-3
"""Share of the largest logit by which a replay may differ from the pass it repeats; rounding is
three orders below, a forgotten operation (a cap on the logits, a shared block) far above."""


@dataclass
class Replay:
    """One recorded forward pass.

    Attributes:
        model: The model, whose weights and hooks are read anew by each replay.
        ids: Its tokens.
        mask: 1 at real tokens.
        positions: The places of each row whose logits are made.
        beside: Activations that are read at the same places and carried behind the logits.
        streams: The residual stream before a block; ``n_layers``: before the final norm.
        calls: What each block was called with beside the stream.
        passed: The activations that were read, as they were in the recorded pass.
        from_tokens: Make whole passes only, in a family that does more than run its blocks.
    """

    model: LensModel
    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    positions: Int[Tensor, "batch read"]
    beside: Beside = field(default_factory=Beside)
    streams: dict[int, Float[Tensor, "batch pos d_model"]] = field(default_factory=dict)
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    passed: dict[str, Tensor] = field(default_factory=dict)
    from_tokens: bool = False

    def record(self, layers: Collection[int]) -> Float[Tensor, "batch read width"]:
        """Run the whole model once, keep its streams before ``layers``, and give its logits."""
        self.streams.clear()
        with torch.no_grad(), self._recording(frozenset(layers)):
            return self.whole(self.passed)

    def whole(self, kept: dict[str, Tensor] | None = None) -> Float[Tensor, "batch read width"]:
        """The logits of a pass from the tokens on; what is read beside them goes into ``kept``."""
        return read(self.model, self.ids, self.mask, self.positions, self.beside, kept)

    def logits(self, layer: int | None) -> Float[Tensor, "batch read width"]:
        """The logits of a pass from ``layer`` on; None: from the tokens on.

        Raises:
            KeyError: The stream before ``layer`` was not recorded.
        """
        if layer is None or self.from_tokens:
            return self.whole()
        kept = dict(self.passed)  # what lies before the block is as it was
        with ExitStack() as stack:
            if self.beside.names:
                hooks = self.beside.hooks(self.positions, kept)
                stack.enter_context(self.model.hooks(fwd=hooks))
            return self.beside.joined(self._from(layer), kept)

    def _from(self, layer: int) -> Float[Tensor, "batch read d_vocab"]:
        stream = self.streams[layer]
        for number in range(layer, self.model.n_layers):
            args, kwargs = self.calls[number]
            out = self.model.model.blocks[number](stream, *args, **kwargs)
            stream = out if isinstance(out, Tensor) else out[0]
        norm = submodule(self.model.model, "ln_final")
        normed = stream if norm is None else norm(stream)
        return self.model.model.unembed(at_positions(self.positions, normed, None))

    def repeats(self) -> bool:
        """Whether replays give what whole passes give; families may do more than their blocks."""
        last = self.model.n_layers
        middle = last // 2
        whole = self.record({middle, last})
        with torch.no_grad():
            error = max(float((self.logits(at) - whole).abs().max()) for at in (middle, last))
        self.streams.clear()
        return error <= _SAME * float(whole.abs().max())

    @contextmanager
    def _recording(self, layers: frozenset[int]) -> Iterator[None]:
        blocks = self.model.model.blocks
        with ExitStack() as stack:
            for number in range(self.model.n_layers):
                handle = blocks[number].register_forward_pre_hook(
                    partial(self._keep, number, number in layers), with_kwargs=True
                )
                stack.callback(handle.remove)
            if self.model.n_layers in layers:
                model = self.model.model
                final = (submodule(model, "ln_final") or model.unembed).register_forward_pre_hook(
                    partial(self._keep, self.model.n_layers, True), with_kwargs=True
                )
                stack.callback(final.remove)
            yield

    def _keep(
        self,
        layer: int,
        stream_too: bool,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        stream = args[0] if args else kwargs["hidden_states"]
        self.calls[layer] = args[1:], rest
        if stream_too:
            self.streams[layer] = stream.detach()


def replay(
    model: LensModel,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    positions: Int[Tensor, "batch read"],
    beside: Beside | None = None,
) -> Replay:
    """A pass of ``model``, ready to be recorded.

    Whether its replays are right is tried at once; where they are not it makes whole passes.

    Args:
        model: The model.
        ids: Its tokens.
        mask: 1 at real tokens.
        positions: The places of each row whose logits are made.
        beside: What a metric reads there too.
    """
    made = Replay(model, ids, mask, positions, beside or Beside())
    if not made.repeats():
        logger.warning("passes of this model cannot begin at a block: each patch takes a whole one")
        made.from_tokens = True
    return made
