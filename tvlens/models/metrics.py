"""What is measured on a run: one number per prompt, in nats or logits.

A metric is called as ``metric(run, batch)`` and must treat prompts as independent rows: one
backward of the sum then gives every prompt's own gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.callables import imported
from tvlens.errors import MetricError

from .prompts import Batch, PromptSet


@dataclass
class Run:
    """What a metric may read.

    Attributes:
        logits: Output of the model that is measured.
        reference_logits: Output of the model to compare with, for metrics that ask for one.
        hooks: Activations by hook name, for metrics that ask for some, at the places of the logits.
    """

    logits: Float[Tensor, "batch pos d_vocab"]
    reference_logits: Float[Tensor, "batch pos d_vocab"] | None = None
    hooks: dict[str, Float[Tensor, "batch pos _"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """A named number per prompt.

    Attributes:
        name: What tables call it.
        unit: ``nats``, ``logits`` or the caller's own.
        better: Which way is good; scores are never flipped by it.
        function: ``f(run, batch) -> Float[Tensor, "batch"]``.
        needs: Prompt fields it reads (``answer``, ``wrong``).
        reference: The model whose logits it compares with, if any.
        answers_only: It reads no logits but those that predict scored tokens, and it finds them
            through ``batch``. Only those are then computed, and the batch it is called with is
            cut to them (``Batch.cut_to_answers``).
        hooks: Hooks of [batch, pos, width] activations that it reads beside the logits, such as
            ``blocks.3.hook_resid_post``.
    """

    name: str
    unit: str
    better: Literal["higher", "lower"]
    function: Callable[[Run, Batch], Tensor]
    needs: tuple[str, ...] = ()
    reference: Literal["base", "tuned"] | None = None
    answers_only: bool = False
    hooks: tuple[str, ...] = ()

    def __call__(self, run: Run, batch: Batch) -> Float[Tensor, " batch"]:
        """The metric of every prompt.

        Raises:
            MetricError: The prompts lack a field, the run an activation, or the result is not one
                number per prompt.
        """
        _require_fields(self, batch)
        if missing := [name for name in self.hooks if name not in run.hooks]:
            raise MetricError(f"{self.name} needs the activation at {missing[0]!r}.")
        if self.reference is not None and run.reference_logits is None:
            raise MetricError(f"{self.name} needs the logits of the {self.reference} model.")
        values = self.function(run, batch)
        if not isinstance(values, Tensor) or values.shape != (len(batch),):
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise MetricError(
                f"{self.name} gave {shape}, expected one number for each of {len(batch)} prompts."
            )
        return values


def _require_fields(metric: Metric, batch: Batch) -> None:
    for name in metric.needs:
        tokens = batch.answer_ids if name == "answer" else batch.wrong_ids
        if any(len(ids) == 0 for ids in tokens):
            raise MetricError(
                f"{metric.name} needs {name!r} on every prompt.",
                hint=f"Add {name!r} to the prompt file or choose another metric.",
            )


def _log_probs_of_next(
    logits: Float[Tensor, "batch pos d_vocab"], ids: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch next"]:
    """log p of the token at position p + 1 given the tokens up to p, in fp32."""
    ahead = logits[:, :-1].float()
    chosen = ahead.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return chosen - ahead.logsumexp(-1)


def _masked_sum(values: Float[Tensor, "batch pos"], mask: Tensor) -> Float[Tensor, " batch"]:
    """Sum over the positions where ``mask`` is true; elsewhere not even a NaN gets through."""
    return reduce(values.masked_fill(~mask, 0.0), "batch pos -> batch", "sum")


def _logit_diff(run: Run, batch: Batch) -> Float[Tensor, " batch"]:
    where = run.logits.device
    rows = torch.arange(len(batch), device=where)
    last = run.logits[rows, batch.last_of_prompt.to(where)].float()
    answer = torch.stack([ids[0] for ids in batch.answer_ids]).to(where)
    wrong = torch.stack([ids[0] for ids in batch.wrong_ids]).to(where)
    return last[rows, answer] - last[rows, wrong]


def _logprob(run: Run, batch: Batch) -> Float[Tensor, " batch"]:
    where = run.logits.device
    scored = batch.scored.to(where)
    return _masked_sum(_log_probs_of_next(run.logits, batch.ids.to(where)), scored[:, 1:])


def _logprob_mean(run: Run, batch: Batch) -> Float[Tensor, " batch"]:
    return _logprob(run, batch) / batch.n_scored.to(run.logits.device)


def _loss(run: Run, batch: Batch) -> Float[Tensor, " batch"]:
    return -_logprob_mean(run, batch)


def mean_at_answers(values: Float[Tensor, "batch pos"], batch: Batch) -> Float[Tensor, " batch"]:
    """The mean of ``values`` over the places that predict scored tokens."""
    scored = batch.scored.to(values.device)
    return _masked_sum(values[:, :-1], scored[:, 1:]) / scored.sum(1)


def _kl(run: Run, batch: Batch) -> Float[Tensor, " batch"]:
    """KL(reference || run) at the positions that predict scored tokens, mean in nats."""
    where = run.logits.device
    if run.reference_logits is None:
        raise MetricError("the KL metrics need reference logits.")
    truth = run.reference_logits[:, :-1].float().to(where).log_softmax(-1)
    here = run.logits[:, :-1].float().log_softmax(-1)
    kl = reduce(truth.exp() * (truth - here), "batch pos d_vocab -> batch pos", "sum")
    return _masked_sum(kl, batch.scored[:, 1:].to(where)) / batch.n_scored.to(where)


SHIPPED: dict[str, Metric] = {
    metric.name: replace(metric, answers_only=True)
    for metric in (
        Metric("logit_diff", "logits", "higher", _logit_diff, needs=("answer", "wrong")),
        Metric("logprob", "nats", "higher", _logprob, needs=("answer",)),
        Metric("logprob_mean", "nats", "higher", _logprob_mean, needs=("answer",)),
        Metric("loss", "nats", "lower", _loss),
        Metric("kl_to_tuned", "nats", "lower", _kl, reference="tuned"),
        Metric("kl_to_base", "nats", "lower", _kl, reference="base"),
    )
}
"""The metrics that have a name."""


ANCHOR, ANCHOR_UNIT = "anchor", "residual"
"""The metric whose direction is made from the two models (``models.anchors``), and its unit."""


def is_anchor(name: str) -> bool:
    """Whether a metric's name is ``anchor``, or ``anchor@LAYER`` for one after that block."""
    return name.partition("@")[0] == ANCHOR


