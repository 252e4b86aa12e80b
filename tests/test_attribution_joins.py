"""Joins of weights and effects on tables made by hand: planted ranks, roles and circuits."""

import numpy as np
import pytest

from tvlens.attribution.joins import (
    circuit_agreement,
    circuits_table,
    effect_of_layers,
    role,
    roles_table,
    size_and_effect,
)
from tvlens.attribution.tables import ATTRIBUTION_SCHEMA
from tvlens.components import Component, key_columns
from tvlens.tables import Table

PROMPTS = 8


def rows(method, scores, *, direction="tuned_into_base", at="base", part=None, spread=0.0):
    """Rows per prompt of components with the given mean scores."""
    columns = {name: [] for name in ATTRIBUTION_SCHEMA.names}
    for component, score in scores.items():
        named = component._replace(part=part) if part else component
        for prompt in range(PROMPTS):
            entry = {
                **{name: values[0] for name, values in key_columns([named]).items()},
                "base": "base", "tuned": "tuned", "tied": False, "method": method,
                "direction": direction, "at": at, "prompt": prompt, "metric": "logprob",
                "unit": "nats", "score": score + spread * (-1) ** prompt,
                "space": "weight" if "weight" in method else "activation",
            }  # fmt: skip
            for name in columns:
                columns[name].append(entry.get(name))
    return columns


def table(*parts):
    merged = {
        name: [value for part in parts for value in part[name]] for name in ATTRIBUTION_SCHEMA.names
    }
    return Table.of("attribution", ATTRIBUTION_SCHEMA, merged, order="score")


HEADS = [Component("head", 0, index) for index in range(4)]
MATRIX = Component("matrix", 0, None, "W_Q")


def test_where_an_effect_arises_and_where_it_passes():
    written = dict(zip(HEADS, [2.0, 2.0, 0.0, 0.0], strict=True))
    passing = dict(zip(HEADS, [3.0, 0.0, 3.0, 0.0], strict=True))
    found = roles_table(
        table(
            rows("weight_ig", {**written, MATRIX: 10.0}),
            rows("cross_model_first_order", passing, part="z"),
            rows("exact_weight_path", {HEADS[0]: 2.0, HEADS[1]: 0.0}),
            rows("exact_activation", {HEADS[0]: 3.0, HEADS[1]: 1.0}, part="z"),
        )
    ).to_frame()
    assert found["role"].tolist() == ["both", "source", "carrier", "neither"]
    assert found["role_exact"].tolist()[:2] == ["both", "carrier"]
    assert found["role_exact"].isna().tolist() == [False, False, True, True]
    assert found["written"].tolist() == [2.0, 2.0, 0.0, 0.0]
    assert found["passing"].tolist() == [3.0, 0.0, 3.0, 0.0]
    assert found["site"].tolist() == ["L0H0", "L0H1", "L0H2", "L0H3"]


def test_the_effect_of_a_layer_is_the_mean_size_of_its_matrices_scores():
    """Scores that cancel over prompts count; other parts, kinds and methods do not."""
    first, second = (Component("matrix", layer, None, "W_O") for layer in (0, 1))
    out = Component("matrix", 0, None, "W_out")
    found = effect_of_layers(
        table(
            rows("weight_ig", {first: 0.0, second: -4.0}, spread=2.0),
            rows("weight_ig", {out: 6.0, MATRIX: 100.0, HEADS[0]._replace(part="W_O"): 100.0}),
            rows("weight_first_order_base", {first: 100.0}),
        ),
        ("W_O", "W_out"),
    )
    assert found == pytest.approx({0: (2.0 + 6.0) / 2, 1: 4.0})


def test_a_score_counts_only_above_its_interval_and_a_hundredth_of_the_change():
    sure, unsure, small = (1.0, 0.5, 1.5), (1.0, -0.1, 2.1), (0.009, 0.008, 0.010)
    assert role(sure, sure, 1.0) == "both"
    assert role(sure, unsure, 1.0) == "source"
    assert role(small, sure, 1.0) == "carrier"
    assert role((-1.0, -1.5, -0.5), unsure, 1.0) == "source"
    assert role(unsure, small, 1.0) == "neither"


def test_a_noisy_site_has_no_role():
    noisy = {HEADS[0]: 0.5}
    found = roles_table(
        table(
            rows("weight_ig", {**noisy, MATRIX: 1.0}, spread=3.0),
            rows("cross_model_first_order", noisy, part="z", spread=3.0),
        )
    ).to_frame()
    assert found["role"].tolist() == ["neither"]
    low, high = found["written_low"][0], found["written_high"][0]
    # Student's t with 7 degrees of freedom: 2.365 * sd / sqrt(8), sd of +-3 around the mean
    assert high - low == pytest.approx(2 * 2.3646 * np.std([3, -3] * 4, ddof=1) / 8**0.5, rel=1e-3)


def weights(sizes, *, base=2.0):
    """The weights table of heads with two parts of planted length."""
    from tvlens.geometry.decompose import WEIGHTS_SCHEMA

    parts = [h._replace(part=part) for h in sizes for part in ("W_Q", "W_O")]
    columns = {
        **key_columns(parts),
        "base": ["base"] * len(parts), "tuned": ["tuned"] * len(parts),
        "tied": [False] * len(parts),
        "delta_norm": [size for size in sizes.values() for _ in range(2)],
        "base_norm": [base] * len(parts),
    }  # fmt: skip
    return Table.of("weights", WEIGHTS_SCHEMA, columns)


@pytest.mark.parametrize(("turn", "rho"), [(1, 1.0), (-1, -1.0)])
def test_size_predicts_effect_where_it_was_planted(turn, rho):
    heads = [Component("head", layer, index) for layer in range(3) for index in range(4)]
    sizes = {head: 1.0 + place for place, head in enumerate(heads)}
    effects = {head: turn * size for head, size in sizes.items()}
    # the effect is a size: a negative score of a large head is a large effect
    shifted = {head: (50 + effect) * (-1) ** i for i, (head, effect) in enumerate(effects.items())}
    found = size_and_effect(weights(sizes), table(rows("weight_ig", shifted))).to_frame()
    assert set(found["measure"]) == {"delta_norm", "relative_delta"}
    assert found["n"].tolist() == [12, 12]
    assert found["spearman"].tolist() == pytest.approx([rho, rho])
    assert (found["ci_low"] <= found["spearman"]).all()


def test_few_components_have_no_rank():
    sizes = {head: 1.0 for head in HEADS[:2]}
    found = size_and_effect(weights(sizes), table(rows("weight_ig", sizes))).to_frame()
    assert found["spearman"].isna().all()


def test_a_circuit_that_moved_is_found_with_its_interval():
    here = dict(zip(HEADS, [4.0, 3.0, 2.0, 1.0], strict=True))
    there = dict(zip(HEADS, [4.0, 3.0, 2.0, 9.0], strict=True))
    circuits = circuits_table(
        table(
            rows("activation_first_order", here, at="base", direction="clean_into_corrupt"),
            rows("activation_first_order", there, at="tuned", direction="clean_into_corrupt"),
        )
    )
    assert circuits is not None
    top = circuits.top(1).iloc[0]
    assert (top["component"], top["difference"]) == ("L0H3", 8.0)
    assert top["ci_low"] == top["ci_high"] == 8.0
    agreement = circuit_agreement(circuits).to_frame().iloc[0]
    assert agreement["spearman"] == pytest.approx(-0.2)  # ranks 4321 against 3214


def test_one_model_alone_is_no_comparison():
    one = rows("activation_first_order", {HEADS[0]: 1.0}, at="tuned")
    assert circuits_table(table(one)) is None
