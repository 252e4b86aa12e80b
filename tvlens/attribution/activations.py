"""Attribution to activations: what a metric would change by if one activation were exchanged.

A run of the *receiver* is patched with another activation at the same tokens' places
(``directions``). The estimate of all patches at once is one backward pass (Nanda 2023; Syed et
al. 2023),

    score = (given activation - receiver's activation) . d metric / d activation,

summed over positions and the component's width, with the gradient taken on the receiver. The
exact effect patches one component for real (``patching``). Which activations there are is said in
``nodes``; ``qk_fix`` and ``atp_star`` are the repairs of that estimate that ``atp_star`` tells of,
``ig_inputs`` takes the gradient along a line between prompts (``input_lines``).

Scores of activations say where a difference *passes*, since an activation carries everything
upstream of it. They do not add up to the change of the metric.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.models.metrics import Metric
from tvlens.models.pair import HookedPair
from tvlens.models.prompts import Batch
from tvlens.tables import Table

from .atp_star import atp_star, qk_fix
from .directions import Patch, Question, question
from .input_lines import along_inputs
from .nodes import DEFAULT_PARTS, Site, activation_sites
from .patching import exact_activations
from .products import first_order
from .tables import (
    NEURONS_PER_PROMPT,
    Cut,
    Direction,
    Estimator,
    MethodRun,
    attribution_table,
)

__all__ = [
    "ActivationScores",
    "activation_scores",
    "activation_sites",
    "attribute_activations",
    "exact_activations",
]

ROWS_AT_ONCE = 16
"""Prompts of one forward and backward: memory grows with it, scores do not change."""
ByCut = Mapping[Cut, Float[Tensor, "batch ..."]]
NEURONS_AT_RANDOM = 64
"""Neurons outside the largest that get rows per prompt too: an unbiased check against exact."""
ByHook = dict[str, Tensor]
_ESTIMATORS: dict[Estimator, Callable[..., ByHook]] = {
    "first_order": first_order,
    "qk_fix": qk_fix,
    "atp_star": atp_star,
}
ADDITIVE = ("first_order", "ig_inputs")
"""Estimators whose scores of single positions sum to the score of all together."""


@dataclass(frozen=True, eq=False)
class ActivationScores:
    """Scores of every component of some activations.

    Attributes:
        values: Per prompt, all positions together, in the metric's unit.
        run: How they were made.
        positions: Of one position at a time, where asked for. Place 0 is a prompt's first real
            token; places past its end are 0. The sum over positions, in float64, is the score for
            ``first_order`` and ``ig_inputs``, and for ``qk_fix`` of all but keys.
    """

    values: Mapping[Cut, Float[Tensor, "batch layer index"]]
    run: MethodRun
    positions: Mapping[Cut, Float[Tensor, "batch pos layer index"]] | None = None

    def table(self, *, neurons: int | None = NEURONS_PER_PROMPT) -> Table:
        """The attribution table's rows; ``neurons`` get rows per prompt, None for all."""
        return attribution_table(
            self.values, self.run, neurons=neurons, at_random=NEURONS_AT_RANDOM
        )


def attribute_activations(
    hooked: HookedPair,
    batch: Batch,
    metric: Metric,
    *,
    direction: Direction,
    at: str = "",
    parts: Sequence[str] = DEFAULT_PARTS,
    estimator: Estimator = "first_order",
    neurons: int | None = NEURONS_PER_PROMPT,
    mean_over: Batch | None = None,
) -> Table:
    """The estimated score of every component of some activations.

    Args:
        hooked: The two models.
        batch: The prompts; directions with a corrupt prompt take those that have one.
        metric: What is measured.
        direction: What is put where; see ``directions``.
        at: The model of a direction within one model, tuned unless said.
        parts: Which activations; see ``nodes``.
        estimator: How the effect of a patch is estimated.
        neurons: How many neurons get rows per prompt, None for all.
        mean_over: Prompts whose mean ``mean_ablation`` puts in, these unless given.

    Raises:
        PromptError: No prompt has the corrupt prompt that the direction needs.
        HostError: A model lacks a part, or is in training mode.
        MetricError: The metric does not depend on the logits, or its gradient vanishes where it
            would be taken.
    """
    asked = question(hooked, metric, direction, at=at, mean_over=mean_over)
    found = activation_scores(asked, batch, parts=parts, estimator=estimator)
    return found.table(neurons=neurons)


def activation_scores(
    asked: Question,
    batch: Batch,
    *,
    parts: Sequence[str] = DEFAULT_PARTS,
    estimator: Estimator = "first_order",
    by_position: bool = False,
    keep: Callable[[ByCut], None] | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
) -> ActivationScores:
    """The estimated scores as tensors, by position too if asked for.

    Memory: one chunk's activations of ``parts``, and the scores of all prompts.

    Args:
        asked: The direction, from ``question``.
        batch: The prompts.
        parts: Which activations.
        estimator: How the effect of a patch is estimated.
        by_position: Keep the scores of every position, O(prompts * pos * layers * index).
        keep: Called with every chunk's scores by position, which need not be held then.
        rows_at_once: Prompts of one forward and backward.

    Raises:
        TvlensError: As for ``attribute_activations``.
    """
    asked.refuse_vanishing_gradient()
    batch, sites = asked.usable(batch), activation_sites(asked.receiver, parts)
    means, run = asked.means(batch, sites), asked.run(batch, estimator)
    along = None
    if estimator == "ig_inputs":
        along = along_inputs(asked, batch, rows_at_once=rows_at_once)
    made = _ESTIMATORS[estimator] if along is None else along
    width, parts, placed = int(batch.lengths.max()), [], []
    for rows in batch.chunks(rows_at_once):
        patch, scored = asked.patch(rows, means), None
        if by_position or keep is not None:
            apart = _by_cut(patch, sites, made, by_position=True)
            scored = {cut: _from_first_token(t, rows, width) for cut, t in apart.items()}
            placed += [scored] if by_position else []
        if keep is not None and scored is not None:
            keep(scored)
        if scored is not None and estimator in ADDITIVE:
            parts.append({cut: t.double().sum(1) for cut, t in scored.items()})
        else:
            parts.append(_by_cut(patch, sites, made, by_position=False))
    run = run if along is None else replace(run, **along.facts)
    positions = _joined(placed) if by_position else None
    return ActivationScores(_joined(parts), run, positions)


def _by_cut(
    patch: Patch, sites: Sequence[Site], made: Callable[..., ByHook], *, by_position: bool
) -> dict[Cut, Float[Tensor, "batch ..."]]:
    """One chunk's scores: [batch, layer, index], by position [batch, pos, layer, index]."""
    scores = made(patch, sites, by_position=by_position)
    return {
        cut: torch.stack([scores[site.hook] for site in sites if site.cut == cut], dim=-2)
        for cut in dict.fromkeys(site.cut for site in sites)
    }


def _joined(parts: Sequence[Mapping[Cut, Tensor]]) -> dict[Cut, Tensor]:
    return {cut: torch.cat([part[cut] for part in parts]) for cut in parts[0]}


def _from_first_token(
    scores: Float[Tensor, "batch pos layer index"], batch: Batch, width: int
) -> Float[Tensor, "batch width layer index"]:
    """The scores from each prompt's first real token on, 0 past its last."""
    placed = scores.new_zeros(len(scores), width, *scores.shape[2:])
    for row, real in enumerate(batch.mask.bool().to(scores.device)):
        placed[row, : int(real.sum())] = scores[row, real]
    return placed