def _no_direction(run: Run, batch: Batch) -> Tensor:
    raise MetricError(
        "the metric anchor has no direction yet: it is made from a base and its fine-tune.",
        hint="In Python: anchor(hooked, batch).metric. tvlens attribute and graft make it "
        "themselves.",
    )


def refuse_vanishing_gradient(metric: Metric, at: str) -> None:
    """Refuse a gradient that is zero by construction.

    Raises:
        MetricError: The metric is a distance to the very run that the gradient is taken at.
    """
    if metric.reference == at:
        raise MetricError(
            f"{metric.name} is a distance to the {at} model and is smallest there, so its "
            "gradient at that model is zero and every first-order score vanishes.",
            hint="Ask from the other model's side, integrate (weight_ig along the path, "
            "layer_integrals over layers), patch exactly, or measure logit_diff or logprob.",
        )


def default_metric(prompts: PromptSet) -> Metric:
    """``logit_diff`` if every prompt has a wrong answer, else ``logprob``, else ``loss``."""
    if prompts.all_have("answer") and prompts.all_have("wrong"):
        return SHIPPED["logit_diff"]
    return SHIPPED["logprob"] if prompts.all_have("answer") else SHIPPED["loss"]


def resolve_metric(
    metric: "str | Metric | Callable[..., Tensor] | None", prompts: PromptSet
) -> Metric:
    """The metric that is meant by a name, ``module:function``, a callable or None.

    Args:
        metric: A plain callable is called as ``f(logits, batch)``.
        prompts: Decides the default and must hold the fields the metric needs.

    Raises:
        MetricError: No such metric, or the prompts lack what it needs.
    """
    if metric is None:
        return default_metric(prompts)
    found = _named(metric) if isinstance(metric, str) else metric
    chosen = found if isinstance(found, Metric) else _wrapped(found)
    for name in chosen.needs:
        if not prompts.all_have(name):
            raise MetricError(
                f"{chosen.name} needs {name!r} on every prompt of {prompts.name!r}.",
                hint=f"Add {name!r} to the prompts or choose another metric.",
            )
    return chosen


def _named(name: str) -> Any:
    if name in SHIPPED:
        return SHIPPED[name]
    if is_anchor(name):
        return Metric(name, ANCHOR_UNIT, "higher", _no_direction, answers_only=True)
    if ":" not in name:
        raise MetricError(
            f"there is no metric {name!r}; there are {', '.join((*SHIPPED, ANCHOR))}.",
            hint="Your own is given as package.module:function.",
        )
    try:
        return imported(name)
    except (ImportError, AttributeError) as error:
        raise MetricError(f"the metric {name!r} cannot be imported: {error}") from error


def _wrapped(function: Any) -> Metric:
    """A plain ``f(logits, batch)`` as a metric."""
    if not callable(function):
        raise MetricError(f"expected a metric, got {type(function).__name__}.")
    called: Any = function
    name = getattr(function, "__name__", type(function).__name__)
    return Metric(name, "metric", "higher", lambda run, batch: called(run.logits, batch))
