"""Tuning vectors form a vector space, whatever form their parts have."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny_checkpoints import add_noise, copy_with, tiny_adapter, tiny_llama
from tvlens.components import Component
from tvlens.errors import IncomparableModelsError, SelectionError

W_Q = Component("matrix", 0, None, "W_Q")
FLOAT32 = 1e-6
"""A few roundings of float32 sums over rank-sized axes."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vectors")
    base = tiny_llama(root / "base")
    return {
        "base": base,
        "one": copy_with(base, root / "one", add_noise(1)),
        "two": copy_with(base, root / "two", add_noise(2)),
        "adapter": tiny_adapter(base, root / "adapter"),
        "other_adapter": tiny_adapter(base, root / "other_adapter", seed=5),
    }


def _vector(folders: dict[str, Path], name: str):
    from tvlens.weights.matching import load_pair
    from tvlens.weights.vector import tuning_vector

    return tuning_vector(load_pair(folders["base"], folders[name], names=("base", name)))


def _flat(vector) -> Tensor:
    return torch.cat([delta.dense().flatten() for delta in vector.values()]).double()


def test_the_vector_is_tuned_minus_base(folders: dict[str, Path]) -> None:
    from safetensors.torch import load_file

    base, tuned = (load_file(folders[name] / "model.safetensors") for name in ("base", "one"))
    name = "model.layers.0.self_attn.q_proj.weight"
    found = _vector(folders, "one")[W_Q].dense()
    assert torch.equal(found, (tuned[name] - base[name]).T)


@pytest.mark.parametrize("other", ["two", "adapter"])
def test_sums_scales_and_products_are_those_of_the_flat_vectors(
    folders: dict[str, Path], other: str
) -> None:
    first, second = _vector(folders, "one"), _vector(folders, other)
    flat_first, flat_second = _flat(first), _flat(second)
    combined = 0.5 * (first - second) + second * 2
    expected = 0.5 * (flat_first - flat_second) + flat_second * 2
    assert torch.allclose(_flat(combined), expected, atol=FLOAT32)
    assert first.dot(second) == pytest.approx(float(flat_first @ flat_second), rel=1e-5, abs=1e-6)
    assert second.norm() == pytest.approx(float(flat_second.norm()), rel=FLOAT32)
    assert first.cosine(-first) == pytest.approx(-1)


def test_low_rank_vectors_stay_low_rank_and_exact(folders: dict[str, Path]) -> None:
    from tvlens.weights.delta import Absent, LowRank

    first, second = _vector(folders, "adapter"), _vector(folders, "other_adapter")
    total = first - second
    assert isinstance(total[W_Q], LowRank)
    assert total[W_Q].rank == 8
    assert isinstance(total[Component("matrix", 0, None, "W_O")], Absent)
    assert torch.allclose(_flat(total), _flat(first) - _flat(second), atol=FLOAT32)
    assert first.dot(second) == pytest.approx(float(_flat(first) @ _flat(second)), rel=1e-5)
    assert total.norm() == pytest.approx(float(_flat(total).norm()), rel=1e-5)


def test_select_keeps_the_components_asked_for(folders: dict[str, Path]) -> None:
    vector = _vector(folders, "one")
    part = vector.select(lambda component: component.layer == 1)
    rest = vector.select(lambda component: component.layer != 1)
    assert {component.layer for component in part} == {1}
    assert part.norm() ** 2 + rest.norm() ** 2 == pytest.approx(vector.norm() ** 2)


def test_what_a_vector_does_not_hold_is_zero_there(folders: dict[str, Path]) -> None:
    first, second = _vector(folders, "one"), _vector(folders, "two")
    part = second.select("kind == 'matrix' and layer == 1")
    total = first + part
    assert list(total) == list(first)
    for component in first:
        expected = first[component].dense().double()
        if component in part:
            expected = expected + second[component].dense().double()
        assert torch.equal(total[component].dense(), expected.float())
    shared = sum(
        float((first[c].dense().double() * second[c].dense().double()).sum()) for c in part
    )
    assert first.dot(part) == pytest.approx(shared, rel=1e-12)
    assert first.products(part).keys() == part.deltas.keys()


def test_a_selection_and_its_complement_make_the_whole_and_are_orthogonal(
    folders: dict[str, Path],
) -> None:
    vector = _vector(folders, "one") + _vector(folders, "adapter")
    chosen = vector.select("L0H1,L1K0,L0N3,L1.ln2")
    rest = vector.select('not (site == "L0H1" or site == "L1K0" or site == "L0N3")')
    rest = rest.select(lambda component: str(component) != "L1.ln2.w")
    assert chosen.dot(rest) == 0
    whole = chosen + rest
    assert all(torch.equal(whole[c].dense(), vector[c].dense()) for c in vector)
    assert chosen.norm() ** 2 + rest.norm() ** 2 == pytest.approx(vector.norm() ** 2, rel=1e-12)


