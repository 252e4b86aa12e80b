"""How much work it is to measure models on tasks and on documents, in the units of ``work``.

A sweep and a combination run every task on many models: a pass over its texts or, where a model
writes, a pass over its prompts and one a token; between two models the weights are written. Beside
that are the bootstraps of every value and comparison. Representations are compared by a pass of two
models over the documents, sums of products of all activations, and the spectra of these sums.
"""

import math
from collections.abc import Sequence

from tvlens.evaluation.intervals import DRAWS
from tvlens.evaluation.likelihood import ReadyChoices, ReadyDistances, ReadyTexts
from tvlens.evaluation.representations import (
    MEMORY,
    ROWS_AT_ONCE,
    TOKENS,
    TOKENS_AT_ONCE,
    site_bytes,
)
from tvlens.evaluation.suite import Ready
from tvlens.evaluation.tasks import MEASURED
from tvlens.evaluation.writing import ReadyWriting
from tvlens.models.generation import ROWS_AT_ONCE as WRITTEN_AT_ONCE
from tvlens.models.metrics import SHIPPED
from tvlens.models.prompts import Batch
from tvlens.weights.matching import Pair

from . import work
from .combination_samples import splits_of
from .plan import StudyPlan
from .row_counts import Rows
from .task_counts import (
    combine_runs,
    countable,
    representation_sizes,
    represented_models,
    sweep_runs,
    sweep_stand_ins,
    sweep_variants,
)
from .work import Work, added, times

WRITING_WEIGHTS = 2.5
"""Weights with a vector in them and put back, in passes of ``entry``."""
DRAWING = 1.5
"""A random vector as long as another, in passes of ``entry``."""
CALLS_OF_A_WRITTEN_BLOCK = 250
"""Small operations of one block for one token that is written, keys and values kept."""
DRAWING_AN_ITEM = 1.0
"""One item of one bootstrap draw, in passes of ``entry``."""
CALLS_OF_AN_INTERVAL = 150
"""Small operations of a bootstrap interval."""
SPECTRA = 2.0
"""Eigenvalue problems of the width of an activation, for one model and set of tokens."""
CALLS_OF_AN_ACTIVATION = 300
"""Small operations of the measures of one activation of one model, and of its rows."""


def task_work(pair: Pair, tasks: Sequence[Ready], *, d_vocab: int) -> Work:
    """One model on all tasks."""
    return added(*(_one_task(pair, one, d_vocab) for one in countable(tasks)))


def _one_task(pair: Pair, one: Ready, d_vocab: int) -> Work:
    if isinstance(one, ReadyWriting):
        return _writing(pair, one, d_vocab)
    if not isinstance(one, ReadyTexts | ReadyDistances | ReadyChoices):
        return {}
    metric = SHIPPED["logprob" if isinstance(one, ReadyChoices) else "loss"]
    works = []
    for part in one.parts:
        passes = work.passes_of(pair, part, metric, d_vocab=d_vocab)
        works += [passes.work, passes.calls(1.0, 1)]
        if isinstance(one, ReadyDistances):
            logits = int(part.n_scored.sum()) * d_vocab
            works.append({"entry": 16 * work.PASSES_OF_AN_ACTIVATION * logits})
    return added(*works)


def tokens_read(one: Ready) -> int:
    """Tokens of a task's texts or prompts."""
    if isinstance(one, ReadyWriting):
        return sum(map(len, one.ids))
    return sum(int(part.lengths.sum()) for part in getattr(one, "parts", ()))


def _writing(pair: Pair, one: ReadyWriting, d_vocab: int) -> Work:
    """Prompts once, then a token at a time to the limit."""
    layout, new = pair.layout, one.task.spec.max_new_tokens
    inside = work.entries(pair, [c for c in pair.components if c.kind == "matrix"])
    rows, read = len(one.ids), tokens_read(one)
    flops = 2.0 * inside * (read + rows * new) + 2.0 * layout.d_model * d_vocab * rows * (new + 1)
    steps = math.ceil(rows / WRITTEN_AT_ONCE) * (new + 1)
    return {"forward": flops, "call": CALLS_OF_A_WRITTEN_BLOCK * layout.n_layers * steps}


def sweep_work(
    pair: Pair, plan: StudyPlan, tasks: Sequence[Ready], rows: Rows, *, d_vocab: int
) -> Work:
    """All models of a sweep, the vectors that stand in, and the tables.

    Args:
        pair: The pair.
        plan: What is asked.
        tasks: Tokenised.
        rows: Those of single items.
        d_vocab: Rows of the embedding that both models have.
    """
    runs, models = sweep_runs(plan), sweep_variants(plan) + 2
    one = task_work(pair, tasks, d_vocab=d_vocab)
    stands = sweep_stand_ins(plan)
    values = [(len(t.task.items), len(MEASURED[t.task.spec.kind])) for t in countable(tasks)]
    draws = added(*(times(3 * models * count, _bootstrap(items)) for items, count in values))
    return added(
        _loading(pair, models=2),
        times(runs, one),
        times(runs - 2, _moving(pair)),
        times(stands, {"entry": DRAWING * _numbers(pair)}),
        draws,
        {"row": rows.at_most},
    )


