"""The stages of a study: each takes a plan and all pairs and yields tables.

    decompose   Pair -> weights, tests, labels, contrasts, measures, directions, readings;
                all pairs -> lineage, overlap
    attribute   HookedPair, prompts, metric -> prompts, attribution, fidelity, findings, roles
    graft       base, tuning vector, prompts, metric -> curves, grafts
    evaluate    models, held-out texts -> evaluation
    sweep       base, tuning vector, controls, tasks -> curves, evaluation, evaluation_items
    combine     base, tuning vectors, controls, tasks -> combinations, disturbance, interference
    represent   base, tuning vector, controls, texts -> representations

A stage is a pure function of its inputs; the runner writes what it returns.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .attributing import attribute_stage
from .combining import combine
from .decomposing import decompose_stage
from .grafting import graft_stage
from .held_out import evaluate_stage
from .outputs import Outputs, Progress, StageOutput
from .plan import StudyPlan
from .prompted import chosen_device
from .representing import represent
from .sweeping import sweep

if TYPE_CHECKING:
    from tvlens.weights.matching import Pair


def sweep_stage(plan: StudyPlan, pairs: "Sequence[Pair]", say: Progress) -> Outputs:
    """Measure tasks along each tuning vector, and along what could stand in its place."""
    known: set[str] = set()
    for pair in pairs:
        found = sweep(plan, pair, say, device=chosen_device(plan), known=known)
        known |= {pair.base_name, pair.tuned_name}
        yield pair.tuned_name, StageOutput(found.tables, found.facts, found.warnings)


def combine_stage(plan: StudyPlan, pairs: "Sequence[Pair]", say: Progress) -> Outputs:
    """Measure tasks over a grid of doses of several tuning vectors, and what could stand in."""
    found = combine(plan, pairs, say, device=chosen_device(plan))
    yield pairs[-1].tuned_name, StageOutput(found.tables, found.facts, found.warnings)


def represent_stage(plan: StudyPlan, pair: "Pair", say: Progress) -> StageOutput:
    """Compare activations on documents: the fine-tune's, random vectors' and controls'."""
    found = represent(plan, pair, say, device=chosen_device(plan))
    return StageOutput((found.table,), found.facts, found.warnings)


def _one_by_one(
    name: str, stage: Callable[[StudyPlan, "Pair", Progress], StageOutput]
) -> "Callable[[StudyPlan, Sequence[Pair], Progress], Outputs]":
    """A stage of single pairs as one of all pairs."""

    def of_all(plan: StudyPlan, pairs: "Sequence[Pair]", say: Progress) -> Outputs:
        for pair in pairs:
            say(f"{name}: {pair.tuned_name}")
            output = stage(plan, pair, say)
            plan = plan.with_sample(output.facts)
            yield pair.tuned_name, output

    return of_all


STAGES: dict[str, Callable[[StudyPlan, "Sequence[Pair]", Progress], Outputs]] = {
    "decompose": decompose_stage,
    "attribute": _one_by_one("attribute", attribute_stage),
    "graft": _one_by_one("graft", graft_stage),
    "evaluate": evaluate_stage,
    "sweep": sweep_stage,
    "combine": combine_stage,
    "represent": _one_by_one("represent", represent_stage),
}
"""What each stage makes of the pairs of a study."""
