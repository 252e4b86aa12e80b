"""Gates against the swap of weights, against models edited by hand, and on their own laws."""

import copy

import pytest
import torch

from . import attribution_pairs as pairs

FAMILIES = ("llama", "gpt2", "neox")


def shipped(name="logprob"):
    from tvlens.models.metrics import SHIPPED

    return SHIPPED[name]


def gated_pair(family, **how):
    from tvlens.attribution.gates import GatedModel

    hooked = pairs.hooked_pair(family, **how)
    return hooked, GatedModel.of_pair(hooked)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_gates_open_are_the_tuned_model_and_all_closed_the_base(family):
    hooked, gated = gated_pair(family)
    batch = pairs.batch()
    reading = gated.reading(shipped(), batch)
    for end, model in ((0.0, hooked.base), (1.0, hooked.tuned)):
        with torch.no_grad():
            wanted = reading.logits(model)
            found = gated.logits(gated.gates(len(batch), end), reading)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_dose_is_the_model_on_the_line_also_beyond_its_ends():
    _, gated = gated_pair("llama")
    batch = pairs.batch()
    reading = gated.reading(shipped(), batch)
    for dose in (-0.5, 0.3, 1.5):
        model = pairs.hf_model("llama")
        pairs.noised(model, scale=0.02 * dose)
        with torch.no_grad():
            logits = model(batch.ids, attention_mask=batch.mask).logits
            rows = torch.arange(len(batch))[:, None]
            found = gated.logits(gated.gates(len(batch), dose), reading)
        torch.testing.assert_close(found, logits[rows, reading.positions], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("name", "estimator", "at"),
    [  # first order of KL to the tuned model at its own end is refused
        ("logprob", "first_order", "base"),
        ("logprob", "first_order", "tuned"),
        ("logprob", "ig", "path"),
        ("kl_to_tuned", "first_order", "base"),
        ("kl_to_tuned", "ig", "path"),
    ],
)
def test_derivatives_of_gates_are_the_scores_by_swap(family, name, estimator, at):
    from tvlens.attribution.gates import gated_weight_scores
    from tvlens.attribution.weights import weight_scores

    hooked, gated = gated_pair(family)
    batch, metric = pairs.batch(), shipped(name)
    swap = weight_scores(hooked, batch, metric, estimator=estimator, at=at)
    ours = gated_weight_scores(gated, batch, metric, estimator=estimator, at=at)
    assert ours.components == swap.components
    assert ours.nodes == swap.nodes
    torch.testing.assert_close(ours.change, swap.change, rtol=1e-4, atol=1e-5)
    largest = float(swap.values.abs().max())
    assert float((ours.values - swap.values).abs().max()) <= 1e-4 * largest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "s"), [("llama", 0.0), ("llama", 0.4), ("gpt2", 1.0), ("neox", 0.4)]
)
def test_one_gate_at_a_time_is_the_exact_swing(family, s):
    from tvlens.attribution.exact import _Measured
    from tvlens.attribution.gates import gated_swings
    from tvlens.attribution.sites import all_components, pieces, weight_path

    hooked, gated = gated_pair(family)
    batch = pairs.batch()
    components = all_components(hooked.base, gated.sites)
    components = [c for c in components if c.kind != "neuron" or c.index in (0, 7)]
    components += [pairs.component("kv_group", 1, 1, None)]
    with weight_path(hooked) as path:
        cuts = [pieces(c, hooked.base, path.sites) for c in components]
        swap = _Measured(path, hooked.reading(shipped(), batch)).swings(cuts, s)
    ours = gated_swings(gated, batch, shipped(), components, s=s)
    assert float((ours - swap).abs().max()) <= 1e-4 * float(swap.abs().max())
    assert float(swap.abs().max()) > 1e-2


def test_rows_have_gates_of_their_own():
    _, gated = gated_pair("llama")
    batch = pairs.batch()
    reading = gated.reading(shipped(), batch)
    gates = gated.gates(len(batch))
    gated.set(gates, pairs.component("head", 0, 1, None), 1.0, slice(2, 3))
    values = gated.values(gates, reading)
    plain = gated.values(gated.gates(len(batch)), reading)
    same = [bool((values[i] - plain[i]).abs() < 1e-6) for i in range(len(batch))]
    assert same == [True, True, False, True]


def test_a_graft_is_the_model_with_those_weights():
    _, gated = gated_pair("llama")
    batch = pairs.batch()
    reading = gated.reading(shipped(), batch)
    grafted, tuned = pairs.hf_model("llama"), pairs.hf_model("llama")
    pairs.noised(tuned)
    with torch.no_grad():
        here, there = (m.model.layers[0].mlp for m in (grafted, tuned))
        here.down_proj.weight.copy_(there.down_proj.weight)
        grafted.model.norm.weight.copy_(tuned.model.norm.weight)
    gates = gated.gates(len(batch))
    gated.set(gates, pairs.component("matrix", 0, None, "W_out"), 1.0)
    gated.set(gates, pairs.component("norm", None, None, "ln_final.w"), 1.0)
    with torch.no_grad():
        wanted = grafted(batch.ids, attention_mask=batch.mask).logits
        found = gated.logits(gates, reading)
    rows = torch.arange(len(batch))[:, None]
    torch.testing.assert_close(found, wanted[rows, reading.positions], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_adapter_in_its_factors_needs_no_second_model(tmp_path):
    import peft

    import tvlens
    from tvlens.attribution.gates import GatedModel, gated_weight_scores
    from tvlens.attribution.weights import weight_scores
    from tvlens.models.lens import LensModel
    from tvlens.weights.delta import LowRank

    base = pairs.hf_model("llama")
    base.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])
    model = peft.get_peft_model(base, settings)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    pair = tvlens.load_pair(tmp_path / "base", tmp_path / "adapter")
    vector = tvlens.tuning_vector(pair)
    gated = GatedModel.of_vector(LensModel.load(tmp_path / "base"), vector)
    assert sum(isinstance(delta, LowRank) for delta in gated.deltas.values()) == 6
    hooked, batch = tvlens.HookedPair(pair), pairs.batch()
    ours = gated_weight_scores(gated, batch, shipped())
    swap = weight_scores(hooked, batch, shipped())
    assert float((ours.values - swap.values).abs().max()) <= 1e-4 * float(swap.values.abs().max())
    assert swap.completeness < 0.002


