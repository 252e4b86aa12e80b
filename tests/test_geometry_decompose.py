"""The weights table: its rows, its identities and what it finds planted."""

import pandas as pd
import pytest
import torch

from tests.geometry_pairs import (
    FakeLayout,
    base_weights,
    decaying,
    fake_pair,
    shapes,
    within_matrix,
)
from tvlens.components import Component
from tvlens.geometry.decompose import SPLIT_COLUMNS, decompose

LAYOUT = FakeLayout(n_kv_heads=4, n_layers=2)
MATRIX = Component("matrix", 0, None, "W_O")


@pytest.fixture(scope="module")
def noisy() -> pd.DataFrame:
    return decompose(fake_pair(LAYOUT, background=0.01)).to_frame()


def test_every_component_has_its_rows_once(noisy: pd.DataFrame) -> None:
    assert noisy["component"].is_unique
    counts = noisy.groupby(["kind", "part"]).size()
    for part in ("W_Q", "W_O", "OV", "QK"):
        assert counts["head", part] == 16
    for part in ("W_K", "W_V"):
        assert counts["kv_head", part] == 8
    for part in ("W_gate", "W_in", "W_out"):
        assert counts["neuron", part] == 2 * LAYOUT.d_mlp
    assert counts["matrix"].sum() == 14
    assert counts["norm"].sum() == 3
    assert counts["embedding", "W_E"] == 1
    heads = noisy[(noisy["part"] == "OV") & (noisy["layer"] == 1)]
    assert heads["kv_index"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_energy_parts_of_matrices_and_heads_sum_to_one(noisy: pd.DataFrame) -> None:
    for kind in ("matrix", "head", "kv_head"):
        rows = noisy[(noisy["kind"] == kind) & ~noisy["part"].isin(["OV", "QK"])]
        total = rows[list(SPLIT_COLUMNS)].sum(axis=1)
        assert total.to_numpy() == pytest.approx(1, abs=1e-9)
    circuits = noisy[noisy["part"].isin(["OV", "QK"])]
    # what is missing is new on both sides: second order in a relative change of 1 %
    assert circuits[list(SPLIT_COLUMNS)].sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-3)
    assert circuits["e_new_both"].isna().all()


def test_new_write_exists_only_where_the_residual_stream_is_written(noisy: pd.DataFrame) -> None:
    matrices = noisy[noisy["kind"] == "matrix"].set_index("component")
    written = matrices["e_new_write"].notna()
    assert set(matrices.loc[written, "part"]) == {"W_O", "W_out"}
    assert (matrices["e_new_read"].notna() == ~written).all()


def test_the_energies_of_heads_and_neurons_sum_to_their_matrix(noisy: pd.DataFrame) -> None:
    energy = noisy.assign(energy=noisy["delta_norm"] ** 2).groupby(["layer", "kind", "part"])
    total = energy["energy"].sum()
    for part, kind in {
        "W_O": "head",
        "W_V": "kv_head",
        "W_in": "neuron",
        "W_out": "neuron",
    }.items():
        assert total[0, kind, part] == pytest.approx(total[0, "matrix", part], rel=1e-9)


def test_chance_shares_of_noise(noisy: pd.DataFrame) -> None:
    down = noisy[(noisy["kind"] == "matrix") & (noisy["part"] == "W_out")]
    assert down["e_within"].mean() == pytest.approx(0.0625, abs=0.01)
    assert down["e_new_write"].mean() == pytest.approx(0.1875, abs=0.02)
    assert down["e_new_both"].mean() == pytest.approx(0.5625, abs=0.02)
    assert noisy.loc[noisy["kind"] == "matrix", "g_write"].abs().mean() < 0.05


@pytest.mark.slow
def test_an_unchanged_component_has_zeros_a_cosine_of_one_and_no_shares() -> None:
    frame = decompose(fake_pair(LAYOUT)).to_frame()
    assert (frame["delta_norm"] == 0).all()
    assert (frame["cos_base_tuned"] == 1).all()
    assert frame["kappa"].isna().all()
    assert frame["e_global"].isna().all()
    assert frame["g_write"].isna().all()
    plain = frame[~frame["part"].isin(["OV", "QK"])]
    assert (plain["equal_fraction"] == 1).all()


