"""The metric of a study; of an anchor, with the direction that the prompts give it."""

from typing import TYPE_CHECKING

from .outputs import StageOutput
from .prompted import of_split

if TYPE_CHECKING:
    from tvlens.models.metrics import Metric
    from tvlens.models.pair import HookedPair
    from tvlens.models.prompts import Batch, PromptSet


def with_direction(
    metric: "Metric", hooked: "HookedPair", asked: "PromptSet", batch: "Batch"
) -> "tuple[Metric, StageOutput]":
    """The metric itself; an anchor with a direction made of the prompts of ``choose``."""
    from tvlens.models.anchors import anchored
    from tvlens.models.metrics import is_anchor

    if not is_anchor(metric.name):
        return metric, StageOutput(())
    chosen = batch.rows(of_split(asked, batch, "choose"))
    made, name = anchored(metric, hooked, chosen), hooked.tuned_name
    facts = {"anchor": {"hook": made.hook, "gap": made.gap, "prompts": made.prompts}}
    sentence = (
        f"{metric.name} of {name} is the projection on the difference of means at {made.hook}, "
        f"made of {made.prompts} prompts of the split 'choose': on those the tuned model is "
        f"{made.gap:.3g} ahead by construction, so read figures on 'judge'."
    )
    vectors = {"anchor": {name: made.direction.contiguous().cpu()}}
    return made.metric, StageOutput((), facts, (sentence,), vectors=vectors)
