"""Likeness from moments: against all tokens at once, by Gram matrices, SVD and principal angles."""

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from tvlens.evaluation.similarity import (
    UNITS,
    Moments,
    directions,
    directions_holding,
    linear_cka,
    overlap,
    similarity,
)

WIDTH = 6


def moments_of(base: np.ndarray, other: np.ndarray) -> Moments:
    """Moments of one activation, tokens x width, in two passes over all tokens."""
    change = other - base
    both = np.cov(np.hstack([base, change]).T, bias=True)
    width = base.shape[1]
    blocks = (both[:width, :width], both[width:, width:], both[width:, :width])
    means = (base.mean(0), change.mean(0))
    first, second = (torch.from_numpy(mean)[None].double() for mean in means)
    return Moments(len(base), first, second, *(torch.from_numpy(b)[None] for b in blocks))


def drawn(seed: int = 0, tokens: int = 200, width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """A base with unequal directions and a mean, and a change with a mean of its own."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(tokens, width)) * np.linspace(0.3, 3, width) + 2
    change = rng.normal(size=(tokens, width)) @ rng.normal(size=(width, width)) * 0.3 - 0.2
    return base, base + change


def value(name: str, base: np.ndarray, other: np.ndarray) -> float:
    found = similarity(moments_of(base, other))
    return float(found.values[name][0])


def by_gram_matrices(base: np.ndarray, other: np.ndarray) -> float:
    """CKA as Kornblith et al. define it: HSIC of two centred kernels of tokens against tokens."""
    centre = np.eye(len(base)) - 1 / len(base)
    kernels = [centre @ x @ x.T @ centre for x in (base, other)]
    hsic = np.array([[np.trace(a @ b) for b in kernels] for a in kernels])
    return float(hsic[0, 1] / np.sqrt(hsic[0, 0] * hsic[1, 1]))


@pytest.mark.parametrize("seed", range(3))
def test_cka_is_that_of_centred_gram_matrices_of_all_tokens(seed):
    base, other = drawn(seed, tokens=60)
    wanted = by_gram_matrices(base, other)
    assert 0.3 < wanted < 0.999
    assert value("cka", base, other) == pytest.approx(wanted, rel=1e-10)


def test_a_rotation_and_a_scale_leave_cka_at_one():
    base, _ = drawn()
    turned = 3 * base @ np.linalg.qr(np.random.default_rng(1).normal(size=(WIDTH, WIDTH)))[0]
    assert value("cka", base, turned) == pytest.approx(1, abs=1e-12)
    assert value("cka", base, turned + 100) == pytest.approx(1, abs=1e-9)
    stretched = base * np.array([5, 1, 1, 1, 1, 0.2])
    assert value("cka", base, stretched) < 0.99


def test_ranks_are_those_of_the_singular_values_of_the_centred_difference():
    base, other = drawn(1)
    change = other - base
    energies = np.linalg.svd(change - change.mean(0), compute_uv=False) ** 2
    shares = energies / energies.sum()
    rank = np.exp(-(shares * np.log(shares)).sum())
    wanted = {
        "effective_rank": rank,
        "effective_rank_share": rank / WIDTH,
        "participation": energies.sum() ** 2 / (energies**2).sum(),
        "directions_90": 1 + int(np.argmax(np.cumsum(shares) >= 0.9)),
        "mean_share": np.square(change.mean(0)).sum() / np.square(change).sum(1).mean(),
        "relative_change": np.sqrt(np.square(change).sum() / np.square(base).sum()),
    }
    for name, expected in wanted.items():
        assert value(name, base, other) == pytest.approx(expected, rel=1e-9), name
    own = np.linalg.svd(base - base.mean(0), compute_uv=False) ** 2
    own /= own.sum()
    assert value("effective_rank_base", base, other) == pytest.approx(
        np.exp(-(own * np.log(own)).sum()), rel=1e-9
    )
    found = similarity(moments_of(base, other))
    assert found.shares[0].numpy() == pytest.approx(shares, rel=1e-9)
    assert set(found.values) | {"cosine"} == set(UNITS)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_overlap_is_the_mean_squared_cosine_of_principal_angles(k):
    rng = np.random.default_rng(3)
    first, second = (np.linalg.qr(rng.normal(size=(9, 9)))[0] for _ in range(2))
    wanted = np.square(np.cos(subspace_angles(first[:, :k], second[:, :k]))).mean()
    bases = (torch.from_numpy(basis)[None] for basis in (first, second))
    assert float(overlap(*bases, torch.tensor([k]))) == pytest.approx(wanted)


def test_heads_may_compare_different_numbers_of_directions():
    rng = np.random.default_rng(4)
    first = second = torch.linalg.qr(torch.from_numpy(rng.normal(size=(3, 7, 7))))[0]
    assert overlap(first, second, torch.tensor([1, 4, 2])).tolist() == pytest.approx([1, 1, 1])
    second = second.flip(-1)  # of the leading 4 and the last 4 of 7 directions one is common
    found = overlap(first, second, torch.tensor([1, 4, 0]))
    assert found[:2].tolist() == pytest.approx([0, 0.25])
    assert torch.isnan(found[2])


def test_random_subspaces_overlap_by_k_over_the_width():
    rng = np.random.default_rng(5)
    drawn_bases = torch.linalg.qr(torch.from_numpy(rng.normal(size=(800, 10, 10))))[0]
    found = overlap(drawn_bases[::2], drawn_bases[1::2], torch.full((400,), 3))
    assert float(found.mean()) == pytest.approx(0.3, abs=0.02)  # standard error 0.005


def test_a_difference_in_known_directions_of_the_base_overlaps_with_it_and_not_by_chance():
    rng = np.random.default_rng(6)
    base = rng.normal(size=(400, 20)) * np.array([9, 8] + [1] * 18)
    inside, outside = np.zeros((2, 400, 20))
    inside[:, :2] = rng.normal(size=(400, 2))
    outside[:, 7:9] = rng.normal(size=(400, 2))
    assert value("overlap", base, base + inside) > 0.98
    assert value("overlap", base, base + outside) < 0.02
    found = similarity(moments_of(base, base + inside))
    assert found.k.tolist() == [2]  # a tenth of 20
    assert value("directions_90", base, base + inside) == 2
    assert value("effective_rank", base, base + inside) == pytest.approx(2, abs=0.05)


def test_k_is_no_more_than_the_rank_of_the_difference():
    base, _ = drawn(tokens=400, width=40)
    one = np.outer(np.random.default_rng(0).normal(size=400), np.arange(40))
    found = similarity(moments_of(base, base + one))
    assert found.k.tolist() == [1]
    assert float(found.values["effective_rank"]) == pytest.approx(1, abs=1e-6)


def test_the_mean_of_a_difference_is_apart_from_its_rank():
    base, other = drawn(7)
    moved = other + 50
    assert value("mean_share", base, moved) > 0.99
    for name in ("effective_rank", "participation", "directions_90", "overlap", "cka"):
        assert value(name, base, moved) == pytest.approx(value(name, base, other), rel=1e-8)


def test_no_difference_has_rank_zero_and_is_called_unchanged():
    base, _ = drawn()
    found = similarity(moments_of(base, base.copy()))
    assert found.status == ("unchanged",)
    for name in ("effective_rank", "effective_rank_share", "participation", "directions_90"):
        assert float(found.values[name]) == 0
    assert float(found.values["relative_change"]) == 0
    assert float(found.values["cka"]) == pytest.approx(1, abs=1e-14)
    assert np.isnan(float(found.values["overlap"]))
    assert np.isnan(float(found.values["mean_share"]))


def test_the_same_shift_at_all_tokens_has_the_rank_of_rounding_and_says_so():
    base = drawn()[0].astype(np.float32)
    moved = base + np.float32(0.1)
    found = similarity(moments_of(base.astype(float), moved.astype(float)))
    assert found.status == ("rounding",)
    assert float(found.values["mean_share"]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("tokens", "status"), [(23, "few_tokens"), (24, "ok")])
def test_ranks_of_few_tokens_are_marked(tokens, status):
    base, other = drawn(tokens=tokens)
    assert similarity(moments_of(base, other)).status == (status,)


def test_at_the_fewest_tokens_the_participation_of_noise_is_a_fifth_too_low():
    rng = np.random.default_rng(8)
    found = []
    for _ in range(20):
        base = rng.normal(size=(160, 40))
        found.append(value("participation", base, base + rng.normal(size=(160, 40))))
    assert np.mean(found) / 40 == pytest.approx(0.8, abs=0.02)


def test_directions_come_largest_first_and_span_the_covariance():
    covariance = moments_of(*drawn(9)).change
    found = directions(covariance)
    assert bool((found.values.diff(dim=-1) <= 0).all())
    again = found.vectors @ torch.diag_embed(found.values) @ found.vectors.mT
    torch.testing.assert_close(again, covariance)
    halves = torch.tensor([[4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    assert directions_holding(halves, 0.7).tolist() == [2]
    assert directions_holding(halves, 0.71).tolist() == [3]
    assert directions_holding(halves, 1.0).tolist() == [4]


def test_cka_does_not_tell_which_of_the_two_came_first():
    base, other = drawn(10)
    mine, theirs = (linear_cka(moments_of(*pair)) for pair in ((base, other), (other, base)))
    torch.testing.assert_close(mine, theirs)
