"""What a comparison would do, from headers alone: tensors, rows, bytes, seconds, memory.

Nothing of a weight is read (``--parents`` reads a sample of rows and says how many), so a 70B is
inspected as fast as the demo. The shape of what ``inspection`` gives is stable:

    base, tuned         names
    family, shape       the family's table and the model's numbers
    parameters          numbers of the model
    tensors             number of tensors by what becomes of them
    not_compared        a sentence a tensor that no analysis covers
    vocabulary          how embedding rows are matched, a sentence
    config_differences  a sentence each
    warnings            sentences
    bytes               {base, tuned, total} of the tensors as stored
    prompts             {name, prompts, tokens, longest, scored, corrupt, chat, metric, unit,
                        warnings}, or {name, prompts, problem}: why they cannot be run
    tasks               {tasks, items, tokens, warnings} of the tasks, None without
    texts               {name, documents, tokens} of the documents, None without
    stages              by name (match, decompose, classify, directions, covariances, attribute,
                        graft, evaluate, sweep, represent, combine):
        bytes_read          all passes over the files together
        seconds             {expected, low, high}
        peak_memory_bytes   of the whole process
        tables              by name: {rows} where the headers decide, else {at_least, at_most};
                            ``by`` splits what is exact by kind or method
        positions           {tensors, bytes} of ``positions/``, with ``position`` alone
        cannot_run          instead of all these: why the stage would be refused
    seconds             {expected, low, high} of all stages
    parents             with ``--parents`` alone: what ``parent_ranking`` gives

Seconds are counts of operations times rates measured on the spot, of a core that nothing else
uses. ``low`` and ``high`` are a factor of 2 away; ``high`` also holds the most nodes an
integral may need, and a slow disk.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from tvlens.errors import TvlensError
from tvlens.evaluation.suite import ready, warnings_of
from tvlens.evaluation.tasks import load_tasks
from tvlens.models.metrics import SHIPPED, resolve_metric
from tvlens.models.pair import common_tokens_of, tokenizer_in
from tvlens.models.prompts import Batch, PromptSet, load_prompts, load_texts, tokenised
from tvlens.weights.lineage import Likeness, likeness, told_apart
from tvlens.weights.matching import Pair, load_pair
from tvlens.weights.sources.opening import open_source

from .combining import one_vocabulary
from .forecast import (
    Forecast,
    Measuring,
    Prompted,
    asked_of,
    attribution_side,
    evaluation_side,
    measuring_side,
    total_seconds,
    weights_side,
)
from .plan import StudyPlan
from .prompted import WIDE, chosen_device
from .rates import Rates, measured_rates
from .refusals import MEASURING, check_measuring, check_pairs
from .task_counts import countable
from .task_work import tokens_read
from .work import entries, stored_bytes

PROMPTED = {"attribute", "graft", "evaluate"}
"""Stages that run the models on the prompts, and on held-out texts of domains."""
SIZES = ("n_layers", "n_heads", "n_kv_heads", "d_head", "d_model", "d_mlp", "d_vocab")


def inspection(
    base: str,
    tuned: str,
    *,
    beside: Sequence[str] = (),
    rates: Rates | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What ``tvlens compare`` of the two would read, compare, take and write; see the module.

    Args:
        base: Specification of the base.
        tuned: Specification of the fine-tune or adapter.
        beside: Fine-tunes of the same base that ``tuned`` is combined with, in the stage
            ``combine``; ``tuned_names`` then names them all, ``tuned`` last.
        rates: Seconds a unit of each operation; measured here where None.
        options: Options of the study, as in ``StudyPlan``: ``prompts``, ``metric``, ``stages``...

    Raises:
        TvlensError: The two cannot be compared, or prompts, metric, tasks or documents cannot be
            used.
    """
    together = StudyPlan(base=base, tuned=(*beside, tuned), **options)
    plan = together.model_copy(update={"tuned": (tuned,), "tuned_names": together.names[-1:]})
    check_measuring(together)
    pair = load_pair(base, tuned, names=("base", plan.names[0]), scan=False, peek=True)
    asked = _asked_prompts(plan)
    rates = rates or measured_rates(chosen_device(plan), wide=pair.layout.d_model >= WIDE)
    stages: dict[str, Forecast] = weights_side(pair, plan, rates)
    refused: dict[str, str] = {}
    prompts: dict[str, Any] | None = None
    if asked is not None:
        prompts, found, refused = _prompted_stages(pair, plan, asked, rates)
        stages |= found
    measured = _measured_stages(pair, together, rates)
    stages, refused = {**stages, **measured.stages}, {**refused, **measured.refused}
    return {
        **_described(pair),
        "prompts": prompts,
        "tasks": measured.tasks,
        "texts": measured.texts,
        "stages": {
            **{name: stage.to_dict() for name, stage in stages.items()},
            **{name: {"cannot_run": sentence} for name, sentence in refused.items()},
        },
        "seconds": total_seconds([*stages.values()]).to_dict(),
    }


