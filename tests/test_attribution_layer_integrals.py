"""Integrals between two activations: exact sums, exact counterparts, where first order fails."""

import pytest
import torch

from . import attribution_pairs as pairs

pytestmark = pytest.mark.slow


def shipped(name="logprob"):
    from tvlens.models.metrics import SHIPPED

    return SHIPPED[name]


def far(model):
    pairs.noised(model, scale=0.06)


def integrals(hooked, batch, metric=None, **how):
    from tvlens.attribution.layer_integrals import layer_integrals

    return layer_integrals(hooked, batch, metric or shipped(), **how)


PARTS = ("z", "post", "pattern", "embed")


@pytest.mark.parametrize("direction", ["tuned_into_base", "base_into_tuned"])
def test_components_of_a_site_sum_to_what_exchanging_all_of_it_does(direction):
    from tvlens.attribution.patching import exact_activations

    hooked, batch = pairs.hooked_pair("llama", far), pairs.batch(lengths=(9, 6))
    found = integrals(hooked, batch, direction=direction, parts=PARTS, nodes=8)
    assert found.completeness <= 0.002
    wholes = [pairs.component("node", site.layer, None, site.part) for site in found.sites]
    exact = exact_activations(hooked, batch, shipped(), wholes, direction=direction).to_frame()
    for site, whole in zip(found.sites, wholes, strict=True):
        rows = exact[(exact["part"] == site.part) & (exact["component"] == str(whole))]
        wanted = torch.tensor(rows.sort_values("prompt")["score"].to_numpy())
        size = float(found.effects[site.hook].abs().max())
        assert size > 1e-3
        # 2e-5: rounding of one float32 metric in another layout
        torch.testing.assert_close(found.effects[site.hook], wanted, rtol=1e-4, atol=2e-5)
        summed = found.values[site.hook].sum(1)
        assert float((summed - wanted).abs().max()) <= 0.02 * size + 2e-5
        torch.testing.assert_close(found.gaps[site.hook], found.effects[site.hook] - summed)


def test_both_directions_give_one_sign_and_size_where_the_metric_is_linear_in_the_site():
    """The last MLP's output goes through the final norm alone: a logit without it is linear."""
    from tvlens.models.metrics import Metric

    hooked, batch = pairs.hooked_pair("llama", far), pairs.batch(lengths=(9, 6))
    for lens in (hooked.base, hooked.tuned):
        norm = lens.model.ln_final.original_component
        norm.forward = lambda x: x
    metric = Metric("logit", "logits", "higher", lambda run, rows: run.logits[:, 5, 3])
    there = integrals(hooked, batch, metric, parts=("mlp_out",), nodes=1)
    last = there.sites[-1].hook
    assert float(there.effects[last].abs().min()) > 1e-4
    torch.testing.assert_close(there.values[last].sum(1), there.effects[last], rtol=1e-4, atol=1e-6)
    table = integrals(
        hooked, batch, metric, direction="base_into_tuned", parts=("mlp_out",), nodes=1
    )
    # the unembedding differs too, so sizes do; the sign is that of tuned against base in both
    assert bool((there.effects[last] * table.effects[last] > 0).all())


def test_a_saturated_softmax_defeats_first_order_and_not_the_integral():
    """A head that attends to one token with certainty has no gradient by its pattern's logits."""
    from tvlens.attribution.activations import attribute_activations

    def sharp(model):
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight.mul_(-1.0)
                layer.self_attn.q_proj.bias.mul_(-1.0)

    hooked = pairs.hooked_pair("llama", sharp)
    for lens in (hooked.base, hooked.tuned):
        for block in lens.model.blocks:
            module = block.attn.q.original_component
            with torch.no_grad():
                module.weight.mul_(6.0)
                module.bias.mul_(6.0)
    batch = pairs.batch(lengths=(9, 6))
    found = integrals(hooked, batch, parts=("q",), nodes=24)
    first = attribute_activations(
        hooked, batch, shipped(), direction="tuned_into_base", parts=("q",)
    ).to_frame()
    last = found.sites[-1]
    effect = found.effects[last.hook]
    rows = first[first["layer"] == last.layer].groupby("prompt")["score"].sum()
    plain = (torch.tensor(rows.to_numpy()) - effect).abs().mean()
    better = found.gaps[last.hook].abs().mean()
    assert float(plain) > 0.3 * float(effect.abs().mean())
    assert float(better) < 0.15 * float(plain)


