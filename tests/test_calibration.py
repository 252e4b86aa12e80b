"""Whether the labels can be believed: planted suites, nulls and storage (docs/calibration.md).

The thin slices run on single layers of the demo models, the deep ones on SmolLM2-135M, whose
fine-tunes examples/real_models makes.
"""

from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.gauge_copies import ALL, saved_copy
from tests.tiny_checkpoints import copy_with, tiny_adapter

pytestmark = pytest.mark.slow

NARROW = ("new, rank 1", "new, rank 4", "mixture")
"""96 dimensions cannot tell one direction's alignment from chance (sd .17): docs say how often."""


@pytest.fixture(scope="module")
def layer():
    from tests.calibration import DEMO
    from tests.planted_suites import ground_of

    return ground_of(DEMO.pair(), 5)


@pytest.fixture(scope="module")
def heads(layer) -> pd.DataFrame:
    from tests.planted_suites import evidence_of

    return evidence_of("heads", layer, 20, backgrounds=("isotropic", "control"), sizes=(0.05,))


@pytest.fixture(scope="module")
def neurons(layer) -> pd.DataFrame:
    from tests.planted_suites import evidence_of

    return evidence_of("neurons", layer, 20, backgrounds=("isotropic", "control"), sizes=(0.02,))


def test_planted_heads_are_called_what_they_are(heads: pd.DataFrame) -> None:
    from tests.planted_suites import called, missed_bars

    assert missed_bars(called(heads)) == []


def test_planted_neurons_are_called_what_they_are(neurons: pd.DataFrame) -> None:
    from tests.planted_suites import GAINS, called, missed_bars

    calls = called(neurons)
    assert missed_bars(calls, without=NARROW) == []
    narrow = calls[calls["plant"].isin(NARROW)]
    assert narrow["label"].isin(GAINS).mean() <= 0.01


@pytest.mark.parametrize("name", ["always_unresolved", "by_raw_cosine"])
def test_a_classifier_without_judgement_fails_the_same_suites(
    heads: pd.DataFrame, neurons: pd.DataFrame, name: str
) -> None:
    from tests import planted_suites

    classifier = getattr(planted_suites, name)
    for found in (heads, neurons):
        calls = planted_suites.called(found, classifier)
        assert planted_suites.missed_bars(calls, without=NARROW)


def test_a_flipped_sign_of_the_gain_fails_the_suite(heads: pd.DataFrame) -> None:
    from tests.planted_suites import called, missed_bars

    assert missed_bars(called(heads.assign(gain=-heads["gain"])))


@pytest.mark.slow
def test_planted_matrices_are_called_what_they_are(layer) -> None:
    from tests.planted_suites import called, evidence_of, missed_bars

    found = evidence_of("matrices", layer, 20, backgrounds=("isotropic",), sizes=(0.05,))
    assert missed_bars(called(found), without=NARROW) == []


@pytest.mark.parametrize("size", [0.002, 0.5])
def test_random_factors_of_heads_are_no_verdict_beside_one_that_is(layer, size: float) -> None:
    from tests.null_suites import factor_noise

    calls = factor_noise([layer], size, 20)
    assert calls.loc[calls["planted"], "label"].tolist() == ["amplified"]
    assert set(calls.loc[~calls["planted"], "label"]) == {"unresolved"}


def test_p_values_of_neurons_are_uniform_where_changes_were_shuffled(layer) -> None:
    from tests.null_suites import evidence, pair_of, shuffled, small_p

    pairs = [pair_of(layer, shuffled(layer, seed)) for seed in range(20, 24)]
    table = small_p(evidence(layer, pairs))
    assert table["n"].sum() == 4 * 2 * 208
    assert table["below"].between(0.03, 0.07).all()  # sd .008 each


def test_bf16_takes_a_round_trip_and_leaves_a_gain_of_three_thousandths(layer) -> None:
    from tests.null_suites import evidence, gain_in_bf16, labels, round_trip

    quiet = labels(evidence(layer, [round_trip(layer)]))
    assert set(quiet["label"]) <= {"unresolved", "unchanged"}
    gained = labels(evidence(layer, [gain_in_bf16(layer, 1.003)]))
    wide = gained[gained["kind"].isin(["matrix", "head"])]  # a neuron has 96 numbers here
    assert (wide["label"] == "amplified").mean() >= 0.99
    assert (gained["label"] == "amplified").mean() >= 0.85


