"""Directions by name: planted writes are found, named with their sign, and can be put back."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from tests.geometry_pairs import (
    FakeLayout,
    FakePair,
    base_weights,
    fake_pair,
    tail_direction,
    within_matrix,
)
from tests.tiny_checkpoints import copy_with, tiny_gemma2
from tvlens.components import Component
from tvlens.geometry.changes import Remainder
from tvlens.geometry.directions import Directions, directions_table, new_directions
from tvlens.geometry.readout import readout, unembedding_of
from tvlens.geometry.spectra import STRONGEST, spectra_of_block, spikes_of
from tvlens.geometry.writes import matrix_intruders, strongest_writes
from tvlens.tables import Table, keyed_schema
from tvlens.weights.matching import load_pair

LAYOUT = FakeLayout()
W_E = Component("embedding", None, None, "W_E")
W_O, W_OUT = (Component("matrix", 0, None, part) for part in ("W_O", "W_out"))
TOKENS = [f"t{number}" for number in range(300)]
BACKGROUND = 0.002


def _unit(vector: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vector.double(), dim=0).float()


def _token(number: int) -> Tensor:
    """The direction that the tied fake model writes for a token."""
    return _unit(base_weights(LAYOUT)[W_E][number])


def _random(size: int, seed: int) -> Tensor:
    return _unit(torch.randn(size, generator=torch.Generator().manual_seed(seed)))


def _found(pair: FakePair, labels: pd.DataFrame | None = None) -> Directions:
    table = None
    if labels is not None:
        schema = keyed_schema(("label", Table.of("x", keyed_schema(), {}).data.schema[0].type))
        count = len(labels)
        known = {"site": ["s"] * count, "base": ["base"] * count, "tuned": ["tuned"] * count}
        columns = {name: labels[name].tolist() for name in labels}
        table = Table.of("labels", schema, {**columns, **known, "tied": [False] * count})
    return new_directions(pair, table, unembedding=unembedding_of(pair), tokens=TOKENS)


def _neurons(labels: dict[int, str], layer: int = 0) -> pd.DataFrame:
    rows = [
        {"component": f"L{layer}N{i}.W_out", "kind": "neuron", "layer": layer, "index": i,
         "part": "W_out", "label": label}
        for i, label in labels.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _planted(component: Component, change: Tensor, *, background: float = BACKGROUND) -> FakePair:
    return fake_pair(LAYOUT, {component: change}, background=background)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_planted_write_along_an_unembedding_row_is_named_by_its_token(sign: float) -> None:
    read, write = _random(192, 1), _token(41)
    pair = _planted(W_OUT, sign * 0.3 * torch.outer(read, write))
    table, vectors = _found(pair)
    row = table.where(component="L0.W_out.d0").to_frame().iloc[0]
    assert (row["kind"], row["site"], row["rank"], row["part"]) == (
        "direction",
        "L0.mlp",
        0,
        "W_out",
    )
    assert row["promoted"][0] == "t41"
    assert row["promoted_ids"][0] == 41
    assert row["promoted_z"][0] == row["top_z"] > row["random_z_99"] > row["random_z"]
    assert row["stands_out"]
    assert row["p_value"] == row["p_floor"] == pytest.approx(1 / 2000)
    assert row["sign"] == "tokens"
    assert row["strength"] == pytest.approx(0.3, rel=0.01)
    assert row["share"] > 0.95
    # the token turns the write vector, the read vector turns with it, and the product stays
    assert float(vectors["tuned/L0.W_out.d0.write"] @ write) > 0.99
    assert float(vectors["tuned/L0.W_out.d0.read"] @ read) * sign > 0.99


def test_a_neurons_change_keeps_its_sign_so_that_promoted_and_suppressed_differ() -> None:
    change = within_matrix(LAYOUT, W_OUT, 5, 0.2 * _token(7))
    change = change + within_matrix(LAYOUT, W_OUT, 6, -0.1 * _token(8))
    labels = _neurons({5: "new_write", 6: "new_write", 9: "rewired"})
    table, vectors = _found(_planted(W_OUT, change), labels)
    rows = table.where(kind="neuron").to_frame().set_index("component")
    assert list(rows.index) == ["L0N5.W_out", "L0N6.W_out"]  # the longest first, no rewired one
    assert rows.loc["L0N5.W_out", "promoted"][0] == "t7"
    assert rows.loc["L0N6.W_out", "suppressed"][0] == "t8"
    assert rows.loc["L0N6.W_out", "suppressed_z"][0] == -rows.loc["L0N6.W_out", "top_z"]
    assert rows["stands_out"].all()
    assert set(rows["sign"]) == {"own"}
    assert rows["rank"].isna().all()
    assert rows["strength"].tolist() == pytest.approx([0.2, 0.1], rel=0.02)
    assert float(vectors["tuned/L0N6.W_out.write"] @ _token(8)) < -0.98
    assert "tuned/L0N6.W_out.read" not in vectors


def test_the_saved_vectors_rebuild_the_change_of_a_matrix() -> None:
    change = sum(
        size * torch.outer(_random(96, place), _random(96, 50 + place))
        for place, size in enumerate((0.5, 0.45, 0.4))
    )
    table, vectors = _found(_planted(W_O, change))  # type: ignore[arg-type]
    rows = table.where(part="W_O").to_frame()
    rebuilt = sum(
        row.strength * torch.outer(vectors[f"{row.vector}.read"], vectors[f"{row.vector}.write"])
        for row in rows.itertuples()
    )
    delta = fake_pair(LAYOUT, {W_O: change}, background=BACKGROUND).weights[W_O].delta  # type: ignore[dict-item]
    assert float((rebuilt - delta).norm() / delta.norm()) < 0.05
    assert all(float(v.norm()) == pytest.approx(1, abs=1e-5) for v in vectors.values())
    assert {v.dtype for v in vectors.values()} == {torch.float32}


def test_unplanted_noise_has_no_direction() -> None:
    table, vectors = _found(fake_pair(LAYOUT, background=0.01))
    assert len(table) <= 1  # 4 matrices and 16 heads, a margin of 2 % each
    assert len(vectors) == 2 * len(table)


@pytest.mark.slow
def test_random_directions_do_not_stand_out_and_their_p_is_calibrated() -> None:
    p_values = []
    for seed in range(6):
        change = sum(
            torch.outer(_random(192, 900 * seed + n), _random(96, 900 * seed + 100 + n))
            for n in range(8)
        )
        rows = _found(_planted(W_OUT, 0.3 * change)).table.where(part="W_out").to_frame()  # type: ignore[operator]
        assert len(rows) == 8
        assert not rows["stands_out"].any()
        assert all(z[0] == top for z, top in zip(rows["promoted_z"], rows["top_z"], strict=True))
        assert all(z[0] < 0 and z[0] <= z[-1] for z in rows["suppressed_z"])
        p_values += rows["p_value"].tolist()
    assert abs(np.mean(p_values) - 0.5) < 4 * (1 / 12 / len(p_values)) ** 0.5
    assert np.mean(np.array(p_values) < 0.05) < 0.17  # 48 draws: .05 +- .03


def _rank_one(kind: str) -> Tensor:
    """A change of W_out of one kind and of length 0.2."""
    left, _, right = torch.linalg.svd(base_weights(LAYOUT)[W_OUT].double(), full_matrices=False)
    generator = torch.Generator().manual_seed(0)
    elsewhere = _random(192, 3).double()
    made = {
        "amplified": torch.outer(left[:, 3], right[3]),
        "attenuated": -torch.outer(left[:, 3], right[3]),
        "rewired": torch.outer(elsewhere, right[2]),
        "new_write": torch.outer(elsewhere, tail_direction(base_weights(LAYOUT)[W_OUT], generator)),
    }
    return 0.2 * made[kind].float()


@pytest.mark.parametrize("kind", ["amplified", "attenuated", "rewired", "new_write"])
def test_a_planted_direction_gets_its_label(kind: str) -> None:
    table, _ = _found(_planted(W_OUT, _rank_one(kind)))
    row = table.where(component="L0.W_out.d0").to_frame().iloc[0]
    assert row["label"] == kind
    gain = {"amplified": 1, "attenuated": -1}.get(kind)
    if gain:
        assert row["gain_cosine"] == pytest.approx(gain, abs=0.02)
    existing = kind != "new_write"
    assert (row["max_cos"] > 0.99) == existing
    assert row["intruder_05"] == (not existing)
    assert row["novelty"] == pytest.approx(0 if existing else 1, abs=0.02)
    assert (row["g_rel"] > 1) == existing


def test_spikes_counts_all_directions_where_only_the_strongest_are_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 11, generator=generator))[0] for n in (192, 96))
    sizes = torch.linspace(1, 0.9, 11)
    rows = _found(_planted(W_OUT, left * sizes @ right.T)).table.where(part="W_out").to_frame()
    assert rows["spikes"].tolist() == [11] * 8
    assert rows["rank"].tolist() == list(range(8))
    np.testing.assert_allclose(rows["strength"], sizes[:8], rtol=0.01)


@pytest.mark.slow
def test_a_change_below_the_rounding_floor_has_no_direction() -> None:
    pair = _planted(W_OUT, 0.3 * torch.outer(_random(192, 1), _token(4)))
    weight = pair.weights[W_OUT]
    for floor, count in ((weight.delta.square().sum() / weight.delta.numel() / 3, 0), (None, 1)):
        floors = None if floor is None else torch.full_like(weight.delta, float(floor))
        known = {**pair.weights, W_OUT: replace(weight, floor=floors)}
        table = _found(FakePair(known, pair.layout)).table.where(part="W_out")
        assert len(table) == count


def test_intruders_are_those_of_a_dense_decomposition() -> None:
    generator = torch.Generator().manual_seed(5)
    base = base_weights(LAYOUT)[W_OUT]
    new = tail_direction(base, generator)
    halfway = _unit(new + torch.linalg.svd(base.double()).Vh[0].float())  # cos .71 with both
    change = 1.5 * torch.outer(_random(192, 1), new) + 1.4 * torch.outer(_random(192, 2), halfway)
    pair = _planted(W_OUT, change)
    spectra = next(s for s in spectra_of_block(pair, pair.blocks()[1], seed=0) if s.part == "W_out")
    tuned, known = (
        np.linalg.svd(matrix.double().numpy(), full_matrices=False)[2]
        for matrix in (base + pair.weights[W_OUT].delta, base)
    )
    largest = np.abs(tuned[:10] @ known.T).max(1)
    expected = {
        f"intruders_0{int(10 * eps)}": int((largest < eps).sum()) for eps in (0.3, 0.5, 0.7)
    }
    assert matrix_intruders(spectra) == expected
    assert expected["intruders_07"] > expected["intruders_03"] >= 0
    small = replace(spectra.weight, change=1e-6 * change)
    still = replace(spectra, weight=small, change=spikes_of(small, seed=0, at_least=STRONGEST))
    assert set(matrix_intruders(still).values()) == {0}


def test_a_few_steps_from_the_bases_directions_find_those_of_the_tuned_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for n in (96, 64))
    values = 0.8 ** torch.arange(64.0)
    base = (left[:, :64] * values @ right.T).double()
    tuned = base + 0.01 * torch.randn(96, 64, generator=generator).double()
    whole = Remainder(base, tuned - base, -torch.ones(1, 1).double())
    found = strongest_writes(whole, right[:, :20].double(), count=5)
    dense = torch.linalg.svd(tuned).Vh[:5]
    torch.testing.assert_close(
        (dense @ found).abs().diagonal(), torch.ones(5).double(), rtol=0, atol=1e-7
    )


def test_a_heads_direction_is_that_of_its_circuit() -> None:
    kept = FakeLayout(n_kv_heads=4)
    weights = base_weights(kept)
    part = slice(2 * 12, 3 * 12)
    write = tail_direction(weights[W_O][part], torch.Generator().manual_seed(1))
    change = 0.4 * torch.outer(_random(12, 5), write)
    pair = fake_pair(kept, {W_O: within_matrix(kept, W_O, 2, change)}, background=1e-4)
    table, vectors = _found(pair)
    rows = table.where(part="OV").to_frame()
    assert rows["component"].tolist() == ["L0H2.OV.d0"]
    row = rows.iloc[0]
    assert (row["site"], row["kind"], row["kv_index"]) == ("L0H2", "direction", 1)
    assert row["label"] == "new_write"
    value = weights[Component("matrix", 0, None, "W_V")][:, 12:24].double()
    left, values, right = torch.linalg.svd(value @ change.double())
    assert row["strength"] == pytest.approx(float(values[0]), rel=0.01)
    assert row["share"] == pytest.approx(1, abs=0.01)
    product = torch.outer(vectors["tuned/L0H2.OV.d0.read"], vectors["tuned/L0H2.OV.d0.write"])
    assert float((product.double() * torch.outer(left[:, 0], right[0])).sum()) > 0.99


def test_a_gain_of_the_values_is_an_amplified_direction_of_its_query_heads() -> None:
    layout, component = FakeLayout(n_kv_heads=4), Component("matrix", 0, None, "W_V")
    base = base_weights(layout)[component][:, :12]
    left, values, right = torch.linalg.svd(base, full_matrices=False)
    top = 0.2 * values[0] * torch.outer(left[:, 0], right[0])
    pair = fake_pair(layout, {component: within_matrix(layout, component, 0, top)}, background=1e-4)
    rows = _found(pair).table.where(part="OV").to_frame()
    assert rows["component"].tolist() == ["L0H0.OV.d0", "L0H1.OV.d0"]
    assert (rows["g_rel"] > 0.5).all()  # it writes where the heads already write
    assert not set(rows["label"]) & {"new_write", "attenuated"}


def test_tokens_are_read_behind_a_post_norms_gain(tmp_path: Path) -> None:
    base = tiny_gemma2(tmp_path / "base")
    pair = load_pair(str(base), str(base), names=("base", "same"))
    unembedding = unembedding_of(pair)
    assert unembedding is not None
    post = pair.read(Component("norm", 1, None, "ln2_post.w")).base
    write = _unit(next(iter(unembedding.pieces()))[:, 23] / unembedding.gain / post)

    def edit(tensors: dict[str, Tensor]) -> None:
        stored = tensors["model.layers.1.mlp.down_proj.weight"]  # [d_model, d_mlp]
        stored += 5 * torch.outer(write, _random(stored.shape[1], 2))

    tuned = load_pair(str(base), str(copy_with(base, tmp_path / "tuned", edit)))
    table, vectors = new_directions(tuned, unembedding=unembedding)
    row = table.where(component="L1.W_out.d0").to_frame().iloc[0]
    assert row["promoted"][0] == "[23]"
    seen = readout((vectors[f"{row['vector']}.write"] * post)[None], unembedding)
    np.testing.assert_allclose(row["promoted_z"], seen.promoted_z[0], rtol=1e-4)
    assert float(vectors[f"{row['vector']}.write"] @ write) > 0.999


def test_without_a_readout_there_are_directions_and_no_tokens() -> None:
    pair = _planted(W_OUT, -0.3 * torch.outer(_random(192, 1), _token(4)))
    table, vectors = new_directions(pair)
    row = table.to_frame().iloc[0]
    assert row["sign"] == "entry"
    assert row["promoted"] is None
    assert pd.isna(row["p_value"])
    write = vectors["tuned/L0.W_out.d0.write"]
    assert float(write[write.abs().argmax()]) > 0


def test_a_pair_without_directions_has_an_empty_table_of_the_same_columns() -> None:
    pair = fake_pair(LAYOUT)
    table, vectors = directions_table(pair, [], unembedding_of(pair), seed=0)
    assert len(table) == 0
    assert not vectors
    assert {"promoted", "q_value", "vector"} <= set(table.data.column_names)