def test_a_distance_to_the_receiver_has_an_integral_though_its_gradient_vanishes():
    from tvlens.attribution.activations import attribute_activations
    from tvlens.errors import MetricError

    hooked, batch = pairs.hooked_pair("llama", far), pairs.batch(lengths=(9, 6))
    metric = shipped("kl_to_base")
    with pytest.raises(MetricError, match="vanishes"):
        attribute_activations(hooked, batch, metric, direction="tuned_into_base")
    found = integrals(hooked, batch, metric, parts=("mlp_out",))
    assert all(float(effect.min()) > 0 for effect in found.effects.values())
    assert found.completeness < 0.01


def test_nodes_are_raised_until_the_gap_is_small_and_the_rows_say_how_many():
    hooked, batch = pairs.hooked_pair("llama", far), pairs.batch(lengths=(9, 6))
    rough = integrals(hooked, batch, parts=("mlp_out",), nodes=1)
    found = integrals(hooked, batch, parts=("mlp_out",))
    assert found.nodes in (3, 5, 8, 12)
    assert found.completeness < rough.completeness
    frame = found.table().to_frame()
    assert set(frame["nodes"]) == {found.nodes}
    assert set(frame["method"]) == {"cross_model_ig"}
    assert set(frame["estimator"]) == {"ig"}
    assert frame["gap"].notna().all()


def test_rows_of_components_and_of_the_whole_sites():
    hooked, batch = pairs.hooked_pair("llama"), pairs.batch(lengths=(9, 6))
    found = integrals(hooked, batch, parts=("z", "post"), nodes=3)
    frame = found.table(neurons=5).to_frame()
    heads = frame[frame["kind"] == "head"]
    wholes = frame[(frame["kind"] == "node") & (frame["part"] == "z")]
    assert len(heads) == 2 * 4 * 2
    assert len(wholes) == 2 * 2
    sums = heads.groupby(["layer", "prompt"])["score"].sum()
    wanted = wholes.set_index(["layer", "prompt"])["score"]
    assert sums.sort_index().to_numpy() == pytest.approx(wanted.sort_index().to_numpy(), rel=1e-6)
    neurons = frame[(frame["kind"] == "neuron") & frame["prompt"].isna()]
    assert len(neurons) == 2 * 24


def test_equal_models_have_zeros_and_padding_side_does_not_matter():
    from dataclasses import replace

    same = integrals(
        pairs.hooked_pair("llama", lambda model: None), pairs.batch(lengths=(5,)), parts=("z",)
    )
    assert all(bool((values == 0).all()) for values in same.values.values())
    hooked, batch = pairs.hooked_pair("llama", far), pairs.batch(lengths=(9, 6))
    left = replace(batch, ids=batch.ids.clone(), mask=batch.mask.clone())
    short = int(batch.lengths[1])
    left.ids[1], left.mask[1] = batch.ids[1].roll(-short), batch.mask[1].roll(-short)
    one, other = (integrals(hooked, b, parts=("z",), nodes=3) for b in (batch, left))
    for name, values in one.values.items():
        assert float((other.values[name] - values).abs().max()) <= 1e-4 * float(values.abs().max())


def test_within_one_model_the_corrupt_prompt_is_a_direction_too():
    from tvlens.models.prompts import Batch

    batch = Batch.of_ids(
        [[3, 4, 5, 6], [7, 8, 9]], answers=[[5], [6]], corrupts=[[3, 9, 5, 2], [1, 8, 4]]
    )
    found = integrals(
        pairs.hooked_pair("llama"),
        batch,
        direction="clean_into_corrupt",
        at="base",
        parts=("mlp_out",),
        nodes=24,
    )
    assert found.run.method == "activation_ig"
    # other tokens are further away than another model: more curvature between them
    assert found.completeness < 0.02


def test_the_models_are_left_as_found_also_by_a_metric_that_raises():
    from tvlens.models.metrics import Metric

    hooked, batch = pairs.hooked_pair("llama"), pairs.batch(lengths=(5,))
    flags = [p.requires_grad for p in hooked.base.model.parameters()]
    calls = []

    def midway(run, rows):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("midway")
        return run.logits.sum((1, 2))

    with pytest.raises(RuntimeError, match="midway"):
        integrals(hooked, batch, Metric("bad", "x", "higher", midway), parts=("z",))
    assert flags == [p.requires_grad for p in hooked.base.model.parameters()]
    assert not any(p.fwd_hooks or p.bwd_hooks for p in hooked.base.model.hook_dict.values())
