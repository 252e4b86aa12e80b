"""What the stages of a plan would refuse, found before any time is spent."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tvlens.errors import StudyError, UnsupportedFormatError
from tvlens.selection import parse_selection
from tvlens.weights.gauge import refuse_canonical
from tvlens.weights.matching import load_pair

from .attributing import words_of
from .combining import check_combine
from .covariances import check_covariances
from .directions import check_replicates
from .plan import StudyPlan, name_of
from .representing import check_represent
from .sweeping import check_sweep, check_swept

if TYPE_CHECKING:
    from tvlens.models.metrics import Metric
    from tvlens.models.prompts import PromptSet
    from tvlens.weights.matching import Pair

GATED = {"attribute", "graft", "sweep", "combine", "represent"}
"""Stages that let parts of a tuning vector into the base, and so must know what a tensor does."""
MEASURING: dict[str, Callable[[StudyPlan], None]] = {
    "sweep": check_sweep,
    "combine": check_combine,
    "represent": check_represent,
}
"""Stages that measure models on tasks or documents, and what finds what each would refuse."""


def check_inputs(plan: StudyPlan) -> None:
    """Find what a later stage would refuse, before any time is spent.

    Raises:
        TvlensError: A prompt file, the metric, a file of texts, a control, the covariances, or a
            classifier or measure of the user's own cannot be used, or two options exclude each
            other.
    """
    if plan.canonical and plan.parent is not None:
        raise StudyError(
            "--canonical and --parent exclude each other: each step would be measured in the "
            "coordinates of its own start, and their sum would mean nothing.",
            hint="Leave --canonical out, or compare the models two by two.",
        )
    from tvlens.models.metrics import resolve_metric
    from tvlens.models.prompts import load_prompts, load_texts

    check_replicates(plan)
    _check_weights_side(plan)
    for spec in plan.controls:
        control = load_pair(plan.base, spec, names=("base", name_of(spec)), scan=False)
        if plan.canonical:
            refuse_canonical(control)
    if {"attribute", "graft"} & set(plan.stages):
        asked = load_prompts(plan.prompts, skip_bad_lines=plan.skip_bad_lines)
        metric = resolve_metric(plan.metric, asked)
        _check_attribution(plan, asked, metric)
    for spec in plan.evaluate.values() if "evaluate" in plan.stages else ():
        load_texts(spec)
    check_measuring(plan)


def check_measuring(plan: StudyPlan) -> None:
    """Find what the stages would refuse that measure models on tasks or documents.

    Raises:
        TvlensError: There are no tasks or documents, they cannot be used, or doses do not fit.
    """
    for stage in plan.stages:
        if stage in MEASURING:
            MEASURING[stage](plan)


def _check_weights_side(plan: StudyPlan) -> None:
    """Find what the decompose stage would refuse of its options."""
    if "decompose" not in plan.stages:
        return
    from tvlens.geometry.own_classifiers import resolved_classifier
    from tvlens.geometry.own_measures import resolved_measures

    check_covariances(plan)
    resolved_classifier(plan.classifier)
    resolved_measures(plan.measures)


def _check_attribution(plan: StudyPlan, asked: "PromptSet", metric: "Metric") -> None:
    """Refuse activations, directions and selections that mean nothing or cannot be asked."""
    if "attribute" not in plan.stages:
        return
    if plan.select:
        parse_selection(plan.select)
    from tvlens.attribution.activations import ADDITIVE
    from tvlens.attribution.exchanges import exchanges, parts_there

    if plan.position and set(ADDITIVE).isdisjoint(plan.estimators):
        raise StudyError(
            f"--position needs an estimator whose scores are sums over positions: "
            f"{', '.join(ADDITIVE)}.",
            hint="Add --estimator first_order.",
        )
    exchanges(
        words_of(plan),
        metric,
        there=parts_there(gated=True),
        prompts=len(asked),
        corrupt=sum(prompt.corrupt is not None for prompt in asked),
    )


def check_pairs(plan: StudyPlan, pairs: "Sequence[Pair]") -> None:
    """Find what a later stage would refuse in the models.

    Raises:
        UnsupportedFormatError: Attribution was asked for a family without a table.
        StudyError: An activation was named that the models do not have.
        TvlensError: The weights cannot be measured in the base's coordinates.
    """
    for pair in pairs if plan.canonical else ():
        refuse_canonical(pair)
    check_swept(plan, pairs)
    for pair in pairs if GATED & set(plan.stages) else ():
        if not pair.layout.listed:
            kind = pair.base.config.get("model_type")
            raise UnsupportedFormatError(
                f"attribution needs to know what a tensor does, and tvlens has no table for the "
                f"family {kind!r}.",
                hint="`tvlens decompose` measures the tuning vector tensor by tensor; a family is "
                "one table in tvlens/weights/families.",
            )
    for pair in pairs if "attribute" in plan.stages else ():
        from tvlens.attribution.exchanges import chosen_parts, parts_there

        chosen_parts(plan.nodes, parts_there(gated=pair.layout.gated), plan.estimators)


def check_vocabularies(plan: StudyPlan, pairs: "Sequence[Pair]") -> None:
    """Refuse vocabularies that a stage which runs the models could not use, before it is reached.

    Raises:
        IncomparableModelsError: A token has another number in base and tuned model.
    """
    if not (GATED | {"evaluate"}) & set(plan.stages):
        return
    from tvlens.models.pair import common_tokens_of

    for pair in pairs:
        common_tokens_of(pair)