def _asked_prompts(plan: StudyPlan) -> PromptSet | None:
    """The prompts of the stages that run models, None where there is no such stage."""
    if PROMPTED.isdisjoint(plan.stages):
        return None
    asked = load_prompts(plan.prompts, skip_bad_lines=plan.skip_bad_lines)
    resolve_metric(plan.metric, asked)
    return asked


def _prompted_stages(
    pair: Pair, plan: StudyPlan, asked: PromptSet, rates: Rates
) -> tuple[dict[str, Any], dict[str, Forecast], dict[str, str]]:
    """The prompts as they would be read, the stages that run on them, and those that cannot."""
    wanted = [name for name in plan.stages if name in PROMPTED]
    known: dict[str, Any] = {"name": asked.name, "prompts": len(asked)}
    try:
        check_pairs(plan, [pair])
        common = common_tokens_of(pair)
        encode = partial(tokenised, tokenizer=tokenizer_in(common.folders), chat=plan.chat)
        batch = encode(asked)
        texts = {task: encode(load_texts(spec)) for task, spec in plan.evaluate.items()}
    except TvlensError as error:
        return {**known, "problem": str(error)}, {}, dict.fromkeys(wanted, str(error))
    prompted = Prompted(batch, resolve_metric(plan.metric, asked), common.size)
    found = attribution_side(pair, plan, prompted, rates)
    found |= evaluation_side(pair, plan, texts, SHIPPED["loss"], rates)
    warnings = [*common.warnings, *batch.warnings, *_left_out(asked)]
    if "attribute" in plan.stages:
        warnings += asked_of(plan, batch, prompted.metric).left_out(pair.layout)
    return {**known, **_counted(prompted), "warnings": warnings}, found, {}


class _Measured(NamedTuple):
    """What is known of tasks and documents, the stages that run on them, and those that cannot."""

    tasks: dict[str, Any] | None
    texts: dict[str, Any] | None
    stages: dict[str, Forecast]
    refused: dict[str, str]


def _measured_stages(pair: Pair, plan: StudyPlan, rates: Rates) -> _Measured:
    """The stages that measure models on tasks and documents, of all fine-tunes of ``plan``."""
    wanted = [name for name in plan.stages if name in MEASURING]
    if not wanted:
        return _Measured(None, None, {}, {})
    names = ["base", *plan.names]
    try:
        others = [
            load_pair(plan.base, spec, names=("base", name), scan=False, peek=True)
            for spec, name in zip(plan.tuned[:-1], names[1:], strict=False)
        ]
        check_pairs(plan, [*others, pair])
        common = one_vocabulary([*others, pair])[-1]
        tokenizer = tokenizer_in(common.folders)
        asked = Measuring(
            ready(load_tasks(plan.tasks), tokenizer, chat=plan.chat) if plan.tasks else [],
            _documents(plan, tokenizer),
            common.size,
        )
    except TvlensError as error:
        return _Measured(None, None, {}, dict.fromkeys(wanted, str(error)))
    found = measuring_side(pair, plan, asked, rates)
    return _Measured(_counted_tasks(asked), _counted_texts(plan, asked.texts), found, {})


def _documents(plan: StudyPlan, tokenizer: Any) -> Batch | None:
    if plan.texts is None:
        return None
    texts = load_texts(plan.texts, skip_bad_lines=plan.skip_bad_lines)
    return tokenised(texts, tokenizer, chat=plan.chat)


def _counted_tasks(asked: Measuring) -> dict[str, Any] | None:
    if not asked.tasks:
        return None
    known = countable(asked.tasks)
    left = [one.task.spec.name for one in asked.tasks if one not in known]
    sentence = "is run by lm-eval, which alone knows its documents: no time or row counts it."
    return {
        "tasks": len(asked.tasks),
        "items": sum(len(one.task.items) for one in known),
        "tokens": sum(map(tokens_read, known)),
        "warnings": [*warnings_of(asked.tasks), *(f"{name} {sentence}" for name in left)],
    }


