"""A metric on a batch of prompts: which logits it reads, and its value on any model."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

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
class Reading:
    """What is measured on a forward pass, with logits made only where they are read.

    Attributes:
        metric: The metric.
        batch: The prompts, whole: what the model runs on.
        positions: The places of each row whose logits are made.
        cut: What the metric is called with: ``batch`` where it may read any logits.
        reference: Logits at ``positions`` that the metric compares with, None where it does not.
    """

    metric: Metric
    batch: Batch
    positions: Int[Tensor, "batch read"]
    cut: Batch
    reference: Float[Tensor, "batch read d_vocab"] | None = None

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
        return cls(metric, batch, positions, cut, logits)

    def logits(
        self, model: MakesLogits, ids: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch read d_vocab"]:
        """The logits of ``model`` that are read; on other tokens at the same places for ``ids``."""
        return model.logits_at(
            self.batch.ids if ids is None else ids, self.batch.mask, self.positions
        )

    def value(self, logits: Float[Tensor, "batch read d_vocab"]) -> Float[Tensor, " batch"]:
        """The metric of every prompt.

        Raises:
            MetricError: The metric does not give one number per prompt.
        """
        return self.metric(Run(logits, self.reference), self.cut)
