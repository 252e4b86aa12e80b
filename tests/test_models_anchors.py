"""The anchor: a planted shift of the residual stream is its direction, and its score."""

import pytest
import torch

from . import attribution_pairs as pairs
from .test_attribution_nodes import batch, scores

UP = 0.7


def shifted(layer, *, scale=UP):
    """A fine-tune that adds ``scale`` to channel 5 and takes half from channel 9, after a block."""

    def change(model):
        with torch.no_grad():
            bias = model.model.layers[layer].self_attn.o_proj.bias
            bias[5] += scale
            bias[9] -= scale / 2

    return change


def quiet_pair(change):
    """A Llama whose MLPs write nothing, so that a bias of the attention passes as it is."""
    from tvlens.models.lens import LensModel, _bridge
    from tvlens.models.pair import HookedPair

    made = []
    for tuned in (False, True):
        model = pairs.hf_model("llama")
        with torch.no_grad():
            for block in model.model.layers:
                block.mlp.down_proj.weight.zero_()
        if tuned:
            change(model)
        made.append(LensModel.wrap(_bridge(model, "llama")))
    return HookedPair.of(*made)


def planted_direction():
    direction = torch.zeros(32)
    direction[5], direction[9] = 1.0, -0.5
    return direction / direction.norm()


LENGTH = UP * (1 + 0.25) ** 0.5


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_planted_shift_is_the_direction_and_its_length_the_gap(side):
    from tvlens.models.anchors import anchor

    hooked, rows = quiet_pair(shifted(1)), batch(side=side)
    found = anchor(hooked, rows.rows([0, 2]))
    assert (found.hook, found.prompts) == ("blocks.1.hook_resid_post", 2)
    torch.testing.assert_close(found.direction, planted_direction(), rtol=0, atol=1e-5)
    assert found.gap == pytest.approx(LENGTH, rel=1e-5)
    base, tuned = (hooked.values(m, found.metric, rows) for m in (hooked.base, hooked.tuned))
    torch.testing.assert_close(tuned - base, torch.full((3,), LENGTH), rtol=1e-4, atol=0)


def test_means_are_of_the_places_that_predict_the_answer_and_of_prompts_alike():
    from tvlens.models.anchors import anchor

    hooked, rows = pairs.hooked_pair("llama"), batch(lengths=(7, 3, 5), side="left")
    found, means = anchor(hooked, rows, hook="blocks.0.hook_resid_post"), []
    for lens in (hooked.base, hooked.tuned):
        each = []
        for prompt in range(3):
            ids = rows.ids[prompt][rows.mask[prompt].bool()][None]
            stream = lens.model.run_with_cache(ids)[1]["blocks.0.hook_resid_post"][0].detach()
            first = int(rows.prompt_lengths[prompt]) - 1
            each.append(stream[first : first + 2].mean(0))
        means.append(torch.stack(each).mean(0))
    wanted = means[1] - means[0]
    assert found.gap == pytest.approx(float(wanted.norm()), rel=1e-4)
    torch.testing.assert_close(found.direction, wanted / wanted.norm(), rtol=1e-3, atol=1e-5)
    values = hooked.values(hooked.tuned, found.metric, rows)
    ids = rows.ids[1][rows.mask[1].bool()][None]
    stream = hooked.tuned.model.run_with_cache(ids)[1]["blocks.0.hook_resid_post"][0]
    along = (stream[2:4] @ found.direction).mean()
    assert float(values[1]) == pytest.approx(float(along), rel=1e-4)


@pytest.mark.slow
def test_only_the_weight_that_was_shifted_has_a_score_and_it_is_the_whole_change():
    from tvlens.attribution.exact import exact_weight_scores
    from tvlens.attribution.weights import weight_scores
    from tvlens.models.anchors import anchor

    hooked, rows = quiet_pair(shifted(1)), batch()
    metric = anchor(hooked, rows).metric
    for how in ({}, {"estimator": "first_order", "at": "base"}):
        found = weight_scores(hooked, rows, metric, **how)
        for component, values in zip(found.components, found.values, strict=True):
            expected = LENGTH if str(component) == "L1.b_O" else 0.0
            assert values.tolist() == pytest.approx([expected] * 3, abs=1e-5), component
    bias = next(c for c in found.components if str(c) == "L1.b_O")
    other = next(c for c in found.components if str(c) == "L0.b_O")
    after = next(c for c in found.components if c.part == "W_U")
    for method in ("exact_weight_insert", "exact_weight_remove", "exact_weight_path"):
        exact = exact_weight_scores(
            hooked, rows, metric, [bias, other, after], method=method, nodes=2
        )
        assert exact[0].tolist() == pytest.approx([LENGTH] * 3, abs=1e-5)
        assert exact[1:].abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 1])
