"""A metric on a batch of prompts: which logits it reads, and its value on any model."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.errors import HostError

from .lens import HookList, LensModel, at_positions
from .metrics import Metric, Run
from .prompts import Batch


@runtime_checkable
class MakesLogits(Protocol):
    """A model as far as a metric needs it; ``lens.LensModel`` is the real one."""

    def logits_at(
        self,
        ids: Int[Tensor, "batch pos"],
        mask: Int[Tensor, "batch pos"],
        positions: Int[Tensor, "batch read"],
    ) -> Float[Tensor, "batch read d_vocab"]:
        """Logits of every row at its own positions."""
        ...


@dataclass(frozen=True)
class Beside:
    """Activations that a metric reads beside the logits, carried behind them as more columns.

    Attributes:
        names: Hooks of [batch, pos, width] activations.
        widths: Columns of each, known once a pass has gone by.
    """

    names: tuple[str, ...] = ()
    widths: dict[str, int] = field(default_factory=dict)

    def hooks(self, positions: Int[Tensor, "batch read"], kept: dict[str, Tensor]) -> HookList:
        """Forward hooks that keep what passes at ``positions``."""
        return [(name, partial(self._keep, name, positions, kept)) for name in self.names]

    def _keep(
        self,
        name: str,
        positions: Int[Tensor, "batch read"],
        kept: dict[str, Tensor],
        activation: Tensor,
        hook: Any,
    ) -> None:
        if activation.ndim != 3:
            raise HostError(
                f"a metric reads activations [batch, pos, width]; {name!r} is "
                f"{list(activation.shape)}.",
            )
        if getattr(hook, "bwd_hooks", ()):
            raise HostError(
                f"scores are asked of {name!r}, which the metric itself reads: the gradient "
                "there cannot be seen.",
                hint="Leave that activation out of the parts, or read another one.",
            )
        kept[name] = at_positions(positions, activation, hook)
        self.widths[name] = activation.shape[-1]

    def joined(
        self, logits: Float[Tensor, "batch read d_vocab"], kept: dict[str, Tensor]
    ) -> Float[Tensor, "batch read width"]:
        """The logits with the activations behind them."""
        if not self.names:
            return logits
        return torch.cat([logits, *(kept[name].to(logits.dtype) for name in self.names)], dim=-1)

    def parted(
        self, read: Float[Tensor, "batch read width"]
    ) -> tuple[Float[Tensor, "batch read d_vocab"], dict[str, Tensor]]:
        """The logits, and the activations by hook."""
        widths = [self.widths[name] for name in self.names]
        logits, *behind = read.split([read.shape[-1] - sum(widths), *widths], dim=-1)
        return logits, dict(zip(self.names, behind, strict=True))


@dataclass(frozen=True)
class Reading:
    """What is measured on a forward pass, with logits made only where they are read.

    Attributes:
        metric: The metric.
        batch: The prompts, whole: what the model runs on.
        positions: The places of each row whose logits are made.
        cut: What the metric is called with: ``batch`` where it may read any logits.
        reference: Logits at ``positions`` that the metric compares with, None where it does not.
        beside: The activations that the metric reads; what is called logits here and in
            ``Replay`` has them behind, as more columns.
    """

    metric: Metric
    batch: Batch
    positions: Int[Tensor, "batch read"]
    cut: Batch
    reference: Float[Tensor, "batch read d_vocab"] | None = None
    beside: Beside = field(default_factory=Beside)

    @classmethod
    def of(cls, metric: Metric, batch: Batch, reference: MakesLogits | None = None) -> "Reading":
        """The reading of ``metric`` on ``batch``; runs ``reference`` where it is given."""
        positions, cut = torch.arange(batch.ids.shape[1]).expand(len(batch), -1), batch
        if metric.answers_only:
            positions, cut = batch.reading_positions, batch.cut_to_answers()
        logits = None
        if reference is not None:
            with torch.no_grad():
                logits = reference.logits_at(batch.ids, batch.mask, positions)
        return cls(metric, batch, positions, cut, logits, Beside(metric.hooks))

    def logits(
        self, model: MakesLogits, ids: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch read width"]:
        """The logits of ``model`` that are read; on other tokens at the same places for ``ids``."""
        tokens = self.batch.ids if ids is None else ids
        return read(model, tokens, self.batch.mask, self.positions, self.beside)

    def value(self, logits: Float[Tensor, "batch read width"]) -> Float[Tensor, " batch"]:
        """The metric of every prompt.

        Raises:
            MetricError: The metric does not give one number per prompt.
        """
        plain, hooks = self.beside.parted(logits)
        return self.metric(Run(plain, self.reference, hooks), self.cut)


def read(
    model: MakesLogits,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    positions: Int[Tensor, "batch read"],
    beside: Beside,
    kept: dict[str, Tensor] | None = None,
) -> Float[Tensor, "batch read width"]:
    """Logits at ``positions`` with the activations of ``beside`` behind them.

    Args:
        model: Any model where nothing is read beside the logits, else a ``LensModel``.
        ids: Its tokens.
        mask: 1 at real tokens.
        positions: The places of each row.
        beside: What else is read.
        kept: Is filled with the activations, by hook.

    Raises:
        HostError: The model has no such hook.
    """
    if not beside.names:
        return model.logits_at(ids, mask, positions)
    if not isinstance(model, LensModel):
        raise HostError(f"{type(model).__name__} has no hooks that a metric could read.")
    found = {} if kept is None else kept
    with model.hooks(fwd=beside.hooks(positions, found)):
        return beside.joined(model.logits_at(ids, mask, positions), found)
