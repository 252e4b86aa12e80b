"""The stage of attribution: estimates for activations and weights, and their exact checks.

HookedPair, prompts, metric -> prompts, attribution, fidelity, findings, roles, circuits
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from tvlens.errors import PromptError, StudyError
from tvlens.selection import parse_selection
from tvlens.tables import Table, concatenated
from tvlens.threads import one_thread

from .anchoring import with_direction
from .outputs import Progress, StageOutput
from .plan import StudyPlan
from .prompted import WIDE, chosen_device, of_split
from .prompts_table import prompts_table

if TYPE_CHECKING:
    from tvlens.attribution.directions import Question
    from tvlens.attribution.edges import EdgeScores
    from tvlens.attribution.exchanges import Exchange, Words
    from tvlens.attribution.gates import GatedModel
    from tvlens.attribution.positions import PositionSeries
    from tvlens.attribution.weights import WeightScores
    from tvlens.models.metrics import Metric
    from tvlens.models.pair import HookedPair
    from tvlens.models.prompts import Batch, PromptSet
    from tvlens.weights.matching import Pair


def attribute_stage(plan: StudyPlan, pair: "Pair", say: Progress) -> StageOutput:
    """Attribute the metric on the prompts to activations and weights, and check the estimates."""
    import torch

    from tvlens.models.metrics import resolve_metric
    from tvlens.models.pair import HookedPair
    from tvlens.models.prompts import load_prompts, tokenised

    hooked = HookedPair(pair, device=chosen_device(plan), dtype=getattr(torch, plan.dtype))
    asked = load_prompts(plan.prompts, skip_bad_lines=plan.skip_bad_lines)
    metric = resolve_metric(plan.metric, asked)
    batch = tokenised(asked, hooked.tokenizer, chat=plan.chat)
    with one_thread(only_if=hooked.base.d_model < WIDE):
        metric, found = with_direction(metric, hooked, asked, batch)
        made = (
            _attributed(plan, hooked, asked, batch, metric, say)
            if plan.dtype == "float32"
            else _scanned(plan, pair, hooked, asked, batch, metric, say)
        )
        copied = _copy_facts(pair, hooked, batch)
    return replace(
        made,
        facts={**made.facts, **copied.facts, **found.facts},
        warnings=(*hooked.warnings, *made.warnings, *copied.warnings, *found.warnings),
        vectors=found.vectors,
    )


def _copy_facts(pair: "Pair", hooked: "HookedPair", batch: "Batch") -> StageOutput:
    """Of models whose weights say that they compute the same: how far their logits are apart."""
    if not pair.load_report.same_function.value or pair.load_report.identical:
        return StageOutput(())
    found = hooked.largest_logit_difference(batch)
    sentence = (
        f"{pair.tuned_name} computes the same function as {pair.base_name}: on the prompts their "
        f"logits differ by {found.difference:.2g} at most, of logits up to {found.size:.2g}."
    )
    facts = {"same_function": {"logit_difference": found.difference, "logit_size": found.size}}
    return StageOutput((), facts, (sentence,))


def _attributed(
    plan: StudyPlan,
    hooked: "HookedPair",
    asked: "PromptSet",
    batch: "Batch",
    metric: Any,
    say: Progress,
) -> StageOutput:
    from tvlens.attribution.tables import NEURONS_PER_PROMPT
    from tvlens.attribution.weights import weight_scores, weight_table

    neurons = None if plan.neurons == "all" else NEURONS_PER_PROMPT
    passing = _activations(plan, hooked, asked, batch, metric, say, neurons=neurons)
    ends, vanishing = _of_weights(hooked, batch, metric, say, neurons=neurons)
    left_out = _vanishing(metric, [*passing.vanishing, *vanishing])
    scores = [*passing.tables, *ends]
    say("weights, integrated along the line from base to tuned")
    integral = weight_scores(hooked, batch, metric, estimator="ig", at="path")
    scores.append(weight_table(integral, hooked, batch, metric, neurons=neurons))
    divided = list(_divided(plan, hooked, hooked, batch, metric, integral, say))
    say("checking estimates against exact patching")
    tables, sample = _checked(plan, hooked, batch, metric, scores)
    tables[0] = concatenated("attribution", [tables[0], *divided], order="score")
    prompt_table = prompts_table(hooked, asked, batch, metric, integral.by_token)
    facts = {**_run_facts(plan, batch, metric), **sample}
    if passing.circuits:
        tables.append(concatenated("edge_circuits", passing.circuits))
    return StageOutput(
        (prompt_table, *tables),
        facts,
        (*_prompt_warnings(plan, asked), *batch.warnings, *passing.warnings, *left_out),
        positions=tuple(passing.positions),
    )


def _scanned(
    plan: StudyPlan,
    pair: "Pair",
    hooked: "HookedPair",
    asked: "PromptSet",
    batch: "Batch",
    metric: Any,
    say: Progress,
) -> StageOutput:
    """The estimates alone, below float32: activations as always, weights by gates."""
    from tvlens.attribution.gates import GatedModel, gated_weight_scores
    from tvlens.attribution.joins import circuits_table, roles_table
    from tvlens.attribution.tables import NEURONS_PER_PROMPT
    from tvlens.attribution.weights import NODE_COUNTS, WEIGHT_ESTIMATES, weight_table
    from tvlens.weights.vector import tuning_vector

    neurons = None if plan.neurons == "all" else NEURONS_PER_PROMPT
    passing = _activations(plan, hooked, asked, batch, metric, say, neurons=neurons)
    gated, tables = GatedModel.of_vector(hooked.base, tuning_vector(pair)), passing.tables
    vanishing = passing.vanishing
    for estimator, at in WEIGHT_ESTIMATES:
        if metric.reference == at:
            vanishing.append(f"weights at {at}")
            continue
        say(f"weights by gates, {estimator.replace('_', ' ')} at {at}")
        nodes = NODE_COUNTS[0] if estimator == "ig" else None
        scores = gated_weight_scores(gated, batch, metric, estimator=estimator, at=at, nodes=nodes)
        tables.append(weight_table(scores, hooked, batch, metric, neurons=neurons))
        if estimator == "ig":
            tables += _divided(plan, hooked, gated, batch, metric, scores, say)
    attribution = concatenated("attribution", tables, order="score")
    circuits = circuits_table(attribution)
    made = [prompts_table(hooked, asked, batch, metric, None), attribution]
    made += [roles_table(attribution), *([] if circuits is None else [circuits])]
    scan = (
        f"attribution is a scan in {plan.dtype}: estimates of which none was checked exactly, "
        "which needs --dtype float32."
    )
    return StageOutput(
        tuple(made),
        _run_facts(plan, batch, metric),
        (
            *(scan, *_prompt_warnings(plan, asked), *batch.warnings, *passing.warnings),
            *_vanishing(metric, vanishing),
        ),
        positions=tuple(passing.positions),
    )


def _run_facts(plan: StudyPlan, batch: "Batch", metric: Any) -> dict[str, Any]:
    return {
        "metric": metric.name,
        "unit": metric.unit,
        "prompts": len(batch),
        "dtype": plan.dtype,
    }


def _divided(
    plan: StudyPlan,
    hooked: "HookedPair",
    models: "HookedPair | GatedModel",
    batch: "Batch",
    metric: Any,
    integral: "WeightScores",
    say: Progress,
) -> Iterator[Table]:
    """The integrated scores divided further, by swap or by gates, as far as that was asked for."""
    from tvlens.attribution.circuits import circuit_scores, circuit_table
    from tvlens.attribution.parts import part_scores, part_table
    from tvlens.attribution.tables import NEURONS_PER_PROMPT
    from tvlens.attribution.weights import method_run

    status = "incomplete" if integral.incomplete else "ok"
    run = method_run(
        integral.method, hooked, batch, metric, nodes=integral.nodes, status=status
    )  # fmt: skip
    if plan.parts:
        say("weights, divided over gains, rewiring and new directions")
        neurons = None if plan.neurons == "all" else NEURONS_PER_PROMPT
        yield part_table(part_scores(models, batch, metric, integral), run, neurons=neurons)
    if plan.circuits:
        say("weights, divided over the circuits of query heads")
        yield circuit_table(circuit_scores(models, batch, metric, integral), run)


def _prompt_warnings(plan: StudyPlan, asked: "PromptSet") -> tuple[str, ...]:
    neutral = "no prompts were given: the shipped neutral texts were used, with the metric loss."
    warnings = (neutral,) if plan.prompts is None else ()
    if asked.skipped:
        left_out = f"{len(asked.skipped)} bad prompt lines were left out: {asked.skipped[0]}"
        warnings = (*warnings, left_out)
    return warnings


class _Passing(NamedTuple):
    """What was made of the activations, and what was not."""

    tables: list[Table]
    positions: "list[PositionSeries]"
    vanishing: list[str]
    warnings: list[str]
    circuits: list[Table]


def _activations(
    plan: StudyPlan,
    hooked: "HookedPair",
    prompts: "PromptSet",
    batch: "Batch",
    metric: "Metric",
    say: Progress,
    *,
    neurons: int | None,
) -> _Passing:
    """Every direction that is asked for by every estimator."""
    from tvlens.attribution.activations import ADDITIVE, activation_scores
    from tvlens.attribution.directions import question
    from tvlens.attribution.exchanges import exchanges
    from tvlens.attribution.nodes import all_parts
    from tvlens.attribution.positions import PositionFile, PositionSeries

    wanted = exchanges(
        words_of(plan),
        metric,
        there=all_parts(hooked.base),
        prompts=len(batch),
        corrupt=sum(len(ids) > 0 for ids in batch.corrupt_ids),
    )
    made = _Passing([], [], wanted.vanishing, wanted.left_out, [])
    for one in wanted.found:
        for estimator in one.estimators:
            say(f"activations, {one.words}, {estimator.replace('_', ' ')}")
            asked = question(hooked, metric, one.direction, at=one.at)
            placed = PositionFile(one.prompts) if plan.position and estimator in ADDITIVE else None
            keep = placed.add if placed is not None else None
            found = activation_scores(asked, batch, parts=one.parts, estimator=estimator, keep=keep)
            made.tables.append(found.table(neurons=neurons))
            if placed is not None:
                made.positions.append(PositionSeries(placed, placed.entry(found.run)))
    _exchange_edges(plan, hooked, prompts, batch, metric, wanted.found, made, say)
    return made


def _exchange_edges(
    plan: StudyPlan,
    hooked: "HookedPair",
    prompts: "PromptSet",
    batch: "Batch",
    metric: "Metric",
    found: "Sequence[Exchange]",
    made: _Passing,
    say: Progress,
) -> None:
    """The edges of every direction where they were asked for, and what few of them carry."""
    from tvlens.attribution.directions import CORRUPTED, question
    from tvlens.attribution.edges import edge_scores

    for one in found:
        asked, scores = question(hooked, metric, one.direction, at=one.at), []
        for estimator in one.of_edges:
            say(f"edges, {one.words}, {estimator.replace('_', ' ')}")
            scores.append(edge_scores(asked, batch, estimator=estimator))
            made.tables.append(scores[-1].table())
        if scores and plan.dtype == "float32" and one.direction in CORRUPTED:
            say(f"circuits of edges, {one.words}")
            _circuits_of_edges(asked, prompts, asked.usable(batch), scores, made, seed=plan.seed)


def _circuits_of_edges(
    asked: "Question",
    prompts: "PromptSet",
    batch: "Batch",
    scores: "Sequence[EdgeScores]",
    made: _Passing,
    *,
    seed: int,
) -> None:
    """Sets of edges within one model; across models all edges do not give the other model."""
    from tvlens.attribution.edge_circuits import edge_circuits

    splits = {split: of_split(prompts, batch, split) for split in ("choose", "judge")}
    try:
        made.circuits.append(edge_circuits(asked, batch, scores, **splits, seed=seed))
    except (PromptError, StudyError) as error:
        made.warnings.append(f"no circuits of edges in {asked.direction} at {asked.at}: {error}")


def words_of(plan: StudyPlan) -> "Words":
    """What a plan says about activations."""
    from tvlens.attribution.exchanges import Words

    return Words(plan.nodes, plan.directions, plan.estimators, plan.edges)


def _of_weights(
    hooked: "HookedPair", batch: "Batch", metric: "Metric", say: Progress, *, neurons: int | None
) -> tuple[list[Table], list[str]]:
    """First order at both ends, but for an end where the gradient vanishes."""
    from tvlens.attribution.weights import weight_scores, weight_table

    tables, left_out = [], []
    for at in ("base", "tuned"):
        if metric.reference == at:
            left_out.append(f"weights at {at}")
            continue
        say(f"weights, first order at {at}")
        scores = weight_scores(hooked, batch, metric, estimator="first_order", at=at)
        tables.append(weight_table(scores, hooked, batch, metric, neurons=neurons))
    return tables, left_out


def _vanishing(metric: "Metric", left_out: Sequence[str]) -> tuple[str, ...]:
    """A sentence on the estimates that a distance to one of the models does not have."""
    if not left_out:
        return ()
    named = ", ".join(name.replace("_", " ") for name in left_out)
    return (
        f"no first-order estimate of {named}: {metric.name} is a distance to the "
        f"{metric.reference} model and is smallest there, so its gradient at that model is zero. "
        "weight_ig, the other side and exact patching are not affected.",
    )


def _checked(
    plan: StudyPlan, hooked: "HookedPair", batch: "Batch", metric: Any, scores: list[Table]
) -> tuple[list[Table], dict[str, Any]]:
    """Exact rows of a sample, the estimates' agreement with them, findings; and its size."""
    from tvlens.attribution.fidelity import check_fidelity
    from tvlens.attribution.findings import findings_table
    from tvlens.attribution.joins import circuits_table, roles_table
    from tvlens.attribution.sampling import (
        CHECKED_PROMPTS,
        FEWER_NODES,
        Sample,
        planned_sample,
        selected,
    )

    only = parse_selection(plan.select) if plan.select else None
    checked = selected(concatenated("attribution", scores), only)
    if plan.check_exact is None:
        sample = planned_sample(
            hooked, batch, metric, checked, seconds=plan.check_seconds, seed=plan.seed
        )
    else:
        prompts = plan.check_prompts or CHECKED_PROMPTS[0]
        sample = Sample(plan.check_exact, plan.check_nodes or FEWER_NODES[-1], prompts)
    exact, fidelity = check_fidelity(
        hooked, batch, metric, checked, seed=plan.seed, **sample._asdict()
    )
    attribution = concatenated("attribution", [*scores, exact], order="score")
    facts = {"check_" + name: size for name, size in sample._asdict().items()}
    tables = [attribution, fidelity, findings_table(attribution), roles_table(attribution)]
    circuits = circuits_table(attribution)
    return [*tables, circuits] if circuits is not None else tables, facts
