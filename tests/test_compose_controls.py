"""Controls: lengths, kinds and streams, each counted another way."""

import pytest
import torch

from . import attribution_pairs as pairs


@pytest.fixture(scope="module")
def model():
    import tvlens
    from tvlens.compose.edits import EditableModel

    base, tuned = pairs.hf_model("llama"), pairs.hf_model("llama")
    pairs.noised(tuned)
    return EditableModel.of_pair(tvlens.load_pair(base, tuned))


def test_a_random_vector_is_as_long_tensor_by_tensor_and_points_elsewhere(model):
    from tvlens.compose.controls import random_vector

    drawn = random_vector(model, seed=0)
    assert set(drawn) == set(model.vector)
    for component, delta in drawn.items():
        assert delta.norm() == pytest.approx(model.vector[component].norm(), rel=1e-5)
    assert abs(drawn.cosine(model.vector)) < 0.05  # sd 1/sqrt(13,000)
    again, other = (random_vector(model, seed=seed) for seed in (0, 1))
    assert all(torch.equal(again[c].dense(), drawn[c].dense()) for c in drawn)
    assert abs(drawn.cosine(other)) < 0.05
    layers = [drawn[pairs.component("matrix", layer, None, "W_in")].dense() for layer in (0, 1)]
    assert (
        abs(float(torch.nn.functional.cosine_similarity(*[x.flatten() for x in layers], 0))) < 0.2
    )


def test_a_random_part_is_as_long_as_the_part_and_zero_elsewhere(model):
    from tvlens.compose.controls import random_vector

    drawn = random_vector(model, seed=2, part="L1H2")
    assert {str(c) for c in drawn} == {"L1.W_Q", "L1.b_Q", "L1.W_O"}
    query = pairs.component("matrix", 1, None, "W_Q")
    columns = drawn[query].dense().reshape(32, 4, 8)
    assert columns[:, [0, 1, 3]].abs().max() == 0
    wanted = model.vector[query].dense().reshape(32, 4, 8)[:, 2].norm()
    assert float(columns.norm()) == pytest.approx(float(wanted), rel=1e-5)


def test_a_random_difference_of_low_rank_is_of_that_rank(tmp_path):
    import tvlens
    from tests.tiny_checkpoints import tiny_adapter, tiny_llama
    from tvlens.compose.controls import random_vector
    from tvlens.compose.edits import EditableModel
    from tvlens.weights.delta import LowRank

    base = tiny_llama(tmp_path / "base")
    pair = tvlens.load_pair(base, tiny_adapter(base, tmp_path / "adapter"))
    found = EditableModel.of_pair(pair)
    drawn = random_vector(found, seed=0)
    low = [c for c, delta in drawn.items() if isinstance(delta, LowRank)]
    assert low
    for component in low:
        assert drawn[component].rank == found.vector[component].rank
        assert drawn[component].norm() == pytest.approx(found.vector[component].norm(), rel=1e-5)


def held(model, doses):
    """Squared length of what doses let in, from the written-out differences."""
    total = 0.0
    for site in model.gated.sites:
        for tensor in site.tensors:
            delta = model.gated.deltas[site.name, tensor].dense().double()
            dose = doses[site.name, tensor].double()
            axis = 0 if site.role in ("attn.o", "mlp.out") and tensor == "weight" else -1
            wide = dose.repeat_interleave(delta.shape[axis] // len(dose))
            shaped = wide if axis == -1 else wide[:, None]
            total += float((delta * shaped).pow(2).sum())
    return total**0.5


PART = "L0H1,L0H2,L1N5,L0N7,L1N9,L1.ln2.w"


def test_a_random_set_has_the_kinds_the_length_and_none_of_the_part(model):
    from tvlens.compose.controls import random_set
    from tvlens.compose.edits import Edit, Term

    mask = model.doses(Edit(0.0, (Term(PART, 1.0),)))
    found = random_set(model, PART, seed=4)
    assert found.count == 6
    both = {key: mask[key] * dose for key, dose in found.doses.items()}
    assert not any(bool(dose.any()) for dose in both.values())
    assert held(model, found.doses) * found.scale == pytest.approx(held(model, mask), rel=1e-5)

    def number(doses, role):
        return sum(int(d.sum()) for (site, t), d in doses.items() if role in site and t == "weight")

    for role in ("attn.q", "attn.o", "mlp.out", "mlp.gate"):
        assert number(found.doses, role) == number(mask, role)
    norms = [d for (site, _), d in found.doses.items() if "ln" in site]
    assert sum(int(d.sum()) for d in norms) == 1
    other = random_set(model, PART, seed=5)
    assert any(not torch.equal(other.doses[key], dose) for key, dose in found.doses.items())


def test_of_a_head_of_which_the_part_holds_one_matrix_another_heads_is_taken(model):
    from tvlens.compose.controls import random_set

    found = random_set(model, "L0H1.W_O", seed=0)
    touched = {site for (site, _), dose in found.doses.items() if bool(dose.any())}
    assert len(touched) == 1
    assert touched.pop().endswith("attn.o")


def test_where_all_are_taken_the_rest_comes_from_the_part(model):
    from tvlens.compose.controls import random_set
    from tvlens.compose.edits import Edit, Term

    part = 'kind == "head"'
    found = random_set(model, part, seed=0)
    mask = model.doses(Edit(0.0, (Term(part, 1.0),)))
    assert found.count == 8
    assert found.scale == pytest.approx(1.0)
    assert all(torch.equal(found.doses[key], dose) for key, dose in mask.items())
