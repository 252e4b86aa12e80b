"""The candidate readings against plain numpy, and that none of them stands without its chance."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import Tensor

from tests.geometry_pairs import FakeLayout, base_weights, decaying, fake_pair
from tvlens.components import Component
from tvlens.geometry.readings import (
    Sided,
    d_head_of,
    drawn_inside,
    energy_rank,
    expected_best_cosine,
    haar_frames,
    readings,
    readings_of,
)

LAYOUT = FakeLayout(n_kv_heads=4)
SIDES = {"W_Q": "read", "W_out": "write"}


def _matrix(part: str) -> Component:
    return Component("matrix", 0, None, part)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _rows(part: str, change: Tensor, layout: FakeLayout = LAYOUT) -> pd.DataFrame:
    return readings(fake_pair(layout, {_matrix(part): change})).to_frame()


def _of(rows: pd.DataFrame, component: str) -> pd.DataFrame:
    return rows[rows["component"] == component].set_index(["reading", "rule"])


def _oracle(base: np.ndarray, change: np.ndarray, side: str, d_head: int) -> dict:
    """Every reading by its formula, on full decompositions, residual stream as columns."""
    if side == "read":
        base, change = base.T, change.T
    _, s, v = np.linalg.svd(base, full_matrices=False)
    u = np.linalg.svd(change, full_matrices=False)[2]
    held = np.cumsum(s**2) / (s**2).sum()
    ranks = {"energy_0.9025": 0.9025, "energy_0.95": 0.95}
    ranks = {rule: int(np.searchsorted(held, share) + 1) for rule, share in ranks.items()}
    ranks["d_head"] = d_head
    found = {
        ("sa_proj", rule): np.linalg.norm(change @ v[:k].T) / np.linalg.norm(change)
        for rule, k in ranks.items()
    }
    cosines = np.abs(u @ v.T)
    for i, j in ((1, 1), (1, 8), (8, 8), (8, 64)):
        found["sa_phi", f"{i}_{j}"] = (cosines[:i, :j] ** 2).sum() / min(i, j)
    best = cosines[:10].max(1)
    return found | {("sa_cos_mean", "top_10"): best.mean(), ("sa_cos_max", "top_10"): best.max()}


@pytest.mark.parametrize("part", list(SIDES))
def test_readings_equal_their_formulas_on_the_side_of_the_residual_stream(part: str) -> None:
    base = base_weights(LAYOUT)[_matrix(part)]
    change = 0.3 * base.flip(0) + 0.02 * _normal(*base.shape)
    rows = _of(_rows(part, change), f"L0.{part}")
    expected = _oracle(base.double().numpy(), change.double().numpy(), SIDES[part], 12)
    assert set(rows["side"]) == {SIDES[part]}
    assert set(rows.index) == set(expected)
    for key, value in expected.items():
        assert rows.loc[key, "value"] == pytest.approx(value, abs=1e-5), key


def test_chance_and_correction_are_those_of_the_energies() -> None:
    base = base_weights(LAYOUT)[_matrix("W_Q")]
    rows = _of(_rows("W_Q", 0.1 * base + 0.02 * _normal(*base.shape)), "L0.W_Q")
    for rule in ("energy_0.9025", "energy_0.95", "d_head"):
        row = rows.loc[("sa_proj", rule)]
        assert row["chance"] == pytest.approx((row["k"] / 96) ** 0.5)
        corrected = (row["value"] ** 2 - row["k"] / 96) / (1 - row["k"] / 96)
        assert row["corrected"] == pytest.approx(corrected)
    row = rows.loc[("sa_phi", "8_64")]
    assert (row["i"], row["k"], row["d"]) == (8, 64, 96)
    assert row["chance"] == pytest.approx(64 / 96)
    assert row["corrected"] == pytest.approx((row["value"] - 64 / 96) / (1 - 64 / 96))


def test_a_pure_gain_is_aligned_with_everything_of_its_rank() -> None:
    base = base_weights(LAYOUT)[_matrix("W_out")]
    rows = _of(_rows("W_out", 0.1 * base), "L0.W_out")
    for key in (("sa_phi", "8_8"), ("sa_phi", "1_8"), ("sa_cos_mean", "top_10")):
        assert rows.loc[key, "value"] == pytest.approx(1, abs=1e-4)
        assert rows.loc[key, "corrected"] == pytest.approx(1, abs=1e-4)
    # and what noise scores beside it stays at chance
    assert (rows["noise"] - rows["chance"]).abs().max() < 0.12
    proj = rows.loc["sa_proj"]
    assert (proj["noise"] - proj["chance"]).abs().max() < 0.02
    held = rows.loc[("sa_proj", "energy_0.9025"), "value"]
    assert 0.95 <= held < 0.96  # the square root of the energy that set k


def test_on_noise_raw_values_follow_the_spectrum_and_corrected_ones_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    steep = decaying(96, 96, generator)
    left, values, right = torch.linalg.svd(steep)
    bases = {"flat": left @ right, "steep": left * values**6 @ right}
    noise = 0.01 * _normal(96, 96, seed=4)
    found = {}
    for name, base in bases.items():
        rows = readings_of(Sided.of(base[None], noise[None], "W_O"), 12, seed=0)
        found[name] = next(r for r in rows if r.rule == "energy_0.9025")
    raw = {name: row.value[0] for name, row in found.items()}
    assert raw["flat"] - raw["steep"] > 0.4
    for row in found.values():
        chance = row.chance[0] ** 2
        spread = (2 * chance / (1 - chance) / 96**2) ** 0.5  # of the corrected energy
        assert abs(row.corrected(row.value)[0]) < 4 * spread
        # another draw of noise says the same
        assert row.noise[0] == pytest.approx(row.value[0], abs=0.02)
        assert abs(row.corrected(row.noise)[0]) < 4 * spread


@pytest.mark.slow
def test_drawn_noise_is_distributed_as_noise_is() -> None:
    base = base_weights(LAYOUT)[_matrix("W_V")]  # 48 directions of 96: half of noise is outside
    drawn = np.stack(
        [
            drawn_inside(Sided.of(base[None], _normal(96, 48)[None], "W_V"), seed=n)[0]
            for n in range(200)
        ]
    )
    written = np.stack(
        [
            Sided.of(base[None], _normal(96, 48, seed=n)[None], "W_V").inside[0].numpy()
            for n in range(200)
        ]
    )
    assert drawn.shape == written.shape
    for top in (1, 10, 48):
        one, other = drawn[:, :top].sum(1), written[:, :top].sum(1)
        assert stats.ks_2samp(one, other).pvalue > 0.01, top


def test_no_reading_stands_without_its_chance_and_its_noise() -> None:
    rows = readings(fake_pair(LAYOUT, background=0.01)).to_frame()
    assert rows[["value", "chance", "noise"]].notna().all().all()
    known = rows["chance"] < 1
    assert rows.loc[known, ["corrected", "noise_corrected"]].notna().all().all()
    assert rows.loc[~known, "corrected"].isna().all()
    # what noise scores is chance up to its spread, for the tuning vector (noise here) as for a draw
    matrices = rows[(rows["kind"] == "matrix") & rows["reading"].isin(["sa_proj", "sa_phi"])]
    means = matrices.groupby(["reading", "rule"])[["corrected", "noise_corrected"]].mean()
    assert (means.abs() < 0.03).all().all()
    cosines = rows[rows["reading"].str.startswith("sa_cos")]
    means = cosines.groupby("reading")[["corrected", "noise_corrected"]].mean()
    assert (means.abs() < 0.02).all().all()


def test_each_head_is_read_on_its_own_slice() -> None:
    parts = {"W_O": (96, 96), "W_V": (96, 48)}
    changes = {_matrix(part): 0.02 * _normal(*shape) for part, shape in parts.items()}
    changes[_matrix("W_O")][:12] = 0  # head 0 did not change
    rows = readings(fake_pair(LAYOUT, changes)).to_frame()
    assert "L0H0.W_O" not in set(rows["component"])
    base = base_weights(LAYOUT)
    for component, part, cut in (
        ("L0H3.W_O", "W_O", np.s_[36:48, :]),
        ("L0K2.W_V", "W_V", np.s_[:, 24:36]),
    ):
        own = base[_matrix(part)].double().numpy()[cut]
        change = changes[_matrix(part)].double().numpy()[cut]
        expected = _oracle(own, change, "write" if part == "W_O" else "read", 12)
        found = _of(rows, component)
        assert found["kv_index"].unique().tolist() == [1 if part == "W_O" else 2]
        for key in (("sa_proj", "energy_0.95"), ("sa_proj", "d_head"), ("sa_phi", "8_8")):
            assert found.loc[key, "value"] == pytest.approx(expected[key], abs=1e-5), component


def test_a_low_rank_change_skips_the_ranks_it_has_not() -> None:
    change = torch.outer(_normal(96, seed=1), _normal(96, seed=2))
    rows = _of(_rows("W_O", change), "L0.W_O")
    assert {rule for reading, rule in rows.index if reading == "sa_phi"} == {"1_1", "1_8"}
    assert ("sa_cos_mean", "top_1") in rows.index


def test_the_smallest_rank_that_holds_the_energy_is_found() -> None:
    values = torch.tensor([[3.0, 4.0, 0.0]]).sort(descending=True).values.double()  # energies 16, 9
    assert energy_rank(values, 0.64).tolist() == [1]
    assert energy_rank(values, 0.65).tolist() == [2]
    assert energy_rank(values, 1.0).tolist() == [2]


@pytest.mark.parametrize(("rank", "d"), [(1, 5), (12, 96), (96, 96)])
def test_the_expected_best_cosine_is_that_of_random_vectors(rank: int, d: int) -> None:
    best = haar_frames(4000, d, 1, seed=1)[:, :rank, 0].abs().amax(1)
    error = float(best.std()) / 4000**0.5
    assert expected_best_cosine(rank, d) == pytest.approx(float(best.mean()), abs=4 * error)


def test_the_width_of_a_head_is_read_off_and_absent_where_no_head_is_known() -> None:
    assert d_head_of(fake_pair(LAYOUT)) == 12
    bare = fake_pair(LAYOUT)
    assert d_head_of(type(bare)({}, LAYOUT)) == 0


def test_an_unchanged_pair_has_no_reading() -> None:
    assert len(readings(fake_pair(LAYOUT))) == 0
