"""Edits against models edited by hand, both ways of being in one, and a planted skill."""

import functools

import pytest
import torch

from . import attribution_pairs as pairs

FAMILIES = ("llama", "gpt2", "neox")
DOSES = (-0.5, 0.3, 1.5)


def editable(family="llama", change=pairs.noised, *, tied=True, tuned_tied=None):
    """A base and its change in memory, behind an ``EditableModel``."""
    import tvlens
    from tvlens.compose.edits import EditableModel

    base = pairs.hf_model(family, tied=tied)
    tuned = pairs.hf_model(family, tied=tied if tuned_tied is None else tuned_tied)
    if tuned_tied is not None:
        tuned.load_state_dict(base.state_dict(), strict=False)
        tuned.lm_head.weight.data.copy_(base.lm_head.weight.data)
    change(tuned)
    return EditableModel.of_pair(tvlens.load_pair(base, tuned))


@functools.cache
def noised(family="llama"):
    """The noised pair of a family; edits leave it as found, so that tests can share it."""
    return editable(family)


def logits(model, batch=None):
    batch = batch or pairs.batch()
    with torch.no_grad():
        return model.logits_at(batch.ids, batch.mask, batch.reading_positions)


def by_hand(edit, family="llama"):
    """Logits of a transformers model whose weights ``edit(name, base, tuned)`` gives."""
    base, tuned = pairs.hf_model(family), pairs.hf_model(family)
    pairs.noised(tuned)
    moved = dict(tuned.named_parameters())
    with torch.no_grad():
        for name, weight in base.named_parameters():
            weight.copy_(edit(name, weight.clone(), moved[name]))
        batch = pairs.batch()
        rows = torch.arange(len(batch))[:, None]
        out = base(batch.ids, attention_mask=batch.mask).logits
        return out[rows, batch.reading_positions]


def bits(lens):
    return {name: tensor.clone() for name, tensor in lens.model.state_dict().items()}


def assert_close(found, wanted):
    """Within 1e-4 of the largest logit."""
    assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_let_in_is_the_base_and_everything_the_stored_tuned_model_bit_for_bit(family):
    import tvlens
    from tvlens.compose.edits import EditableModel, interpolated, removed, scaled
    from tvlens.models.lens import LensModel

    base, tuned = pairs.hf_model(family), pairs.hf_model(family)
    pairs.noised(tuned)
    model = EditableModel.of_pair(tvlens.load_pair(base, tuned))
    for edit, loaded in ((removed(), base), (scaled(1.0), tuned), (interpolated(0.0), base)):
        wanted = logits(LensModel.of(loaded))
        with model.edited(edit) as lens:
            assert torch.equal(logits(lens), wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "way"),
    [("llama", "swap"), ("llama", "gates"), ("gpt2", "swap"), ("neox", "gates"), ("neox", "swap")],
)
def test_a_dose_is_the_model_on_the_line_also_beyond_its_ends(family, way):
    from tvlens.compose.edits import scaled

    model = noised(family)
    for dose in DOSES:
        wanted = by_hand(lambda name, base, tuned, s=dose: base + s * (tuned - base), family)
        with model.edited(scaled(dose), by=way) as lens:
            assert_close(logits(lens), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["swap", "gates"])
def test_all_let_in_as_a_sum_is_the_tuned_model_within_rounding(way):
    from dataclasses import replace

    from tvlens.compose.edits import scaled

    model = noised()
    with model.edited(scaled(1.0)) as lens:
        wanted = logits(lens)
    with replace(model, tuned=None).edited(scaled(1.0), by=way) as lens:
        assert_close(logits(lens), wanted)


