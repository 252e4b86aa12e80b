"""Held-out loss: by hand on logits that are known, and its interval."""

import numpy as np
import pytest
import torch

from tvlens.evaluation.losses import bootstrap_interval, held_out_losses, losses_table
from tvlens.models.prompts import Batch

VOCAB = 5


class _Fixed:
    """A model that gives every next token the probability that its id says."""

    def logits_at(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        p = torch.tensor([0.4, 0.3, 0.2, 0.05, 0.05])
        return p.log().expand(*positions.shape, VOCAB).clone()


def test_the_loss_is_the_mean_surprise_of_the_answer_and_not_of_the_prompt() -> None:
    batch = Batch.of_ids([[3, 3], [4]], answers=[[0, 1], [2, 2, 0]])
    expected = [-(np.log(0.4) + np.log(0.3)) / 2, -(2 * np.log(0.2) + np.log(0.4)) / 3]
    assert held_out_losses(_Fixed(), batch) == pytest.approx(expected, rel=1e-6)  # fp32 logs


def test_texts_a_forward_pass_do_not_change_the_losses() -> None:
    batch = Batch.of_ids([[3], [4, 4, 4], [0]], answers=[[0], [1, 2], [2]])
    whole = held_out_losses(_Fixed(), batch)
    assert held_out_losses(_Fixed(), batch, chunk=1) == pytest.approx(whole, rel=1e-6)


def test_the_table_has_one_row_a_task_with_the_mean_inside_its_interval() -> None:
    tasks = {"a": Batch.of_ids([[3], [3]], answers=[[0], [4]])}
    row = losses_table("base", _Fixed(), tasks).to_frame().iloc[0]
    assert row["n"] == 2
    assert row["value"] == pytest.approx(-(np.log(0.4) + np.log(0.05)) / 2)
    assert row["ci_low"] <= row["value"] <= row["ci_high"]


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for draw in range(200):
        low, high = bootstrap_interval(rng.normal(1.0, 2.0, 60), seed=draw)
        hits += low <= 1.0 <= high
    assert 0.89 <= hits / 200 <= 0.99  # nominal 0.95, binomial sd 0.015


def test_one_text_has_no_interval() -> None:
    assert np.isnan(bootstrap_interval(np.array([1.0]))).all()