def test_patches_before_and_after_the_place_are_those_of_a_plain_loop(layer):
    """Passes begin at the patched block: an anchor before it must keep what was recorded."""
    from tvlens.attribution.activations import attribute_activations, exact_activations
    from tvlens.models.anchors import anchor

    hooked, rows = pairs.hooked_pair("llama"), batch(lengths=(6, 4))
    found = anchor(hooked, rows, hook=f"blocks.{layer}.hook_resid_post")
    asked = [pairs.component("head", i, n, "z") for i in (0, 1) for n in (0, 3)]
    asked += [pairs.component("node", i, None, "mlp_out") for i in (0, 1)]
    asked += [pairs.component("node", layer, None, "resid_post")]
    how = {"direction": "tuned_into_base"}
    ours = scores(exact_activations(hooked, rows, found.metric, asked, **how))
    first = scores(attribute_activations(hooked, rows, found.metric, **how))
    names = {"z": "blocks.{}.attn.hook_z"}
    for prompt in range(len(rows)):
        ids = rows.ids[prompt : prompt + 1, : int(rows.lengths[prompt])]
        given = hooked.tuned.model.run_with_cache(ids)[1]
        last = int(rows.prompt_lengths[prompt]) - 1

        def along(hooks, ids=ids, last=last):
            kept = []
            keep = (found.hook, lambda t, hook: kept.append(t))
            with torch.no_grad(), hooked.base.model.hooks(fwd_hooks=[*hooks, keep]):
                hooked.base.model(ids)
            return float((kept[0][0, last : last + 2] @ found.direction).mean())

        for component in asked:
            name = names.get(component.part, f"blocks.{{}}.hook_{component.part}")
            name = name.format(component.layer)

            def exchange(t, hook, name=name, index=component.index, given=given):
                t = t.clone()
                where = ... if index is None else (slice(None), slice(None), index)
                t[where] = given[name][where]
                return t

            wanted = along([(name, exchange)]) - along([])
            key = (str(component), prompt)
            assert ours[key] == pytest.approx(wanted, abs=2e-5), component
            if component.layer > layer:
                assert ours[key] == first[key] == 0
            elif key in first:
                assert first[key] == pytest.approx(wanted, abs=0.15 * abs(wanted) + 1e-3)


@pytest.mark.slow
def test_gates_measure_the_same_anchor():
    from tvlens.attribution.gates import GatedModel, gated_swings, gated_weight_scores
    from tvlens.attribution.weights import weight_scores
    from tvlens.models.anchors import anchor

    hooked, rows = pairs.hooked_pair("llama"), batch()
    metric = anchor(hooked, rows, hook="blocks.0.hook_resid_post").metric
    gated = GatedModel.of_pair(hooked)
    ours, theirs = gated_weight_scores(gated, rows, metric), weight_scores(hooked, rows, metric)
    torch.testing.assert_close(ours.values, theirs.values, rtol=1e-3, atol=1e-5)
    chosen = [pairs.component("head", 0, 1, None), pairs.component("head", 1, 1, None)]
    swings = gated_swings(gated, rows, metric, chosen, s=0.0)
    assert swings[0].abs().min() > 0
    assert not swings[1].any()


def test_an_activation_that_the_metric_reads_has_no_gradient_to_give():
    from tvlens.attribution.activations import attribute_activations
    from tvlens.errors import HostError
    from tvlens.models.anchors import anchor

    hooked, rows = pairs.hooked_pair("llama"), batch()
    metric = anchor(hooked, rows).metric
    with pytest.raises(HostError, match="the metric itself reads"):
        attribute_activations(
            hooked, rows, metric, direction="tuned_into_base", parts=("resid_post",)
        )


def test_a_metric_of_ones_own_may_read_activations_and_logits():
    from tvlens.models import Metric

    hooked, rows = pairs.hooked_pair("gpt2"), batch()
    name = "blocks.1.hook_resid_pre"

    def both(run, rows):
        return run.logits[:, 2, 7] + 10 * run.hooks[name][:, 2, 3]

    metric = Metric("both", "mixed", "higher", both, hooks=(name,))
    values = hooked.values(hooked.tuned, metric, rows)
    logits, cache = hooked.tuned.model.run_with_cache(rows.ids)
    wanted = logits[:, 2, 7] + 10 * cache[name][:, 2, 3]
    torch.testing.assert_close(values, wanted.detach(), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_an_anchor_is_refused():
    from tvlens.errors import HostError, MetricError
    from tvlens.models import Metric, PromptSet, resolve_metric
    from tvlens.models.anchors import anchor, anchored, hook_of
    from tvlens.models.metrics import Run
    from tvlens.models.prompts import Prompt

    hooked, rows = quiet_pair(shifted(1)), batch()
    texts = PromptSet((Prompt("a"),))
    open_metric = resolve_metric("anchor", texts)
    with pytest.raises(MetricError, match="no direction yet"):
        open_metric(Run(torch.zeros(3, 4, 5)), rows)
    assert anchored(open_metric, hooked, rows).hook == "blocks.1.hook_resid_post"
    assert hook_of("anchor@0", hooked.base) == "blocks.0.hook_resid_post"
    for wrong in ("anchor@2", "anchor@x", "anchor@-1"):
        with pytest.raises(MetricError, match="from 0 to 1"):
            anchored(resolve_metric(wrong, texts), hooked, rows)
    with pytest.raises(MetricError, match=r"the same at blocks\.0\.hook_resid_post"):
        anchored(resolve_metric("anchor@0", texts), hooked, rows)
    with pytest.raises(MetricError, match="choose"):
        anchor(hooked, rows.rows([]))
    with pytest.raises(HostError, match="no hook"):
        anchor(hooked, rows, hook="blocks.7.hook_resid_post")
    heads = Metric("z", "x", "higher", lambda r, b: r.logits[:, 0, 0], hooks=(
        "blocks.0.attn.hook_z",
    ))  # fmt: skip
    with pytest.raises(HostError, match="batch, pos, width"):
        hooked.values(hooked.base, heads, rows)


class Stop(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_models_are_left_as_found(fails):
    from tests.test_attribution_activations import state
    from tvlens.models.anchors import anchor

    def stop(*arguments, **named):
        raise Stop

    hooked, rows = pairs.hooked_pair("llama"), batch()
    breaks = [("blocks.1.hook_mlp_out", stop)] if fails else []
    before = state(hooked)
    with hooked.tuned.hooks(fwd=breaks):
        if fails:
            with pytest.raises(Stop):
                anchor(hooked, rows)
        else:
            metric = anchor(hooked, rows).metric
            hooked.values(hooked.tuned, metric, rows)
    assert state(hooked) == before
