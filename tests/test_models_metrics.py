"""Metrics against their formulas on logits that are written down."""

import math

import pytest
import torch

from tvlens.errors import MetricError
from tvlens.models.metrics import SHIPPED, Metric, Run, default_metric, resolve_metric
from tvlens.models.prompts import Batch, Prompt, PromptSet

FULL = PromptSet((Prompt("a", answer="b", wrong="c"), Prompt("d", answer="e", wrong="f")))
ANSWERED = PromptSet((Prompt("a", answer="b", wrong="c"), Prompt("d", answer="e")))
TEXTS = PromptSet((Prompt("a"),))


@pytest.fixture
def batch() -> Batch:
    return Batch.of_ids([[1, 2], [3, 1, 2]], answers=[[4], [0, 3]], wrongs=[[3], [1]])


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0))


def log_p(logits: torch.Tensor, row: int, position: int, token: int) -> float:
    weights = [math.exp(x) for x in logits[row, position].tolist()]
    return math.log(weights[token] / sum(weights))


def answer_log_p(logits: torch.Tensor) -> list[float]:
    second = log_p(logits, 1, 2, 0) + log_p(logits, 1, 3, 3)
    return [log_p(logits, 0, 1, 4), second]


def test_logit_diff_is_taken_at_the_last_token_of_the_prompt(
    batch: Batch, logits: torch.Tensor
) -> None:
    expected = [logits[0, 1, 4] - logits[0, 1, 3], logits[1, 2, 0] - logits[1, 2, 1]]
    assert SHIPPED["logit_diff"](Run(logits), batch).tolist() == pytest.approx(
        [float(x) for x in expected]
    )


def test_logprob_sums_and_logprob_mean_divides_and_loss_is_its_negative(
    batch: Batch, logits: torch.Tensor
) -> None:
    first, second = answer_log_p(logits)
    run = Run(logits)
    assert SHIPPED["logprob"](run, batch).tolist() == pytest.approx([first, second])
    assert SHIPPED["logprob_mean"](run, batch).tolist() == pytest.approx([first, second / 2])
    assert SHIPPED["loss"](run, batch).tolist() == pytest.approx([-first, -second / 2])


def test_the_loss_of_a_document_covers_every_token_but_the_first(logits: torch.Tensor) -> None:
    batch = Batch.of_ids([[1, 2, 4], [3, 1, 2, 0, 2]])
    expected = -(log_p(logits, 0, 0, 2) + log_p(logits, 0, 1, 4)) / 2
    assert SHIPPED["loss"](Run(logits), batch)[0].item() == pytest.approx(expected)


def test_nothing_at_padding_changes_a_metric(batch: Batch, logits: torch.Tensor) -> None:
    broken = logits.clone()
    broken[0, 3:] = float("nan")
    broken[1, 4:] = float("nan")
    for metric in SHIPPED.values():
        reference = torch.zeros_like(logits)
        plain = metric(Run(logits, reference), batch)
        assert torch.equal(metric(Run(broken, reference), batch), plain), metric.name


def test_kl_is_from_the_reference_to_the_run_and_zero_at_itself(
    batch: Batch, logits: torch.Tensor
) -> None:
    reference = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(1))
    metric = SHIPPED["kl_to_tuned"]
    total = 0.0
    for position in (2, 3):
        for token in range(5):
            truth = log_p(reference, 1, position, token)
            total += math.exp(truth) * (truth - log_p(logits, 1, position, token))
    assert metric(Run(logits, reference), batch)[1].item() == pytest.approx(total / 2, rel=1e-5)
    assert metric(Run(reference, reference), batch).abs().max() == 0
    assert (metric.reference, SHIPPED["kl_to_base"].reference) == ("tuned", "base")


def test_the_default_follows_what_the_prompts_hold() -> None:
    names = [default_metric(prompts).name for prompts in (FULL, ANSWERED, TEXTS)]
    assert names == ["logit_diff", "logprob", "loss"]
    assert resolve_metric(None, FULL).name == "logit_diff"


def own_metric(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    return logits.sum((1, 2))


def test_a_name_a_path_a_callable_and_a_metric_all_resolve(
    batch: Batch, logits: torch.Tensor
) -> None:
    assert resolve_metric("loss", FULL) is SHIPPED["loss"]
    mine = Metric("mine", "nats", "lower", lambda run, batch: run.logits[:, 0, 0])
    assert resolve_metric(mine, TEXTS) is mine
    for given in (own_metric, "tests.test_models_metrics:own_metric"):
        found = resolve_metric(given, TEXTS)
        assert found.name == "own_metric"
        assert torch.equal(found(Run(logits), batch), logits.sum((1, 2)))


@pytest.mark.parametrize("name", ["logit_dif", "no.such.module:f", "tvlens.errors:nothing"])
def test_an_unknown_metric_is_refused(name: str) -> None:
    with pytest.raises(MetricError):
        resolve_metric(name, FULL)


def test_a_metric_that_the_prompts_cannot_serve_is_refused(
    batch: Batch, logits: torch.Tensor
) -> None:
    with pytest.raises(MetricError, match="wrong"):
        resolve_metric("logit_diff", ANSWERED)
    bare = Batch.of_ids([[1, 2], [3, 1, 2]])
    with pytest.raises(MetricError, match="answer"):
        SHIPPED["logprob"](Run(logits), bare)
    with pytest.raises(MetricError, match="tuned"):
        SHIPPED["kl_to_tuned"](Run(logits), batch)
    with pytest.raises(MetricError, match="one number for each"):
        Metric("mean", "nats", "higher", lambda run, batch: run.logits.mean())(Run(logits), batch)