def _counted_texts(plan: StudyPlan, batch: Batch | None) -> dict[str, Any] | None:
    if batch is None:
        return None
    return {"name": plan.texts, "documents": len(batch), "tokens": int(batch.lengths.sum())}


def _left_out(asked: PromptSet) -> list[str]:
    if not asked.skipped:
        return []
    return [f"{len(asked.skipped)} bad prompt lines are left out: {'; '.join(asked.skipped)}."]


def _counted(prompted: Prompted) -> dict[str, Any]:
    batch, metric = prompted.batch, prompted.metric
    return {
        "tokens": int(batch.lengths.sum()),
        "longest": int(batch.lengths.max()),
        "scored": int(batch.n_scored.sum()),
        "corrupt": sum(len(ids) > 0 for ids in batch.corrupt_ids),
        "chat": batch.chat,
        "metric": metric.name,
        "unit": metric.unit,
    }


def _described(pair: Pair) -> dict[str, Any]:
    """What the headers and configs say about the two models."""
    report, numbers = pair.load_report, pair.layout
    return {
        "base": pair.base.name,
        "tuned": pair.tuned.name,
        "family": numbers.family,
        "shape": {
            name: getattr(numbers, name) for name in SIZES if numbers.listed or name == "n_layers"
        },
        "parameters": entries(pair, pair.components),
        "tensors": report.counts,
        "not_compared": [
            f"{match.base or match.tuned}: {match.status}. {match.reason}".rstrip()
            for match in report.tensors
            if match.status in ("only_in_base", "only_in_tuned", "refused")
        ],
        "vocabulary": (report.vocabulary or {}).get("sentence", "that of the base"),
        "config_differences": [
            f"{found.field}: {found.base!r} in base, {found.tuned!r} in tuned ({found.effect})"
            for found in report.config_differences
        ],
        "warnings": report.warnings,
        "bytes": dict(zip(("base", "tuned", "total"), _bytes(pair), strict=True)),
    }


def _bytes(pair: Pair) -> tuple[int, int, int]:
    base, tuned = stored_bytes(pair)
    return base, tuned, base + tuned


def parent_ranking(tuned: str, candidates: Sequence[str]) -> dict[str, Any]:
    """Which of some models is likeliest the parent of another: a row of evidence for each.

    Args:
        tuned: The model whose parent is asked for.
        candidates: Model specifications; those that cannot be compared get the reason instead.

    Raises:
        TvlensError: ``tuned`` cannot be read.
    """
    open_source(tuned)
    found: list[Likeness] = []
    refused = []
    for spec in dict.fromkeys(candidates):
        try:
            found.append(
                likeness(load_pair(spec, tuned, names=(spec, tuned), scan=False, peek=True))
            )
        except TvlensError as error:
            refused.append({"candidate": spec, "verdict": "refused", "reason": str(error)})
    found.sort(key=lambda candidate: candidate.distance)
    rivals = [other.base for other in found[1:] if not _apart(found[0], other)]
    return {
        "candidates": [*(candidate.to_dict() for candidate in found), *refused],
        "likeliest": found[0].base if found and not rivals and not found[0].unlike else None,
        "sentence": _ranking_sentence(tuned, found, rivals),
    }


def _apart(nearest: Likeness, other: Likeness) -> bool:
    """Whether the distance decides between two candidates, by how far they are from each other."""
    names = nearest.base, other.base
    try:
        between = likeness(load_pair(*names, names=names, scan=False, peek=True))
    except TvlensError:
        return True  # each can be compared with the tuned model, but they not with each other
    return told_apart(nearest.distance, other.distance, between.distance)


def _ranking_sentence(tuned: str, found: list[Likeness], rivals: list[str]) -> str:
    if not found or found[0].verdict == "implausible":
        return f"None of the candidates looks like the parent of {tuned}."
    if found[0].unlike:
        return found[0].warning
    if rivals:
        return (
            f"{found[0].base} and {', '.join(rivals)} cannot be told apart as parents of {tuned}: "
            "the changes have too much in common."
        )
    if found[1:]:
        return f"{found[0].base} is the likeliest parent of {tuned} among the candidates."
    return f"{found[0].base} looks like a parent of {tuned}; name others to compare it with."
