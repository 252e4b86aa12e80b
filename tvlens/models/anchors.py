"""The direction in which a fine-tune moves the residual stream, as a metric of open-ended answers.

Where no answer is the right one there is no logit to compare. An *anchor* measures how far along
the way from base to tuned a run is:

    u     = (mean of the tuned model's activation - mean of the base's), to unit length
    score = mean over the places that predict scored tokens of activation . u

with means over the same places of both models on the same tokens, every prompt counting the same.
The direction is made once, from prompts of its own (the split ``choose``), and is then the same
for every model that is measured. On the prompts that it is made of the tuned model is ``gap``
ahead of the base by construction; what holds is read on other prompts (``judge``).

The unit is the residual stream's own: nothing is divided by a norm, so figures of two layers, or
of two pairs, cannot be compared.
"""

from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from tvlens.errors import MetricError

from .lens import LensModel
from .metrics import ANCHOR, ANCHOR_UNIT, Metric, Run, mean_at_answers
from .pair import HookedPair
from .prompts import Batch
from .reading import Reading

_ROWS_AT_ONCE = 16
_SAME = 1e-5
"""Gap, relative to the activation, below which two models are the same there; rounding is less."""


@dataclass(frozen=True, eq=False)
class Anchor:
    """A direction of the residual stream, from a base to its fine-tune.

    Attributes:
        hook: Where.
        direction: Of unit length.
        gap: Distance of the two means, in units of the residual stream.
        prompts: How many prompts it was made of.
        name: What tables call the metric.
    """

    hook: str
    direction: Float[Tensor, " d_model"]
    gap: float
    prompts: int
    name: str = ANCHOR

    @property
    def metric(self) -> Metric:
        """How far a run is along the direction, at the places that predict scored tokens."""

        def along(run: Run, batch: Batch) -> Float[Tensor, " batch"]:
            activation = run.hooks[self.hook].float()
            direction = self.direction.to(activation.device)
            values = einsum(activation, direction, "batch pos d_model, d_model -> batch pos")
            return mean_at_answers(values, batch)

        return Metric(
            self.name, ANCHOR_UNIT, "higher", along, answers_only=True, hooks=(self.hook,)
        )


def anchor(
    hooked: HookedPair, batch: Batch, *, hook: str | None = None, name: str = ANCHOR
) -> Anchor:
    """The anchor of a pair.

    Args:
        hooked: The two models; left as they were.
        batch: The prompts it is made of; keep others to judge by.
        hook: An activation [batch, pos, d_model]; the residual stream after the last block unless
            given. What comes after it has no part in the metric.
        name: What tables call the metric.

    Raises:
        MetricError: There are no prompts, or the models do not differ there on them.
        HostError: The models have no such hook.
    """
    where = hook or hook_of(ANCHOR, hooked.base)
    if len(batch) == 0:
        raise MetricError(
            "an anchor needs prompts to be made of, and none is of the split 'choose'.",
            hint="Give prompts the split 'choose', or more of them.",
        )
    base, tuned = (_mean(model, where, batch) for model in (hooked.base, hooked.tuned))
    gap, size = (float(v.norm()) for v in (tuned - base, base))
    if not gap > _SAME * size:
        raise MetricError(
            f"base and tuned model are the same at {where} on the {len(batch)} prompts that an "
            f"anchor would be made of: their means differ by {gap:.2g} of {size:.3g}.",
            hint="Choose a later layer with anchor@LAYER, or prompts on which they differ.",
        )
    return Anchor(where, ((tuned - base) / gap).float(), gap, len(batch), name)


def anchored(metric: Metric, hooked: HookedPair, batch: Batch) -> Anchor:
    """The anchor that ``resolve_metric("anchor")`` or ``"anchor@LAYER"`` leaves open.

    Raises:
        MetricError: There is no such layer; and as for ``anchor``.
    """
    return anchor(hooked, batch, hook=hook_of(metric.name, hooked.base), name=metric.name)


def hook_of(name: str, model: LensModel) -> str:
    """The hook that the name of an anchor means.

    Raises:
        MetricError: What follows ``@`` is no layer of the model.
    """
    _, given, layer = name.partition("@")
    if not given:
        layer = str(model.n_layers - 1)
    if not layer.isdecimal() or int(layer) >= model.n_layers:
        raise MetricError(
            f"{name!r}: expected anchor@LAYER with a layer from 0 to {model.n_layers - 1}."
        )
    return f"blocks.{int(layer)}.hook_resid_post"


def _mean(model: LensModel, hook: str, batch: Batch) -> Float[Tensor, " d_model"]:
    """The mean over prompts of the mean over the places that predict scored tokens; float64."""
    total, rows_read = (
        torch.zeros(1, dtype=torch.float64),
        Metric("mean", ANCHOR_UNIT, "higher", _nothing, answers_only=True, hooks=(hook,)),
    )
    for rows in batch.chunks(_ROWS_AT_ONCE):
        reading = Reading.of(rows_read, rows)
        with torch.no_grad():
            _, kept = reading.beside.parted(reading.logits(model))
        activation = kept[hook].cpu().double()
        weights = reading.cut.answer_positions.double()
        weights = weights / weights.sum(1, keepdim=True)
        summed = einsum(activation, weights, "batch pos d_model, batch pos -> d_model")
        total = total + summed
    return total / len(batch)


def _nothing(run: Run, batch: Batch) -> Tensor:
    return torch.zeros(len(batch))
