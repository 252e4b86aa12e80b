"""Every activation in every family: finite differences, the host's own patching, slow loops."""

import pytest
import torch

from . import attribution_pairs as pairs

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
    "gpt2",
    "neox",
)


def batch(*, side="right", lengths=(6, 4, 7)):
    from tvlens.models.prompts import Batch

    generator = torch.Generator().manual_seed(3)

    def ids(count):
        return torch.randint(1, 40, (count,), generator=generator).tolist()

    return Batch.of_ids(
        [ids(n) for n in lengths],
        answers=[ids(2) for _ in lengths],
        wrongs=[ids(1) for _ in lengths],
        corrupts=[ids(n) for n in lengths],
        side=side,
    )


def double_pair(family, *, scale=0.02):
    """A pair in float64 throughout; the caller has made torch's float32 mean float64."""
    from tvlens.models.lens import LensModel, _bridge
    from tvlens.models.pair import HookedPair

    base, tuned = pairs.hf_model(family), pairs.hf_model(family)
    pairs.noised(tuned, scale=scale)
    return HookedPair.of(*(LensModel.wrap(_bridge(m.double(), family)) for m in (base, tuned)))


@pytest.fixture
def all_double(monkeypatch):
    """Norms and rotary phases of transformers go through float32, which no difference survives."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def scores(table):
    frame = table.to_frame().dropna(subset=["prompt"])
    return {
        (c, int(p)): s for c, p, s in zip(frame.component, frame.prompt, frame.score, strict=True)
    }


def metric():
    from tvlens.models import SHIPPED

    return SHIPPED["logit_diff"]


def every_activation(hooked, *, neurons=(3, 17)):
    """Components of every part, two neurons a block, and the whole tensors."""
    from tvlens.attribution.nodes import NODES, all_parts
    from tvlens.components import Component

    found = []
    for part in all_parts(hooked.base):
        cut, _ = NODES[part]
        counts = {"head": range(4), "kv_head": range(hooked.base.n_kv_heads), "neuron": neurons}
        for layer in range(2) if cut.layered else [None]:
            for index in counts.get(cut.kind, [None]):
                found.append(Component(cut.kind, layer, index, part))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_activations_score_is_the_finite_difference_in_double_precision(family, all_double):
    from tvlens.attribution.activations import attribute_activations
    from tvlens.attribution.nodes import all_parts, site_of

    hooked, rows = double_pair(family), batch(lengths=(5,))
    parts = all_parts(hooked.base)
    table = attribute_activations(
        hooked, rows, metric(), direction="tuned_into_base", parts=parts, neurons=None
    )
    ours, step = scores(table), 1e-4
    largest = {}
    for (label, _), score in ours.items():
        part = label.rpartition(".")[2]
        largest[part] = max(largest.get(part, 0.0), abs(score))
    answer, wrong = int(rows.answer_ids[0][0]), int(rows.wrong_ids[0][0])
    with torch.no_grad():
        own, other = (m.model.run_with_cache(rows.ids)[1] for m in (hooked.base, hooked.tuned))
    for component in every_activation(hooked):
        site = site_of(component, hooked.base)
        change = other[site.hook] - own[site.hook]
        if component.index is not None:
            keep = torch.zeros(change.shape[site.index_axis], dtype=change.dtype)
            keep[component.index] = 1.0
            change = change.movedim(site.index_axis, -1).mul(keep).movedim(-1, site.index_axis)
        ends = []
        for h in (step, -step):
            hook = (site.hook, lambda t, hook, h=h, c=change: t + h * c)
            with torch.no_grad(), hooked.base.model.hooks(fwd_hooks=[hook]):
                logits = hooked.base.model(rows.ids)[0, 4]
            ends.append(logits[answer] - logits[wrong])
        slope = float((ends[0] - ends[1]) / (2 * step))
        allowed = 1e-6 * largest[component.part]  # the step's error is quadratic
        assert abs(slope) > 0, component
        assert ours[str(component), 0] == pytest.approx(slope, abs=allowed), component


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_patches_equal_the_hosts(family):
    from transformer_lens import patching

    from tvlens.attribution.activations import exact_activations

    hooked, rows = pairs.hooked_pair(family), batch(lengths=(5,))
    answer, wrong = int(rows.answer_ids[0][0]), int(rows.wrong_ids[0][0])
    asked = every_activation(hooked)
    ours = scores(exact_activations(hooked, rows, metric(), asked, direction="tuned_into_base"))
    cache = hooked.tuned.model.run_with_cache(rows.ids)[1]

    def value(logits):
        return logits[0, 4, answer] - logits[0, 4, wrong]

    with torch.no_grad():
        plain = float(value(hooked.base.model(rows.ids)))
        for part in ("q", "v", "k", "pattern"):
            patch = getattr(patching, f"get_act_patch_attn_head_{part}_all_pos")
            theirs = patch(hooked.base.model, rows.ids, cache, value) - plain
            letter = "K" if part in "kv" else "H"
            for layer, row in enumerate(theirs.tolist()):
                for head, effect in enumerate(row):
                    label = f"L{layer}{letter}{head}.{part}"
                    assert ours[label, 0] == pytest.approx(effect, abs=2e-5), label  # fp32 logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "direction"),
    [
        ("gpt2", "tuned_into_base"),
        ("llama", "base_into_tuned"),
        ("llama", "clean_into_corrupt"),
        ("llama", "corrupt_into_clean"),
    ],
)
def test_exact_patches_of_every_activation_equal_a_loop_over_prompts(family, direction):
    from tvlens.attribution.activations import exact_activations
    from tvlens.attribution.nodes import site_of

    hooked, rows = pairs.hooked_pair(family), batch(lengths=(6, 4))
    asked = every_activation(hooked, neurons=(5,))
    ours = scores(exact_activations(hooked, rows, metric(), asked, direction=direction))
    receiver = hooked.base if direction == "tuned_into_base" else hooked.tuned
    donor = hooked.base if direction == "base_into_tuned" else hooked.tuned
    for prompt in range(len(rows)):
        length, last = int(rows.lengths[prompt]), int(rows.prompt_lengths[prompt]) - 1
        clean, corrupt = rows.ids[prompt : prompt + 1, :length], rows.corrupt_ids[prompt][None]
        run = corrupt if direction == "clean_into_corrupt" else clean
        given = corrupt if direction == "corrupt_into_clean" else clean
        answer, wrong = int(rows.answer_ids[prompt][0]), int(rows.wrong_ids[prompt][0])
        cache = donor.model.run_with_cache(given)[1]
        with torch.no_grad():
            before = receiver.model(run)[0, last]
        for component in asked:
            site = site_of(component, receiver)

            def exchange(t, hook, site=site, index=component.index, cache=cache):
                new = cache[site.hook]
                if index is None:
                    return new
                t = t.clone()
                place = (slice(None),) * site.index_axis + (index,)
                t[place] = new[place]
                return t

            with torch.no_grad(), receiver.model.hooks(fwd_hooks=[(site.hook, exchange)]):
                moved = receiver.model(run)[0, last] - before
            expected = float(moved[answer] - moved[wrong])
            expected *= -1 if direction in ("base_into_tuned", "corrupt_into_clean") else 1
            assert ours[str(component), prompt] == pytest.approx(expected, abs=3e-5), component


def test_the_noising_and_denoising_signs_agree_where_the_model_is_linear_enough():
    from tvlens.attribution.activations import exact_activations
    from tvlens.components import Component

    hooked, rows = pairs.hooked_pair("llama"), batch()
    whole = [Component("node", None, None, "embed")]
    found = [
        scores(exact_activations(hooked, rows, metric(), whole, direction=direction))
        for direction in ("clean_into_corrupt", "corrupt_into_clean")
    ]
    # the embedding carries the whole prompt, so both ends are the same two runs
    for key, value in found[0].items():
        assert found[1][key] == pytest.approx(value, abs=3e-5)
        assert abs(value) > 1e-3


def test_a_whole_tensor_is_all_its_heads_at_once():
    from tvlens.attribution.activations import exact_activations
    from tvlens.components import Component

    hooked, rows = pairs.hooked_pair("gpt2"), batch()
    asked = [Component("node", 1, None, "z"), Component("node", 1, None, "attn_out")]
    ours = scores(exact_activations(hooked, rows, metric(), asked, direction="tuned_into_base"))
    hook = "blocks.1.attn.hook_z"
    for prompt in range(len(rows)):
        ids = rows.ids[prompt : prompt + 1, : int(rows.lengths[prompt])]
        given = hooked.tuned.model.run_with_cache(ids)[1][hook]
        last = int(rows.prompt_lengths[prompt]) - 1
        with torch.no_grad():
            before = hooked.base.model(ids)[0, last]
            with hooked.base.model.hooks(fwd_hooks=[(hook, lambda t, hook, g=given: g)]):
                moved = hooked.base.model(ids)[0, last] - before
        expected = moved[int(rows.answer_ids[prompt][0])] - moved[int(rows.wrong_ids[prompt][0])]
        assert ours["L1.z", prompt] == pytest.approx(float(expected), abs=2e-5)
        assert ours["L1.attn_out", prompt] != ours["L1.z", prompt]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_left_and_right_padding_give_the_same_scores(family):
    from tvlens.attribution.activations import attribute_activations, exact_activations
    from tvlens.attribution.nodes import all_parts

    hooked = pairs.hooked_pair(family)
    parts, asked = all_parts(hooked.base), every_activation(hooked, neurons=(3,))[::4]
    for direction in ("tuned_into_base", "clean_into_corrupt"):
        estimates, exact = [], []
        for side in ("right", "left"):
            rows = batch(side=side)
            how = {"direction": direction}
            table = attribute_activations(hooked, rows, metric(), parts=parts, **how)
            estimates.append(scores(table))
            exact.append(scores(exact_activations(hooked, rows, metric(), asked, **how)))
        for right, left in (estimates, exact):
            allowed = 1e-4 * max(map(abs, right.values()))
            assert right.keys() == left.keys()
            for key, value in right.items():
                assert left[key] == pytest.approx(value, abs=allowed), key


@pytest.mark.slow
def test_a_prompt_scores_the_same_alone_as_in_a_batch_of_all_parts():
    from tvlens.attribution.activations import attribute_activations
    from tvlens.attribution.nodes import all_parts

    hooked, rows = pairs.hooked_pair("gemma2"), batch()
    how = {"direction": "tuned_into_base", "parts": all_parts(hooked.base), "neurons": None}
    together = scores(attribute_activations(hooked, rows, metric(), **how))
    allowed = 1e-5 * max(map(abs, together.values())) + 3e-6
    for prompt in range(len(rows)):
        alone = scores(attribute_activations(hooked, rows.rows([prompt]), metric(), **how))
        for key, value in alone.items():
            assert together[key] == pytest.approx(value, abs=allowed), key


def test_the_tables_name_parts_by_kind_and_keep_key_values_grouped():
    from tvlens.attribution.activations import attribute_activations

    hooked, rows = pairs.hooked_pair("llama"), batch()
    table = attribute_activations(
        hooked, rows, metric(), direction="tuned_into_base", parts=("q", "k", "v", "pattern", "pre")
    )
    frame = table.to_frame()
    assert set(map(tuple, frame[["kind", "part"]].drop_duplicates().to_numpy())) == {
        ("head", "q"),
        ("head", "pattern"),
        ("kv_head", "k"),
        ("kv_head", "v"),
        ("neuron", "pre"),
    }
    assert set(frame[frame.part == "k"].component) == {
        f"L{layer}K{head}.k" for layer in range(2) for head in range(2)
    }
    assert set(frame[(frame.part == "q") & (frame["index"] == 3)].kv_index) == {1}
    assert set(frame.site[frame.part == "pattern"]) == set(frame.site[frame.part == "q"])


def test_parts_that_a_model_lacks_are_refused_by_name():
    from tvlens.attribution.activations import attribute_activations, exact_activations
    from tvlens.attribution.nodes import all_parts
    from tvlens.components import Component
    from tvlens.errors import HostError

    hooked, rows = pairs.hooked_pair("gpt2"), batch()
    assert "pre_linear" not in all_parts(hooked.base)
    for part, said in (("pre_linear", "pre_linear"), ("zz", "there are embed")):
        with pytest.raises(HostError, match=said):
            attribute_activations(
                hooked, rows, metric(), direction="tuned_into_base", parts=(part,)
            )
    grouped = pairs.hooked_pair("llama")
    for wrong in (
        Component("kv_head", 0, 2, "k"),
        Component("head", 0, 0, "k"),
        Component("node", 0, 1, "resid_pre"),
        Component("node", 0, None, "embed"),
    ):
        with pytest.raises(HostError, match=str(wrong)):
            exact_activations(grouped, rows, metric(), [wrong], direction="tuned_into_base")


def _mean_of_real_tokens(model, rows, hook):
    found = [
        model.run_with_cache(rows.ids[p : p + 1, : int(rows.lengths[p])])[1][hook][0]
        for p in range(len(rows))
    ]
    return torch.cat(found).mean(0)


@pytest.mark.parametrize("direction", ["zero_ablation", "mean_ablation"])
@pytest.mark.parametrize("part", ["z", "post", "k", "resid_post"])
def test_an_ablation_takes_the_activation_away_at_every_place(part, direction):
    from tvlens.attribution.activations import attribute_activations, exact_activations
    from tvlens.attribution.nodes import NODES
    from tvlens.components import Component

    hooked, rows = pairs.hooked_pair("llama"), batch()
    cut, name = NODES[part]
    index = None if cut.kind == "node" else 1
    component, hook = Component(cut.kind, 1, index, part), name.format(1)
    asked = {"direction": direction, "at": "tuned"}
    exact = scores(exact_activations(hooked, rows, metric(), [component], **asked))
    table = attribute_activations(hooked, rows, metric(), parts=(part,), neurons=None, **asked)
    first, model = scores(table), hooked.tuned.model
    given = _mean_of_real_tokens(model, rows, hook).detach()
    given = given * (direction == "mean_ablation")
    for prompt in range(len(rows)):
        ids = rows.ids[prompt : prompt + 1, : int(rows.lengths[prompt])]
        last = int(rows.prompt_lengths[prompt]) - 1
        answer, wrong = int(rows.answer_ids[prompt][0]), int(rows.wrong_ids[prompt][0])
        seen = []

        def ablate(t, hook, keep=None):
            new = t.clone()
            place = ... if index is None else (..., index, slice(None))
            place = (..., index) if cut.kind == "neuron" else place
            new[place] = given.expand_as(t)[place]
            return new

        def watch(t, hook, seen=seen):
            seen.append(t.detach().requires_grad_())
            return seen[0]

        with model.hooks(fwd_hooks=[(hook, watch)]):
            logits = model(ids)[0, last]
        before = logits[answer] - logits[wrong]
        (gradient,) = torch.autograd.grad(before, seen[0])
        with torch.no_grad(), model.hooks(fwd_hooks=[(hook, ablate)]):
            logits = model(ids)[0, last]
        key = (str(component), prompt)
        assert exact[key] == pytest.approx(
            float(before.detach() - logits[answer] + logits[wrong]), abs=3e-5
        )
        change = ablate(seen[0].detach(), None) - seen[0].detach()
        assert first[key] == pytest.approx(-float((change * gradient).sum()), abs=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_by_position_sum_to_the_score_and_sit_at_their_token(side):
    from tvlens.attribution.activations import activation_scores
    from tvlens.attribution.directions import question
    from tvlens.attribution.nodes import NODES

    hooked, rows = pairs.hooked_pair("llama"), batch(side=side)
    asked = question(hooked, metric(), "tuned_into_base")
    parts = ("z", "post", "mlp_out")
    found = activation_scores(asked, rows, parts=parts, by_position=True)
    for cut, values in found.values.items():
        summed = found.positions[cut].sum(1, dtype=values.dtype)
        torch.testing.assert_close(summed, values, rtol=1e-5, atol=1e-6)
    hook, one = NODES["mlp_out"][1].format(0), NODES["mlp_out"][0]
    for prompt in range(len(rows)):
        ids = rows.ids[prompt][rows.mask[prompt].bool()][None]
        last = int(rows.prompt_lengths[prompt]) - 1
        seen = []

        def watch(t, hook, seen=seen):
            seen.append(t.detach().requires_grad_())
            return seen[0]

        with hooked.base.model.hooks(fwd_hooks=[(hook, watch)]):
            logits = hooked.base.model(ids)[0, last]
        reached = logits[int(rows.answer_ids[prompt][0])] - logits[int(rows.wrong_ids[prompt][0])]
        (gradient,) = torch.autograd.grad(reached, seen[0])
        other = hooked.tuned.model.run_with_cache(ids)[1][hook].detach()
        expected = ((other - seen[0].detach()) * gradient).sum(-1)[0]
        ours = found.positions[one][prompt, :, 0, 0]
        torch.testing.assert_close(ours[: ids.shape[1]], expected, rtol=1e-4, atol=1e-6)
        assert not ours[ids.shape[1] :].any()
