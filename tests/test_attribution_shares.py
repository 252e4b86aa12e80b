"""Shares of an effect by geometric part, on tables made by hand."""

import numpy as np
import pyarrow.compute as pc
import pytest

from tvlens.attribution.parts import PARTS
from tvlens.attribution.shares import BANDS, _share, shares_table
from tvlens.attribution.tables import ATTRIBUTION_SCHEMA
from tvlens.components import Component, key_columns
from tvlens.geometry.measures import WEIGHTS_SCHEMA
from tvlens.tables import Table, keyed_schema

PROMPTS = 8
MATRICES = {
    Component("matrix", layer, None, part): part for layer in range(2) for part in ("W_O", "W_out")
}
NEURON = Component("neuron", 0, 3)


def attribution(effects, *, noise=0.0, seed=0):
    """Rows of parts: ``effects`` by matrix part and geometric part, for each of the layers."""
    rng = np.random.default_rng(seed)
    rows = []
    for component, part in MATRICES.items():
        for name, effect in effects[part].items():
            for prompt in range(PROMPTS):
                moved = effect + noise * rng.standard_normal()
                rows.append((component, name, prompt, moved))
    rows += [(NEURON, name, None, score) for name, score in (("global", 1.0), ("new_write", 3.0))]
    rows.append((NEURON, "global", 0, 99.0))  # rows per prompt of a neuron are of the largest alone
    columns = {
        **key_columns([row[0] for row in rows]),
        "geometric_part": [row[1] for row in rows],
        "prompt": [row[2] for row in rows],
        "score": [row[3] for row in rows],
    }
    constant = {"base": "base", "tuned": "med", "metric": "logprob", "unit": "nats",
                "method": "weight_ig", "space": "weight", "tied": False}  # fmt: skip
    columns |= {name: [value] * len(rows) for name, value in constant.items()}
    return Table.of("attribution", ATTRIBUTION_SCHEMA, columns)


PLANTED = {"W_O": {"global": 3.0, "new_write": 1.0}, "W_out": {"scale": -1.0, "new_both": 3.0}}


def rows_of(table, **equal):
    return table.where(**equal).to_frame().set_index("geometric_part")


def test_shares_are_ratios_of_sums_over_components_and_all_parts_sum_to_1():
    found = shares_table(attribution(PLANTED))
    wanted = [
        ("attention", "gains", 0.75),
        ("attention", "new", 0.25),
        ("MLP", "gains", -0.5),
        ("MLP", "new", 1.5),
        ("W_O", "new", 0.25),
    ]
    for of, band, share in wanted:
        row = rows_of(found, of=of).loc[band]
        assert row["share"] == pytest.approx(share)
        assert row["components"] == 2
        assert row["n"] == PROMPTS
    mlp = rows_of(found, of="MLP")
    assert mlp.loc["new_both", "effect"] == pytest.approx(6.0)
    assert mlp.loc["new_both", "whole"] == pytest.approx(4.0)
    singles = mlp[mlp.index.isin(PARTS)]
    assert singles["share"].sum() == pytest.approx(1.0)
    assert set(BANDS) <= set(mlp.index)


def test_neurons_are_taken_from_their_means_over_prompts_without_an_interval():
    found = rows_of(shares_table(attribution(PLANTED)), of="neuron")
    assert found.loc["new", "share"] == pytest.approx(0.75)
    assert np.isnan(found.loc["new", "ci_low"])
    assert found.loc["new", "effect"] == pytest.approx(3.0)


def test_the_contrast_is_the_mlps_share_less_attentions():
    found = shares_table(attribution(PLANTED, noise=0.1)).where(level="contrast").to_frame()
    assert list(found["of"]) == ["MLP minus attention", "W_out minus W_O"]
    row = found.iloc[0]
    assert row["share"] == pytest.approx(1.25, abs=0.2)
    assert row["ci_low"] > 0
    assert row["verdict"] == "supported"
    assert (
        "New directions carry more of the MLP's effect than of attention's: supported"
        in (row["sentence"])
    )
    turned = {"W_O": PLANTED["W_out"], "W_out": PLANTED["W_O"]}
    other = shares_table(attribution(turned, noise=0.1)).where(level="contrast").to_frame()
    assert other.iloc[0]["verdict"] == "not supported"


