"""The stage of grafts: the smallest sets of components that carry the change of the metric.

base, tuning vector, prompts, metric -> curves, grafts
"""

from typing import TYPE_CHECKING

from tvlens.threads import one_thread

from .anchoring import with_direction
from .outputs import Progress, StageOutput
from .plan import StudyPlan
from .prompted import WIDE, base_on_prompts, chosen_device, of_split

if TYPE_CHECKING:
    from tvlens.weights.matching import Pair


def graft_stage(plan: StudyPlan, pair: "Pair", say: Progress) -> StageOutput:
    """Find the smallest sets of components that carry the change of the metric."""
    from tvlens.attribution.gates import GatedModel, gated_weight_scores
    from tvlens.attribution.grafting import graft
    from tvlens.models.metrics import is_anchor, resolve_metric
    from tvlens.models.pair import HookedPair
    from tvlens.weights.vector import tuning_vector

    run = base_on_prompts(plan, pair)
    lens, asked, batch = run.lens, run.asked, run.batch
    metric = resolve_metric(plan.metric, asked)
    splits = {split: of_split(asked, batch, split) for split in ("choose", "judge")}
    found_direction = StageOutput(())
    with one_thread(only_if=lens.d_model < WIDE):
        if is_anchor(metric.name):
            hooked = HookedPair(pair, device=chosen_device(plan))
            metric, found_direction = with_direction(metric, hooked, asked, batch)
            del hooked
        gated = GatedModel.of_vector(lens, tuning_vector(pair))
        say("weights, integrated along the line from base to tuned, by gates")
        scores = gated_weight_scores(gated, batch, metric)
        say("growing sets of components, in and out")
        found = graft(
            gated,
            batch,
            metric,
            scores,
            **splits,
            keep=plan.keep,
            seed=plan.seed,
            names=(pair.base_name, pair.tuned_name),
        )
    return StageOutput(
        (found.curves, found.sets),
        {**found.facts, **found_direction.facts},
        (*run.warnings, *batch.warnings, *found_direction.warnings),
        vectors=found_direction.vectors,
    )
