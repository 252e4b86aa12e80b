"""Parts of weight scores: exact sums, planted changes, finite differences, gates, adapters."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from . import attribution_pairs as pairs
from .test_geometry_splits import written

pytestmark = pytest.mark.slow

FAMILIES = ("llama", "gpt2", "neox")


def logprob():
    from tvlens.models.metrics import SHIPPED

    return SHIPPED["logprob"]


def logit():
    """A metric without a rounding to float32 inside, for differences in float64."""
    from tvlens.models.metrics import Metric

    return Metric("logit", "logits", "higher", lambda run, batch: run.logits[:, 4, 7])


def scored(hooked, batch, metric=None, **how):
    from tvlens.attribution.parts import part_scores
    from tvlens.attribution.weights import weight_scores

    metric = metric or logprob()
    scores = weight_scores(hooked, batch, metric, **how)
    return scores, part_scores(hooked, batch, metric, scores)


END = {"estimator": "first_order", "at": "base"}


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("llama", {"nodes": 3}),
        *((family, {"estimator": "first_order", "at": "tuned"}) for family in FAMILIES),
    ],
)
def test_parts_sum_to_the_score_of_every_component_that_has_them(family, how):
    scores, found = scored(pairs.hooked_pair(family), pairs.batch(), **how)
    rows = {component: row for row, component in enumerate(scores.components)}
    total = torch.zeros_like(scores.values)
    size = torch.zeros_like(scores.values)
    for part in found.parts.values():
        places = [rows[component] for component in part.components]
        total[places] += part.values
        size[places] += part.values.abs()
    divided = torch.tensor([c.kind in ("matrix", "head", "kv_head", "neuron") for c in rows])
    assert bool((size[divided].amax(1) > 0).all())
    assert bool((size[~divided] == 0).all())
    error = (total - scores.values)[divided].abs()
    assert float((error / size[divided]).max()) <= 1e-6


def test_every_kind_has_the_parts_that_it_can_have():
    _, found = scored(pairs.hooked_pair("gpt2"), pairs.batch(lengths=(5,)), **END)

    def parts(*key):
        return list(found.of(pairs.component(*key)))

    gains = ["global", "scale", "within", "reroute"]
    assert parts("matrix", 0, None, "W_Q") == [*gains, "new_read", "new_both"]
    assert parts("matrix", 1, None, "W_out") == [*gains, "new_write", "new_both"]
    assert parts("head", 1, 2, None) == [*gains, "new_read", "new_write", "new_both", "bias"]
    assert parts("kv_head", 1, 2, None) == [*gains, "new_read", "new_both", "bias"]
    assert parts("neuron", 0, 3, None) == ["global", "within", "new_read", "new_write", "bias"]
    with pytest.raises(KeyError, match="no split"):
        parts("norm", 0, None, "ln1.w")


def planted(module, part, kind):
    """A change of one linear layer of a transformers model that is of one kind alone."""

    def change(model):
        weight = model.model.layers[1].get_submodule(module).weight
        base = weight.detach().double().T  # x @ W
        u, s, vh = torch.linalg.svd(base, full_matrices=False)
        new = len(s) - 1
        delta = {
            "global": 0.2 * base,
            "scale": 0.2
            * u[:, :4]
            @ torch.diag(s[:4].flip(0) * torch.tensor([1, -1, 1, -1]))
            @ vh[:4],
            "within": torch.outer(u[:, 0], vh[1]),
            "new_write": torch.outer(u[:, 0], vh[new]),
            "new_read": torch.outer(u[:, new], vh[0]),
            "new_both": torch.outer(u[:, new], vh[new - 1]),
        }[kind]
        with torch.no_grad():
            weight += delta.T.float()

    return change


@pytest.mark.parametrize(
    ("module", "part", "kind"),
    [
        ("mlp.down_proj", "W_out", "global"),
        ("mlp.down_proj", "W_out", "new_write"),
        ("self_attn.o_proj", "W_O", "within"),
        ("self_attn.q_proj", "W_Q", "new_read"),
        ("mlp.up_proj", "W_in", "new_both"),
    ],
)
def test_a_pair_whose_change_is_of_one_kind_has_all_of_its_effect_there(module, part, kind):
    hooked = pairs.hooked_pair("llama", planted(module, part, kind))
    scores, found = scored(hooked, pairs.batch(lengths=(9, 6)), **END)
    component = pairs.component("matrix", 1, None, part)
    whole = scores.values[scores.components.index(component)]
    assert float(whole.abs().min()) > 1e-4
    for name, values in found.of(component).items():
        wanted = whole if name == kind else torch.zeros_like(whole)
        # 1e-4 of the score: the planted change was rounded to float32 when it was added
        assert float((values - wanted).abs().max()) <= 1e-4 * float(whole.abs().max()), name
    for name, part_of in found.parts.items():
        others = [i for i, c in enumerate(part_of.components) if c.layer == 0]
        assert float(part_of.values[others].abs().max()) == 0, name


def test_a_gain_of_every_weight_of_a_neuron_and_of_a_head_is_their_gain():
    def grown(model):
        layer = model.model.layers[1]
        with torch.no_grad():
            layer.mlp.down_proj.weight[:, 5] *= 1.3
            layer.mlp.up_proj.weight[5] *= 0.8
            layer.self_attn.o_proj.weight[:, 8:16] *= 1.2

    hooked, batch = pairs.hooked_pair("llama", grown), pairs.batch(lengths=(9, 6))
    scores, found = scored(hooked, batch, **END)
    for component in (("neuron", 1, 5, None), ("head", 1, 1, None)):
        key = pairs.component(*component)
        whole = scores.values[scores.components.index(key)]
        assert float(whole.abs().min()) > 1e-4
        size = float(whole.abs().max())
        for name, values in found.of(key).items():
            wanted = whole if name == "global" else torch.zeros_like(whole)
            assert float((values - wanted).abs().max()) <= 1e-4 * size, (key, name)


def double_pair(family):
    from tvlens.models.lens import LensModel, _bridge
    from tvlens.models.pair import HookedPair

    models = [pairs.hf_model(family).double() for _ in range(2)]
    pairs.noised(models[1], scale=0.1)
    return HookedPair.of(*(LensModel.wrap(_bridge(model, family)) for model in models))


@pytest.mark.parametrize(
    ("role", "part"), [("mlp.out", "W_out"), ("mlp.in", "W_in"), ("attn.o", "W_O")]
)
def test_a_part_is_the_change_of_the_metric_along_that_part_alone(role, part):
    """Central differences in float64 of the metric with the part's matrix added to the base.

    GPT-2 computes in float64 throughout; an RMS norm would go through float32.
    """
    hooked, batch, metric = double_pair("gpt2"), pairs.batch(lengths=(9, 6)), logit()
    _, found = scored(hooked, batch, metric, **END)
    weights = []
    for lens in (hooked.base, hooked.tuned):
        module = lens.model.blocks[1].get_submodule(role).original_component
        weights.append(module.weight.data)
    base, delta = weights[0].clone(), weights[1] - weights[0]  # Conv1D: x @ W as it is stored
    component, step = pairs.component("matrix", 1, None, part), 1e-4
    for name, matrix in written(base, delta, part).items():
        moved = []
        for sign in (1, -1):
            weights[0].copy_(base + sign * step * torch.from_numpy(matrix))
            moved.append(hooked.values(hooked.base, metric, batch))
        weights[0].copy_(base)
        slope = (moved[0] - moved[1]) / (2 * step)
        assert float(slope.abs().max()) > 1e-5
        torch.testing.assert_close(found.of(component)[name], slope, rtol=1e-5, atol=1e-8, msg=name)


def test_layers_in_groups_give_what_all_at_once_give(monkeypatch):
    from tvlens.attribution import parts

    hooked, batch = pairs.hooked_pair("llama"), pairs.batch(lengths=(9, 6))
    _, together = scored(hooked, batch, **END)
    monkeypatch.setattr(parts, "ENTRIES_AT_ONCE", 1)
    seen = []
    whole = parts._Passes.rows
    monkeypatch.setattr(parts._Passes, "rows", lambda *a: seen.append(1) or whole(*a))
    _, apart = scored(hooked, batch, **END)
    assert len(seen) == 2
    for name, part in together.parts.items():
        assert part.components == apart.parts[name].components
        torch.testing.assert_close(part.values, apart.parts[name].values, rtol=1e-6, atol=1e-9)


def test_a_part_is_the_same_alone_and_in_a_batch_padded_on_either_side():
    from dataclasses import replace

    hooked, batch = pairs.hooked_pair("llama"), pairs.batch(lengths=(9, 6))
    _, found = scored(hooked, batch, **END)
    for row, one in enumerate(batch.chunks(1)):
        _, single = scored(hooked, one, **END)
        for name, part in found.parts.items():
            size = float(part.values.abs().max())
            error = (part.values[:, row] - single.parts[name].values[:, 0]).abs().max()
            assert float(error) <= 1e-4 * size, name
    left = replace(batch, ids=batch.ids.clone(), mask=batch.mask.clone())
    short = int(batch.lengths[1])
    left.ids[1], left.mask[1] = batch.ids[1].roll(-short), batch.mask[1].roll(-short)
    _, other = scored(hooked, left, **END)
    for name, part in found.parts.items():
        size = float(part.values.abs().max())
        assert float((part.values - other.parts[name].values).abs().max()) <= 1e-4 * size, name


@pytest.mark.slow
def test_an_adapter_in_its_factors_gives_what_the_merged_pair_gives(tmp_path):
    import peft

    import tvlens
    from tvlens.attribution.gates import GatedModel, gated_weight_scores
    from tvlens.attribution.parts import part_scores
    from tvlens.models.lens import LensModel

    base = pairs.hf_model("llama")
    base.save_pretrained(tmp_path / "base")
    modules = ["q_proj", "v_proj", "o_proj", "down_proj"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=4, target_modules=modules))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    pair = tvlens.load_pair(tmp_path / "base", tmp_path / "adapter")
    gated = GatedModel.of_vector(LensModel.load(tmp_path / "base"), tvlens.tuning_vector(pair))
    batch = pairs.batch(lengths=(9, 6))
    scores = gated_weight_scores(gated, batch, logprob(), **END)
    ours = part_scores(gated, batch, logprob(), scores)
    _, merged = scored(tvlens.HookedPair(pair), batch, **END)
    untouched = ours.of(pairs.component("matrix", 0, None, "W_gate"))
    assert all(bool((values == 0).all()) for values in untouched.values())
    for name, part in merged.parts.items():
        size = float(part.values.abs().max())
        assert ours.parts[name].components == part.components
        error = float((ours.parts[name].values - part.values).abs().max())
        # 1e-3: in the base's null directions the merged sum's own rounding is some of the change
        assert error <= 1e-3 * size, (name, error, size)


def test_both_models_are_left_bit_for_bit_as_they_were():
    hooked = pairs.hooked_pair("gpt2")
    before = [
        {name: tensor.clone() for name, tensor in lens.model.state_dict().items()}
        for lens in (hooked.base, hooked.tuned)
    ]
    scored(hooked, pairs.batch(lengths=(5,)), **END)
    for lens, old in zip((hooked.base, hooked.tuned), before, strict=True):
        assert all(torch.equal(t, old[name]) for name, t in lens.model.state_dict().items())
        assert not any(p.fwd_hooks or p.bwd_hooks for p in lens.model.hook_dict.values())


def test_the_table_says_which_part_and_its_rows_sum_to_the_whole():
    from tvlens.attribution.parts import part_table
    from tvlens.attribution.weights import method_run, weight_table

    hooked, batch = pairs.hooked_pair("llama"), pairs.batch(lengths=(9, 6))
    scores, found = scored(hooked, batch, **END)
    run = method_run(scores.method, hooked, batch, logprob(), nodes=1)
    frame = part_table(found, run, neurons=10).to_frame()
    whole = weight_table(scores, hooked, batch, logprob(), neurons=10).to_frame()
    assert frame["geometric_part"].notna().all()
    assert frame["gap"].isna().all()
    keys = ["component", "prompt"]
    frame["prompt"], whole["prompt"] = frame["prompt"].fillna(-1), whole["prompt"].fillna(-1)
    sums = frame.groupby(keys)["score"].sum()
    wanted = whole[whole["kind"].isin(["matrix", "head", "kv_head", "neuron"])]
    wanted = wanted.set_index(keys)["score"]
    assert set(sums.index) == set(wanted.index)
    joined = sums.to_frame("sum").join(wanted.to_frame("whole"))
    np.testing.assert_allclose(joined["sum"], joined["whole"], rtol=1e-4, atol=1e-7)


def test_parts_do_not_disturb_what_reads_whole_scores():
    from tvlens.attribution.asking import attribute
    from tvlens.attribution.joins import effect_of_layers, roles_table
    from tvlens.attribution.sampling import sampled_strata
    from tvlens.attribution.series import scores_by_series
    from tvlens.tables import Table

    hooked, batch = pairs.hooked_pair("llama"), pairs.batch(lengths=(9, 6))
    more = attribute(hooked, batch, "logprob", also=("parts", "circuits"))
    frame = more.to_frame()
    extra = frame["geometric_part"].notna() | frame["part"].isin(["OV", "QK"])
    plain = Table(more.name, more.data.filter(pa.array((~extra).to_numpy())), more.order)
    assert extra.sum() > len(plain)
    assert effect_of_layers(plain, ["W_O"]) == effect_of_layers(more, ["W_O"])
    assert sampled_strata(plain, count=20) == sampled_strata(more, count=20)
    assert roles_table(plain).data.equals(roles_table(more).data)
    for series, frame in scores_by_series(plain).items():
        assert frame.equals(scores_by_series(more)[series])
