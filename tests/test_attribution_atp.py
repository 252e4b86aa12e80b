"""AtP*: exact where the model is linear from the pattern on, slow loops, planted cancellation."""

import math

import pytest
import torch

from . import attribution_pairs as pairs
from .test_attribution_nodes import FAMILIES, all_double, batch, double_pair, metric, scores

pytestmark = pytest.mark.slow

__all__ = ["all_double"]
HEADS, KV_HEADS, WIDTH = 4, 2, 8
GIVEN = {"direction": "tuned_into_base"}


def attributed(hooked, rows, estimator, *, parts=("q", "k"), **how):
    from tvlens.attribution.activations import attribute_activations

    table = attribute_activations(
        hooked, rows, metric(), parts=parts, estimator=estimator, neurons=None, **{**GIVEN, **how}
    )
    return scores(table)


def exact(hooked, rows, components, **how):
    from tvlens.attribution.activations import exact_activations

    return scores(exact_activations(hooked, rows, metric(), components, **{**GIVEN, **how}))


def components(part, *, layers=(0, 1)):
    kind, count = ("kv_head", KV_HEADS) if part in "kv" else ("head", HEADS)
    return [pairs.component(kind, i, n, part) for i in layers for n in range(count)]


def distance(ours, wanted):
    """Size of the error relative to what is wanted, over the keys of ``wanted``."""
    error = math.sqrt(sum((ours[key] - value) ** 2 for key, value in wanted.items()))
    return error / math.sqrt(sum(value**2 for value in wanted.values()))


def toy(change, *, layers=2, seed=0):
    """A Llama (grouped heads, rotary, RMSNorm) that is linear but for its softmax, and a change.

    Its norms divide by a constant, its MLPs write nothing, and the blocks after the first attend
    to all places alike.
    """
    import transformers

    from tvlens.models.lens import LensModel, _bridge
    from tvlens.models.pair import HookedPair

    made = []
    for tuned in (False, True):
        shape = pairs.config("llama", tied=False)
        shape.rms_norm_eps, shape.num_hidden_layers = 1e8, layers
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(
            shape, attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(0.25 * torch.randn_like(parameter))
                if "norm" in name:
                    parameter.fill_(1e4)
            for block in model.model.layers:
                block.mlp.down_proj.weight.zero_()
            for block in model.model.layers[1:]:
                block.self_attn.q_proj.weight.zero_()
                block.self_attn.q_proj.bias.zero_()
            if tuned:
                change(model)
        made.append(LensModel.wrap(_bridge(model, "llama")))
    return HookedPair.of(*made)


def turned(model):
    """Other queries and keys in the first block, so large that its softmax saturates."""
    attention = model.model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight.add_(0.5 * torch.randn_like(projection.weight))


def saturated(model):
    turned(model)
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight.mul_(12.0)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("part", ["q", "k"])
def test_the_qk_fix_is_exact_where_the_model_is_linear_from_the_pattern_on(part, side):
    hooked, rows = toy(turned), batch(side=side)
    wanted = exact(hooked, rows, components(part, layers=(0,)))
    assert max(map(abs, wanted.values())) > 0.01
    ours = attributed(hooked, rows, "qk_fix", parts=(part,))
    assert distance(ours, wanted) < 1e-4  # fp32 logits
    assert distance(attributed(hooked, rows, "first_order", parts=(part,)), wanted) > 0.05


@pytest.mark.parametrize("part", ["q", "k"])
def test_a_saturated_softmax_hides_a_query_from_first_order_and_not_from_the_fix(part):
    hooked, rows = toy(saturated), batch(lengths=(8, 5))
    asked = {"direction": "base_into_tuned"}
    wanted = exact(hooked, rows, components(part, layers=(0,)), **asked)
    first = attributed(hooked, rows, "first_order", parts=(part,), **asked)
    ours = attributed(hooked, rows, "qk_fix", parts=(part,), **asked)
    assert distance(first, wanted) > 0.5
    assert distance(ours, wanted) < 1e-4


def test_every_estimator_is_exact_in_a_linear_model():
    """The base attends to all places alike, so only its queries meet a softmax that bends."""

    def moved(model):
        pairs.noised(model, scale=0.5)

    def flat(hooked):
        for block in hooked.base.model.original_model.model.layers:
            block.self_attn.q_proj.weight.data.zero_()
            block.self_attn.q_proj.bias.data.zero_()

    hooked, rows = toy(moved), batch()
    flat(hooked)
    parts = ("embed", "v", "z", "pattern", "attn_out", "mlp_out", "resid_pre", "resid_post")
    asked = [c for part in "vz" for c in components(part)]
    asked += [pairs.component("head", i, 3, "pattern") for i in (0, 1)]
    asked += [pairs.component("node", i, None, p) for i in (0, 1) for p in parts[4:]]
    asked += [pairs.component("node", None, None, "embed")]
    wanted = exact(hooked, rows, asked)
    first = attributed(hooked, rows, "first_order", parts=parts)
    assert distance(first, wanted) < 1e-4
    assert attributed(hooked, rows, "qk_fix", parts=parts) == first
    queries = exact(hooked, rows, components("q"))
    assert distance(attributed(hooked, rows, "qk_fix", parts=("q",)), queries) < 1e-4
    # nothing comes after the last block that could be dropped
    ours = attributed(hooked, rows, "atp_star", parts=parts)
    last = {key: value for key, value in wanted.items() if key[0].startswith("L1")}
    assert len(last) == 3 * (KV_HEADS + HEADS + 1 + 4)
    whole = {key: v for key, v in last.items() if not key[0].endswith("resid_pre")}
    assert distance(ours, whole) < 1e-4


def plain_softmax(query, key, *, position):
    """Rows of one head's pattern from its query and key of one prompt, in torch alone."""
    half = query.shape[-1] // 2
    angles = torch.arange(len(query))[:, None] / 10_000 ** (torch.arange(half) / half)[None]
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))

    def rotated(x):
        return x * cos + torch.cat([-x[:, half:], x[:, :half]], -1) * sin

    if not position:
        rotated = torch.clone
    logits = rotated(query) @ rotated(key).T / math.sqrt(query.shape[-1])
    return logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf).softmax(-1)


