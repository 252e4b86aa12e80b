"""The attention of one forward pass, run again alone with other queries or keys.

What every attention module was called with is kept of a whole pass. Called with it again, under
hooks, the module does what it did in the pass (mask, rotary phases, norms of queries and keys, a
cap on the scores, grouped keys) and only what the hooks exchange is different: the softmax under
another query or key is the host's own, to the last operation.
"""

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tvlens.errors import HostError

from .hosts import submodule
from .lens import HookList, LensModel

SCORES, PATTERN = "blocks.{}.attn.hook_attn_scores", "blocks.{}.attn.hook_pattern"
_SAME = 1e-3
"""Largest difference of a repeated pattern, whose entries are at most 1; rounding is far below."""


class Attended(NamedTuple):
    """What a block attended to.

    Attributes:
        scores: Before the softmax, masked.
        pattern: After it.
    """

    scores: Float[Tensor, "batch head query key"]
    pattern: Float[Tensor, "batch head query key"]


@dataclass
class RecordedAttention:
    """What the attention of some blocks was called with in one pass; made by ``recorded``.

    Memory: the input of every recorded block, O(layers * batch * pos * d_model).

    Attributes:
        model: The model, whose weights and hooks are read anew by each run.
        calls: Arguments and keywords, by block.
    """

    model: LensModel
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)

    def again(self, layer: int, edits: HookList = ()) -> Attended:
        """Scores and pattern of a block under ``edits``, forward hooks within its attention."""
        args, kwargs = self.calls[layer]
        kept: dict[str, Tensor] = {}
        watched = [(name.format(layer), partial(_keep, kept, name)) for name in (SCORES, PATTERN)]
        with torch.no_grad(), self.model.hooks(fwd=[*edits, *watched]):
            _attention(self.model, layer)(*args, **kwargs)
        return Attended(kept[SCORES], kept[PATTERN])

    def keep(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A forward pre-hook of the attention module of block ``layer``."""
        self.calls[layer] = args, kwargs


def recorded(
    model: LensModel,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    layers: Collection[int],
) -> RecordedAttention:
    """Run the whole model once and keep what the attention of ``layers`` was called with.

    Raises:
        HostError: The attention of this family gives another pattern when it is run alone, or
            does not show its scores and patterns.
    """
    found, kept = RecordedAttention(model), {}
    if not layers:
        return found
    last = max(layers)
    seen = (PATTERN.format(last), partial(_keep, kept, PATTERN))
    model.require_eval()
    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(model.hooks(fwd=[seen]))
        for layer in layers:
            handle = _attention(model, layer).register_forward_pre_hook(
                partial(found.keep, layer), with_kwargs=True
            )
            stack.callback(handle.remove)
        model.logits_at(ids, mask, torch.zeros(len(ids), 1, dtype=torch.long))
    error = (found.again(last).pattern - kept[PATTERN])[_rows(mask)].abs().max()
    if not float(error) <= _SAME:
        raise HostError(
            f"the attention of block {last} run alone differs from the pass by {float(error):.3g}.",
            hint="Patterns under other queries or keys cannot be had of this model; use the "
            "first-order estimator.",
        )
    return found


def _attention(model: LensModel, layer: int) -> nn.Module:
    module = submodule(model.model, f"blocks.{layer}.attn")
    if module is None:
        raise HostError(f"block {layer} of this model has no attention of its own.")
    return module


def _rows(mask: Int[Tensor, "batch pos"]) -> tuple[Tensor, slice, Tensor]:
    """Rows of a pattern that belong to a real query."""
    batch, query = mask.bool().nonzero(as_tuple=True)
    return batch, slice(None), query


def _keep(kept: dict[str, Tensor], name: str, activation: Tensor, hook: Any) -> None:
    kept[name] = activation.detach()