def test_an_effect_that_may_be_0_has_no_shares_and_no_verdict():
    small = {"W_O": {"global": 0.0, "new_write": 0.0}, "W_out": PLANTED["W_out"]}
    found = shares_table(attribution(small, noise=1.0, seed=3))
    assert rows_of(found, of="attention")["share"].isna().all()
    row = found.where(level="contrast").to_frame().iloc[0]
    assert row["verdict"] == "cannot tell"
    assert np.isnan(row["share"])
    assert "not surely different from 0" in row["sentence"]


@pytest.mark.slow
def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Ratios of means of 16 prompts: percentiles of a bootstrap are a little short."""
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(300):
        new, other = 1 + rng.standard_normal(16), 3 + rng.standard_normal(16)
        found = _share(new, new + other, seed)
        hits += found.low <= 0.25 <= found.high
    assert 0.85 <= hits / 300 <= 0.97


def weights():
    energies = {"e_global": 0.5, "e_scale": 0.1, "e_within": 0.1, "e_reroute": 0.1,
                "e_new_write": 0.1, "e_new_both": 0.1}  # fmt: skip
    columns = {
        **key_columns(list(MATRICES)),
        "base": ["base"] * 4,
        "tuned": ["med"] * 4,
        "tied": [False] * 4,
        "delta_norm": [1.0, 1.0, 1.0, 3.0],
        **{name: [value] * 3 + [0.0] for name, value in energies.items()},
    }
    columns["e_new_both"][3] = 1.0
    return Table.of("weights", WEIGHTS_SCHEMA, columns)


def test_energies_stand_beside_shares_counted_by_squared_length():
    found = shares_table(attribution(PLANTED), weights=weights())
    mlp = rows_of(found, of="MLP")
    # W_out of layer 0 has 1 of 10 of the squared length, that of layer 1 the rest
    assert mlp.loc["gains", "energy"] == pytest.approx(0.1 * 0.6)
    assert mlp.loc["new", "energy"] == pytest.approx(0.1 * 0.2 + 0.9)
    attention = rows_of(found, of="attention")
    assert attention.loc["gains", "energy"] == pytest.approx(0.6)
    sentence = found.where(level="contrast").to_frame().iloc[0]["sentence"]
    assert "from 0.92 of its squared length" in sentence


def test_groups_by_label_hold_the_components_that_have_it():
    import pyarrow as pa

    schema = keyed_schema(("label", pa.string()))
    named = [*MATRICES, NEURON._replace(part="W_out")]
    labels = ["new_write", "new_write", "amplified", "new_write", "amplified"]
    columns = {
        **key_columns(named), "base": ["base"] * 5, "tuned": ["med"] * 5, "tied": [False] * 5,
        "label": labels,
    }  # fmt: skip
    table = Table.of("labels", schema, columns)
    found = shares_table(attribution(PLANTED), labels=table)
    new = rows_of(found, of="new_write matrix")
    assert new.loc["new", "components"] == 3  # W_O once, W_out twice
    assert new.loc["new", "share"] == pytest.approx((1 + 3 + 3) / (4 + 2 + 2))
    neurons = rows_of(found, of="amplified neuron")
    assert neurons.loc["gains", "share"] == pytest.approx(0.25)


def test_a_few_prompts_give_shares_without_an_interval_and_no_verdict():
    few = attribution(PLANTED, noise=0.1)
    frame = few.data.filter(pc.less(few.data["prompt"], 5))
    found = shares_table(Table("attribution", frame))
    row = rows_of(found, of="attention").loc["new"]
    assert row["share"] == pytest.approx(0.25, abs=0.1)
    assert np.isnan(row["ci_low"])
    contrast = found.where(level="contrast").to_frame().iloc[0]
    assert contrast["verdict"] == "cannot tell"
    assert "5 prompts are too few" in contrast["sentence"]


def test_without_parts_there_is_no_row():
    plain = attribution(PLANTED).where(geometric_part=None)
    assert len(shares_table(plain)) == 0
