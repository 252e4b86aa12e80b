"""Portions of a tuning vector: geometric parts and directions, on tensors and on planted skills."""

import numpy as np
import pytest
import torch

from . import attribution_pairs as pairs

NEW = ("new_write", "new_both")


def component(kind, layer, index, part):
    return pairs.component(kind, layer, index, part)


def vector_of(change=pairs.noised, family="llama"):
    """A pair in memory and its tuning vector."""
    import tvlens
    from tvlens.weights.vector import tuning_vector

    base, tuned = pairs.hf_model(family, tied=False), pairs.hf_model(family, tied=False)
    change(tuned)
    pair = tvlens.load_pair(base, tuned)
    return pair, tuning_vector(pair)


def parts_by_numpy(base, delta, part):
    """The parts of a change from a full SVD of the base, written out in numpy."""
    w, d = base.double().numpy(), delta.double().numpy()
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    k_read, k_write = (max(1, min(size // 4, len(s))) for size in w.shape)
    channels = np.array([u[:, i] @ d @ vh[i] for i in range(len(s))])
    gain = (w * d).sum() / (w * w).sum()
    rest = d - sum(c * np.outer(u[:, i], vh[i]) for i, c in enumerate(channels))
    read = u[:, :k_read] @ u[:, :k_read].T
    write = vh[:k_write].T @ vh[:k_write]
    off_read, off_write = np.eye(len(read)) - read, np.eye(len(write)) - write
    writes = part in ("W_O", "W_out")
    return {
        "global": gain * w,
        "scale": sum((c - gain * s[i]) * np.outer(u[:, i], vh[i]) for i, c in enumerate(channels)),
        "within": read @ rest @ write,
        "new_write" if writes else "reroute": read @ rest @ off_write,
        "reroute" if writes else "new_read": off_read @ rest @ write,
        "new_both": off_read @ rest @ off_write,
    }


@pytest.mark.slow
@pytest.mark.parametrize("names", [("global",), ("scale", "within"), NEW, ("new_read", "reroute")])
def test_a_portion_is_the_sum_of_its_parts_in_every_matrix_and_nothing_elsewhere(names):
    from tvlens.compose.portions import geometric_parts, portion

    pair, vector = vector_of()
    found = portion(vector, geometric_parts(",".join(names)), pair.stored_weight)
    for one, delta in vector.items():
        if one.kind != "matrix":
            assert one not in found
            continue
        oracle = parts_by_numpy(pair.stored_weight(one), delta.dense(), one.part)
        wanted = sum(oracle[name] for name in names if name in oracle)
        if not any(name in oracle for name in names):
            assert one not in found
            continue
        assert delta.norm() > 0.1
        np.testing.assert_allclose(found[one].dense().numpy(), wanted, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_the_parts_one_by_one_sum_to_the_matrices_of_the_vector_and_all_at_once_are_its_own():
    from tvlens.compose.portions import GEOMETRIC_PARTS, geometric_parts, has_parts, portion

    pair, vector = vector_of()
    matrices = vector.select(has_parts)
    whole = portion(vector, geometric_parts(",".join(GEOMETRIC_PARTS)), pair.stored_weight)
    assert {*whole} == {*matrices}
    assert all(whole[one] is vector[one] for one in whole)
    each = [portion(vector, geometric_parts(n), pair.stored_weight) for n in GEOMETRIC_PARTS]
    total = sum(each[1:], start=each[0])
    for one in matrices:
        torch.testing.assert_close(total[one].dense(), vector[one].dense(), rtol=0, atol=1e-6)


def test_what_has_no_part_is_said_with_its_share_of_the_length():
    from tvlens.compose.portions import geometric_parts, has_parts, left_out

    _, vector = vector_of()
    splitless, without = left_out(vector, geometric_parts("new_write"))
    rest = vector.select(lambda c: not has_parts(c))
    share = (rest.norm() / vector.norm()) ** 2
    assert splitless.startswith(f"{len(rest)} changed components (")
    kinds = splitless.partition("(")[2].partition(")")[0].split(", ")
    assert sorted(kinds) == ["bias", "embedding", "norm"]
    assert f"{share:.2%}" in splitless
    assert "W_Q, W_K, W_V, W_gate, W_in have no part new_write" in without
    assert left_out(vector.select(has_parts), geometric_parts("new_both")) == ()


@pytest.mark.parametrize("text", ["", "new", "new_write,newread", "W_O"])
def test_a_name_that_is_no_part_is_refused_with_those_that_are(text):
    from tvlens.compose.portions import geometric_parts
    from tvlens.errors import SelectionError

    with pytest.raises(SelectionError, match=r"no geometric part .*global, scale, within"):
        geometric_parts(text)


@pytest.mark.parametrize("side", ["write", "read"])
def test_along_directions_is_the_projection_on_their_span_of_factors_too(side):
    """Three directions of which two span a plane with the third: a projection, not a sum."""
    from dataclasses import replace

    from tvlens.compose.portions import Along, portion
    from tvlens.weights.delta import LowRank

    pair, vector = vector_of()
    one = component("matrix", 1, None, "W_out")
    generator = torch.Generator().manual_seed(2)
    width = vector[one].shape[1 if side == "write" else 0]
    two = torch.randn(2, width, generator=generator)
    given = 1e-7 * torch.cat([two, two.sum(0, keepdim=True)])  # of whatever length
    basis = np.linalg.qr(two.double().numpy().T)[0]
    low = LowRank(torch.randn(24, 3, generator=generator), torch.randn(3, 32, generator=generator))
    for delta in (vector[one], low):
        own = replace(vector, deltas={**vector.deltas, one: delta})
        taken = Along({one: given}, vector.base.layout, side)
        found = portion(own, taken, pair.stored_weight)
        d = delta.dense().double().numpy()
        wanted = d @ basis @ basis.T if side == "write" else basis @ basis.T @ d
        assert [*found] == [one]
        assert isinstance(found[one], LowRank)
        assert found[one].rank == 2
        np.testing.assert_allclose(found[one].dense().numpy(), wanted, rtol=0, atol=1e-5)


def test_of_a_head_and_a_neuron_only_their_rows_are_projected():
    from tvlens.compose.portions import Along, portion

    pair, vector = vector_of()
    head, neuron = component("head", 0, 1, "W_O"), component("neuron", 1, 5, "W_out")
    u = torch.randn(1, 32, generator=torch.Generator().manual_seed(4))
    found = portion(vector, Along({head: u, neuron: 3 * u}, vector.base.layout), pair.stored_weight)
    unit = (u / u.norm()).double().numpy()
    for one, rows in (
        (("matrix", 0, None, "W_O"), slice(8, 16)),
        (("matrix", 1, None, "W_out"), [5]),
    ):
        matrix = component(*one)
        d = vector[matrix].dense().double().numpy()
        wanted = np.zeros_like(d)
        wanted[rows] = d[rows] @ unit.T @ unit
        np.testing.assert_allclose(found[matrix].dense().numpy(), wanted, rtol=0, atol=1e-6)
    assert len(found) == 2


def test_what_a_matrix_and_its_neuron_both_say_is_taken_once():
    """The neuron's row on the span of both directions, all other rows on the matrix's own."""
    from tvlens.compose.portions import Along, portion

    pair, vector = vector_of()
    matrix, neuron = component("matrix", 1, None, "W_out"), component("neuron", 1, 5, "W_out")
    u = torch.randn(2, 32, generator=torch.Generator().manual_seed(4))
    taken = Along({neuron: u[1:] + u[:1], matrix: u[:1]}, vector.base.layout)
    found = portion(vector, taken, pair.stored_weight)[matrix].dense().numpy()
    d = vector[matrix].dense().double().numpy()
    frames = [np.linalg.qr(u[:k].double().numpy().T)[0] for k in (1, 2)]
    wanted = d @ frames[0] @ frames[0].T
    wanted[5] = d[5] @ frames[1] @ frames[1].T
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    same = Along({matrix: u[:1], neuron: 2 * u[:1]}, vector.base.layout)
    once = portion(vector, same, pair.stored_weight)[matrix].dense().numpy()
    np.testing.assert_allclose(once, d @ frames[0] @ frames[0].T, rtol=0, atol=1e-6)


def test_a_direction_that_belongs_to_nothing_is_refused():
    from tvlens.compose.portions import Along
    from tvlens.errors import SelectionError

    _, vector = vector_of()
    with pytest.raises(SelectionError, match="cannot write along a direction of 31 entries; it"):
        Along({component("matrix", 0, None, "W_O"): torch.ones(1, 31)}, vector.base.layout)
    for one, side in (
        (component("matrix", 9, None, "W_O"), "write"),
        (component("norm", 0, None, "ln1.w"), "write"),
        (component("head", 0, 1, "W_Q"), "write"),
        (component("neuron", 0, 1, "W_out"), "read"),
    ):
        with pytest.raises(SelectionError, match=f"does not {side} along directions"):
            Along({one: torch.ones(1, 32)}, vector.base.layout, side)


def skill_of(reading, lens):
    with torch.no_grad():
        return float(reading.value(reading.logits(lens)).mean())


def planted(kind):
    """A pair whose skill is carried by one part of one matrix, or one direction, and measured.

    The layer's W_out is moved up its gradient, projected on the part (numpy) or on one direction,
    until the answers' log-probability has risen by 1. Beside it lies a little other change of the
    same matrix, projected off what carries the skill.
    """
    import tvlens
    from tvlens.compose.edits import EditableModel
    from tvlens.models.metrics import SHIPPED
    from tvlens.models.reading import Reading

    base, tuned = (pairs.hf_model("llama", tied=False) for _ in range(2))
    reading = Reading.of(SHIPPED["logprob"], pairs.planted_prompts())
    weight = tuned.model.layers[0].mlp.down_proj.weight
    start = weight.detach().clone().mT
    unit = torch.randn(32, generator=torch.Generator().manual_seed(6)).double()
    unit = (unit / unit.norm()).numpy()

    def value():
        logits = tuned(reading.batch.ids, attention_mask=reading.batch.mask).logits
        rows = torch.arange(len(logits))[:, None]
        return reading.value(logits[rows, reading.positions]).mean()

    def carried(matrix):
        if kind == "direction":
            return matrix.double().numpy() @ np.outer(unit, unit)
        return parts_by_numpy(start, matrix, "W_out")[kind]

    first = float(value().detach())
    while float(value().detach()) < first + 1.0:
        gradient = torch.autograd.grad(value(), [weight])[0].mT
        step = torch.from_numpy(carried(gradient)).float()
        with torch.no_grad():
            weight += (0.05 * step / step.norm()).mT
    noise = torch.randn(24, 32, generator=torch.Generator().manual_seed(7))
    noise -= torch.from_numpy(carried(noise)).float()
    with torch.no_grad():
        weight += (0.02 * noise / noise.norm()).mT
    model = EditableModel.of_pair(tvlens.load_pair(base, tuned))
    return model, tvlens.load_pair(base, tuned), reading, torch.from_numpy(unit).float()


def taken_from(kind, unit, layout):
    from tvlens.compose.portions import Along, geometric_parts

    if kind != "direction":
        return geometric_parts(kind)
    return Along({component("matrix", 0, None, "W_out"): unit[None]}, layout)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["new_write", "new_both", "direction"])
def test_a_skill_goes_with_the_part_that_carries_it_and_comes_with_it(kind):
    from tvlens.compose.controls import random_vector
    from tvlens.compose.edits import scaled
    from tvlens.compose.portions import portion

    model, pair, reading, unit = planted(kind)
    part = portion(
        model.vector, taken_from(kind, unit, model.vector.base.layout), pair.stored_weight
    )
    values = {"base": skill_of(reading, model.lens)}
    with model.edited(scaled(1.0)) as lens:
        values["tuned"] = skill_of(reading, lens)
    variants = {
        "alone": part,
        "without": model.vector - part,
        "reversed": -part,
        "doubled": 2 * part,
    }
    alone = model.with_vector(part)
    for seed in range(3):
        variants[f"random {seed}"] = random_vector(alone, seed=seed)
    for name, vector in variants.items():
        with model.with_vector(vector).edited(scaled(1.0)) as lens:
            values[name] = skill_of(reading, lens) - values["base"]
    gain = values["tuned"] - values["base"]
    assert gain > 0.9
    assert values["alone"] == pytest.approx(gain, abs=0.1)
    assert values["without"] == pytest.approx(0.0, abs=0.1)
    assert values["reversed"] < -0.3
    assert values["doubled"] > values["alone"] + 0.3
    for seed in range(3):
        assert abs(values[f"random {seed}"]) < 0.5 * gain
        drawn = variants[f"random {seed}"]
        assert drawn.norm() == pytest.approx(part.norm(), rel=1e-5)
        assert {*drawn} == {*part}


@pytest.mark.slow
def test_other_parts_do_not_carry_what_one_part_carries():
    from tvlens.compose.edits import scaled
    from tvlens.compose.portions import GEOMETRIC_PARTS, geometric_parts, portion
    from tvlens.errors import SelectionError

    model, pair, reading, _ = planted("new_write")
    base = skill_of(reading, model.lens)
    others = ",".join(name for name in GEOMETRIC_PARTS if name != "new_write")
    rest = portion(model.vector, geometric_parts(others), pair.stored_weight)
    with model.with_vector(rest).edited(scaled(1.0)) as lens:
        assert skill_of(reading, lens) == pytest.approx(base, abs=0.1)
    with pytest.raises(SelectionError, match="nothing of new_read"):
        portion(model.vector, geometric_parts("new_read"), pair.stored_weight)


@pytest.mark.slow
def test_an_adapters_parts_are_those_of_its_product(tmp_path):
    import tvlens
    from tests.tiny_checkpoints import tiny_adapter, tiny_llama
    from tvlens.compose.portions import geometric_parts, portion
    from tvlens.weights.delta import LowRank
    from tvlens.weights.vector import tuning_vector

    base = tiny_llama(tmp_path / "base")
    pair = tvlens.load_pair(base, tiny_adapter(base, tmp_path / "adapter"))
    vector = tuning_vector(pair)
    low = [one for one, delta in vector.items() if isinstance(delta, LowRank)]
    assert low
    found = portion(vector, geometric_parts("new_both,new_write"), pair.stored_weight)
    for one in low:
        oracle = parts_by_numpy(pair.stored_weight(one), vector[one].dense(), one.part)
        wanted = sum(oracle[name] for name in NEW if name in oracle)
        np.testing.assert_allclose(found[one].dense().numpy(), wanted, rtol=0, atol=2e-6)
