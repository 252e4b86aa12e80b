"""Labels of planted changes: named with their sign, and nothing named that is noise."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from tests.geometry_pairs import (
    FakeLayout,
    FakePair,
    FakeWeight,
    base_weights,
    fake_pair,
    isotropic,
    tail_direction,
    within_matrix,
)
from tvlens.components import Component
from tvlens.errors import StudyError
from tvlens.geometry import Labels, classify, decompose
from tvlens.geometry.classify import decide

LAYOUT = FakeLayout()
BACKGROUND = 0.002  # what a short real fine-tune does
W_O = Component("matrix", 0, None, "W_O")
W_OUT = Component("matrix", 0, None, "W_out")
W_GATE = Component("matrix", 0, None, "W_gate")


def _labelled(pair: FakePair) -> Labels:
    return classify(pair, decompose(pair))


def _of(labels: Labels, kind: str, part: str, layer: int = 0) -> pd.DataFrame:
    frame = labels.labels.to_frame()
    chosen = (frame["kind"] == kind) & (frame["part"] == part) & (frame["layer"] == layer)
    return frame[chosen].reset_index(drop=True)


def _head(matrix: Tensor, head: int) -> Tensor:
    return matrix[head * LAYOUT.d_head : (head + 1) * LAYOUT.d_head]


def _scaled_to(change: Tensor, relative: float, like: Tensor) -> Tensor:
    return (change * (relative * like.norm() / change.norm())).float()


def _new_write_of_head(base: Tensor, generator: torch.Generator) -> Tensor:
    """Rank one, orthogonal to everything the head writes."""
    outside = torch.linalg.svd(base.double()).Vh[len(base) :]
    mix = torch.randn(len(outside), generator=generator, dtype=torch.float64)
    weights = torch.randn(len(base), generator=generator, dtype=torch.float64)
    return torch.outer(weights, mix @ outside)


@cache
def _planted_heads(size: float, seed: int) -> Labels:
    """Head 2 amplified, 4 attenuated, 6 writes a new direction, 5 mixes its own, 7 is noise."""
    base = base_weights(LAYOUT, seed)[W_O]
    generator = torch.Generator().manual_seed(100 + seed)
    mixer = torch.randn(LAYOUT.d_head, LAYOUT.d_head, generator=generator)
    changes = {
        2: _head(base, 2),
        4: -_head(base, 4),
        5: (mixer - mixer.T) @ _head(base, 5),
        6: _new_write_of_head(_head(base, 6), generator),
        7: torch.randn(LAYOUT.d_head, LAYOUT.d_model, generator=generator),
    }
    planted = sum(
        within_matrix(LAYOUT, W_O, head, _scaled_to(change, size, _head(base, head)))
        for head, change in changes.items()
    )
    return _labelled(fake_pair(LAYOUT, {W_O: planted}, background=BACKGROUND, seed=seed))


@pytest.mark.slow
@pytest.mark.parametrize("size", [0.02, 0.05])
def test_planted_heads_get_their_label_and_the_others_none(size: float) -> None:
    expected = ["unresolved"] * 8
    expected[2], expected[4], expected[5], expected[6] = (
        "amplified", "attenuated", "rewired", "new_write",
    )  # fmt: skip
    for seed in range(3):
        labels = _planted_heads(size, seed)
        assert _of(labels, "head", "OV")["label"].tolist() == expected
        assert set(_of(labels, "head", "OV", layer=1)["label"]) == {"unresolved"}


@pytest.mark.slow
def test_an_amplified_head_says_why_in_numbers() -> None:
    row = _of(_planted_heads(0.05, 0), "head", "OV").loc[2]
    assert row["component"] == "L0H2.OV"
    assert row["share_amplified"] > 0.95
    assert "+0.05" in row["label_reason"]
    assert "own versus" in row["decided_by"]
    assert row["dominance"] > 0.95


@pytest.mark.slow
def test_a_gain_of_a_shared_value_matrix_amplifies_all_its_query_heads() -> None:
    layout = FakeLayout(n_kv_heads=4)
    component = Component("matrix", 0, None, "W_V")
    base = base_weights(layout)[component]
    columns = slice(layout.d_head, 2 * layout.d_head)
    planted = within_matrix(layout, component, 1, 0.05 * base[:, columns])
    labels = _labelled(fake_pair(layout, {component: planted}, background=BACKGROUND))
    expected = ["unresolved", "unresolved", "amplified", "amplified"] + ["unresolved"] * 4
    assert _of(labels, "head", "OV")["label"].tolist() == expected


def _planted_neurons(size: float, seed: int) -> Labels:
    """W_out neurons 0-19 amplified, 20-39 attenuated, 40-59 one new direction, 60-79 noise."""
    base = base_weights(LAYOUT, seed)[W_OUT]
    generator = torch.Generator().manual_seed(200 + seed)
    length = size * base.norm(dim=1, keepdim=True)
    noise = torch.nn.functional.normalize(torch.randn(base.shape, generator=generator), dim=1)
    signs = 2.0 * torch.randint(0, 2, (20, 1), generator=generator) - 1
    planted = torch.zeros_like(base)
    planted[:20] = size * base[:20]
    planted[20:40] = -size * base[20:40]
    planted[40:60] = signs * length[40:60] * tail_direction(base, generator)
    planted[60:80] = length[60:80] * noise[60:80]
    return _labelled(fake_pair(LAYOUT, {W_OUT: planted}, background=BACKGROUND, seed=seed))


@pytest.mark.slow
def test_planted_neurons_are_recalled_and_noise_is_not_named() -> None:
    right, named, quiet = 0, 0, 0
    for seed in range(3):
        found = _of(_planted_neurons(0.02, seed), "neuron", "W_out")["label"]
        right += int((found[:20] == "amplified").sum() + (found[20:40] == "attenuated").sum())
        right += int((found[40:60] == "new_write").sum())
        named += int((found[60:] != "unresolved").sum())
        quiet += len(found[60:])
    assert right >= 0.95 * 180
    assert named <= 0.05 * quiet


@pytest.mark.slow
def test_reading_neurons_that_share_a_new_direction_are_new_read() -> None:
    base = base_weights(LAYOUT)[W_GATE]
    generator = torch.Generator().manual_seed(3)
    planted = torch.zeros_like(base)
    direction = tail_direction(base.T, generator)
    planted[:, :20] = torch.outer(direction, 0.02 * base[:, :20].norm(dim=0))
    labels = _labelled(fake_pair(LAYOUT, {W_GATE: planted}, background=BACKGROUND))
    found = _of(labels, "neuron", "W_gate")["label"]
    assert (found[:20] == "new_read").all()
    assert (found[20:] == "unresolved").mean() >= 0.98


@pytest.mark.slow
def test_one_neuron_with_a_random_change_carries_no_evidence_of_structure() -> None:
    base = base_weights(LAYOUT)[W_OUT]
    noise = torch.randn(LAYOUT.d_model, generator=torch.Generator().manual_seed(4))
    planted = within_matrix(LAYOUT, W_OUT, 7, _scaled_to(noise, 0.05, base[7]))
    found = _of(_labelled(fake_pair(LAYOUT, {W_OUT: planted})), "neuron", "W_out")
    assert found.loc[7, "label"] == "unresolved"
    assert set(found["label"].drop(7)) == {"unchanged"}


@pytest.mark.slow
def test_whole_matrices_get_their_label() -> None:
    base = base_weights(LAYOUT)
    generator = torch.Generator().manual_seed(5)
    reads = torch.nn.functional.normalize(torch.randn(LAYOUT.d_mlp, generator=generator), dim=0)
    planted = {
        W_O: 0.02 * base[W_O],
        W_OUT: 0.02
        * base[W_OUT].norm()
        * torch.outer(reads, tail_direction(base[W_OUT], generator)),
        W_GATE: 0.02
        * base[W_GATE].norm()
        * torch.outer(tail_direction(base[W_GATE].T, generator), reads),
        Component("matrix", 0, None, "W_Q"): -1.5 * base[Component("matrix", 0, None, "W_Q")],
    }
    frame = _labelled(fake_pair(LAYOUT, planted, background=BACKGROUND)).labels.to_frame()
    found = frame[(frame["kind"] == "matrix")].set_index("component")["label"]
    expected = {"L0.W_O": "amplified", "L0.W_out": "new_write", "L0.W_gate": "new_read"}
    assert {**expected, "L0.W_Q": "flipped"} == {c: found[c] for c in (*expected, "L0.W_Q")}
    assert set(found.drop([*expected, "L0.W_Q"])) == {"unresolved"}


@pytest.mark.slow
@pytest.mark.parametrize("size", [0.002, 0.1, 0.5])
def test_pure_noise_stays_unresolved_at_any_size(size: float) -> None:
    frame = pd.concat(
        [_labelled(fake_pair(LAYOUT, background=size, seed=s)).labels.to_frame() for s in range(2)]
    )
    frame = frame[frame["kind"].isin(["matrix", "head", "neuron"])]
    unresolved = (frame["label"] == "unresolved").groupby(frame["kind"]).mean()
    assert unresolved["head"] == 1  # random factor changes are no attention verdict
    assert unresolved["matrix"] >= 0.95
    assert unresolved["neuron"] >= 0.99
    assert not frame["label"].eq("unchanged").any()


def _stored_in_bf16(scale: float) -> FakePair:
    """A pair whose tuned weights are ``scale`` times the bf16 base, rounded to bf16."""
    weights = {}
    for component, original in base_weights(LAYOUT).items():
        base = original.bfloat16().float()
        delta = (scale * base).bfloat16().float() - base
        ulp = torch.exp2(torch.floor(torch.log2(base.abs().clamp(min=1e-30))) - 7)
        weights[component] = FakeWeight(component, base, delta, ulp.square() / 12)
    return FakePair(weights, LAYOUT)


@pytest.mark.slow
def test_a_round_trip_through_bf16_is_unresolved() -> None:
    weights = {}
    for component, base in base_weights(LAYOUT).items():
        ulp = torch.exp2(torch.floor(torch.log2(base.abs().clamp(min=1e-30))) - 7)
        delta = base.bfloat16().float() - base
        weights[component] = FakeWeight(component, base, delta, ulp.square() / 12)
    labels = _labelled(FakePair(weights, LAYOUT)).labels.to_frame()
    assert set(labels["label"]) == {"unchanged", "unresolved"}
    reasons = labels.loc[labels["label"] == "unresolved", "label_reason"]
    assert reasons.str.contains("energy of rounding").all()


@pytest.mark.slow
def test_gains_in_bf16_appear_where_the_format_can_hold_them() -> None:
    for scale, expected in ((1.001, "unchanged"), (1.02, "amplified")):
        frame = _labelled(_stored_in_bf16(scale)).labels.to_frame()
        tested = frame[frame["kind"].isin(["matrix", "head", "neuron"])]
        assert (tested["label"] == expected).mean() >= 0.99


@pytest.mark.slow
def test_an_unchanged_pair_is_unchanged_everywhere() -> None:
    labels = _labelled(fake_pair(LAYOUT))
    assert set(labels.labels.to_frame()["label"]) == {"unchanged"}
    assert len(labels.tests) == 0


@pytest.mark.slow
def test_biases_say_that_they_are_not_classified() -> None:
    bias, base = Component("bias", 0, None, "b_O"), torch.randn(LAYOUT.d_model)
    pair = FakePair({bias: FakeWeight(bias, base, 0.1 * base)}, LAYOUT)
    row = _labelled(pair).labels.to_frame().set_index("component").loc["L0.b_O"]
    assert row["label"] == "unresolved"
    assert "not classified yet" in row["label_reason"]


@pytest.mark.slow
def test_every_label_has_its_component_once_and_tests_only_what_is_above_the_floor() -> None:
    labels = _planted_heads(0.05, 0)
    frame, tests = labels.labels.to_frame(), labels.tests.to_frame()
    assert frame["component"].is_unique
    assert frame["label_reason"].str.len().min() > 10
    key = ["component", "side", "statistic", "null"]
    assert not tests.duplicated(key).any()
    assert (tests["q_value"] >= tests["p_value"] - 1e-15).all()
    gains = tests[(tests["kind"] == "head") & (tests["statistic"] == "gain")]
    assert set(gains["m"]) == {16}
    assert (gains["ci_low"] < gains["ci_high"]).all()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_labels() -> None:
    first, second = (_labelled(fake_pair(LAYOUT, background=0.1)) for _ in range(2))
    assert first.labels.data.equals(second.labels.data)
    assert first.tests.data.equals(second.tests.data)


@pytest.mark.slow
def test_a_classifier_passed_in_decides() -> None:
    pair = fake_pair(LAYOUT, background=0.01)

    def always_mixed(evidence: pd.DataFrame) -> pd.DataFrame:
        return evidence.assign(label="mixed", label_reason="asked for")

    found = classify(pair, decompose(pair), classifier=always_mixed)
    assert set(found.labels.to_frame()["label"]) == {"mixed"}


def test_a_table_of_another_pair_is_refused() -> None:
    pair = fake_pair(LAYOUT)
    other = decompose(fake_pair(FakeLayout(n_layers=1)))
    with pytest.raises(StudyError, match="no row 'L1"):
        classify(pair, other)


def test_decide_needs_energy_significance_and_dominance() -> None:
    shares = np.array([[0.5, 0.05, 0.3, 0.9], [0.1, 0.0, 0.3, 0.05]])
    significant = np.array([[True, True, True, False], [True, True, True, True]])
    found = decide(shares, significant)
    assert found.winner.tolist() == [0, -1, 0, -1]
    assert found.structured == pytest.approx([0.6, 0.05, 0.6, 0.05])
    assert found.dominance[:3] == pytest.approx([5 / 6, 1, 0.5])


@pytest.mark.slow
def test_controls_enter_the_contrasts_of_classify() -> None:
    pair = fake_pair(LAYOUT, background=0.01)
    found = classify(pair, decompose(pair), controls=[fake_pair(LAYOUT, background=0.01, seed=0)])
    quoted = found.contrasts.where(headline=True).to_frame()
    assert quoted["against"].tolist() == ["minus controls"] * 2
    assert quoted["mean"].tolist() == pytest.approx([0, 0], abs=1e-9)
    assert quoted["sentence"][0] in found._repr_html_()


def test_isotropic_noise_has_the_length_it_says() -> None:
    base = base_weights(LAYOUT)[W_O]
    noise = isotropic(base, 0.1, torch.Generator().manual_seed(0))
    assert float(noise.norm() / base.norm()) == pytest.approx(0.1)


@pytest.mark.slow
def test_a_head_whose_values_read_a_new_direction_is_new_read() -> None:
    component = Component("matrix", 0, None, "W_V")
    base = base_weights(LAYOUT)[component]
    columns = slice(3 * LAYOUT.d_head, 4 * LAYOUT.d_head)
    generator = torch.Generator().manual_seed(8)
    change = _new_write_of_head(base[:, columns].T, generator).T
    planted = within_matrix(LAYOUT, component, 3, _scaled_to(change, 0.05, base[:, columns]))
    labels = _labelled(fake_pair(LAYOUT, {component: planted}, background=BACKGROUND))
    expected = ["unresolved"] * 8
    expected[3] = "new_read"
    assert _of(labels, "head", "OV")["label"].tolist() == expected


@pytest.mark.slow
def test_a_matrix_that_was_zero_in_the_base_is_unresolved_and_has_no_gain() -> None:
    pair = fake_pair(LAYOUT, background=0.01)
    zero = FakeWeight(W_OUT, torch.zeros(192, 96), pair.weights[W_OUT].delta)
    pair = FakePair({**pair.weights, W_OUT: zero}, LAYOUT)
    weights = decompose(pair)
    row = weights.to_frame().set_index("component").loc["L0.W_out"]
    assert row[["gain", "kappa", "e_global", "g_write"]].isna().all()
    found = classify(pair, weights)
    assert set(_of(found, "neuron", "W_out")["label"]) == {"unresolved"}
    assert set(found.contrasts.to_frame()["n_layers"]) == {1}


@pytest.mark.slow
def test_a_single_kv_head_says_that_no_gain_could_be_tested() -> None:
    layout = FakeLayout(n_kv_heads=1, n_layers=1)
    base = base_weights(layout)[W_O]
    row = _of(_labelled(fake_pair(layout, {W_O: 0.05 * base})), "head", "OV").loc[0]
    assert row["label"] == "unresolved"
    assert row["label_reason"].endswith("No gain could be tested.")


@pytest.mark.slow
def test_a_head_whose_values_mix_what_they_already_read_is_rewired() -> None:
    component = Component("matrix", 0, None, "W_V")
    base = base_weights(LAYOUT)[component]
    columns = slice(3 * LAYOUT.d_head, 4 * LAYOUT.d_head)
    first, second = torch.randn(2, LAYOUT.d_head, generator=torch.Generator().manual_seed(9))
    change = base[:, columns] @ (torch.outer(first, second) - torch.outer(second, first))
    planted = within_matrix(LAYOUT, component, 3, _scaled_to(change, 0.05, base[:, columns]))
    labels = _labelled(fake_pair(LAYOUT, {component: planted}, background=BACKGROUND))
    assert _of(labels, "head", "OV").loc[3, "label"] == "rewired"