@pytest.mark.slow
def test_a_vector_from_files_is_the_pair_also_where_embeddings_are_tied(tmp_path):
    import tvlens
    from tvlens.attribution.gates import GatedModel
    from tvlens.models.lens import LensModel

    base, tuned = pairs.hf_model("llama"), pairs.hf_model("llama")
    pairs.noised(tuned)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    vector = tvlens.tuning_vector(tvlens.load_pair(tmp_path / "base", tmp_path / "tuned"))
    gated = GatedModel.of_vector(LensModel.load(tmp_path / "base"), vector)
    batch = pairs.batch()
    reading = gated.reading(shipped(), batch)
    with torch.no_grad():
        wanted = tuned(batch.ids, attention_mask=batch.mask).logits
        found = gated.logits(gated.gates(len(batch), 1.0), reading)
    rows = torch.arange(len(batch))[:, None]
    torch.testing.assert_close(found, wanted[rows, reading.positions], rtol=1e-4, atol=1e-5)
    half = gated.gates(len(batch))
    gated.set(half, pairs.component("embedding", None, None, "W_U"), 1.0)
    with torch.no_grad():
        alone = gated.logits(half, reading)
    assert float((alone - found).abs().max()) > 1e-3


def test_a_vector_of_another_base_is_refused(tmp_path):
    import dataclasses

    import tvlens
    from tvlens.attribution.gates import GatedModel
    from tvlens.errors import HostError
    from tvlens.weights.delta import Absent

    base = pairs.hf_model("llama")
    base.save_pretrained(tmp_path / "base")
    vector = tvlens.tuning_vector(tvlens.load_pair(tmp_path / "base", tmp_path / "base"))
    lens = pairs.hooked_pair("llama").base
    for layer, shape, said in ((9, (32, 32), "L9"), (0, (32, 31), "the model's")):
        held = {pairs.component("matrix", layer, None, "W_Q"): Absent(shape)}
        with pytest.raises(HostError, match=said):
            GatedModel.of_vector(lens, dataclasses.replace(vector, deltas=held))


@pytest.mark.slow
def test_bfloat16_scores_are_those_of_the_same_weights_in_float32():
    from tvlens.attribution.gates import GatedModel, gated_weight_scores
    from tvlens.models.lens import LensModel, _bridge
    from tvlens.models.pair import HookedPair

    models = [pairs.hf_model("llama"), pairs.hf_model("llama")]
    pairs.noised(models[1])
    rough = [copy.deepcopy(model).bfloat16() for model in models]
    exact = [copy.deepcopy(model).float() for model in rough]
    batch = pairs.batch()
    found = []
    for pair in (rough, exact):
        hooked = HookedPair.of(*(LensModel.wrap(_bridge(model, "llama")) for model in pair))
        gated = GatedModel.of_pair(hooked)
        found.append(
            gated_weight_scores(gated, batch, shipped(), estimator="first_order", at="base")
        )
    together = torch.stack([scores.values.flatten() for scores in found])
    assert float(torch.corrcoef(together)[0, 1]) > 0.99


def test_exact_effects_are_refused_below_float32():
    from tvlens.attribution.gates import GatedModel, gated_swings
    from tvlens.errors import HostError
    from tvlens.models.lens import LensModel, _bridge
    from tvlens.models.pair import HookedPair

    models = [pairs.hf_model("llama").bfloat16() for _ in range(2)]
    gated = GatedModel.of_pair(
        HookedPair.of(*(LensModel.wrap(_bridge(model, "llama")) for model in models))
    )
    with pytest.raises(HostError, match="float32"):
        gated_swings(gated, pairs.batch(), shipped(), [pairs.component("head", 0, 0, None)], s=0.0)


@pytest.mark.parametrize("fails", [False, True])
def test_the_base_is_left_as_found(fails):
    from tvlens.attribution.gates import gated_swings, gated_weight_scores
    from tvlens.models.metrics import Metric

    hooked, gated = gated_pair("gpt2")
    batch = pairs.batch()
    model = hooked.base.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = []

    def metric(run, rows):
        calls.append(1)
        if fails and len(calls) == 4:
            raise RuntimeError("midway")
        return run.logits[:, 2, 5]

    ask = Metric("logit", "logits", "higher", metric)

    def run():
        gated_swings(gated, batch, ask, [pairs.component("head", 1, 1, None)], s=0.0)
        gated_weight_scores(gated, batch, ask, estimator="first_order", at="base")

    if fails:
        with pytest.raises(RuntimeError, match="midway"):
            run()
    else:
        run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(hook.fwd_hooks or hook.bwd_hooks for hook in model.hook_dict.values())
