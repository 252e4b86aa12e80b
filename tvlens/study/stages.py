"""The stages of a study: each takes a plan and a pair and returns tables.

    decompose   Pair -> weights, tests, labels
    attribute   HookedPair, prompts, metric -> prompts, attribution, fidelity, findings
    evaluate    models, held-out texts -> evaluation

A stage is a pure function of its inputs; the runner writes what it returns.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ..tables import Table
from ..weights.matching import load_pair
from .plan import StudyPlan, name_of

if TYPE_CHECKING:
    from ..models.pair import HookedPair
    from ..models.prompts import Batch, PromptSet
    from ..weights.matching import Pair

Progress = Callable[[str], None]

PROMPTS_SCHEMA = pa.schema(
    [
        ("prompt", pa.int32()),
        ("tuned", pa.string()),
        ("text", pa.string()),
        ("answer", pa.string()),
        ("wrong", pa.string()),
        ("corrupt", pa.string()),
        ("group", pa.string()),
        ("split", pa.string()),
        ("rendered", pa.string()),
        ("ids", pa.list_(pa.int64())),
        ("answer_start", pa.int32()),
        ("answer_end", pa.int32()),
        ("tokens", pa.list_(pa.string())),
        ("token_scores", pa.list_(pa.float64())),
        ("metric", pa.string()),
        ("metric_base", pa.float64()),
        ("metric_tuned", pa.float64()),
    ]
)


@dataclass(frozen=True)
class StageOutput:
    """What a stage made.

    Attributes:
        tables: To be written whole.
        facts: Small JSON values for the manifest.
        warnings: Sentences for the person who reads the result.
    """

    tables: tuple[Table, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def decompose_stage(plan: StudyPlan, pair: "Pair", say: Progress) -> StageOutput:
    """Measure and classify every component of the tuning vector."""
    from ..geometry.classify import classify
    from ..geometry.decompose import decompose

    weights = decompose(pair)
    say(f"classify: {pair.tuned_name}")
    controls = tuple(
        load_pair(plan.base, spec, names=("base", name_of(spec))) for spec in plan.controls
    )
    labels = classify(pair, weights, controls=controls, seed=plan.seed)
    facts = {"headline": labels.headline}
    return StageOutput((weights, labels.tests, labels.labels), facts)


STAGES: dict[str, Callable[[StudyPlan, "Pair", Progress], StageOutput]] = {
    "decompose": decompose_stage,
}
