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

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from tvlens.errors import StudyError, UnsupportedFormatError
from tvlens.selection import parse_selection
from tvlens.tables import Table, concatenated
from tvlens.threads import one_thread
from tvlens.weights.gauge import canonical, refuse_canonical, removed
from tvlens.weights.matching import load_pair

from .combining import check_combine, combine
from .controls import controls_from
from .covariances import Known, base_covariances, check_covariances, runs_models
from .directions import check_replicates, overlap_tables, written_directions
from .plan import WHOLE_WAY, StudyPlan, name_of
from .prompted import WIDE, base_on_prompts, chosen_device
from .representing import check_represent, represent
from .sweeping import check_sweep, sweep

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from tvlens.attribution.exchanges import Words
    from tvlens.attribution.gates import GatedModel
    from tvlens.attribution.positions import PositionSeries
    from tvlens.attribution.weights import WeightScores
    from tvlens.models.lens import LensModel
    from tvlens.models.metrics import Metric
    from tvlens.models.pair import HookedPair
    from tvlens.models.prompts import Batch, PromptSet
    from tvlens.weights.matching import Pair

Progress = Callable[[str], None]
GATED = {"attribute", "graft", "sweep", "combine", "represent"}
"""Stages that let parts of a tuning vector into the base, and so must know what a tensor does."""

MEASURING: dict[str, Callable[[StudyPlan], None]] = {
    "sweep": check_sweep,
    "combine": check_combine,
    "represent": check_represent,
}
"""Stages that measure models on tasks or documents, and what finds what each would refuse."""

