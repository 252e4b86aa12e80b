"""Parts of a change against projections written out, planted changes, and the columns e_*."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tvlens.geometry.changes import Factored
from tvlens.geometry.matrices import K_FRACTION, seen, spectral_basis
from tvlens.geometry.measures import placed_columns
from tvlens.geometry.splits import (
    GEOMETRIC_PARTS,
    NeuronSplit,
    Split,
    matrix_split,
    neuron_split,
    parts_of_change,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def conditioned(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A base whose smallest singular values are not tiny: the Gram squares its condition."""
    return normal(rows, columns, seed=seed) + 3 * torch.eye(rows, columns, dtype=torch.float64)


def written(base: Tensor, delta: Tensor, part: str) -> dict[str, np.ndarray]:
    """The oracle: every part as a matrix, from a full SVD and projections."""
    w, d = base.numpy(), delta.numpy()
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    rank = int((s > 1e-5 * s[0]).sum())
    k_read, k_write = (max(1, min(int(K_FRACTION * size), rank)) for size in w.shape)
    gain = (w * d).sum() / (w * w).sum()
    channels = np.einsum("ai, ab, ib -> i", u, d, vh)
    rest = d - u @ np.diag(channels) @ vh
    read, write = u[:, :k_read] @ u[:, :k_read].T, vh[:k_write].T @ vh[:k_write]
    parts = {
        "global": gain * w,
        "scale": u @ np.diag(channels - gain * s) @ vh,
        "within": read @ rest @ write,
        "new_both": (rest - read @ rest) @ (np.eye(len(write)) - write),
    }
    onto_new = read @ rest @ (np.eye(len(write)) - write)
    from_new = (rest - read @ rest) @ write
    if part in ("W_O", "W_out"):
        return {**parts, "new_write": onto_new, "reroute": from_new}
    return {**parts, "reroute": onto_new, "new_read": from_new}


def shares_of(split: Split, base: Tensor, delta: Tensor, seed: int = 5) -> dict[str, Tensor]:
    """The split's shares of <G, D> for gradients in factors, and G itself under ``G``."""
    x, g = normal(2, 3, base.shape[0], seed=seed), normal(2, 3, base.shape[1], seed=seed + 1)
    gradient = torch.einsum("bpi, bpo -> bio", x, g)
    total = torch.einsum("bio, io -> b", gradient, delta)[:, None]
    return {**split.shares(x, g, total), "G": gradient, "total": total}


def alone(tensor: Tensor) -> Tensor:
    return tensor[None]


@pytest.mark.slow
@given(st.integers(4, 14), st.integers(4, 14), st.integers(0, 500), st.sampled_from(["W_O", "W_Q"]))
def test_parts_are_the_projections_written_out_and_sum_to_the_score(
    rows: int, columns: int, seed: int, part: str
) -> None:
    base, delta = conditioned(rows, columns, seed), normal(rows, columns, seed=seed + 1)
    found = shares_of(matrix_split(alone(base), alone(delta), part), base, delta, seed)
    gradient, total = found.pop("G"), found.pop("total")
    oracle = written(base, delta, part)
    assert set(found) == set(oracle)
    for name, matrix in oracle.items():
        wanted = torch.einsum("bio, io -> b", gradient, torch.from_numpy(matrix))[:, None]
        torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sum(found.values()), total, rtol=0, atol=1e-9)


@pytest.mark.slow
@given(st.integers(4, 14), st.integers(4, 14), st.integers(0, 500), st.sampled_from(["W_O", "W_Q"]))
def test_the_parts_themselves_are_the_projections_written_out_and_sum_to_the_change(
    rows: int, columns: int, seed: int, part: str
) -> None:
    base, delta = conditioned(rows, columns, seed), normal(rows, columns, seed=seed + 1)
    found, oracle = dict(parts_of_change(base, delta, part)), written(base, delta, part)
    assert set(found) == set(oracle)
    for name, matrix in oracle.items():
        np.testing.assert_allclose(found[name].numpy(), matrix, rtol=0, atol=1e-7)
    torch.testing.assert_close(sum(found.values()), delta, rtol=0, atol=1e-13)


@pytest.mark.parametrize("part", ["W_O", "W_Q"])
def test_parts_of_factors_are_those_of_their_product_and_sum_to_it(part: str) -> None:
    base, left, right = conditioned(12, 10), normal(12, 2, seed=1), normal(2, 10, seed=2)
    found = dict(parts_of_change(base, Factored(left, right), part))
    dense = dict(parts_of_change(base, left @ right, part))
    for name, values in dense.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=1e-12)
    torch.testing.assert_close(sum(found.values()), left @ right, rtol=0, atol=1e-13)


