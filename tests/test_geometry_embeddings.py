"""Labels of embeddings from their d_model products alone, a piece of the vocabulary at a time."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from tests.geometry_pairs import (
    FakeLayout,
    FakePair,
    FakeWeight,
    decaying,
    isotropic,
    tail_direction,
)
from tvlens.components import Component
from tvlens.geometry import Labels, decompose_and_classify
from tvlens.geometry.changes import Factored
from tvlens.geometry.classify import Classifier
from tvlens.geometry.embedding_evidence import token_spikes, tokens_with_half
from tvlens.geometry.matrix_evidence import gain_cosines
from tvlens.geometry.measures import vocabulary
from tvlens.geometry.nulls import random_signs
from tvlens.geometry.spikes import flipped_gram
from tvlens.weights.delta import LowRank

pytestmark = pytest.mark.slow

LAYOUT = FakeLayout()
TOKENS = 400
PARTS = ("W_E", "W_U", "W_pos")
BACKGROUNDS = (0.0, 0.002)


class Pieces(FakePair):
    """A pair that gives an embedding 90 tokens at a time."""

    def slabs(self, component: Component) -> list[FakeWeight]:
        whole = self.weights[component]
        axis = 1 if component.part == "W_U" else 0
        pieces = zip(*(x.split(90, dim=axis) for x in (whole.base, whole.delta)), strict=True)
        return [replace(whole, base=base, delta=delta) for base, delta in pieces]


def _base(seed: int) -> Tensor:
    return decaying(TOKENS, LAYOUT.d_model, torch.Generator().manual_seed(70 + seed))


def _planted(label: str, base: Tensor, generator: torch.Generator) -> Tensor:
    """A change of the rows of ``base`` that earns a label, as long as ``base``."""
    each = torch.randn(len(base), generator=generator)
    gains = {"amplified": base, "attenuated": -base, "flipped": -base}
    if label in gains:
        return gains[label]
    direction = tail_direction(base, generator)
    if label == "rewired":
        direction = torch.linalg.svd(base).Vh[:4].sum(0) / 2
    return torch.outer(each, direction) * base.norm() / each.norm()


def _classified(
    rows: Tensor, base: Tensor, part: str, classifier: Classifier | None = None
) -> Labels:
    turned = part == "W_U"
    base, rows = (x.T.contiguous() if turned else x for x in (base, rows))
    component = Component("embedding", None, None, part)
    pair = Pieces({component: FakeWeight(component, base, rows)}, LAYOUT)
    (found,) = decompose_and_classify([pair], classifier=classifier)
    return found.labels


def _label(rows: Tensor, base: Tensor, part: str, classifier: Classifier | None = None) -> str:
    return _classified(rows, base, part, classifier).labels.to_frame()["label"][0]


def _wrong(size: float, background: float, classifier: Classifier | None = None) -> list[str]:
    wrong = []
    for seed, part in enumerate(PARTS):
        generator = torch.Generator().manual_seed(seed)
        base = _base(seed)
        new = "new_read" if part == "W_U" else "new_write"
        for label in ("amplified", "attenuated", "flipped", "rewired", new):
            scale = 1.5 if label == "flipped" else size
            rows = scale * _planted(label, base, generator)
            rows = rows + isotropic(base, background, generator)
            if (found := _label(rows, base, part, classifier)) != label:
                wrong.append(f"{part}: {label} is {found}")
    return wrong


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("size", [0.02, 0.05])
def test_planted_embeddings_get_their_label(size: float, background: float) -> None:
    assert _wrong(size, background) == []


def test_a_classifier_that_never_says_anything_fails_the_planted_embeddings() -> None:
    def silent(evidence: pd.DataFrame) -> pd.DataFrame:
        return evidence.assign(label="unresolved")

    assert len(_wrong(0.05, 0.002, silent)) == 5 * len(PARTS)


@pytest.mark.slow
@pytest.mark.parametrize("size", [0.002, 0.5])
def test_noise_in_embeddings_stays_unresolved_at_any_size(size: float) -> None:
    found = []
    for seed in range(20):
        base, generator = _base(seed), torch.Generator().manual_seed(seed)
        found.append(_label(isotropic(base, size, generator), base, PARTS[seed % 3]))
    assert np.mean([label == "unresolved" for label in found]) >= 0.95


@pytest.mark.slow
def test_noise_in_a_few_tokens_is_no_structure() -> None:
    found = []
    for seed in range(20):
        base = _base(seed)
        rows = torch.zeros_like(base)
        rows[3:23] = torch.randn(20, LAYOUT.d_model, generator=torch.Generator().manual_seed(seed))
        found.append(_label(rows, base, "W_E"))
    assert np.mean([label == "unresolved" for label in found]) >= 0.95


def test_the_tokens_that_hold_half_of_the_change_are_counted() -> None:
    rows = torch.zeros(TOKENS, LAYOUT.d_model)
    rows[[3, 250, 7, 8], [0, 1, 2, 3]] = torch.tensor([3.0, 2.0, 2.0, 1.0])  # 9 of 18 in the first
    tests = _classified(rows, _base(0), "W_E").tests.to_frame().set_index("statistic")
    row = tests.loc["tokens_with_half_the_change"]
    assert (row["k"], row["effect"]) == (1, 1 / TOKENS)
    assert np.isnan(row["p_value"])
    assert tokens_with_half(torch.tensor([1.0, 2, 3, 4]).double()) == 2


@pytest.mark.parametrize("gain", [0.0, 0.04])
def test_spikes_from_products_are_those_of_the_matrix(gain: float) -> None:
    base, generator = _base(1), torch.Generator().manual_seed(2)
    change = 0.02 * _planted("new_write", base, generator) + isotropic(base, 0.002, generator)
    change = change + gain * base
    component = Component("embedding", None, None, "W_E")
    pair = Pieces({component: FakeWeight(component, base, change)}, LAYOUT)
    whole = vocabulary(pair.slabs(component), "W_E", "both", seed=0)
    own = float(whole.columns["gain"][0])
    found = token_spikes(whole, own)
    rest = change.double() - own * base.double()
    left, values, right = torch.linalg.svd(rest, full_matrices=False)
    count = len(found.shares)
    assert count >= 1
    shares = values[:count].square() / rest.square().sum()
    torch.testing.assert_close(found.shares, shares, rtol=1e-5, atol=0)
    cosines = gain_cosines(left[:, :count], right[:count].T, base)
    torch.testing.assert_close(found.cosines, cosines, rtol=1e-4, atol=1e-6)


def test_other_signs_leave_lengths_and_take_what_entries_share() -> None:
    rows = torch.outer(torch.linspace(1, 3, 200), torch.ones(30)) * 1e-12
    found = flipped_gram(rows, random_signs((200, 30), seed=0))
    torch.testing.assert_close(found.diagonal(), rows.double().square().sum(0), rtol=1e-5, atol=0)
    apart = found - torch.diag(found.diagonal())
    assert float(apart.norm() / found.diagonal().norm()) < 0.5  # 29^.5 with their own signs
    factors = Factored(rows[:, :1], torch.ones(1, 30))
    same = flipped_gram(factors, random_signs((200, 30), seed=0))
    torch.testing.assert_close(same, found, rtol=1e-5, atol=1e-30)


def test_a_factored_change_of_an_embedding_is_new_too() -> None:
    base, generator = _base(0), torch.Generator().manual_seed(4)
    component = Component("embedding", None, None, "W_E")
    factors = LowRank(
        torch.randn(TOKENS, 1, generator=generator), tail_direction(base, generator)[None]
    )
    pair = FakePair({component: FakeWeight(component, base, factors)}, LAYOUT)
    (found,) = decompose_and_classify([pair])
    assert found.labels.labels.to_frame()["label"].tolist() == ["new_write"]


def test_other_signs_of_nothing_are_nothing() -> None:
    rows = torch.zeros(40, 30)
    assert not flipped_gram(rows, random_signs((40, 30), seed=0)).any()
    rows[3] = 1.0
    assert flipped_gram(rows, random_signs((40, 30), seed=0)).isfinite().all()
