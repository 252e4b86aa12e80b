"""Exact patches at one position, and of keys and values in isolation, against plain hooks."""

import pytest
import torch

from . import attribution_pairs as pairs
from .test_attribution_nodes import batch, scores

PLACES = {
    "z": "blocks.{}.attn.hook_z",
    "q": "blocks.{}.attn.hook_q",
    "k": "blocks.{}.attn.hook_k",
    "v": "blocks.{}.attn.hook_v",
    "post": "blocks.{}.mlp.hook_post",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "resid_pre": "blocks.{}.hook_resid_pre",
}


def logprob():
    from tvlens.models import SHIPPED

    return SHIPPED["logprob"]


def alone(rows, prompt):
    """One prompt's own tokens, prompt and answer, as a batch of one without padding."""
    return rows.ids[prompt][rows.mask[prompt].bool()][None]


def log_p(model, rows, prompt, hooks=()):
    """The log-probability of a prompt's answer under plain hooks of the host."""
    ids, answer = alone(rows, prompt), rows.answer_ids[prompt].tolist()
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        chances = model(ids)[0].log_softmax(-1)
    first = int(rows.prompt_lengths[prompt]) - 1
    return sum(float(chances[first + i, token]) for i, token in enumerate(answer))


def ends(hooked, direction):
    """Receiver, donor and sign."""
    models = (hooked.base.model, hooked.tuned.model)
    return (*models, 1) if direction == "tuned_into_base" else (*models[::-1], -1)


def put(name, given, *, index=None, places=slice(None)):
    """A hook that puts ``given`` in at some positions, of one head or neuron or of all."""

    def exchange(t, hook):
        t = t.clone()
        where = (slice(None), places) if index is None else (slice(None), places, index)
        t[where] = given[where]
        return t

    return name, exchange


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "kind", "index", "direction", "side"),
    [
        ("z", "head", 2, "tuned_into_base", "right"),
        ("k", "kv_head", 1, "tuned_into_base", "left"),
        ("v", "kv_head", 0, "base_into_tuned", "right"),
        ("post", "neuron", 5, "base_into_tuned", "left"),
        ("resid_pre", "node", None, "base_into_tuned", "left"),
    ],
)
def test_one_position_is_exchanged_at_a_time(part, kind, index, direction, side):
    from tvlens.attribution.directions import question
    from tvlens.attribution.patching import exact_positions

    hooked = pairs.hooked_pair("llama", lambda model: pairs.noised(model, scale=0.2))
    rows, layer = batch(side=side), 0
    component = pairs.component(kind, layer, index, part)
    asked = question(hooked, logprob(), direction)
    found = exact_positions(asked, rows, component, rows_at_once=2)
    assert found.shape == (3, int(rows.lengths.max()))
    receiver, donor, sign = ends(hooked, direction)
    name, seen = PLACES[part].format(layer), []
    for prompt in range(len(rows)):
        ids = alone(rows, prompt)
        given = donor.run_with_cache(ids)[1][name].detach()
        plain = log_p(receiver, rows, prompt)
        for place in range(ids.shape[1]):
            hooks = [put(name, given, index=index, places=place)]
            wanted = sign * (log_p(receiver, rows, prompt, hooks) - plain)
            assert float(found[prompt, place]) == pytest.approx(wanted, abs=3e-5), place
            seen.append(abs(wanted))
        assert not found[prompt, ids.shape[1] :].any()
    assert max(seen) > 1e-3


def test_positions_of_a_corrupt_prompt_are_its_own():
    from tvlens.attribution.directions import question
    from tvlens.attribution.patching import exact_positions

    hooked, rows = pairs.hooked_pair("gpt2"), batch()
    asked = question(hooked, logprob(), "clean_into_corrupt", at="base")
    found = exact_positions(asked, rows, pairs.component("node", 1, None, "resid_pre"))
    model, name = hooked.base.model, PLACES["resid_pre"].format(1)
    corrupted = rows.corrupted()
    for prompt in range(len(rows)):
        given = model.run_with_cache(alone(rows, prompt))[1][name].detach()
        plain = log_p(model, corrupted, prompt)
        for place in range(given.shape[1]):
            wanted = log_p(model, corrupted, prompt, [put(name, given, places=place)]) - plain
            assert float(found[prompt, place]) == pytest.approx(wanted, abs=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "direction", "side"),
    [
        ("llama", "tuned_into_base", "right"),
        ("llama", "base_into_tuned", "left"),
        ("gpt2", "tuned_into_base", "left"),
    ],
)
def test_an_isolated_key_or_value_counts_where_the_answer_reads_it_alone(family, direction, side):
    """Plain hooks: the key or value exchanged, its readers' outputs put back elsewhere."""
    from tvlens.attribution.activations import exact_activations

    hooked = pairs.hooked_pair(family, lambda model: pairs.noised(model, scale=0.2))
    rows, share = batch(side=side, lengths=(6, 4)), 2 if family == "llama" else 1
    asked = [pairs.component("kv_head", i, n, p) for i in (0, 1) for n in (0, 1) for p in "kv"]
    how = {"direction": direction}
    ours = scores(exact_activations(hooked, rows, logprob(), asked, isolated=True, **how))
    joint = scores(exact_activations(hooked, rows, logprob(), asked, **how))
    receiver, donor, sign = ends(hooked, direction)
    for prompt in range(len(rows)):
        ids, length = alone(rows, prompt), int(rows.prompt_lengths[prompt])
        own, other = (m.run_with_cache(ids)[1] for m in (receiver, donor))
        # the last place reads for no scored token
        elsewhere = [p for p in range(ids.shape[1]) if p < length - 1 or p == ids.shape[1] - 1]
        plain = log_p(receiver, rows, prompt)
        for component in asked:
            name = PLACES[component.part].format(component.layer)
            z, first = PLACES["z"].format(component.layer), component.index * share
            hooks = [put(name, other[name].detach(), index=component.index)]
            hooks += [
                put(z, own[z].detach(), index=head, places=elsewhere)
                for head in range(first, first + share)
            ]
            wanted = sign * (log_p(receiver, rows, prompt, hooks) - plain)
            assert ours[str(component), prompt] == pytest.approx(wanted, abs=3e-5), component
    largest = max(map(abs, joint.values()))
    assert max(abs(ours[key] - value) for key, value in joint.items()) > 0.05 * largest


def test_isolated_rows_have_a_method_of_their_own_and_only_keys_and_values_can_be():
    from tvlens.attribution.activations import exact_activations
    from tvlens.errors import HostError

    hooked, rows = pairs.hooked_pair("llama"), batch()
    key = pairs.component("kv_head", 1, 0, "k")
    how = {"direction": "tuned_into_base", "isolated": True}
    frame = exact_activations(hooked, rows, logprob(), [key], **how).to_frame()
    assert set(frame["method"]) == {"exact_activation_isolated"}
    assert set(frame["estimator"]) == {"exact"}
    for wrong in (pairs.component("head", 1, 0, "q"), pairs.component("node", 1, None, "v")):
        with pytest.raises(HostError, match="isolated"):
            exact_activations(hooked, rows, logprob(), [wrong], **how)
