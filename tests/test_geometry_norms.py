"""Labels of norms: planted gains, attenuations and channels; shifts and noise stay unresolved."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from tests.geometry_pairs import FakeLayout, FakePair, FakeWeight, fake_pair
from tvlens.components import Component
from tvlens.geometry import classify, decompose, decompose_and_classify
from tvlens.geometry.classify import Classifier
from tvlens.geometry.norm_evidence import joint_gains, single_channels

pytestmark = pytest.mark.slow

LAYOUT = FakeLayout(n_layers=6)
NORMS = [
    Component("norm", layer, None, f"{name}.w") for layer in range(6) for name in ("ln1", "ln2")
]
BACKGROUNDS = (0.0, 0.002)


def _gains(seed: int) -> dict[Component, Tensor]:
    """Gain vectors as models have them: positive, and alike in the channels that stand out."""
    generator = torch.Generator().manual_seed(seed)
    common = 1 + 0.3 * torch.randn(LAYOUT.d_model, generator=generator)
    common[:3] *= 4
    return {c: common + 0.2 * torch.randn(LAYOUT.d_model, generator=generator) for c in NORMS}


def _pair(planted: Mapping[Component, Tensor], background: float, seed: int) -> FakePair:
    generator = torch.Generator().manual_seed(50 + seed)
    weights = {}
    for component, base in _gains(seed).items():
        noise = torch.randn(base.shape, generator=generator)
        delta = noise * (background * base.norm() / noise.norm())
        delta = delta + planted.get(component, torch.zeros_like(base))
        weights[component] = FakeWeight(component, base, delta, (base * 2.0**-24).square() / 12)
    return FakePair(weights, LAYOUT)


def _labels(
    planted: Mapping[Component, Tensor],
    background: float,
    seed: int = 0,
    classifier: Classifier | None = None,
) -> pd.DataFrame:
    (found,) = decompose_and_classify([_pair(planted, background, seed)], classifier=classifier)
    return found.labels.labels.to_frame().set_index("component")


def _channels(base: Tensor, size: float) -> Tensor:
    """Two ordinary channels of a gain vector change, by ``size`` of its length."""
    change = torch.zeros_like(base)
    change[[17, 60]] = torch.tensor([1.0, -1.0])
    return change * (size * base.norm() / 2**0.5)


def _wrong(size: float, background: float, classifier: Classifier | None = None) -> list[str]:
    """What is wrong with the labels of planted norms and of the others, over four seeds."""
    quiet, wrong = [], []
    for seed in range(4):
        base = _gains(seed)
        planted = {
            NORMS[2]: size * base[NORMS[2]],
            NORMS[3]: -size * base[NORMS[3]],
            NORMS[7]: _channels(base[NORMS[7]], size),
            NORMS[9]: -1.5 * base[NORMS[9]],
        }
        found = _labels(planted, background, seed, classifier)["label"]
        expected = ["amplified", "attenuated", "rewired", "flipped"]
        names = [str(c) for c in planted]
        pairs = zip(names, expected, strict=True)
        wrong += [f"{n} is {found[n]}" for n, label in pairs if found[n] != label]
        quiet += found.drop(names).tolist()
    noise = "unresolved" if background else "unchanged"
    if np.mean([label == noise for label in quiet]) < 0.95:
        wrong.append(f"of what is {noise} much is named")
    return wrong


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("size", [0.02, 0.05])
def test_planted_norms_get_their_label_and_the_others_none(size: float, background: float) -> None:
    assert _wrong(size, background) == []


def test_a_classifier_that_never_says_anything_fails_the_planted_norms() -> None:
    def silent(evidence: pd.DataFrame) -> pd.DataFrame:
        return evidence.assign(label="unresolved")

    assert len(_wrong(0.05, 0.002, silent)) == 16


@pytest.mark.slow
@pytest.mark.parametrize("size", [0.002, 0.05, 0.5])
def test_noise_in_norms_stays_unresolved_at_any_size(size: float) -> None:
    labels = pd.concat([_labels({}, size, seed)["label"] for seed in range(10)])
    assert (labels == "unresolved").mean() >= 0.95


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_shift_of_all_channels_is_no_gain_and_says_so(background: float) -> None:
    shift = torch.full((LAYOUT.d_model,), 0.05)
    row = _labels({NORMS[4]: shift}, background).loc[str(NORMS[4])]
    assert row["label"] == "unresolved"
    assert "a shift of all channels" in row["label_reason"]


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_change_along_the_gains_of_another_norm_is_no_own_gain(background: float) -> None:
    other = 0.05 * _gains(0)[NORMS[0]]
    labels = _labels({NORMS[4]: other}, background)
    assert labels.loc[str(NORMS[4]), "label"] == "unresolved"


def test_equal_gains_leave_no_gain_to_test() -> None:
    ones = {c: torch.ones(LAYOUT.d_model) for c in NORMS}
    weights = {c: FakeWeight(c, one, 0.05 * one * (c == NORMS[1])) for c, one in ones.items()}
    pair = FakePair(weights, LAYOUT)
    frame = classify(pair, decompose(pair)).labels.to_frame().set_index("component")
    assert frame.loc[str(NORMS[1]), "label"] == "unresolved"
    assert frame.loc[str(NORMS[1]), "decided_by"].startswith("single channels alone")


def test_an_amplified_and_a_reshaped_norm_say_why_in_numbers() -> None:
    base = _gains(0)
    planted = {NORMS[2]: 0.05 * base[NORMS[2]], NORMS[7]: _channels(base[NORMS[7]], 0.05)}
    frame = _labels(planted, 0.002)
    amplified, reshaped = (frame.loc[str(c)] for c in planted)
    assert "a gain of the base weights, +0.0" in amplified["label_reason"]
    assert amplified["share_amplified"] > 0.95
    assert amplified["decided_by"].startswith("own versus other norms")
    assert "in single channels (2 of them)" in reshaped["label_reason"]


def test_coefficients_and_their_errors_are_those_of_least_squares() -> None:
    generator = torch.Generator().manual_seed(3)
    base, change = torch.randn(2, 4, 30, generator=generator, dtype=torch.float64)
    found = joint_gains(base, change)
    design = torch.cat([torch.ones(1, 30).double(), base]).mT
    for norm in range(4):
        fit = torch.linalg.lstsq(design, change[norm]).solution
        rest = change[norm] - design @ fit
        covariance = torch.linalg.inv(design.mT @ design) * rest.square().sum() / (30 - 5)
        assert float(found.gain[norm]) == pytest.approx(float(fit[1 + norm]), rel=1e-6)
        expected = fit[1:] / covariance.diagonal()[1:].sqrt()
        torch.testing.assert_close(found.t[norm], expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.rest[norm], rest, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("width", [12, 96, 576])
def test_single_channels_of_noise_stand_out_once_in_twenty_norms(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    found = single_channels(torch.randn(2000, width, generator=generator, dtype=torch.float64))
    assert 0.01 <= float((found.p_value < 0.05).mean()) <= 0.07


def test_a_single_channel_is_found_whatever_the_sign_and_only_it() -> None:
    rest = torch.randn(2, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rest[0, 7], rest[1, 8] = 12, -12
    found = single_channels(rest)
    assert found.count.tolist() == [1, 1]
    assert found.energy == pytest.approx([144, 144])
    assert (found.p_value < 1e-6).all()


def test_labels_keep_the_order_of_the_components() -> None:
    pair = fake_pair(FakeLayout(), background=0.01)
    weights = decompose(pair).to_frame()["component"]
    labels = classify(pair, decompose(pair)).labels.to_frame()["component"]
    assert labels.tolist() == [name for name in weights if name in set(labels)]


def test_norms_of_two_widths_are_no_peers() -> None:
    generator = torch.Generator().manual_seed(5)
    parts = [("ln1.w", 96), ("q_norm.w", 12)]
    weights = {}
    for layer in range(4):
        for part, width in parts:
            component = Component("norm", layer, None, part)
            base = 1 + 0.3 * torch.randn(width, generator=generator)
            weights[component] = FakeWeight(component, base, 0.05 * base * (layer == 2))
    pair = FakePair(weights, FakeLayout(n_layers=4))
    found = classify(pair, decompose(pair))
    amplified = found.labels.to_frame().query("label == 'amplified'")["component"]
    assert set(amplified) == {"L2.ln1.w", "L2.q_norm.w"}
    assert set(found.tests.to_frame()["statistic"]) == {"gain", "single_channels"}