def test_a_selected_vector_knows_what_it_was_selected_from(folders: dict[str, Path]) -> None:
    vector = _vector(folders, "one")
    part = vector.select("L0H1")
    assert (part.name, part.selection) == ("one[L0H1]", "L0H1")
    again = part.select("part == 'W_Q'")
    assert again.selection == "(L0H1) and (part == 'W_Q')"
    assert [str(component) for component in again] == ["L0.W_Q"]
    assert (2 * (part - vector)).name == "2 * (one[L0H1] - one)"
    assert (part - vector).selection is None
    with pytest.raises(SelectionError, match="selects nothing that one\\[L0H1\\] holds"):
        part.select("part == 'W_K'")


def test_low_rank_selections_stay_low_rank(folders: dict[str, Path]) -> None:
    from tvlens.weights.delta import LowRank

    vector = _vector(folders, "adapter")
    part = vector.select("L0H1,L0N4")
    assert [str(c) for c in part] == ["L0.W_Q", "L0.W_O", "L0.W_gate", "L0.W_in", "L0.W_out"]
    for name, axis, kept in (("W_Q", 1, slice(8, 16)), ("W_out", 0, slice(4, 5))):
        component = Component("matrix", 0, None, name)
        assert isinstance(part[component], LowRank)
        expected = torch.zeros_like(vector[component].dense())
        index = (slice(None), kept) if axis else (kept, slice(None))
        expected[index] = vector[component].dense()[index]
        assert torch.equal(part[component].dense(), expected)


def test_vectors_of_another_base_are_refused_whatever_their_names(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    from tvlens.weights.matching import load_pair
    from tvlens.weights.vector import tuning_vector

    def nudge(tensors: dict[str, Tensor]) -> None:
        weight = tensors["model.layers.1.mlp.up_proj.weight"]
        weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))

    other = copy_with(folders["base"], tmp_path / "base", nudge)
    tuned = copy_with(other, tmp_path / "one", add_noise(1))
    vector, foreign = _vector(folders, "one"), tuning_vector(load_pair(other, tuned))
    for operation in (vector.__add__, vector.dot, vector.__sub__):
        with pytest.raises(IncomparableModelsError, match=r"L1\.W_in of base differs from that"):
            operation(foreign)
    elsewhere = foreign.select("layer == 0")
    assert vector.dot(elsewhere) > 0  # where both bases are the same


