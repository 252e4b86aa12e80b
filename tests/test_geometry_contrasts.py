"""The contrasts of MLP and attention: planted verdicts, identities, calibration, and noise."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tests.geometry_pairs import FakeLayout, FakePair, base_weights, fake_pair
from tvlens.geometry import decompose
from tvlens.geometry.contrasts import (
    CONTRASTS_SCHEMA,
    EQUAL,
    LEVEL,
    MEASURES,
    TOO_FEW,
    Contrast,
    contrasts_table,
    judged,
    spread,
    with_weighted,
)

pytestmark = pytest.mark.slow

LAYOUT = FakeLayout(n_heads=2, n_kv_heads=2, d_model=24, d_head=12, d_mlp=48, n_layers=12)


def _weights(newness, amplification=None, *, mlp=0.0, tuned="tuned", snr=np.nan) -> pd.DataFrame:
    """Rows of ``weights`` whose W_O has these values and whose W_out has ``mlp``."""
    newness = np.asarray(newness, dtype=float)
    gains = np.zeros_like(newness) if amplification is None else np.asarray(amplification, float)
    both = []
    for part, g_write, net in (
        ("W_O", newness, gains),
        ("W_out", 0 * newness + mlp, 0 * gains + mlp),
    ):
        both.append(
            pd.DataFrame({"part": part, "layer": range(len(newness)), "g_write": g_write,
                          "amplification": net})
        )  # fmt: skip
    frame = pd.concat(both).assign(kind="matrix", base="base", tuned=tuned)
    return frame.assign(delta_norm=1.0, snr=snr)


def _row(table, claim="newness", against="raw", weighting="none") -> pd.Series:
    frame = table.where(claim=claim, against=against, weighting=weighting).to_frame()
    assert len(frame) == 1
    return frame.iloc[0]


def _noise(layers: int, seed: int = 0, scale: float = 0.03) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=scale, size=layers)


def _contrast(differences, weights=None) -> Contrast:
    differences = np.asarray(differences, dtype=float)
    count = len(differences)
    weights = np.full(count, 1 / count) if weights is None else np.asarray(weights)
    layers = tuple(range(count))
    return Contrast("newness", layers, differences, np.zeros(count), weights)


# --- verdicts of planted differences ------------------------------------------------------------


@pytest.mark.parametrize("claim", ["newness", "amplification"])
@pytest.mark.parametrize(
    ("planted", "scale", "layers", "verdict"),
    [
        (0.3, 0.03, 24, "supported"),
        (0.3, 0.03, 8, "supported"),
        (-0.3, 0.03, 24, "not supported"),
        (0.0, 0.03, 24, "not supported"),
        (0.0, 0.5, 24, "cannot tell"),
        (0.3, 0.03, 5, TOO_FEW),
        (0.3, 0.03, 1, TOO_FEW),
    ],
)
def test_planted_differences_get_their_verdict(claim, planted, scale, layers, verdict) -> None:
    noise = _noise(layers, scale=scale)
    values = planted + noise - noise.mean()
    row = _row(contrasts_table(_weights(values, values, mlp=0.0)), claim)
    assert row["verdict"] == verdict
    assert row["mean"] == pytest.approx(planted)
    assert (row["attention"], row["mlp"]) == (pytest.approx(planted), 0.0)


def test_what_is_sure_but_small_is_no_support() -> None:
    """A significant difference supports only if it is as large as a claim must be."""
    noise = _noise(24)
    noise -= noise.mean()
    ruled_out = _row(contrasts_table(_weights(0.02 + 0.1 * noise)))
    assert (ruled_out["verdict"], ruled_out["ci_high"] < 0.05) == ("not supported", True)
    assert ruled_out["p_value"] < LEVEL
    unsure = _row(contrasts_table(_weights(0.04 + noise)))
    assert unsure["verdict"] == "cannot tell"
    assert "may be below 0.05" in unsure["why"]
    assert unsure["p_value"] < LEVEL


def test_what_only_independent_layers_would_support_cannot_be_told() -> None:
    """Layers that come in runs: significant one by one, not as blocks."""
    runs = np.repeat([0.35, 0.3, -0.25, 0.35, 0.3, -0.2, 0.3, 0.3, 0.35, -0.2], 3)
    row = _row(contrasts_table(_weights(runs)))
    assert row["p_value"] < LEVEL < row["p_block"]
    assert row["verdict"] == "cannot tell"
    assert "neighbouring layers are independent" in row["why"]


def test_too_few_layers_say_how_small_p_can_get() -> None:
    row = _row(contrasts_table(_weights([0.3, 0.31, 0.3, 0.32])))
    assert (row["p_value"], row["p_floor"], row["verdict"]) == (0.125, 0.125, TOO_FEW)
    assert "cannot tell: too few layers" in row["sentence"]
    assert "0.12" in row["sentence"]


def test_no_layer_is_too_few_and_no_number_is_made_up() -> None:
    frame = contrasts_table(_weights([0.1, 0.1], snr=1.0)).to_frame()
    assert set(frame["verdict"]) == {TOO_FEW}
    assert frame[["mean", "ci_low", "p_value", "detectable"]].isna().all(axis=None)
    assert "above the rounding floor" in frame["sentence"][0]


def test_a_layer_whose_change_may_be_rounding_does_not_count() -> None:
    weights = _weights([0.1] * 8)
    lost = (weights["layer"] == 3) & (weights["part"] == "W_out")
    row = _row(contrasts_table(weights.assign(snr=np.where(lost, 3.9, 4.1))))
    assert row["layers"].tolist() == [0, 1, 2, 4, 5, 6, 7]


def test_the_sentence_holds_what_a_reader_needs() -> None:
    noise = _noise(24)
    text = _row(contrasts_table(_weights(0.3 + noise - noise.mean())))["sentence"]
    for part in ("MLP writes are newer than attention's: supported", "G_rel", "+0.300", "95 %",
                 "over 24 layers", "p = 0.0001", "smallest possible 0.0001",
                 "without a control this says nothing about the domain"):  # fmt: skip
        assert part in text, part
    wide = _row(contrasts_table(_weights(10 * (noise - noise.mean()))))
    assert f"{wide['detectable']:.2g} is the smallest difference that would" in wide["sentence"]
    assert "80 % power at the 5 % level" in wide["sentence"]


# --- controls -----------------------------------------------------------------------------------


def test_a_control_that_shows_the_same_takes_the_claim_away() -> None:
    own = _weights(0.3 + _noise(24))
    table = contrasts_table(own, [own])
    assert _row(table)["verdict"] == "supported"
    against = _row(table, against="minus controls")
    assert against["mean"] == pytest.approx(0, abs=1e-12)
    assert against["verdict"] == "not supported"
    assert "minus the control" in against["sentence"]
    assert "says nothing" not in against["sentence"]


def test_controls_are_subtracted_one_by_one_and_their_mean() -> None:
    one, two = (_weights(level + _noise(12, seed), tuned=f"ctl-{seed}")
                for seed, level in ((1, 0.1), (2, 0.4)))  # fmt: skip
    table = contrasts_table(_weights(0.3 + _noise(12)), [one, two])
    against = ["raw", "minus ctl-1", "minus ctl-2", "minus controls"]
    assert table.to_frame()["against"].tolist() == against * 2
    raw, first, second, both = (_row(table, against=name) for name in against)
    assert raw["mean"] - first["mean"] == pytest.approx(0.1 + _noise(12, 1).mean())
    assert both["mean"] == pytest.approx((first["mean"] + second["mean"]) / 2)
    assert [row["controls"] for row in (raw, first, second, both)] == [0, 1, 1, 2]
    assert "minus the mean of 2 controls" in both["sentence"]
    assert "minus ctl-1" in first["sentence"]
    quoted = table.where(headline=True).to_frame()
    assert quoted["against"].tolist() == ["minus controls"] * 2
    assert quoted["claim"].tolist() == list(MEASURES)


def test_layers_that_a_control_lacks_do_not_count() -> None:
    control = _weights(np.zeros(6))
    row = _row(contrasts_table(_weights(np.ones(8)), [control]), against="minus controls")
    assert row["layers"].tolist() == list(range(6))


# --- weights from attribution -------------------------------------------------------------------


def test_equal_weights_give_the_unweighted_numbers() -> None:
    table = contrasts_table(_weights(0.1 + _noise(30), _noise(30, 1)))
    both = with_weighted(table, dict.fromkeys(range(30), 7.0)).to_frame()
    plain, weighted = (both[both["weighting"] == name] for name in ("none", "weight_ig"))
    numbers = both.select_dtypes("number").columns
    pd.testing.assert_frame_equal(
        plain[numbers].reset_index(drop=True), weighted[numbers].reset_index(drop=True)
    )
    assert plain["verdict"].tolist() == weighted["verdict"].tolist()
    assert not weighted["headline"].any()


def test_only_layers_that_matter_vote() -> None:
    """The claim holds where the behaviour is and fails elsewhere."""
    values = np.where(np.arange(24) < 12, 0.3, -0.3) + _noise(24, scale=0.01)
    table = contrasts_table(_weights(values))
    assert _row(table)["mean"] == pytest.approx(0, abs=0.01)
    importance = {layer: 1.0 if layer < 12 else 0.0 for layer in range(24)}
    row = _row(with_weighted(table, importance), weighting="weight_ig")
    assert row["verdict"] == "supported"
    assert row["layers"].tolist() == list(range(12))
    assert row["mean"] == pytest.approx(values[:12].mean())
    assert "counted by weight_ig" in row["sentence"]


def test_the_weighted_mean_is_that_of_repeated_layers() -> None:
    values = _noise(6, scale=1.0)
    table = with_weighted(
        contrasts_table(_weights(values)), {layer: layer + 1.0 for layer in range(6)}
    )
    repeated = np.repeat(values, range(1, 7))
    row = _row(table, weighting="weight_ig")
    assert row["mean"] == pytest.approx(repeated.mean())
    assert row["weight_by_layer"].sum() == pytest.approx(1)


def test_weighting_again_replaces_and_no_score_is_no_vote() -> None:
    table = contrasts_table(_weights(_noise(8)))
    once = with_weighted(table, {0: 1.0, 1: 2.0})
    assert with_weighted(once, {0: 1.0, 1: 2.0}).data.equals(once.data)
    assert len(once) == 2 * len(table)
    nothing = _row(with_weighted(once, {}), weighting="weight_ig")
    assert (nothing["n_layers"], nothing["verdict"]) == (0, TOO_FEW)
    assert "has a score" in nothing["why"]


# --- identities ---------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 3])
def test_p_counts_the_sign_patterns_of_blocks(block: int) -> None:
    differences = 0.5 + _noise(8, 4, scale=1.0)
    weights = np.arange(1, 9) / 36
    sums = [float((differences * weights)[i : i + block].sum()) for i in range(0, 8, block)]
    patterns = itertools.product((1, -1), repeat=len(sums))
    flipped = [abs(sum(s * v for s, v in zip(signs, sums, strict=True))) for signs in patterns]
    reached = sum(value >= abs(sum(sums)) - 1e-12 for value in flipped)
    found = _contrast(differences, weights).flips(block, seed=0)
    assert found.p_value == pytest.approx(reached / len(flipped))
    assert found.p_floor == 2 / len(flipped)


def test_the_last_layers_have_the_first_ones_as_neighbours() -> None:
    """All layers count in as many blocks, so turning the circle changes nothing."""
    values = np.array([2.0, 1.5, 0.0, 0.3, 0.1, -0.4, 0.2, 0.0, 1.8])
    weights = np.full(9, 1 / 9)
    turned = [spread(np.roll(values, by), weights, 2) for by in range(9)]
    errors = [one.error for one in turned if one is not None]
    assert len(errors) == 9
    assert errors == pytest.approx([errors[0]] * 9)


def test_an_interval_that_holds_0_is_not_significant_where_blocks_cannot_tell() -> None:
    """Eight layers of one sign whose neighbours are alike: four blocks cannot reach 0.05."""
    found = judged(_contrast([0.9, 0.9, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01]), seed=0)
    assert found is not None
    assert found.flips.p_value < LEVEL < found.blocks.p_floor
    assert found.interval[0] < 0 < found.interval[1]
    assert not found.significant


def test_blocks_of_one_layer_are_students_interval() -> None:
    values = _noise(12, 3)
    found = spread(values, np.full(12, 1 / 12), 1)
    expected = stats.ttest_1samp(values, 0).confidence_interval(1 - LEVEL)
    assert found is not None
    assert values.mean() - found.half_interval == pytest.approx(expected.low)
    assert values.mean() + found.half_interval == pytest.approx(expected.high)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_error_is_that_of_drawn_circular_blocks(weighted: bool) -> None:
    """The oracle draws: starts at random, blocks around the circle, the weighted mean of each."""
    rng = np.random.default_rng(0)
    count, block = 30, 3
    values = np.repeat(rng.normal(size=10), 3) + rng.normal(size=count)
    weights = np.exp(0.3 * rng.normal(size=count)) if weighted else np.ones(count)
    weights /= weights.sum()
    means = []
    for _ in range(4000):
        drawn = [(s + i) % count for s in rng.integers(0, count, count // block) for i in range(3)]
        means.append(np.average(values[drawn], weights=weights[drawn]))
    blocks = 1 / (block * (weights**2).sum())
    found = spread(values, weights, block)
    assert found is not None
    assert found.freedom == pytest.approx(blocks - 1)
    # one draw in 63 of the deviation's own spread; to first order in the weights
    expected = np.std(means) * (blocks / (blocks - 1)) ** 0.5
    assert found.error == pytest.approx(expected, rel=0.08 if weighted else 0.05)


def test_a_constant_difference_has_no_spread_however_layers_are_weighted() -> None:
    weights = np.arange(1, 13) / 78
    found = spread(np.full(12, 0.2), weights, 2)
    assert found is not None
    assert found.error == pytest.approx(0, abs=1e-12)


def test_one_layer_that_holds_all_weight_has_no_spread() -> None:
    weights = np.full(12, 1e-6)
    weights[3] = 1 - 11e-6
    assert spread(_noise(12), weights, 2) is None
    assert spread(_noise(1), np.ones(1), 1) is None


def test_the_other_sign_gives_the_other_difference_and_the_same_p() -> None:
    values = 0.1 + _noise(20)
    one, other = (judged(_contrast(sign * values), seed=0) for sign in (1, -1))
    assert one is not None
    assert other is not None
    assert one.contrast.mean == -other.contrast.mean
    assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]))
    assert one.flips.p_value == pytest.approx(other.flips.p_value, abs=0.01)


def test_every_column_is_filled() -> None:
    frame = contrasts_table(_weights(0.1 + _noise(12)), [_weights(_noise(12, 1))]).to_frame()
    assert list(frame.columns) == CONTRASTS_SCHEMA.names
    assert frame.notna().all(axis=None)
    assert set(frame["weighting"]) == {EQUAL}
    assert frame["mean"].tolist() == pytest.approx((frame["attention"] - frame["mlp"]).tolist())


# --- calibration --------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [7, 10])
def test_layers_that_exchange_reject_one_in_twenty(layers: int) -> None:
    """Of independent layers of very different spread, flips and interval keep their level."""
    rng = np.random.default_rng(layers)
    size = np.exp(rng.normal(size=layers))
    draws = 300
    p_values, covered = [], 0
    for _ in range(draws):
        found = _contrast(rng.normal(size=layers) * size)
        p_values.append(found.flips(1, seed=0).p_value)
        own = spread(found.differences, found.weights, found.block)
        assert own is not None
        covered += abs(found.mean) <= own.half_interval
    assert 0.02 <= np.mean(np.array(p_values) <= LEVEL) <= 0.085  # 0.05 +- 2.7 deviations
    assert covered / draws >= 0.92


def test_intervals_of_blocks_cover_what_neighbours_share() -> None:
    rng = np.random.default_rng(5)
    covered = {1: 0, 3: 0}
    for _ in range(600):
        values = rng.normal(size=31)
        values = values[1:] + values[:-1]  # correlation 0.5 with the next layer
        for block in covered:
            found = spread(values, np.full(30, 1 / 30), block)
            assert found is not None
            covered[block] += abs(values.mean()) <= found.half_interval
    assert covered[1] / 600 < 0.88  # layers taken as independent: too narrow
    assert covered[3] / 600 > 0.90


def test_the_detectable_difference_is_found_in_four_of_five() -> None:
    rng = np.random.default_rng(6)
    weights = np.full(10, 1 / 10)
    found = [spread(rng.normal(size=10), weights, 1) for _ in range(200)]
    known = np.mean([one.detectable for one in found if one is not None])
    p_values = [_contrast(known + rng.normal(size=10)).flips(1, seed=0).p_value for _ in range(300)]
    assert np.mean(np.array(p_values) <= LEVEL) == pytest.approx(0.8, abs=0.07)


# --- planted in weights -------------------------------------------------------------------------


def _planted(attention: float, mlp: float, *, seed: int = 0) -> FakePair:
    """Gains of W_O and W_out in every layer, on noise a tenth as long as the base."""
    bases = base_weights(LAYOUT, seed)
    gains = {"W_O": attention, "W_out": mlp}
    planted = {
        component: gains[component.part] * base
        for component, base in bases.items()
        if component.part in gains
    }
    return fake_pair(LAYOUT, planted, background=0.1, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "mlp", "newness", "amplification"),
    [
        (0.2, 0.0, "supported", "supported"),
        (0.0, 0.2, "not supported", "not supported"),
        (-0.2, 0.0, "supported", "not supported"),  # attenuation is no amplification
        (0.0, 0.0, "cannot tell", "not supported"),  # 12 small matrices cannot rule 0.05 out
    ],
)
def test_gains_planted_in_one_kind_of_matrix_decide_both_claims(
    attention: float, mlp: float, newness: str, amplification: str
) -> None:
    table = contrasts_table(decompose(_planted(attention, mlp)).to_frame())
    found = {claim: _row(table, claim) for claim in MEASURES}
    share = 0.8 * (np.sign(attention) - np.sign(mlp))  # .2^2 / (.2^2 + .1^2)
    assert found["amplification"]["mean"] == pytest.approx(share, abs=0.03)
    verdicts = {claim: row["verdict"] for claim, row in found.items()}
    assert verdicts == {"newness": newness, "amplification": amplification}