def pattern_gradients(lens, rows, prompt):
    """The gradient of the metric at every block's pattern, by a zero added there."""
    length = int(rows.lengths[prompt])
    ids = rows.ids[prompt : prompt + 1, :length]
    leaves = [torch.zeros(1, HEADS, length, length, requires_grad=True) for _ in range(2)]
    hooks = [
        (f"blocks.{i}.attn.hook_pattern", lambda t, hook, e=leaf: t + e)
        for i, leaf in enumerate(leaves)
    ]
    with lens.model.hooks(fwd_hooks=hooks):
        logits = lens.model(ids)[0, int(rows.prompt_lengths[prompt]) - 1]
    value = logits[int(rows.answer_ids[prompt][0])] - logits[int(rows.wrong_ids[prompt][0])]
    return [g[0] for g in torch.autograd.grad(value, leaves)]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_qk_fix_equals_a_loop_over_heads_and_positions_in_plain_torch(family):
    from tvlens.attribution.activations import activation_scores
    from tvlens.attribution.directions import question

    hooked = pairs.hooked_pair(family, lambda model: pairs.noised(model, scale=0.3))
    rows, share = batch(lengths=(6, 4)), 2 if family == "llama" else 1
    ours = attributed(hooked, rows, "qk_fix")
    asked = question(hooked, metric(), "tuned_into_base")
    found = activation_scores(asked, rows, parts=("q", "k"), estimator="qk_fix", by_position=True)
    placed = {cut.part: scored for cut, scored in found.positions.items()}
    allowed = 2e-5 * max(map(abs, ours.values()))
    for prompt in range(len(rows)):
        ids = rows.ids[prompt : prompt + 1, : int(rows.lengths[prompt])]
        caches = [m.model.run_with_cache(ids)[1] for m in (hooked.base, hooked.tuned)]
        gradients = pattern_gradients(hooked.base, rows, prompt)
        for layer, gradient in enumerate(gradients):
            (q, k), (q_new, k_new) = (
                [c[f"blocks.{layer}.attn.hook_{n}"][0].detach() for n in "qk"] for c in caches
            )

            def effect(query, key, head, g=gradient, own=(q, k)):
                new = plain_softmax(query, key, position=family != "gpt2")
                plain = (own[0][:, head], own[1][:, head // share])
                return float(
                    ((new - plain_softmax(*plain, position=family != "gpt2")) * g[head]).sum()
                )

            for head in range(HEADS):
                own_key, total = k[:, head // share], 0.0
                for place in range(ids.shape[1]):
                    query = q[:, head].clone()
                    query[place] = q_new[place, head]
                    one = effect(query, own_key, head)
                    total += one
                    assert float(placed["q"][prompt, place, layer, head]) == pytest.approx(
                        one, abs=allowed
                    )
                assert ours[f"L{layer}H{head}.q", prompt] == pytest.approx(total, abs=allowed)
            for index in range(HEADS // share):
                heads = range(index * share, (index + 1) * share)
                for place in range(ids.shape[1]):
                    key = k[:, index].clone()
                    key[place] = k_new[place, index]
                    one = sum(effect(q[:, head], key, head) for head in heads)
                    assert float(placed["k"][prompt, place, layer, index]) == pytest.approx(
                        one, abs=allowed
                    )
                together = sum(effect(q[:, head], k_new[:, index], head) for head in heads)
                label = f"L{layer}K{index}.k"
                assert ours[label, prompt] == pytest.approx(together, abs=allowed)
                assert float(found.values[_cut("k")][prompt, layer, index]) == pytest.approx(
                    together, abs=allowed
                )


def _cut(part):
    from tvlens.attribution.nodes import NODES

    return NODES[part][0]


@pytest.mark.slow
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_key_alone_is_measured_in_a_row_that_it_holds_alone(side):
    """One token takes a whole row up to 1e-30 of it: what is left of the others must be seen."""
    from tvlens.attribution.activations import activation_scores
    from tvlens.attribution.directions import question

    hooked = toy(saturated)
    for lens in (hooked.base, hooked.tuned):
        lens.model.original_model.model.layers[0].self_attn.q_proj.weight.data.mul_(4.0)
    rows = batch(lengths=(7,), side=side)
    asked = question(hooked, metric(), "base_into_tuned")
    found = activation_scores(asked, rows, parts=("k",), estimator="qk_fix", by_position=True)
    given = hooked.base.model.run_with_cache(rows.ids)[1]["blocks.0.attn.hook_k"]
    last = [int(rows.mask.sum()) - 3, int(rows.answer_ids[0][0]), int(rows.wrong_ids[0][0])]
    for index in range(KV_HEADS):
        for place in range(7):

            def alone(t, hook, place=place, index=index):
                t = t.clone()
                t[:, place, index] = given[:, place, index]
                return t

            values = []
            for hooks in ([], [("blocks.0.attn.hook_k", alone)]):
                with torch.no_grad(), hooked.tuned.model.hooks(fwd_hooks=hooks):
                    logits = hooked.tuned.model(rows.ids)[0, 6]
                values.append(float(logits[last[1]] - logits[last[2]]))
            one = float(found.positions[_cut("k")][0, place, 0, index])
            assert one == pytest.approx(values[0] - values[1], abs=2e-4), (place, index)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_qk_fix_is_the_hosts_own_softmax_in_every_family(family, all_double):
    """The pattern with one head exchanged comes from a whole pass, its slope from differences."""
    hooked, rows = double_pair(family, scale=0.3), batch(lengths=(6,))
    ours, step = attributed(hooked, rows, "qk_fix"), 1e-4
    allowed = 1e-6 * max(map(abs, ours.values()))
    answer, wrong = int(rows.answer_ids[0][0]), int(rows.wrong_ids[0][0])
    own, other = (m.model.run_with_cache(rows.ids)[1] for m in (hooked.base, hooked.tuned))
    model, kv_heads = hooked.base.model, hooked.base.n_kv_heads
    for part, layer, index in [("q", 0, 1), ("q", 1, 3), ("k", 0, 0), ("k", 1, kv_heads - 1)]:
        name, pattern = (f"blocks.{layer}.attn.hook_{n}" for n in (part, "pattern"))
        seen = []

        def exchange(t, hook, name=name, index=index):
            t = t.clone()
            t[:, :, index] = other[name][:, :, index]
            return t

        keep = (pattern, lambda t, hook, seen=seen: seen.append(t.detach()))
        with torch.no_grad(), model.hooks(fwd_hooks=[(name, exchange), keep]):
            model(rows.ids)
        change, ends = seen[0] - own[pattern].detach(), []
        for h in (step, -step):
            moved = (pattern, lambda t, hook, h=h, c=change: t + h * c)
            with torch.no_grad(), model.hooks(fwd_hooks=[moved]):
                logits = model(rows.ids)[0, 5]
            ends.append(logits[answer] - logits[wrong])
        slope = float((ends[0] - ends[1]) / (2 * step))
        label = f"L{layer}{'K' if part == 'k' else 'H'}{index}.{part}"
        assert ours[label, 0] == pytest.approx(slope, abs=allowed), label
        assert abs(slope) > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_graddrop_is_a_mean_over_runs_in_which_one_layer_is_detached(family):
    """The oracle detaches in the forward pass and adds a zero at each activation."""
    from tvlens.attribution.nodes import activation_sites

    hooked, rows = pairs.hooked_pair(family), batch(lengths=(5, 4))
    parts = ("embed", "z", "v", "attn_out", "mlp_out", "resid_pre", "resid_post", "pattern")
    ours = attributed(hooked, rows, "atp_star", parts=parts)
    first = attributed(hooked, rows, "first_order", parts=parts)
    allowed = 1e-5 * max(map(abs, ours.values()))
    model = hooked.base.model
    for prompt in range(len(rows)):
        length = int(rows.lengths[prompt])
        ids, last = rows.ids[prompt : prompt + 1, :length], int(rows.prompt_lengths[prompt]) - 1
        caches = [m.model.run_with_cache(ids)[1] for m in (hooked.base, hooked.tuned)]
        for site in activation_sites(hooked.base, parts):
            own, other = (cache[site.hook].detach() for cache in caches)
            by_layer = []
            for layer in range(2):
                zero = torch.zeros_like(own, requires_grad=True)
                hooks = [(site.hook, lambda t, hook, e=zero: t + e)]
                hooks += [
                    (f"blocks.{layer}.hook_{name}", lambda t, hook: t.detach())
                    for name in ("attn_out", "mlp_out")
                ]
                with model.hooks(fwd_hooks=hooks):
                    logits = model(ids)[0, last]
                value = logits[int(rows.answer_ids[prompt][0])]
                value = value - logits[int(rows.wrong_ids[prompt][0])]
                (gradient,) = torch.autograd.grad(value, [zero], allow_unused=True)
                by_layer.append((other - own) * (0.0 if gradient is None else gradient))
            on_stream = site.part in ("embed", "resid_pre", "resid_post")
            kept = [layer for layer in range(2) if on_stream or layer != site.layer]
            for index in range(1 if site.cut.kind == "node" else own.shape[site.index_axis]):
                number = None if site.cut.kind == "node" else index
                chosen = [
                    float((t if number is None else t.select(site.index_axis, index)).sum())
                    for t in by_layer
                ]
                mean = sum(abs(chosen[layer]) for layer in kept) / len(kept)
                label = str(pairs.component(site.cut.kind, site.layer, number, site.part))
                wanted = math.copysign(mean, first[label, prompt])
                assert ours[label, prompt] == pytest.approx(wanted, abs=allowed), label


def test_effects_that_cancel_are_seen_by_graddrop_and_not_by_first_order():
    e, one, bend = 3, 5, 4.0

    def planted(model):
        """Channel ``one`` is 1 at every token, channel ``e`` is 0 before block 0's neuron."""
        embedding, blocks = model.model.embed_tokens.weight, model.model.layers
        embedding[:, e], embedding[:, one] = 0.0, 1.0
        for block in blocks:
            block.self_attn.o_proj.weight.zero_()
            block.self_attn.o_proj.bias.zero_()
            for projection in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj):
                projection.weight.zero_()
        # silu(bend x) * 1 has slope bend / 2 at 0: channel e loses what it gained, at first
        neuron = blocks[1].mlp
        neuron.gate_proj.weight[0, e], neuron.up_proj.weight[0, one] = bend, 1.0
        neuron.down_proj.weight[e, 0] = -2.0 / bend

    def tuned(model):
        planted(model)
        writer = model.model.layers[0].mlp
        writer.gate_proj.weight[4, one], writer.up_proj.weight[4, one] = 1.0, 1.0
        writer.down_proj.weight[e, 4] = 1.0

    hooked = toy(tuned, layers=3)
    with torch.no_grad():
        planted(hooked.base.model.original_model)
    rows = batch(lengths=(4, 3))
    how = {"parts": ("mlp_out",)}
    wanted = exact(hooked, rows, [pairs.component("node", 0, None, "mlp_out")])
    first = attributed(hooked, rows, "first_order", **how)
    ours = attributed(hooked, rows, "atp_star", **how)
    assert max(map(abs, wanted.values())) > 0.05
    for key, value in wanted.items():
        assert abs(first[key]) < 1e-3 * abs(value) + 1e-6
        assert abs(ours[key]) > 0.3 * abs(value)
    # of the two layers after it one takes all away and one nothing: half of the direct effect
    width = float(hooked.tuned.model.run_with_cache(rows.ids)[1]["blocks.0.hook_mlp_out"][0, 0, e])
    unembed = hooked.base.model.original_model.lm_head.weight[:, e].detach()
    for prompt in range(2):
        direct = unembed[rows.answer_ids[prompt][0]] - unembed[rows.wrong_ids[prompt][0]]
        expected = abs(float(direct) * width) / 2
        assert abs(ours["L0.mlp_out", prompt]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["qk_fix", "atp_star"])
def test_padding_and_the_other_prompts_change_nothing(estimator):
    hooked, parts = pairs.hooked_pair("llama"), ("q", "k", "z", "post", "mlp_out", "embed")
    found = {side: attributed(hooked, batch(side=side), estimator, parts=parts) for side in SIDES}
    allowed = 1e-4 * max(map(abs, found["right"].values()))
    assert found["right"].keys() == found["left"].keys()
    for key, value in found["right"].items():
        assert found["left"][key] == pytest.approx(value, abs=allowed), key
    for prompt in range(3):
        alone = attributed(hooked, batch().rows([prompt]), estimator, parts=parts)
        for key, value in alone.items():
            assert found["right"][key] == pytest.approx(value, abs=allowed), key


SIDES = ("right", "left")


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_positions_sit_at_their_tokens_on_either_side(side):
    from tvlens.attribution.activations import activation_scores
    from tvlens.attribution.directions import question

    hooked = pairs.hooked_pair("llama")
    asked, rows = question(hooked, metric(), "tuned_into_base"), batch(side=side)
    how = {"parts": ("q", "k", "z"), "by_position": True}
    found = activation_scores(asked, rows, estimator="qk_fix", **how)
    for prompt in range(len(rows)):
        alone = activation_scores(asked, batch().rows([prompt]), estimator="qk_fix", **how)
        length = int(rows.lengths[prompt])
        for cut, placed in alone.positions.items():
            ours = found.positions[cut][prompt]
            torch.testing.assert_close(ours[:length], placed[0], rtol=1e-3, atol=1e-6)
            assert not ours[length:].any()
        for part in ("q", "z"):
            cut = _cut(part)
            torch.testing.assert_close(
                found.positions[cut].sum(1), found.values[cut], rtol=1e-4, atol=1e-6
            )


class Stop(Exception):
    pass


def _stops(*arguments, **named):
    raise Stop


@pytest.mark.parametrize("where", ["nowhere", "metric", "hook", "attention"])
def test_models_are_left_as_found(where):
    from tests.test_attribution_activations import state
    from tvlens.attribution.activations import attribute_activations
    from tvlens.models import Metric

    hooked, rows = pairs.hooked_pair("llama"), batch()
    ask = Metric("stops", "nats", "higher", _stops) if where == "metric" else metric()
    names = {"hook": "blocks.1.hook_mlp_out", "attention": "blocks.1.attn.hook_attn_scores"}
    breaks = [(names[where], _stops)] if where in names else []
    with torch.no_grad():
        hooked.base(rows.ids, rows.mask)  # transformers adds a hook of its own in a first pass
        before = state(hooked)
        modules = [
            len(m._forward_pre_hooks) + len(m._forward_hooks) for m in hooked.base.model.modules()
        ]

        def run():
            return attribute_activations(
                hooked, rows, ask, parts=("q", "k", "z"), estimator="atp_star", **GIVEN
            )

        with hooked.base.hooks(fwd=breaks):
            if where == "nowhere":
                run()
            else:
                with pytest.raises(Stop):
                    run()
        assert state(hooked) == before
        assert modules == [
            len(m._forward_pre_hooks) + len(m._forward_hooks) for m in hooked.base.model.modules()
        ]


@pytest.mark.slow
def test_the_rows_name_their_estimator():
    from tvlens.attribution.activations import attribute_activations

    hooked, rows = pairs.hooked_pair("llama"), batch()
    for direction, within in (
        ("tuned_into_base", "cross_model"),
        ("clean_into_corrupt", "activation"),
    ):
        for estimator in ("qk_fix", "atp_star"):
            table = attribute_activations(
                hooked, rows, metric(), parts=("q", "k"), estimator=estimator, direction=direction
            )
            frame = table.to_frame()
            assert set(frame["method"]) == {f"{within}_{estimator}"}
            assert set(frame["estimator"]) == {estimator}
            assert set(frame["kind"]) == {"head", "kv_head"}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "neox"])
@pytest.mark.parametrize("side", SIDES)
def test_attention_run_alone_repeats_the_pass(family, side):
    from tvlens.models.attention import PATTERN, SCORES, recorded

    hooked, rows, kept = pairs.hooked_pair(family), batch(side=side), {}
    names = [name.format(layer) for name in (SCORES, PATTERN) for layer in (0, 1)]
    hooks = [(name, lambda t, hook, n=name: kept.__setitem__(n, t)) for name in names]
    with torch.no_grad(), hooked.base.hooks(fwd=hooks):
        hooked.base(rows.ids, rows.mask)
    found = recorded(hooked.base, rows.ids, rows.mask, (0, 1))
    for layer in (0, 1):
        again = found.again(layer)
        for name, ours in ((SCORES, again.scores), (PATTERN, again.pattern)):
            assert torch.equal(ours, kept[name.format(layer)]), name
        real = rows.mask.bool()[:, None, :, None].expand_as(again.pattern)
        torch.testing.assert_close(again.scores.softmax(-1)[real], again.pattern[real])


def test_attention_that_does_not_repeat_itself_is_refused():
    from tvlens.errors import HostError
    from tvlens.models.attention import recorded

    hooked, rows, calls = pairs.hooked_pair("llama"), batch(), []

    def drifting(t, hook):
        calls.append(1)
        return t + len(calls) * torch.arange(t.shape[-1])

    with (
        hooked.base.hooks(fwd=[("blocks.1.attn.hook_attn_scores", drifting)]),
        pytest.raises(HostError, match="alone"),
    ):
        recorded(hooked.base, rows.ids, rows.mask, (0, 1))
