"""Null models: calibrated on noise, equal to their definition by loops."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from tvlens.geometry.heads import Factor
from tvlens.geometry.nulls import (
    above_rounding,
    benjamini_hochberg,
    factor_swap,
    neuron_gain,
    noise_edge,
    own_versus_others,
    peers_of,
    share_in_spans,
    sign_flip_test,
    spans_of,
    unit_alignment_spread,
)


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_noise_stays_below_its_edge_and_a_common_direction_rises_above() -> None:
    noise = _normal(20, 40, 60)
    above = torch.linalg.svdvals(noise)[:, 0] > noise_edge(noise, seed=5)
    assert int(above.sum()) <= 2  # a margin of 2 % leaves a small chance each
    rank_one = torch.outer(_normal(40, seed=1), _normal(60, seed=2))
    assert float(torch.linalg.matrix_norm(rank_one, 2)) > 1.4 * float(noise_edge(rank_one, seed=5))


def test_rows_of_very_different_length_are_no_structure() -> None:
    lengths = torch.logspace(0, 2, 40, dtype=torch.float64)
    noise = torch.diag(lengths) @ _normal(40, 60)
    iid = noise.norm() / 2400**0.5 * (40**0.5 + 60**0.5)
    largest = torch.linalg.svdvals(noise)[0]
    assert float(largest) > float(iid)
    assert float(largest) < 1.1 * float(noise_edge(noise, seed=1))


def test_q_values_follow_benjamini_and_hochberg_and_skip_what_is_not_tested() -> None:
    p_values = np.array([0.01, np.nan, 0.04, 0.03, 0.5])
    expected = [0.04, np.nan, 0.04 * 4 / 3, 0.04 * 4 / 3, 0.5]
    np.testing.assert_allclose(benjamini_hochberg(p_values), expected)
    assert np.isnan(benjamini_hochberg(np.full(3, np.nan))).all()


def test_the_rounding_gate_lets_adapters_pass_and_nothing_below_four() -> None:
    delta = np.array([0.0, 1.0, 1.0, 1.0])
    snr = np.array([9.0, 3.9, 4.0, np.nan])
    assert above_rounding(delta, snr).tolist() == [False, False, True, True]


def test_own_versus_others_is_calibrated_on_exchangeable_values() -> None:
    generator = np.random.default_rng(0)
    found = [own_versus_others(generator.normal(size=(8, 8)), np.arange(8)) for _ in range(200)]
    p_values = np.concatenate([f.p_two_sided() for f in found if f is not None])
    # 1600 draws, dependent within a layer: sd about .008
    assert 0.02 <= float((p_values < 0.05).mean()) <= 0.075


def test_heads_of_one_kv_group_are_no_peers() -> None:
    group = np.array([0, 0, 1, 1, 2, 2])
    values = np.random.default_rng(1).normal(size=(6, 6)) * 0.1
    values[0, :2] = 5.0  # a gain of the shared W_V shows on both mates
    found = own_versus_others(values, group)
    assert found is not None
    assert found.others == 4
    assert found.p_two_sided()[0] < 1e-4
    assert found.effect[0] == pytest.approx(5.0 - values[0, 2:].mean())


def test_the_variance_over_peers_is_shrunk_to_the_median_of_the_layer() -> None:
    values = np.random.default_rng(2).normal(size=(5, 5)) * np.arange(1, 6)[:, None]
    found = own_versus_others(values, np.arange(5))
    assert found is not None
    peers = [np.delete(row, head) for head, row in enumerate(values)]
    spread = np.array([row.var(ddof=1) for row in peers])
    # four peers: three degrees of freedom of their own, as many from the layer
    # of a chi-square of three degrees the median is 0.7887 of the mean
    typical = np.median(spread) / 0.788658
    error = np.sqrt((3 * typical + 3 * spread) / 6 * (1 + 1 / 4))
    effect = np.array([values[h, h] - row.mean() for h, row in enumerate(peers)])
    np.testing.assert_allclose(found.t, effect / error)
    np.testing.assert_allclose(found.p_greater(), stats.t.sf(effect / error, 6))


@pytest.mark.slow
def test_own_versus_others_is_calibrated_where_heads_share_their_values() -> None:
    """Random weights, 3 kv heads of 3 query heads: columns of mates correlate at .24."""
    group = np.repeat(np.arange(3), 3)
    value, output = _normal(3, 60, 8)[group], _normal(9, 8, 60, seed=1)
    below, correlated = [], []
    for seed in range(150):
        d_value = _normal(3, 60, 8, seed=2 * seed + 2)[group]
        d_output = _normal(9, 8, 60, seed=2 * seed + 3)
        swap = factor_swap(Factor(value, d_value), Factor(output, d_output))
        found = own_versus_others(swap.z.numpy(), group, alike=swap.of_mates(group))
        assert found is not None
        below.append(found.p_two_sided() < 0.05)
        z = swap.z.numpy()
        correlated += [z[h, a] * z[h, a + 1] for h, a in ((0, 3), (0, 6), (3, 0), (3, 6), (6, 0))]
    assert swap.of_mates(group) == pytest.approx(np.mean(correlated), abs=0.1)
    print(np.mean(below))
    assert 0.02 <= np.mean(below) <= 0.07


def test_a_single_kv_head_leaves_no_peer_to_test_against() -> None:
    assert own_versus_others(np.zeros((4, 4)), np.zeros(4, dtype=int)) is None


def test_factor_swaps_have_unit_spread_under_noise_and_equal_a_loop() -> None:
    value, output = _normal(4, 20, 3), _normal(4, 3, 20, seed=1)
    d_value, d_output = 0.1 * _normal(4, 20, 3, seed=2), 0.2 * _normal(4, 3, 20, seed=3)
    z = factor_swap(Factor(value, d_value), Factor(output, d_output)).z
    for h in range(4):
        for g in range(4):
            to_output, to_value = (
                value[g].T @ value[g] @ output[g],
                value[g] @ output[g] @ output[g].T,
            )
            inner = (d_output[h] * to_output).sum() + (d_value[h] * to_value).sum()
            spread = (
                d_output[h].square().mean() * to_output.square().sum()
                + d_value[h].square().mean() * to_value.square().sum()
            ).sqrt()
            assert float(z[h, g]) == pytest.approx(float(inner / spread))
    left = Factor(_normal(30, 20, 3, seed=4), _normal(30, 20, 3, seed=5))
    right = Factor(_normal(30, 3, 20, seed=6), _normal(30, 3, 20, seed=7))
    many = factor_swap(left, right).z
    assert float(many.std()) == pytest.approx(1, abs=0.1)


def test_own_factor_swap_is_the_first_order_gain_of_the_circuit() -> None:
    value, output = _normal(2, 20, 3), _normal(2, 3, 20, seed=1)
    still = Factor(value, torch.zeros_like(value)), Factor(output, torch.zeros_like(output))
    assert float(factor_swap(still[0], Factor(output, 0.01 * output)).z[0, 0]) > 5
    assert float(factor_swap(Factor(value, -0.01 * value), still[1]).z[1, 1]) < -5


def test_share_in_spans_is_a_projection_and_chance_is_d_head_over_d_model() -> None:
    base = _normal(6, 4, 40)
    found = share_in_spans(base, spans_of(base))
    torch.testing.assert_close(found.diagonal(), torch.ones(6).double())
    noise = share_in_spans(_normal(6, 4, 40, seed=1), spans_of(base))
    assert float(noise.mean()) == pytest.approx(0.1, abs=0.02)


def test_neuron_gain_has_the_moments_of_all_own_and_other_pairs() -> None:
    base, delta = _normal(30, 10) + 0.5, _normal(30, 10, seed=1)
    own = torch.nn.functional.cosine_similarity(delta, base, dim=1)
    found = neuron_gain(peers_of(base), delta, own)
    cosines = torch.nn.functional.cosine_similarity(delta[:, None], base[None], dim=2)
    torch.testing.assert_close(found.effect, cosines.diagonal() - cosines.mean(1))
    torch.testing.assert_close(found.spread, cosines.std(1, correction=0))


def test_neuron_gain_is_calibrated_on_noise_over_correlated_base_weights() -> None:
    base = _normal(2000, 40) + 0.7
    delta = _normal(2000, 40, seed=1)
    own = torch.nn.functional.cosine_similarity(delta, base, dim=1)
    found = neuron_gain(peers_of(base), delta, own)
    p_values = 2 * stats.norm.sf((found.effect / found.spread).abs().numpy())
    assert 0.035 <= float((p_values < 0.05).mean()) <= 0.065


def test_the_spread_of_a_random_directions_alignment() -> None:
    squares = _normal(4000, 30).square()
    share = squares / squares.sum(1, keepdim=True)
    weights = 1 - (2 * torch.arange(1, 31) - 1) / 30
    assert float((share * weights).sum(1).std()) == pytest.approx(
        unit_alignment_spread(30), rel=0.05
    )


def test_sign_flips_enumerate_few_layers_and_name_the_smallest_p() -> None:
    four = sign_flip_test(np.array([1.0, 1.0, 1.0, 1.0]), seed=0)
    assert (four.p_value, four.p_floor, four.draws) == (0.125, 0.125, 16)
    mixed = sign_flip_test(np.array([1.0, -1.0]), seed=0)
    assert mixed.p_value == 1.0
    many = sign_flip_test(np.full(30, 0.1), seed=0)
    assert many.p_value == many.p_floor == pytest.approx(2 / 20001)
    assert many.mean == pytest.approx(0.1)
    one = sign_flip_test(np.array([3.0]), seed=0)
    assert (one.p_value, one.p_floor) == (1.0, 1.0)


@pytest.mark.parametrize("count", [2, 5, 9])
def test_sign_flips_count_the_patterns_that_reach_the_mean(count: int) -> None:
    found = np.random.default_rng(count).normal(0.4, size=count)
    reached = 0
    for signs in itertools.product((1, -1), repeat=count):
        flipped = sum(sign * value for sign, value in zip(signs, found, strict=True))
        reached += abs(flipped) >= abs(sum(found)) - 1e-12
    assert sign_flip_test(found, seed=0).p_value == pytest.approx(reached / 2**count)
