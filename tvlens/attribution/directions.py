"""What is put where: the run that is patched, what it is given, and the sign of the answer.

    direction            receiver             is given                        sign
    tuned_into_base      base                 the tuned model's activation     +
    base_into_tuned      tuned                the base's activation            -
    clean_into_corrupt   the corrupt prompt   the prompt's activation          +   (denoising)
    corrupt_into_clean   the prompt           the corrupt prompt's             -   (noising)
    zero_ablation        the prompt           zero                             -
    mean_ablation        the prompt           the mean over real tokens        -

The sign makes all of them read alike: a score above 0 says that the metric is higher with the
activation of the tuned model, of the clean prompt, or, for the two ablations, with the activation
there at all. The last four are within one model (``at``); TransformerLens reports denoising in
the same sign and noising in the opposite one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.errors import HostError, PromptError
from tvlens.models.lens import LensModel
from tvlens.models.metrics import Metric, refuse_vanishing_gradient
from tvlens.models.pair import HookedPair
from tvlens.models.prompts import Batch
from tvlens.models.reading import Reading

from .nodes import Site, activations, wide
from .tables import Direction, MethodRun


class _Exchange(NamedTuple):
    receiver: str | None
    given: str
    sign: int


_EXCHANGES: dict[str, _Exchange] = {
    "tuned_into_base": _Exchange("base", "other", 1),
    "base_into_tuned": _Exchange("tuned", "other", -1),
    "clean_into_corrupt": _Exchange(None, "clean", 1),
    "corrupt_into_clean": _Exchange(None, "corrupt", -1),
    "zero_ablation": _Exchange(None, "zero", -1),
    "mean_ablation": _Exchange(None, "mean", -1),
}
CORRUPTED = ("clean_into_corrupt", "corrupt_into_clean")
"""Directions that need prompts with a corrupt prompt."""
_ROWS_AT_ONCE = 16


@dataclass(frozen=True, eq=False)
class Patch:
    """One chunk of prompts: which run is patched with what.

    Attributes:
        receiver: The model that is run.
        receiver_ids: Its tokens.
        donor: The model whose activations are put in, None for an ablation.
        donor_ids: The donor's tokens.
        means: What a mean ablation puts in, by hook; empty otherwise.
        reading: The metric on these prompts.
        sign: What makes a score above 0 read alike in all directions.
    """

    receiver: LensModel
    receiver_ids: Int[Tensor, "batch pos"]
    donor: LensModel | None
    donor_ids: Int[Tensor, "batch pos"]
    means: dict[str, Tensor]
    reading: Reading
    sign: int

    @property
    def batch(self) -> Batch:
        """The prompts."""
        return self.reading.batch

    def given(self, names: Sequence[str]) -> dict[str, Float[Tensor, "..."]]:
        """What is put in at each hook, to be broadcast against the activation there.

        O(batch * pos * width of the hooks) with a donor, O(width) for an ablation.
        """
        if self.donor is not None:
            return activations(self.donor, self.donor_ids, self.batch.mask, names)
        nothing = torch.zeros((), device=self.receiver.device, dtype=self.receiver.dtype)
        return {name: self.means.get(name, nothing) for name in names}


@dataclass(frozen=True, eq=False)
class Question:
    """A direction asked of a pair with a metric; made by ``question``."""

    hooked: HookedPair
    metric: Metric
    direction: Direction
    at: str
    mean_over: Batch | None = None

    @property
    def receiver(self) -> LensModel:
        """The model that is run with patches or gradients."""
        return self.hooked.base if self.at == "base" else self.hooked.tuned

    @property
    def sign(self) -> int:
        """What the change of the metric by an exchange is multiplied by to be a score."""
        return _EXCHANGES[self.direction].sign

    def usable(self, batch: Batch) -> Batch:
        """The prompts that the direction can be asked on.

        Raises:
            PromptError: None of them has a corrupt prompt of its own length.
        """
        if self.direction not in CORRUPTED:
            return batch
        chosen = batch.with_corrupt()
        if len(chosen) == 0:
            raise PromptError(
                f"{self.direction} needs prompts with 'corrupt' of the same token length.",
                hint="; ".join(batch.warnings),
            )
        return chosen

    def means(self, batch: Batch, sites: Sequence[Site]) -> dict[str, Float[Tensor, "1 1 ..."]]:
        """For a mean ablation: the mean activation at every site over real tokens.

        Over ``mean_over``, or over ``batch`` where none was given.

        Raises:
            HostError: A pattern was asked for, which has no mean over prompts of other lengths.
        """
        if self.direction == "mean_ablation" and any(site.part == "pattern" for site in sites):
            raise HostError(
                "attention patterns have no mean over prompts of different lengths.",
                hint="Use zero_ablation for patterns, or leave them out of parts.",
            )
        return self.means_at(batch, [site.hook for site in sites])

    def means_at(self, batch: Batch, names: Sequence[str]) -> dict[str, Float[Tensor, "1 1 ..."]]:
        """The same means at hooks of [batch, pos, ...] activations; empty but for mean ablation."""
        if self.direction != "mean_ablation":
            return {}
        return _means(self.receiver, self.mean_over or batch, names)

    def patch(self, batch: Batch, means: dict[str, Tensor]) -> Patch:
        """The patch of one chunk of prompts."""
        exchange = _EXCHANGES[self.direction]
        other = self.hooked.tuned if self.at == "base" else self.hooked.base
        donor = {"other": other, "zero": None, "mean": None}.get(exchange.given, self.receiver)
        ids, donor_ids = batch.ids, batch.ids
        if exchange.given == "clean":
            ids = batch.corrupted().ids
        elif exchange.given == "corrupt":
            donor_ids = batch.corrupted().ids
        reading = self.hooked.reading(self.metric, batch)
        return Patch(self.receiver, ids, donor, donor_ids, means, reading, exchange.sign)

    @property
    def gradient_vanishes(self) -> bool:
        """Whether the metric is a distance to the very run that is differentiated."""
        return gradient_vanishes(self.metric, self.direction, self.at)

    def refuse_vanishing_gradient(self) -> None:
        """Refuse an estimate where the gradient is zero by construction.

        Raises:
            MetricError: The metric is a distance to the very run that the gradient is taken at.
        """
        if self.gradient_vanishes:
            refuse_vanishing_gradient(self.metric, self.at)

    def run(self, batch: Batch, estimator: str) -> MethodRun:
        """What the rows of the answer have in common."""
        exact = {"exact": "exact_activation", "exact_isolated": "exact_activation_isolated"}
        return MethodRun(
            method=exact.get(estimator) or method_label(self.direction, estimator),
            space="activation",
            estimator=estimator.partition("_isolated")[0],
            direction=self.direction,
            at=self.at,
            metric=self.metric.name,
            unit=self.metric.unit,
            base=self.hooked.base_name,
            tuned=self.hooked.tuned_name,
            prompts=batch.numbers,
            n_tokens=batch.lengths.tolist(),
            heads_per_kv=self.hooked.base.n_heads // self.hooked.base.n_kv_heads,
        )


def question(
    hooked: HookedPair,
    metric: Metric,
    direction: Direction,
    *,
    at: str = "",
    mean_over: Batch | None = None,
) -> Question:
    """A direction asked of a pair.

    Args:
        hooked: The two models.
        metric: What is measured.
        direction: What is put where.
        at: The model of a direction within one model, tuned unless said; the two across models
            imply theirs.
        mean_over: Prompts whose mean activation ``mean_ablation`` puts in; the attributed prompts
            themselves unless given, so that a prompt's score depends on the others.

    Raises:
        HostError: There is no such direction, or it cannot be asked at that model.
    """
    return Question(hooked, metric, direction, place_of(direction, at), mean_over)


def place_of(direction: str, at: str = "") -> str:
    """The model that runs in a direction: the one it implies, else ``at``, else tuned.

    Raises:
        HostError: There is no such direction, or it cannot be asked at that model.
    """
    if direction not in _EXCHANGES:
        raise HostError(f"there is no direction {direction!r}; there are {', '.join(_EXCHANGES)}.")
    implied = _EXCHANGES[direction].receiver
    place = at or implied or "tuned"
    if place != (implied or place) or place not in ("base", "tuned"):
        raise HostError(f"{direction} cannot be taken at {place!r}.")
    return place


def gradient_vanishes(metric: Metric, direction: str, at: str) -> bool:
    """Whether a metric is a distance to the very run that is differentiated."""
    return metric.reference == at and direction != "clean_into_corrupt"  # which runs other tokens


def method_label(direction: str, estimator: str) -> str:
    """The method label of an estimator of activations in a direction."""
    across = _EXCHANGES[direction].given == "other"
    return f"{'cross_model' if across else 'activation'}_{estimator}"


def _means(
    model: LensModel, batch: Batch, names: Sequence[str]
) -> dict[str, Float[Tensor, "1 1 ..."]]:
    total: dict[str, Tensor] = {}
    for rows in batch.chunks(_ROWS_AT_ONCE):
        mask = rows.mask.bool().to(model.device)
        for name, activation in activations(model, rows.ids, rows.mask, names).items():
            padding = ~mask.reshape(*mask.shape, *[1] * (activation.ndim - 2))
            kept = wide(activation).masked_fill(padding, 0.0)
            summed = reduce(kept, "batch pos ... -> 1 1 ...", "sum")
            total[name] = total.get(name, torch.zeros_like(summed)) + summed
    count = int(batch.mask.sum())
    return {name: (values / count).to(model.dtype) for name, values in total.items()}