def test_structure_needs_more_above_rounding_than_a_gain(heads: pd.DataFrame) -> None:
    from tests.planted_suites import called

    near = called(heads.assign(snr=20.0))
    gains = near["label"].isin(["amplified", "attenuated"])
    assert gains.sum() >= 10
    assert set(near.loc[~gains, "label"]) == {"unresolved"}
    written = near[near["expected"] == "new_write"]
    reason = "20 times the energy of rounding; 24 times are needed to say where its structure lies"
    assert written["label_reason"].str.contains(reason).all()
    assert set(written["decided_by"]) == {"rounding floor"}
    far = called(heads.assign(snr=25.0))
    assert (far["label"] == far["expected"])[far["expected"] != ""].mean() >= 0.95


def test_the_answer_says_why_storage_leaves_labels_out() -> None:
    from tvlens.geometry.classify import ROUNDING_FLOOR
    from tvlens.reporting import answer

    assert answer.ROUNDING_FLOOR == ROUNDING_FLOOR
    labels = pd.DataFrame({"decided_by": [ROUNDING_FLOOR, "x", "x", "x"]})
    assert "25 % of these are unresolved" in answer._near_rounding(labels)
    assert answer._near_rounding(labels.iloc[1:]) == ""


def _labels(pair) -> pd.DataFrame:
    from tvlens.geometry import decompose_and_classify

    frame = decompose_and_classify([pair])[0].labels.labels.to_frame()
    return frame.set_index("component")["label"]