PROMPTS_SCHEMA = pa.schema(
    [
        ("prompt", pa.int32()),
        ("tuned", pa.string()),
        ("text", pa.string()),
        ("answer", pa.string()),
        ("wrong", pa.string()),
        ("corrupt", pa.string()),
        ("corrupt_tokens", pa.list_(pa.string())),
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
        vectors: Tensors that a table names, by the table's name, to be written beside it.
        positions: Scores by position, to be moved into the study; None for a stage without any.
    """

    tables: tuple[Table, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    vectors: Mapping[str, Mapping[str, "Tensor"]] = field(default_factory=dict)
    positions: "tuple[PositionSeries, ...] | None" = None


Outputs = Iterator[tuple[str, StageOutput]]
"""What a stage makes, each under the name of the fine-tune that it belongs to."""


def decompose_stage(plan: StudyPlan, pairs: "Sequence[Pair]", say: Progress) -> Outputs:
    """Measure and classify every component of the tuning vectors; then one against the other."""
    pairs, controls = _canonical(plan, pairs, say), {}
    made: dict[str, StageOutput] = {}
    for group in _of_one_base(pairs):
        found = _canonical(plan, controls_from(plan, group[0]), say)
        controls[group[0].base.folder] = found
        if runs_models(plan):
            say(f"what the matrices of {group[0].base_name} read")
        known = base_covariances(plan, group[0])
        made.update(_decomposed(plan, group, found, known, say))
    yield from ((pair.tuned_name, made[pair.tuned_name]) for pair in pairs)
    lineage = lineage_stage(plan, pairs, say)
    overlaps = overlap_tables(plan, pairs, controls, say)
    yield pairs[-1].tuned_name, replace(lineage, tables=(*lineage.tables, *overlaps))


def _of_one_base(pairs: "Sequence[Pair]") -> "list[list[Pair]]":
    """The pairs by their base, in order: what belongs to a base alone is then worked out once."""
    groups: dict[Path, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.base.folder, []).append(pair)
    return list(groups.values())


def _decomposed(
    plan: StudyPlan,
    pairs: "Sequence[Pair]",
    controls: "Sequence[Pair]",
    known: Known,
    say: Progress,
) -> Outputs:
    """The geometry of fine-tunes of one base."""
    from tvlens.geometry.classify import decompose_and_classify

    facts: dict[str, dict[str, Any]] = {pair.tuned_name: dict(known.facts) for pair in pairs}
    warnings: dict[str, tuple[str, ...]] = {pair.tuned_name: known.warnings for pair in pairs}
    for pair in pairs if plan.canonical else ():
        moved = removed(pair)
        counts = {"neurons": moved.neurons, "heads": moved.heads}
        facts[pair.tuned_name]["canonical"] = counts
        warnings[pair.tuned_name] = (*known.warnings, moved.sentence)
    say(f"decompose and classify: {', '.join(pair.tuned_name for pair in pairs)}")
    found = decompose_and_classify(
        pairs,
        controls=controls,
        covariances=known.covariances,
        classifier=plan.classifier,
        measures=plan.measures,
        seed=plan.seed,
        progress=_blocks_of("decompose", say),
    )
    for pair, geometry in zip(pairs, found, strict=True):
        name, labels = pair.tuned_name, geometry.labels
        say(f"directions: {name}")
        written = written_directions(pair, labels.labels, seed=plan.seed)
        tables = (geometry.weights, labels.tests, labels.labels, labels.contrasts)
        tables += () if labels.measures is None else (labels.measures,)
        yield (
            name,
            StageOutput(
                (*tables, written.directions, written.readings),
                facts[name],
                warnings[name],
                vectors={"directions": written.vectors},
            ),
        )


def _blocks_of(stage: str, say: Progress) -> Callable[[int, int], None]:
    """Says how many blocks are done where that leaves no line behind (``say.passing``)."""
    passing = getattr(say, "passing", None)

    def said(done: int, total: int) -> None:
        if passing is not None:
            passing(f"{stage}: block {done} of {total}")

    return said


def _canonical(plan: StudyPlan, pairs: "Sequence[Pair]", say: Progress) -> "list[Pair]":
    """The pairs, if asked for with their tuned models read in the base's coordinates."""
    if not plan.canonical:
        return list(pairs)
    found = []
    for pair in pairs:
        say(f"finding the base's coordinates for {pair.tuned_name}")
        found.append(canonical(pair))
    return found


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
        metric, found = _with_direction(metric, hooked, asked, batch)
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


def _with_direction(
    metric: "Metric", hooked: "HookedPair", asked: "PromptSet", batch: "Batch"
) -> "tuple[Metric, StageOutput]":
    """The metric itself; an anchor with a direction made of the prompts of ``choose``."""
    from tvlens.models.anchors import anchored
    from tvlens.models.metrics import is_anchor

    if not is_anchor(metric.name):
        return metric, StageOutput(())
    chosen = batch.rows(_of_split(asked, batch, "choose"))
    made, name = anchored(metric, hooked, chosen), hooked.tuned_name
    facts = {"anchor": {"hook": made.hook, "gap": made.gap, "prompts": made.prompts}}
    sentence = (
        f"{metric.name} of {name} is the projection on the difference of means at {made.hook}, "
        f"made of {made.prompts} prompts of the split 'choose': on those the tuned model is "
        f"{made.gap:.3g} ahead by construction, so read figures on 'judge'."
    )
    vectors = {"anchor": {name: made.direction.contiguous().cpu()}}
    return made.metric, StageOutput((), facts, (sentence,), vectors=vectors)


def _of_split(asked: "PromptSet", batch: "Batch", split: str) -> list[int]:
    """The rows of a batch whose prompts are of a split."""
    return [row for row, number in enumerate(batch.numbers) if asked[number].split == split]


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
    splits = {split: _of_split(asked, batch, split) for split in ("choose", "judge")}
    found_direction = StageOutput(())
    with one_thread(only_if=lens.d_model < WIDE):
        if is_anchor(metric.name):
            hooked = HookedPair(pair, device=chosen_device(plan))
            metric, found_direction = _with_direction(metric, hooked, asked, batch)
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
    passing = _activations(plan, hooked, batch, metric, say, neurons=neurons)
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
    prompt_table = _prompts_table(hooked, asked, batch, metric, integral.by_token)
    facts = {**_run_facts(plan, batch, metric), **sample}
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
    passing = _activations(plan, hooked, batch, metric, say, neurons=neurons)
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
    made = [_prompts_table(hooked, asked, batch, metric, None), attribution]
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


def _activations(
    plan: StudyPlan,
    hooked: "HookedPair",
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
    made = _Passing([], [], wanted.vanishing, wanted.left_out)
    for one, estimator in itertools.product(wanted.found, plan.estimators):
        say(f"activations, {one.words}, {estimator.replace('_', ' ')}")
        asked = question(hooked, metric, one.direction, at=one.at)
        placed = PositionFile(one.prompts) if plan.position and estimator in ADDITIVE else None
        keep = placed.add if placed is not None else None
        found = activation_scores(asked, batch, parts=one.parts, estimator=estimator, keep=keep)
        made.tables.append(found.table(neurons=neurons))
        if placed is not None:
            made.positions.append(PositionSeries(placed, placed.entry(found.run)))
    return made


def words_of(plan: StudyPlan) -> "Words":
    """What a plan says about activations."""
    from tvlens.attribution.exchanges import Words

    return Words(plan.nodes, plan.directions, plan.estimators)


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


def _prompts_table(
    hooked: "HookedPair",
    asked: "PromptSet",
    batch: "Batch",
    metric: Any,
    scores: "Float[Tensor, 'prompt pos'] | None",
) -> Table:
    """Each prompt as the models read it, its metric at both ends, and its tokens' scores if any."""
    prompts = [asked[number] for number in batch.numbers]
    lengths = batch.mask.sum(1).tolist()
    ids = [row[:n].tolist() for row, n in zip(batch.ids, lengths, strict=True)]
    decode = hooked.tokenizer.decode if hooked.tokenizer is not None else str
    starts = batch.prompt_lengths.tolist()
    columns: dict[str, list[Any]] = {
        "prompt": batch.numbers,
        "tuned": [hooked.tuned_name] * len(batch),
        "text": [p.prompt for p in prompts],
        "answer": [p.answer for p in prompts],
        "wrong": [p.wrong for p in prompts],
        "corrupt": [p.corrupt for p in prompts],
        "corrupt_tokens": [
            [decode([i]) for i in ids.tolist()] if len(ids) else None for ids in batch.corrupt_ids
        ],
        "group": [p.group for p in prompts],
        "split": [p.split for p in prompts],
        "rendered": list(batch.texts),
        "ids": ids,
        "answer_start": starts,
        "answer_end": [s + len(a) for s, a in zip(starts, batch.answer_ids, strict=True)],
        "tokens": [[decode([i]) for i in row] for row in ids],
        "token_scores": [None] * len(batch)
        if scores is None
        else [row[:n].tolist() for row, n in zip(scores, lengths, strict=True)],
        "metric": [metric.name] * len(batch),
        "metric_base": _values(hooked, hooked.base, metric, batch),
        "metric_tuned": _values(hooked, hooked.tuned, metric, batch),
    }
    return Table.of("prompts", PROMPTS_SCHEMA, columns)


def _values(hooked: "HookedPair", lens: "LensModel", metric: Any, batch: "Batch") -> list[float]:
    from tvlens.attribution.weights import chunks

    parts = chunks(batch, lens.d_vocab)
    return [value for part in parts for value in hooked.values(lens, metric, part).tolist()]


def lineage_stage(plan: StudyPlan, pairs: "Sequence[Pair]", say: Progress) -> StageOutput:
    """With a parent: how each whole way from the base divides into its two steps."""
    if plan.parent is None:
        return StageOutput(())
    from tvlens.weights.steps import detour_warning, lineage_table

    first = pairs[0]
    seconds = [pair for pair in pairs if pair.base_name == first.tuned_name]
    say(f"lineage: {first.base_name} -> {first.tuned_name} -> ...")
    tables = [lineage_table(first, second) for second in seconds]
    warnings = (detour_warning(table) for table in tables)
    return StageOutput((concatenated("lineage", tables),), warnings=tuple(filter(None, warnings)))


def evaluate_stage(plan: StudyPlan, pairs: "Sequence[Pair]", say: Progress) -> Outputs:
    """Held-out loss per domain of the base, the fine-tunes and the controls, each model once."""
    from tvlens.evaluation.losses import losses_table
    from tvlens.models.lens import LensModel
    from tvlens.models.pair import common_tokens_of, tokenizer_in
    from tvlens.models.prompts import load_texts, tokenised

    measured = [pair for pair in pairs if not pair.tuned_name.endswith(WHOLE_WAY)]
    for spec in plan.controls:
        measured.append(load_pair(plan.base, spec, names=("base", name_of(spec)), scan=False))
    common = [common_tokens_of(pair) for pair in measured]
    base = measured[0].base.folder
    base_first = any(tokens.folders[0] == base for tokens in common)
    tokenizer = tokenizer_in((base, *common[0].folders) if base_first else common[0].folders)
    tasks = {
        task: tokenised(load_texts(spec), tokenizer, chat=plan.chat)
        for task, spec in plan.evaluate.items()
    }
    models: dict[str, tuple[Path, Path | None]] = {"base": (base, None)}
    for pair in measured:
        adapter = pair.tuned.folder if pair.adapter else None
        models[pair.tuned_name] = (pair.base.folder if adapter else pair.tuned.folder, adapter)
    made = []
    for name, (folder, adapter) in models.items():
        say(f"held-out losses of {name}")
        lens = LensModel.load(folder, adapter=adapter, device=chosen_device(plan))
        made.append(losses_table(name, lens, tasks, seed=plan.seed))
    warnings = tuple(sentence for tokens in common for sentence in tokens.warnings)
    output = StageOutput((concatenated("evaluation", made),), warnings=warnings)
    yield pairs[-1].tuned_name, output


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