def test_a_head_scaled_in_w_o_has_that_gain_in_w_o_and_ov_and_nowhere_else() -> None:
    base = base_weights(LAYOUT)[MATRIX]
    head = slice(3 * LAYOUT.d_head, 4 * LAYOUT.d_head)
    pair = fake_pair(LAYOUT, {MATRIX: within_matrix(LAYOUT, MATRIX, 3, 0.05 * base[head])})
    frame = decompose(pair).to_frame().set_index("component")
    for component in ("L0H3.W_O", "L0H3.OV"):
        # 0.05 times a float32 number is rounded at 6e-8
        assert frame.loc[component, "gain"] == pytest.approx(0.05, rel=1e-6)
        assert frame.loc[component, "residual"] < 1e-6
        assert frame.loc[component, "e_global"] == pytest.approx(1, abs=1e-6)
        assert frame.loc[component, "g_write"] == pytest.approx(1, abs=1e-6)
    changed = frame.index[frame["delta_norm"] > 0]
    assert set(changed) == {"L0.W_O", "L0H3.W_O", "L0H3.OV"}


@pytest.mark.slow
def test_a_scaled_shared_w_v_scales_the_ov_of_every_head_that_reads_it() -> None:
    component = Component("matrix", 1, None, "W_V")
    base = base_weights(LAYOUT)[component]
    kv_head = slice(2 * LAYOUT.d_head, 3 * LAYOUT.d_head)
    planted = within_matrix(LAYOUT, component, 2, -0.02 * base[:, kv_head])
    frame = decompose(fake_pair(LAYOUT, {component: planted})).to_frame().set_index("component")
    changed = frame[(frame["delta_norm"] > 0) & (frame["part"] == "OV")]
    assert list(changed.index) == ["L1H4.OV", "L1H5.OV"]
    assert changed["gain"].to_numpy() == pytest.approx(-0.02, rel=1e-5)


@pytest.mark.slow
def test_reversing_the_pair_turns_gains_round_and_keeps_norms() -> None:
    pair = fake_pair(LAYOUT, background=0.01)
    reverse = {c: type(w)(c, w.base + w.delta, -w.delta, w.floor) for c, w in pair.weights.items()}
    there = decompose(pair).to_frame()
    back = decompose(type(pair)(reverse, pair.layout)).to_frame()
    # float32 base + delta is rounded at 6e-8 of the base, 6e-6 of a 1 % change
    assert back["delta_norm"].to_numpy() == pytest.approx(there["delta_norm"].to_numpy(), rel=1e-4)
    changed = there["delta_norm"].to_numpy() > 0
    cosine = there["cos_base_tuned"].to_numpy()
    assert back["cos_base_tuned"].to_numpy()[changed] == pytest.approx(cosine[changed], rel=1e-6)
    first = there["gain"] * there["base_norm"] ** 2 + there["delta_norm"] ** 2
    second = -(back["gain"] * back["base_norm"] ** 2)
    plain = changed & ~there["part"].isin(["OV", "QK"]).to_numpy()
    assert second.to_numpy()[plain] == pytest.approx(first.to_numpy()[plain], rel=1e-3, abs=1e-7)


def test_an_embedding_is_measured_on_its_d_model_side_only() -> None:
    component = Component("embedding", None, None, "W_E")
    base = base_weights(LAYOUT)[component]
    frame = decompose(fake_pair(LAYOUT, {component: 0.1 * base})).to_frame()
    row = frame.set_index("component").loc["embed.W_E"]
    assert row["gain"] == pytest.approx(0.1, rel=1e-5)
    assert row["g_write"] == pytest.approx(1, abs=1e-6)
    assert pd.isna(row["g_read"])
    assert pd.isna(row["e_global"])


def test_progress_counts_the_blocks() -> None:
    seen: list[tuple[int, int]] = []
    decompose(fake_pair(LAYOUT), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_the_planted_bases_have_the_shapes_they_claim() -> None:
    values = torch.linalg.svdvals(decaying(*shapes(LAYOUT)["W_out"], torch.Generator()))
    assert float(values[0]) == pytest.approx(1, abs=1e-4)