@pytest.mark.slow
def test_a_copy_in_other_coordinates_and_its_original_get_the_same_labels(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from tests.test_planted_demo import HEAD, _planted
    from tvlens import load_pair
    from tvlens.demo.models import demo_folder
    from tvlens.weights.gauge import canonical

    base, control = demo_folder("base"), load_file(demo_folder("ctl") / "model.safetensors")

    def plant(tensors: dict[str, torch.Tensor]) -> None:
        for name, own in list(tensors.items()):
            delta = control[name] - own
            tensors[name] = own + delta * (0.002 * own.norm() / delta.norm()) + _planted(name, own)

    tuned = copy_with(base, tmp_path / "tuned", plant)
    (tuned / "tvlens_storage.json").unlink()
    copy = saved_copy(tuned, tmp_path / "copy", ALL)
    first, second = (_labels(canonical(load_pair(base, one))) for one in (tuned, copy))
    assert first[f"L{HEAD[0]}H{HEAD[1]}.OV"] == second[f"L{HEAD[0]}H{HEAD[1]}.OV"] == "amplified"
    assert (first == second).mean() >= 0.995
    gains = ["amplified", "attenuated", "flipped"]
    assert (first.isin(gains) == second.isin(gains)).mean() >= 0.999


@pytest.mark.slow
def test_an_adapter_in_factors_and_its_merge_get_the_same_labels(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tvlens import load_pair
    from tvlens.demo.models import demo_folder

    base = copy_with(demo_folder("base"), tmp_path / "base", lambda tensors: None)
    (base / "tvlens_storage.json").unlink()
    adapter = tiny_adapter(base, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(
        tmp_path / "merged"
    )
    first, second = (_labels(load_pair(base, tmp_path / x)) for x in ("adapter", "merged"))
    assert len(set(first)) > 2
    assert first.equals(second.reindex(first.index))


# --- SmolLM2-135M -------------------------------------------------------------------------------


@pytest.mark.deep
@pytest.mark.parametrize("family", ["heads", "neurons", "matrices"])
def test_plants_in_a_real_model_are_called_what_they_are(family: str) -> None:
    from tests import planted_suites
    from tests.calibration import SMOL, markdown, planted, recall_table

    found = planted(SMOL, family)
    calls = planted_suites.called(found)
    print(markdown(recall_table(calls)))
    assert planted_suites.missed_bars(calls) == []
    for classifier in (planted_suites.always_unresolved, planted_suites.by_raw_cosine):
        assert planted_suites.missed_bars(planted_suites.called(found, classifier))


@pytest.mark.deep
def test_random_factors_in_a_real_model_are_unresolved_at_any_size() -> None:
    from tests.calibration import SMOL, factors, markdown

    table = factors(SMOL)
    print(markdown(table))
    assert (table["unresolved"] >= 0.99).all()
    assert (table["found"] >= 0.95).all()


@pytest.mark.deep
def test_p_values_in_a_real_model_are_uniform_under_exchangeable_nulls() -> None:
    from tests.calibration import SMOL, markdown, null_p_values

    table = null_p_values(SMOL)
    print(markdown(table))  # the control's own updates are no null: measured, held to no bar
    null = table[table["change"] != "control"]
    heads, neurons = (null[null["kind"] == kind] for kind in ("head", "neuron"))
    assert heads["below"].between(0.02, 0.07).all()
    assert neurons["below"].between(0.045, 0.055).all()


@pytest.mark.deep
def test_storage_of_a_real_model_in_bf16() -> None:
    from tests.calibration import SMOL, counts, markdown, stored, tested

    quiet, gained = stored(SMOL).values()
    assert set(tested(quiet)["label"]) <= {"unresolved", "unchanged"}
    print(markdown(counts(gained)))
    by_kind = (tested(gained)["label"] == "amplified").groupby(tested(gained)["kind"]).mean()
    assert (by_kind >= 0.99).all()


@pytest.mark.deep
@pytest.mark.parametrize("tuned", ["med", "ctl-1"])
def test_a_small_real_fine_tune_in_bf16_is_unresolved_and_says_why(tuned: str) -> None:
    from tests.calibration import SMOL, fine_tune_stored, tested

    calls = tested(fine_tune_stored(SMOL, tuned))
    assert set(calls["label"]) <= {"unresolved", "unchanged"}
    changed = calls[calls["label"] == "unresolved"]
    assert changed["label_reason"].str.contains("energy of rounding").mean() >= 0.99


@pytest.mark.deep
def test_a_real_adapter_in_factors_and_its_merge_get_the_same_labels() -> None:
    from tests.calibration import SMOL
    from tests.geometry_pairs import FakePair, FakeWeight
    from tests.null_suites import evidence, labels, pair_of
    from tests.planted_suites import PARTS, ground_of

    pair, frames = SMOL.pair("med-lora"), ([], [])
    for number in (2, 14, 27):
        ground = ground_of(pair, number, PARTS)
        read = {part: pair.read(ground.component(part)) for part in PARTS}
        factors = {w.component: FakeWeight(w.component, w.base, w.delta) for w in read.values()}
        merged = {p: (own + ground.control[p]) - own for p, own in ground.base.items()}
        both = FakePair(factors, ground.layout), pair_of(ground, merged)
        for frame, found in zip(frames, evidence(ground, both), strict=True):
            frame.append(found)
    first, second = (labels(frame) for frame in frames)
    print(pd.crosstab(first["kind"], first["label"]))
    assert first["snr"].isna().all()
    assert not second["snr"].isna().any()
    assert (first["label"] == second["label"]).mean() >= 0.9999


# --- the rules that the suites changed -----------------------------------------------------------


def test_a_neurons_share_is_close_to_what_the_others_alone_would_give() -> None:
    """Oracle: the common direction taken anew without each neuron."""
    from tvlens.geometry.neuron_evidence import shared_with_others
    from tvlens.geometry.spikes import Spikes

    generator = torch.Generator().manual_seed(1)
    rows = 0.6 * torch.randn(40, 30, generator=generator, dtype=torch.float64)
    common = torch.nn.functional.normalize(torch.randn(30, generator=generator), dim=0).double()
    rows[:20] += 2.5 * torch.outer(torch.randn(20, generator=generator).double(), common)
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    total = float(rows.square().sum())
    spikes = Spikes(left[:, :1], values[:1], right[:1].T, total, 0.0)
    found = shared_with_others(spikes, rows.square().sum(1))[20:, 0].square()
    alone = []
    for row in range(20, 40):
        others = torch.cat([rows[:row], rows[row + 1 :]])
        alone.append(float(rows[row] @ torch.linalg.svd(others).Vh[0]) ** 2)
    pulled = (left[20:, 0] * values[0]).square()
    oracle = sum(alone) / 20
    assert float(pulled.mean()) > 1.2 * oracle
    assert float(found.mean()) == pytest.approx(oracle, rel=0.1)


def test_a_read_of_uncertain_alignment_is_between_and_not_rewired() -> None:
    import numpy as np

    from tvlens.geometry.evidence import placed

    share, error = np.array([0.8, 0.8, 0.8]), np.full(3, 0.1)
    for part, new in (("W_gate", "new_read"), ("W_out", "new_write")):
        where = placed(share, np.array([0.2, 0.45, 0.8]), error, part)
        assert where[f"share_{new}"].tolist() == [0.8, 0, 0]
        assert where["share_between"].tolist() == [0, 0.8, 0]
        assert where["share_within"].tolist() == [0, 0, 0.8]