@pytest.mark.parametrize("way", ["swap", "gates"])
@pytest.mark.parametrize("rest", [0.0, 1.0])
def test_a_part_has_a_dose_of_its_own(way, rest):
    """Head 1 of layer 0 (columns 8 to 15 of q, of o the inputs) and the MLP's output of layer 1."""
    from tvlens.compose.edits import Edit, Term

    head, mlp = "model.layers.0.self_attn", "model.layers.1.mlp.down_proj.weight"

    def edit(name, base, tuned):
        dose = torch.full_like(base, rest)
        if name in (f"{head}.q_proj.weight", f"{head}.q_proj.bias"):
            dose[8:16] = -1.0
        if name == f"{head}.o_proj.weight":
            dose[:, 8:16] = -1.0
        if name == mlp:
            dose[:] = 0.4
        return base + dose * (tuned - base)

    asked = Edit(rest, (Term("L0H1", -1.0), Term('layer == 1 and part == "W_out"', 0.4)))
    with noised().edited(asked, by=way) as lens:
        assert_close(logits(lens), by_hand(edit))


def test_words_for_edits_say_the_doses_that_they_mean():
    from tvlens.compose.edits import Edit, Term, grafted, interpolated, negated, removed, scaled

    assert removed() == Edit(0.0)
    assert removed("L0H1") == Edit(1.0, (Term("L0H1", 0.0),))
    assert negated(scale=2.0) == Edit(-2.0)
    assert negated("L0H1") == Edit(1.0, (Term("L0H1", -1.0),))
    assert grafted("L0H1") == Edit(0.0, (Term("L0H1", 1.0),))
    assert scaled(0.5, "L0H1", rest=1.0) == Edit(1.0, (Term("L0H1", 0.5),))
    assert interpolated(0.5) == Edit(0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        interpolated(1.2)
    with pytest.raises(ValueError, match="finite dose"):
        Edit(float("nan"))


def test_components_select_as_their_names_do_and_the_later_term_counts():
    from tvlens.compose.edits import Edit, Term

    model = noised()
    head = pairs.component("head", 0, 1, None)
    by_name, by_key = (model.doses(Edit(0.0, (Term(p, 1.0),))) for p in ("L0H1", (head,)))
    assert all(torch.equal(by_name[key], by_key[key]) for key in by_name)
    assert by_name["blocks.0.attn.q", "weight"].tolist() == [0.0, 1.0, 0.0, 0.0]
    assert by_name["blocks.0.attn.k", "weight"].tolist() == [0.0, 0.0]
    later = model.doses(Edit(0.0, (Term("layer == 0", 2.0), Term((head,), 1.0))))
    assert later["blocks.0.attn.q", "weight"].tolist() == [2.0, 1.0, 2.0, 2.0]


def test_a_selection_of_nothing_that_changed_is_refused():
    from tvlens.compose.edits import grafted
    from tvlens.errors import SelectionError

    def change(model):
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(1.1)

    model = editable("llama", change)
    with pytest.raises(SelectionError, match="changed"), model.edited(grafted("L0H1")):
        pass
    with pytest.raises(SelectionError, match="L9H1"), model.edited(grafted("L9H1")):
        pass


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_the_model_is_as_found_after_edits_and_after_an_exception(family):
    from tvlens.compose.edits import scaled

    model = noised(family)
    before, wanted = bits(model.lens), logits(model.lens)
    with model.edited(scaled(0.7)) as lens:
        assert not torch.equal(logits(lens), wanted)
    with pytest.raises(KeyError), model.edited(scaled(-1.0)):
        raise KeyError("inside")
    with pytest.raises(KeyError), model.edited(scaled(2.0, "layer == 1"), by="gates"):
        raise KeyError("inside")
    after = bits(model.lens)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(logits(model.lens), wanted)
    assert not any(point.has_hooks() for point in model.lens.model.hook_dict.values())


@pytest.mark.parametrize("way", ["swap", "gates"])
def test_a_tied_base_whose_fine_tune_has_an_unembedding_of_its_own(way):
    from tvlens.compose.edits import grafted, scaled
    from tvlens.errors import SelectionError

    def change(model):
        with torch.no_grad():
            model.lm_head.weight.add_(0.1)

    model = editable("llama", change, tied=True, tuned_tied=False)
    batch, plain = pairs.batch(), logits(model.lens)
    kept = model.lens.model.state_dict().keys()
    with model.edited(scaled(2.0), by=way) as lens:
        moved = logits(lens)
    assert float((moved - plain).abs().max()) > 1e-2
    base = pairs.hf_model("llama")
    with torch.no_grad():
        hidden = base.model(batch.ids, attention_mask=batch.mask).last_hidden_state
        out = hidden @ (base.lm_head.weight + 0.2).T
    assert_close(moved, out[torch.arange(len(batch))[:, None], batch.reading_positions])
    with model.edited(grafted("unembed"), by=way) as lens:
        half = logits(lens)
    torch.testing.assert_close(half, (moved + plain) / 2, rtol=1e-4, atol=1e-4)
    with pytest.raises(SelectionError, match="changed"), model.edited(grafted("embed"), by=way):
        pass
    assert model.lens.model.state_dict().keys() == kept
    assert torch.equal(logits(model.lens), plain)


@pytest.mark.slow
def test_an_adapter_is_edited_in_its_factors(tmp_path):
    import tvlens
    from tests.tiny_checkpoints import tiny_adapter, tiny_llama
    from tvlens.compose.edits import EditableModel, scaled
    from tvlens.weights.delta import LowRank

    base = tiny_llama(tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / "adapter")
    model = EditableModel.of_pair(tvlens.load_pair(base, adapter))
    assert any(isinstance(delta, LowRank) for delta in model.gated.deltas.values())
    results = []
    for way in ("swap", "gates"):
        with model.edited(scaled(0.6), by=way) as lens:
            results.append(logits(lens))
    assert_close(*results)
    with model.edited(scaled(1.0)) as lens:
        whole = logits(lens)
    with model.edited(scaled(1.0), by="gates") as lens:
        assert_close(logits(lens), whole)


@pytest.fixture(scope="module")
def planted():
    """A model whose skill lives in three known components, and how well it does."""
    import tvlens
    from tvlens.compose.edits import EditableModel
    from tvlens.models.metrics import SHIPPED
    from tvlens.models.reading import Reading

    model = EditableModel.of_pair(tvlens.load_pair(*pairs.planted_models()))
    reading = Reading.of(SHIPPED["logprob"], pairs.planted_prompts())

    def skill(lens):
        with torch.no_grad():
            return float(reading.value(reading.logits(lens)).mean())

    return model, skill


def test_a_planted_skill_goes_with_its_components_and_comes_with_them(planted):
    from tvlens.compose.edits import grafted, removed, scaled

    model, skill = planted
    part = pairs.planted_components()
    base = skill(model.lens)
    values = []
    for edit in (scaled(1.0), removed(part), grafted(part), scaled(-1.0)):
        with model.edited(edit) as lens:
            values.append(skill(lens))
    tuned, without, alone, reversed_ = values
    assert tuned - base > 1.4  # three components, 0.5 each
    assert without - base == pytest.approx(0.0, abs=0.05 * (tuned - base))
    assert alone - base == pytest.approx(tuned - base, rel=0.05)
    assert reversed_ < base


def test_random_components_as_many_and_as_long_do_not_take_it_away(planted):
    from tvlens.compose.controls import random_set
    from tvlens.compose.edits import Edit, Share, removed, scaled, written

    model, skill = planted
    part = pairs.planted_components()
    with model.edited(scaled(1.0)) as lens:
        tuned = skill(lens)
    with model.edited(removed(part)) as lens:
        lost = tuned - skill(lens)
    whole = model.doses(Edit(1.0))
    for seed in range(3):
        found = random_set(model, part, seed=seed)
        assert found.count == 3
        doses = {key: whole[key] - found.scale * dose for key, dose in found.doses.items()}
        with written(model.lens, [Share(model.gated, doses)]) as lens:
            assert abs(tuned - skill(lens)) < 0.5 * lost


def test_random_vectors_as_long_do_not_bring_it(planted):
    from tvlens.attribution.gates import GatedModel
    from tvlens.compose.controls import random_vector
    from tvlens.compose.edits import Edit, Share, grafted, written

    model, skill = planted
    part, base = pairs.planted_components(), skill(model.lens)
    with model.edited(grafted(part)) as lens:
        gained = skill(lens) - base
    for seed in range(3):
        vector = random_vector(model, seed=seed, part=part)
        gated = GatedModel.of_vector(model.lens, vector)
        with written(model.lens, [Share(gated, model.doses(Edit(1.0)))]) as lens:
            assert abs(skill(lens) - base) < 0.5 * gained
