"""Token scores: they sum to the change, and sit where a planted difference works."""

from pathlib import Path

import pytest
import torch

from tests.attribution_pairs import batch, hooked_pair
from tests.gated_tokens import gated_token_scores
from tests.tiny_checkpoints import copy_with, tiny_llama
from tvlens.attribution.weights import attribute_weights, weight_scores
from tvlens.models import SHIPPED, Batch, HookedPair, Metric

LOGIT_DIFF = SHIPPED["logit_diff"]


def token_scores(pair: HookedPair, prompts: Batch, metric: Metric) -> torch.Tensor:
    return weight_scores(pair, prompts, metric).by_token


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_token_scores_equal_the_gradient_of_a_gate_at_every_position(family: str) -> None:
    pair, prompts = hooked_pair(family), batch()
    scores = weight_scores(pair, prompts, LOGIT_DIFF)
    oracle = gated_token_scores(pair, prompts, LOGIT_DIFF, nodes=scores.nodes)
    allowed = 1e-4 * float(oracle.abs().max())  # fp32 sums in another order
    assert torch.allclose(scores.by_token, oracle, atol=allowed)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize("metric", ["logit_diff", "kl_to_tuned"])
def test_token_scores_sum_to_the_change_of_the_metric(family: str, metric: str) -> None:
    pair, prompts = hooked_pair(family), batch()
    scores = token_scores(pair, prompts, SHIPPED[metric])
    ends = [pair.values(model, SHIPPED[metric], prompts) for model in (pair.tuned, pair.base)]
    change = ends[0] - ends[1]
    assert scores.shape == prompts.ids.shape
    # fp32 metrics of two batch layouts
    assert torch.allclose(scores.sum(1).float(), change, atol=2e-4, rtol=2e-3)
    assert (scores[prompts.mask == 0] == 0).all()


@pytest.mark.slow
def test_a_changed_embedding_scores_at_its_token_alone(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][9] += 0.1

    pair = HookedPair((base, copy_with(base, tmp_path / "tuned", edit)))
    prompts = Batch.of_ids([[0, 9, 3, 9], [0, 5], [9, 4]], answers=[[1]] * 3, wrongs=[[2]] * 3)
    scores = token_scores(pair, prompts, LOGIT_DIFF)
    expected = (prompts.ids == 9) & (prompts.mask == 1)
    assert torch.equal(scores != 0, expected)


@pytest.mark.slow
def test_what_comes_after_the_last_token_that_is_read_has_no_score() -> None:
    prompts = batch()
    scores = token_scores(hooked_pair("llama"), prompts, LOGIT_DIFF)
    place = torch.arange(scores.shape[1])
    assert (scores[place >= prompts.prompt_lengths[:, None]] == 0).all()
    assert (scores[place < prompts.prompt_lengths[:, None]] != 0).all()


@pytest.mark.slow
def test_tokens_and_components_share_one_sum() -> None:
    pair, prompts = hooked_pair("llama"), batch()
    table = attribute_weights(pair, prompts, LOGIT_DIFF, estimator="ig", at="path").to_frame()
    disjoint = table[table.kind.isin(["matrix", "norm", "bias", "embedding"])]
    by_component = disjoint.groupby("prompt").score.sum().to_numpy()
    by_token = token_scores(pair, prompts, LOGIT_DIFF).sum(1).numpy()
    assert by_token == pytest.approx(by_component, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_a_prompt_has_the_same_token_scores_alone() -> None:
    pair, prompts = hooked_pair("llama"), batch()
    together = token_scores(pair, prompts, LOGIT_DIFF)
    for row in range(len(prompts)):
        alone = token_scores(pair, prompts.rows([row]), LOGIT_DIFF)[0]
        allowed = 1e-4 * float(alone.abs().max())  # fp32 noise of another matmul shape
        assert torch.allclose(together[row, : len(alone)], alone, atol=allowed)