def test_parts_sum_to_the_change_of_a_base_with_null_directions() -> None:
    base, delta = normal(12, 3) @ normal(3, 10, seed=1), normal(12, 10, seed=2)
    for part in ("W_O", "W_Q"):
        found = dict(parts_of_change(base, delta, part))
        torch.testing.assert_close(sum(found.values()), delta, rtol=0, atol=1e-13)


@pytest.mark.parametrize("part", ["W_out", "W_in"])
@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_the_energies_of_the_parts_are_the_columns_of_the_weights_table(
    shape: tuple[int, int], part: str
) -> None:
    base, delta = conditioned(*shape), normal(*shape, seed=1)
    basis = spectral_basis(base)
    columns = placed_columns(basis, seen(basis, delta), part, shape=shape)
    total = float(delta.square().sum())
    for name, matrix in written(base, delta, part).items():
        assert float(columns[f"e_{name}"]) == pytest.approx((matrix**2).sum() / total, abs=1e-9)


def planted(kind: str, base: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(base, full_matrices=True)
    new = len(s) - 1
    return {
        "global": 0.03 * base,
        "scale": u[:, :2] @ torch.diag(torch.stack([s[1], -s[0]])) @ vh[:2],
        "within": torch.outer(u[:, 0], vh[1]) - torch.outer(u[:, 1], vh[0]),
        "new_write": torch.outer(u[:, 0], vh[new]),
        "reroute": torch.outer(u[:, new], vh[0]),
        "new_both": torch.outer(u[:, new], vh[new - 1]),
    }[kind]


@pytest.mark.parametrize("kind", ["global", "scale", "within", "new_write", "reroute", "new_both"])
@pytest.mark.parametrize("shape", [(16, 12), (12, 16)])
def test_a_planted_change_is_in_its_part_alone(kind: str, shape: tuple[int, int]) -> None:
    base = conditioned(*shape)
    delta = planted(kind, base)
    found = shares_of(matrix_split(alone(base), alone(delta), "W_out"), base, delta)
    total = found.pop("total")
    del found["G"]
    for name, values in found.items():
        wanted = total if name == kind else torch.zeros_like(total)
        torch.testing.assert_close(values, wanted, rtol=1e-6, atol=1e-8, msg=name)


def test_what_is_new_in_a_matrix_that_reads_is_what_it_reads() -> None:
    base = conditioned(16, 12)
    u, _, vh = torch.linalg.svd(base, full_matrices=True)
    delta = torch.outer(u[:, 11], vh[0])
    found = shares_of(matrix_split(alone(base), alone(delta), "W_in"), base, delta)
    torch.testing.assert_close(found["new_read"], found["total"])
    assert float(found["reroute"].abs().max()) < 1e-9


@pytest.mark.parametrize("part", ["W_O", "W_Q"])
def test_factors_give_what_the_dense_change_gives(part: str) -> None:
    base, left, right = conditioned(12, 10), normal(12, 3, seed=1), normal(3, 10, seed=2)
    dense = left @ right
    one = shares_of(matrix_split(alone(base), alone(dense), part), base, dense)
    factors = Factored(left[None], right[None])
    other = shares_of(matrix_split(alone(base), factors, part), base, dense)
    for name, values in one.items():
        torch.testing.assert_close(other[name], values, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("part", ["W_O", "W_Q"])
def test_several_components_at_once_are_each_one_alone(part: str) -> None:
    heads, d_model, d_head = 3, 12, 4
    shape = (d_head, d_model) if part == "W_O" else (d_model, d_head)
    base = torch.stack([conditioned(*shape, seed=h) for h in range(heads)])
    delta = normal(heads, *shape, seed=9)
    stream, own = normal(2, 3, d_model, seed=1), normal(2, 3, heads, d_head, seed=2)
    x, g = (own, stream) if part == "W_O" else (stream, own)
    pattern = "bphi, bpo, hio -> bh" if part == "W_O" else "bpi, bpho, hio -> bh"
    total = torch.einsum(pattern, x, g, delta)
    found = matrix_split(base, delta, part).shares(x, g, total)
    for head in range(heads):
        mine = own[:, :, head]
        sides = (mine, stream) if part == "W_O" else (stream, mine)
        split = matrix_split(base[head : head + 1], delta[head : head + 1], part)
        for name, values in split.shares(*sides, total[:, head : head + 1]).items():
            torch.testing.assert_close(found[name][:, head : head + 1], values)
    assert set(found) < set(GEOMETRIC_PARTS)


def neuron_parts(base: Tensor, delta: Tensor, part: str) -> dict[str, np.ndarray]:
    """The oracle: for every neuron a projector on the top directions with its own taken out."""
    w, d = ((t if part == "W_out" else t.T).numpy() for t in (base, delta))
    u, s, vh = np.linalg.svd(base.numpy(), full_matrices=False)
    rank = int((s > 1e-5 * s[0]).sum())
    side = vh.T if part == "W_out" else u
    kept = side[:, : max(1, min(int(K_FRACTION * w.shape[1]), rank))]
    parts = {name: np.zeros_like(w) for name in ("global", "within", "new")}
    for n, (vector, change) in enumerate(zip(w, d, strict=True)):
        parts["global"][n] = (change @ vector) / (vector @ vector) * vector
        unit = vector / np.linalg.norm(vector)
        without = kept - np.outer(unit, unit @ kept)
        across = change - parts["global"][n]
        parts["within"][n] = without @ np.linalg.lstsq(without, across, rcond=None)[0]
        parts["new"][n] = across - parts["within"][n]
    return parts


def neuron_shares(split: NeuronSplit, delta: Tensor, seed: int = 3) -> dict[str, Tensor]:
    neurons, width = split.vectors.shape
    own, stream = normal(2, 3, neurons, seed=seed), normal(2, 3, width, seed=seed + 1)
    rows = delta if split.part == "W_out" else delta.T
    total = torch.einsum("bpn, bpd, nd -> bn", own, stream, rows)
    gradient = torch.einsum("bpn, bpd -> bnd", own, stream)
    return {**split.shares(own, stream, total), "G": gradient, "total": total}


@given(
    st.integers(3, 14), st.integers(4, 12), st.integers(0, 500), st.sampled_from(["W_out", "W_in"])
)
def test_parts_of_neurons_are_projections_that_keep_off_their_own_vector(
    neurons: int, width: int, seed: int, part: str
) -> None:
    shape = (neurons, width) if part == "W_out" else (width, neurons)
    base, delta = conditioned(*shape, seed=seed), normal(*shape, seed=seed + 1)
    found = neuron_shares(neuron_split(base, delta, part), delta, seed)
    oracle = neuron_parts(base, delta, part)
    new = "new_write" if part == "W_out" else "new_read"
    for name, ours in (("global", "global"), ("within", "within"), ("new", new)):
        wanted = torch.einsum("bnd, nd -> bn", found["G"], torch.from_numpy(oracle[name]))
        torch.testing.assert_close(found[ours], wanted, rtol=1e-6, atol=1e-7)
    summed = found["global"] + found["within"] + found[new]
    torch.testing.assert_close(summed, found["total"], rtol=0, atol=1e-9)


def test_a_neuron_that_only_grew_is_all_gain_and_one_in_a_top_direction_stays_within() -> None:
    base = conditioned(20, 12)
    _, _, vh = torch.linalg.svd(base, full_matrices=False)
    base[4] = 2 * vh[0]  # its vector lies within the top directions: nothing is left of it across
    _, _, vh = torch.linalg.svd(base, full_matrices=False)
    delta = torch.zeros_like(base)
    delta[3], delta[4] = 0.1 * base[3], vh[1] - (vh[1] @ base[4]) / 4 * base[4]
    found = neuron_shares(neuron_split(base, delta, "W_out"), delta)
    torch.testing.assert_close(found["global"][:, 3], found["total"][:, 3])
    torch.testing.assert_close(
        found["within"][:, 4] + found["new_write"][:, 4], found["total"][:, 4]
    )
    torch.testing.assert_close(found["global"][:, 4], torch.zeros(2).double(), atol=1e-9, rtol=0)
    others = [n for n in range(20) if n not in (3, 4)]
    assert float(found["total"][:, others].abs().max()) == 0


def test_neurons_in_factors_are_those_of_the_dense_change() -> None:
    base, left, right = conditioned(14, 12), normal(14, 2, seed=1), normal(2, 12, seed=2)
    dense = left @ right
    one = neuron_shares(neuron_split(base, dense, "W_out"), dense)
    other = neuron_shares(neuron_split(base, Factored(left, right), "W_out"), dense)
    for name, values in one.items():
        torch.testing.assert_close(other[name], values, rtol=1e-7, atol=1e-8)


def test_a_base_of_zeros_has_nothing_to_gain() -> None:
    base, delta = torch.zeros(8, 6).double(), normal(8, 6)
    found = shares_of(matrix_split(alone(base), alone(delta), "W_out"), base, delta)
    torch.testing.assert_close(found["new_both"], found["total"])
    neurons = neuron_shares(neuron_split(base, delta, "W_out"), delta)
    assert float(neurons["global"].abs().max()) == 0
    torch.testing.assert_close(neurons["new_write"], neurons["total"])