def test_a_base_under_another_name_or_dtype_is_the_same_base(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    from tvlens.weights.matching import load_pair
    from tvlens.weights.vector import tuning_vector

    def halve(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    def widen(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.float() for name, tensor in tensors.items()})

    narrow = copy_with(folders["base"], tmp_path / "narrow", halve)
    wide = copy_with(narrow, tmp_path / "wide", widen)
    first = tuning_vector(load_pair(narrow, folders["one"]))
    second = tuning_vector(load_pair(wide, folders["one"]))
    with pytest.warns(UserWarning, match="'narrow' and 'wide' of two tuning vectors have other"):
        assert (first - second).norm() == 0


def test_bases_that_differ_in_shape_are_refused_by_name(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    from tvlens.weights.matching import load_pair
    from tvlens.weights.vector import tuning_vector

    tied = tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    vector = tuning_vector(load_pair(tied, copy_with(tied, tmp_path / "t", add_noise(1))))
    with pytest.raises(IncomparableModelsError, match="bases differ in tied: False in base, True"):
        _vector(folders, "one") + vector


def test_a_tied_embedding_counts_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from tvlens.weights.matching import load_pair
    from tvlens.weights.vector import tuning_vector

    base = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    tuned = copy_with(base, tmp_path / "tuned", add_noise(1))
    vector = tuning_vector(load_pair(base, tuned))
    first, second = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    expected = sum(float((second[n] - first[n]).double().square().sum()) for n in first)
    assert vector.norm() ** 2 == pytest.approx(expected, rel=1e-12)


def test_what_did_not_change_is_absent(folders: dict[str, Path], tmp_path: Path) -> None:
    from tvlens.weights.delta import Absent
    from tvlens.weights.matching import load_pair
    from tvlens.weights.vector import tuning_vector

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"][2] += 1

    tuned = copy_with(folders["base"], tmp_path / "tuned", edit)
    vector = tuning_vector(load_pair(folders["base"], tuned))
    changed = [str(c) for c, delta in vector.items() if not isinstance(delta, Absent)]
    assert changed == ["ln_final.w"]


def test_a_vector_is_scaled_by_finite_numbers_only(folders: dict[str, Path]) -> None:
    vector = _vector(folders, "one")
    assert ((vector / 4) * 4 - vector).norm() == 0
    with pytest.raises(ValueError, match="finite number, got nan"):
        vector * math.nan
    with pytest.raises(ZeroDivisionError):
        vector / 0


def test_products_and_cosines_of_components_add_up(folders: dict[str, Path]) -> None:
    from tvlens.weights.span import gram

    vectors = [_vector(folders, name) for name in ("one", "two", "adapter", "base")]
    found = gram(vectors)
    flat = torch.stack([_flat(vector) for vector in vectors])
    assert torch.allclose(found.whole, flat @ flat.T, rtol=1e-7, atol=1e-7)
    assert found.whole[0, 1] == pytest.approx(vectors[0].dot(vectors[1]), rel=1e-12)
    assert float(found.cosines[0, 1]) == pytest.approx(vectors[0].cosine(vectors[1]), rel=1e-9)
    assert math.isnan(found.cosines[0, 3])
    frame = found.to_frame()
    assert len(frame) == 10 * len(vectors[0])
    row = frame[(frame.component == "L0.W_Q") & (frame["first"] == "one") & (frame.second == "two")]
    assert row["product"].item() == pytest.approx(vectors[0].products(vectors[1])[W_Q], rel=1e-12)
    assert row["cosine"].item() == pytest.approx(vectors[0].cosines(vectors[1])[W_Q], rel=1e-9)


@pytest.mark.parametrize("onto", [["two"], ["two", "adapter"], ["adapter", "other_adapter"]])
def test_a_projection_is_the_least_squares_solution(
    folders: dict[str, Path], onto: list[str]
) -> None:
    from tvlens.weights.span import project

    vector, others = _vector(folders, "one"), [_vector(folders, name) for name in onto]
    vector = vector + 0.3 * others[0]
    found = project(vector, others)
    matrix = torch.stack([_flat(other) for other in others], dim=1)
    expected = torch.linalg.lstsq(matrix, _flat(vector)).solution
    assert found.coefficients == pytest.approx(expected.tolist(), rel=1e-6)
    for other in others:
        assert abs(found.across.cosine(other)) < FLOAT32
    assert (found.along + found.across - vector).norm() < FLOAT32 * vector.norm()
    share = float((matrix @ expected).norm() / _flat(vector).norm()) ** 2
    assert found.share == pytest.approx(share, rel=1e-6)


def test_projections_of_low_rank_vectors_stay_low_rank(folders: dict[str, Path]) -> None:
    from tvlens.weights.delta import Absent, LowRank
    from tvlens.weights.span import project

    first, second = _vector(folders, "adapter"), _vector(folders, "other_adapter")
    found = project(first, [second])
    assert {type(delta) for delta in found.across.values()} == {LowRank, Absent}
    assert found.along[W_Q].rank == 4


def test_dependent_and_zero_vectors_add_nothing_to_a_span(folders: dict[str, Path]) -> None:
    from tvlens.weights.span import project

    vector, other = _vector(folders, "one"), _vector(folders, "two")
    zero = _vector(folders, "base")
    alone = project(vector, [other])
    found = project(vector, [other, other * 2, zero])
    assert found.share == pytest.approx(alone.share, rel=1e-6)
    assert found.coefficients[2] == 0
    assert (found.along - alone.along).norm() < FLOAT32 * alone.along.norm()
    assert math.isnan(project(zero, [vector]).share)
    with pytest.raises(ValueError, match="at least one"):
        project(vector, [])


def test_a_sum_of_many_rounds_once() -> None:
    from tvlens.weights.delta import Dense, combined

    terms = [(0.1, Dense(torch.tensor([1.0, 3.0]))) for _ in range(10)]
    assert combined(terms).tensor.tolist() == [1.0, 3.0]
    tiny = Dense(torch.tensor([1e-9]))
    big = Dense(torch.tensor([1.0]))
    assert combined([(1, big), (1, tiny), (-1, big)]).tensor.item() == pytest.approx(1e-9, rel=1e-6)


def test_differences_of_different_shapes_are_not_added() -> None:
    from tvlens.weights.delta import Absent, Dense, added

    with pytest.raises(IncomparableModelsError, match=r"shapes \(2,\) and \(3,\)"):
        added(Dense(torch.zeros(2)), Absent((3,)))


def test_a_zero_vector_has_no_direction(folders: dict[str, Path]) -> None:
    zero = _vector(folders, "base")
    assert zero.norm() == 0
    assert math.isnan(zero.cosine(zero))
