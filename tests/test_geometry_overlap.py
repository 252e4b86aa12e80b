"""Fine-tunes against each other: planted common subspaces, floors by simulation, ceilings."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from tests.geometry_pairs import FakeLayout, FakePair, fake_pair
from tests.tiny_checkpoints import add_noise, copy_with, tiny_adapter, tiny_llama
from tvlens.components import Component
from tvlens.errors import IncomparableModelsError, StudyError
from tvlens.geometry.overlap import largest_cosine_bound, overlap, random_overlap, subspaces
from tvlens.geometry.readings import haar_frames
from tvlens.weights.matching import load_pair
from tvlens.weights.vector import tuning_vector

LAYOUT = FakeLayout()
W_OUT, W_IN = (Component("matrix", 0, None, part) for part in ("W_out", "W_in"))


def _frame(size: int, width: int, seed: int) -> Tensor:
    return haar_frames(1, size, width, seed=seed)[0].float()


def _pair(name: str, planted: dict[Component, Tensor]) -> FakePair:
    """The common base with planted changes."""
    return FakePair(fake_pair(LAYOUT, planted).weights, LAYOUT, tuned_name=name)


def _writes(directions: Tensor, seed: int) -> Tensor:
    """A change of W_out that writes exactly the columns of ``directions``."""
    return 0.3 * _frame(192, directions.shape[1], seed) @ directions.T


def _row(table: pd.DataFrame, component: str) -> pd.Series:
    return table[table["component"] == component].iloc[0]


def test_a_common_subspace_overlaps_wholly_whatever_evokes_it() -> None:
    common = _frame(96, 3, 1)
    mixed = common @ _frame(3, 3, 2)  # the same space, other directions in it
    pairs = [_pair("a", {W_OUT: _writes(common, 3)}), _pair("b", {W_OUT: _writes(mixed, 4)})]
    row = _row(overlap(pairs).to_frame(), "L0.W_out")
    assert (row["tuned"], row["other"], row["relation"]) == ("a", "b", "fine-tune")
    assert row["overlap"] == pytest.approx(1, abs=1e-6)
    assert row["principal_cosines"] == pytest.approx([1, 1, 1], abs=1e-6)
    assert (row["rank_a"], row["rank_b"], row["d"]) == (3, 3, 96)
    assert (row["shared"], row["specific_a"], row["specific_b"]) == (3, 0, 0)
    assert abs(row["cosine"]) < 0.3  # as vectors they have little in common


def test_shared_and_specific_directions_are_counted() -> None:
    frame = _frame(96, 6, 5)
    a, b = frame[:, :4], frame[:, 2:]  # two in common
    pairs = [_pair("a", {W_OUT: _writes(a, 6)}), _pair("b", {W_OUT: _writes(b[:, :3], 7)})]
    row = _row(overlap(pairs).to_frame(), "L0.W_out")
    assert (row["shared"], row["specific_a"], row["specific_b"]) == (2, 2, 1)
    assert row["overlap"] == pytest.approx(2 / 3, abs=1e-6)


def test_a_reading_matrix_is_compared_on_its_read_side() -> None:
    common = _frame(96, 2, 8)
    pairs = [
        _pair(name, {W_IN: 0.3 * common @ _frame(192, 2, seed).T})
        for name, seed in (("a", 9), ("b", 10))
    ]
    row = _row(overlap(pairs).to_frame(), "L0.W_in")
    assert row["overlap"] == pytest.approx(1, abs=1e-6)
    assert row["d"] == 96


def test_random_fine_tunes_lie_at_the_floor() -> None:
    pairs = [
        _pair(name, {W_OUT: _writes(_frame(96, 4, 11 + seed), 20 + seed)})
        for seed, name in enumerate("abcdef")
    ]
    rows = overlap(pairs).to_frame()
    rows = rows[rows["component"] == "L0.W_out"]
    assert len(rows) == 15
    z = (rows["overlap"] - rows["overlap_floor"]) / rows["overlap_floor_sd"]
    assert rows["overlap_floor"].unique() == pytest.approx([4 / 96])
    assert z.abs().max() < 4
    assert abs(z.mean()) < 1
    assert rows["shared"].sum() == 0
    assert (rows["cosine"].abs() < 5 * rows["cosine_floor_sd"]).all()
    assert rows["cosine_floor_sd"].unique() == pytest.approx([(192 * 96) ** -0.5])


@pytest.mark.parametrize("ranks", [(1, 1), (2, 2), (3, 7), (10, 4)])
def test_the_floor_is_that_of_random_subspaces(ranks: tuple[int, int]) -> None:
    rank_a, rank_b = ranks
    # one of the two may be fixed: its first coordinates
    drawn = haar_frames(4000, 20, rank_b, seed=1)[:, :rank_a]
    found = drawn.square().sum((1, 2)).numpy() / min(ranks)
    mean, deviation = random_overlap(rank_a, rank_b, 20)
    assert found.mean() == pytest.approx(mean, abs=4 * deviation / 4000**0.5)
    assert found.std() == pytest.approx(deviation, rel=0.06)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "d"), [((1, 1), 30), ((1, 4), 30), ((2, 3), 40), ((5, 9), 60), ((8, 8), 40)]
)
def test_one_random_pair_in_a_thousand_exceeds_the_bound(ranks: tuple[int, int], d: int) -> None:
    drawn = haar_frames(20_000, d, ranks[1], seed=2)[:, : ranks[0]]
    largest = torch.linalg.svdvals(drawn)[:, 0].numpy()
    bound = largest_cosine_bound(*ranks, d)
    assert 0.0003 < (largest > bound).mean() < 0.0021  # 20 expected, 6 to 42 allowed
    assert largest_cosine_bound(*ranks[::-1], d) == bound


@pytest.mark.slow
def test_beyond_the_exact_ranks_the_bound_is_a_little_too_strict() -> None:
    from tvlens.geometry.overlap import EXACT_RANK, _johnstone_bound

    for least, most, d in ((8, 8, 40), (8, 30, 576), (6, 64, 4096)):
        assert least <= EXACT_RANK
        exact, rough = largest_cosine_bound(least, most, d), _johnstone_bound(least, most, d) ** 0.5
        assert exact < rough < 1.05 * exact
    assert largest_cosine_bound(9, 9, 60) > largest_cosine_bound(8, 9, 60)


def test_subspaces_too_wide_to_avoid_each_other_share_nothing_by_that() -> None:
    assert largest_cosine_bound(8, 8, 12) == 1.0
    found = subspaces(_frame(12, 8, 1).double(), _frame(12, 8, 2).double())
    assert found is not None
    assert found.cosines[0] == pytest.approx(1)
    assert found.shared == 0


def test_the_ceiling_is_what_two_runs_of_one_recipe_share() -> None:
    frame = _frame(96, 8, 30)
    a, again, b = frame[:, :2], frame[:, 1:3], frame[:, 4:6]
    pairs = [
        _pair(name, {W_OUT: _writes(space, 31)})
        for name, space in (("a", a), ("b", b), ("a2", again))
    ]
    rows = overlap(pairs, replicates={"a": "a2"}).to_frame()
    rows = rows[rows["component"] == "L0.W_out"].set_index(["tuned", "other"])
    assert rows.loc[("a", "b"), "overlap"] == pytest.approx(0, abs=1e-6)
    assert rows.loc[("a", "b"), "overlap_ceiling"] == pytest.approx(0.5, abs=1e-5)
    assert rows.loc[("a", "a2"), "relation"] == "replicate"
    assert rows.loc[("b", "a2"), "overlap_ceiling"] == pytest.approx(0.5, abs=1e-5)
    assert pd.isna(rows.loc[("a", "a2"), "overlap_ceiling"])
    alone = overlap(pairs[:2]).to_frame()
    assert alone[["overlap_ceiling", "cosine_ceiling"]].isna().all().all()


def test_with_two_replicates_the_ceiling_is_the_geometric_mean() -> None:
    frame = _frame(96, 8, 40)
    spaces = {"a": [0, 1], "a2": [0, 1], "b": [2, 3], "b2": [2, 4]}  # overlaps 1 and 1/2
    pairs = [_pair(n, {W_OUT: _writes(frame[:, s], 41)}) for n, s in spaces.items()]
    rows = overlap(pairs, replicates={"a": "a2", "b": "b2"}).to_frame()
    rows = rows[rows["component"] == "L0.W_out"].set_index(["tuned", "other"])
    assert rows.loc[("a", "b"), "overlap_ceiling"] == pytest.approx(0.5**0.5, abs=1e-5)


def test_controls_are_named_and_unchanged_components_have_no_cosine() -> None:
    space = _writes(_frame(96, 2, 50), 51)
    pairs = [_pair("a", {W_OUT: space}), _pair("ctl", {W_OUT: space})]
    rows = overlap(pairs, controls=["ctl"]).to_frame()
    assert set(rows["relation"]) == {"control"}
    assert _row(rows, "L0.W_out")["cosine"] == pytest.approx(1)
    still = _row(rows, "L1.W_out")
    assert pd.isna(still["cosine"])
    assert pd.isna(still["overlap"])
    assert (still["spikes_a"], still["norm_a"]) == (0, 0)


@pytest.mark.slow
def test_cosines_add_up_to_those_of_the_whole_tuning_vectors(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    folders = [
        copy_with(base, tmp_path / name, add_noise(seed)) for seed, name in ((1, "a"), (2, "b"))
    ]
    folders.append(tiny_adapter(base, tmp_path / "lora"))
    pairs = [load_pair(str(base), str(f), names=("base", f.name)) for f in folders]
    rows = overlap(pairs).to_frame()
    for (one, other), frame in rows.groupby(["tuned", "other"]):
        vectors = [tuning_vector(p) for n in (one, other) for p in pairs if p.tuned_name == n]
        total = frame["inner"].sum() / np.sqrt(
            (frame["norm_a"] ** 2).sum() * (frame["norm_b"] ** 2).sum()
        )
        assert total == pytest.approx(vectors[0].cosine(vectors[1]), abs=1e-6)
        for component, cosine in vectors[0].cosines(vectors[1]).items():
            found = _row(frame, str(component))["cosine"]
            assert found == pytest.approx(cosine, abs=1e-6, nan_ok=True)


def test_fine_tunes_of_other_bases_are_refused() -> None:
    other = fake_pair(LAYOUT, seed=3)
    pairs = [_pair("a", {}), FakePair(other.weights, LAYOUT, tuned_name="b")]
    with pytest.raises(IncomparableModelsError, match="no common origin"):
        overlap(pairs)


def test_names_must_differ_and_a_replicate_must_be_there() -> None:
    pairs = [_pair("a", {}), _pair("b", {})]
    with pytest.raises(StudyError, match="called the same"):
        overlap([pairs[0], pairs[0]])
    with pytest.raises(StudyError, match="'c' is not among"):
        overlap(pairs, replicates={"a": "c"})