def combine_work(
    pair: Pair, plan: StudyPlan, tasks: Sequence[Ready], rows: Rows, *, d_vocab: int
) -> Work:
    """All points of a grid, the parts one by one, what the weights foretell, and the tables.

    Args:
        pair: One of the pairs.
        plan: What is asked.
        tasks: Tokenised.
        rows: Those of single items.
        d_vocab: Rows of the embedding that all models have.
    """
    count = len(plan.tuned)
    runs, parts = combine_runs(pair, plan, tasks)
    known = countable(tasks)
    losses = [one for one in known if one.task.spec.kind == "loss"]
    of_domain = task_work(pair, losses, d_vocab=d_vocab)
    domains = max(1, len({one.task.spec.domain for one in losses}))
    values = [
        (len(one.task.items), len(MEASURED[one.task.spec.kind]) * len(splits_of(one.task)))
        for one in known
    ]
    draws = added(*(times(4 * runs * number, _bootstrap(items)) for items, number in values))
    merged = 1 if plan.method == "task" else 4
    return added(
        _loading(pair, models=1 + count),
        times(runs, added(task_work(pair, tasks, d_vocab=d_vocab), times(merged, _moving(pair)))),
        times(parts / domains, of_domain),
        times(parts, _part(pair)),
        times(count * (plan.draws + len(plan.controls)), {"entry": DRAWING * _numbers(pair)}),
        times(count, _spectra(pair)),
        draws,
        {"row": rows.at_most},
    )


def _part(pair: Pair) -> Work:
    """One matrix in and out, with the doses of all others made anew."""
    calls = work.CALLS_OF_A_COMPONENT + 20 * len(pair.components)
    return {"entry": WRITING_WEIGHTS * _numbers(pair) / max(1, len(pair.components)), "call": calls}


def _spectra(pair: Pair) -> Work:
    """Leading directions of every matrix of a vector."""
    matrices = [c for c in pair.components if c.kind in ("matrix", "embedding")]
    return added(*(work.measured_matrix(pair, component) for component in matrices))


def represent_work(pair: Pair, plan: StudyPlan, batch: Batch, rows: Rows, *, d_vocab: int) -> Work:
    """Passes of two models for every comparison, sums of products, and spectra.

    Args:
        pair: The pair.
        plan: What is asked.
        batch: The documents.
        rows: Those of the table.
        d_vocab: Rows of the embedding that both models have.
    """
    models, layout = represented_models(plan), pair.layout
    one = work.passes_of(pair, batch, SHIPPED["logprob"], d_vocab=d_vocab)
    passes = times(2 * reads(pair), added(one.work, one.calls(1.0, passes_over(batch))))
    tokens, sums, spectra = int(batch.mask.sum()), 0.0, 0.0
    for part, count in representation_sizes(layout).items():
        width = layout.d_head if part == "z" else layout.d_model
        sums += 6.0 * count * width**2 * tokens
        spectra += len(TOKENS) * count * SPECTRA * work.eigen_units(width)
    sites = sum(1 if part == "z" else count for part, count in representation_sizes(layout).items())
    heads = sum(representation_sizes(layout).values())
    draws = times(len(TOKENS) * heads, _bootstrap(len(batch)))
    calls = {"call": CALLS_OF_AN_ACTIVATION * len(TOKENS) * sites}
    each = added(passes, {"product": sums, "eigen": spectra}, draws, calls, _moving(pair))
    drawn = times(plan.draws, {"entry": DRAWING * _numbers(pair)})
    return added(_loading(pair, models=3), times(models, each), drawn, {"row": rows.at_most})


def passes_over(batch: Batch) -> int:
    """Batches that documents are read in."""
    return math.ceil(
        len(batch) / max(1, min(ROWS_AT_ONCE, TOKENS_AT_ONCE // max(1, batch.ids.shape[1])))
    )


def sums_bytes(pair: Pair) -> int:
    """Memory of the sums over all activations."""
    layout = pair.layout
    sizes = representation_sizes(layout)
    heads = sizes["z"] * site_bytes(1, layout.d_head)
    rest = sum(n for part, n in sizes.items() if part != "z")
    return heads + rest * site_bytes(1, layout.d_model)


def reads(pair: Pair) -> int:
    """How often all documents are read, so that the sums of one reading fit."""
    return max(1, math.ceil(sums_bytes(pair) / MEMORY))


def _bootstrap(items: int) -> Work:
    return {"entry": DRAWING_AN_ITEM * DRAWS * items, "call": CALLS_OF_AN_INTERVAL}


def _numbers(pair: Pair) -> int:
    return work.entries(pair, pair.components)


def _moving(pair: Pair) -> Work:
    """A vector into the weights and out again."""
    return {"entry": WRITING_WEIGHTS * _numbers(pair), "call": 60 * len(pair.components)}


def _loading(pair: Pair, *, models: int) -> Work:
    """Reading models and one vector each, and what it takes to start them."""
    one = {"entry": 2 * work.SCANNING * _numbers(pair), "call": work.CALLS_OF_A_START / 2}
    return times(models, one)
