"""Gradients along the inputs: completeness, plain autograd, what first order cannot see."""

import pytest
import torch

from . import attribution_pairs as pairs
from .test_attribution_nodes import batch, metric

WITHIN = ("clean_into_corrupt", "corrupt_into_clean")
FAMILIES = ("llama", "gemma2", "gpt2", "neox")


def asked(hooked, direction, **how):
    from tvlens.attribution.directions import question

    return question(hooked, how.pop("metric", metric()), direction, **how)


def scored(hooked, rows, direction, **how):
    from tvlens.attribution.activations import activation_scores

    return activation_scores(asked(hooked, direction), rows, estimator="ig_inputs", **how)


def change(hooked, rows):
    """metric on the prompts minus metric on their corrupt prompts."""
    patch = asked(hooked, "corrupt_into_clean").patch(rows, {})
    with torch.no_grad():
        clean, corrupt = (
            patch.reading.value(patch.reading.logits(hooked.tuned, ids)).double()
            for ids in (patch.receiver_ids, patch.donor_ids)
        )
    return clean - corrupt


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("direction", WITHIN)
def test_scores_of_tokens_sum_to_the_change_of_the_metric(family, direction):
    from tvlens.attribution.nodes import EMBEDDING

    hooked, rows = pairs.hooked_pair(family), batch()
    found = scored(hooked, rows, direction, parts=("embed",), by_position=True)
    whole, expected = found.values[EMBEDDING].flatten(1).sum(1), change(hooked, rows)
    gap = torch.tensor(found.run.gap)
    torch.testing.assert_close(whole.double() + gap, expected, rtol=0, atol=2e-5)
    assert found.run.nodes in (8, 16, 32, 64)
    size = float(expected.abs().mean())
    assert found.run.status == "ok"
    assert float(gap.abs().mean()) <= (0.01 if found.run.nodes < 64 else 0.1) * size
    placed = found.positions[EMBEDDING].double().sum(1).flatten(1).sum(1)
    torch.testing.assert_close(placed, whole.double(), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_scores_are_those_of_a_slow_integral_in_plain_autograd():
    """transformers alone: embeddings in, gradients at z and MLP outputs, 2,000 midpoints."""
    from tvlens.attribution.input_lines import ig_inputs
    from tvlens.attribution.nodes import activation_sites

    hooked, rows = pairs.hooked_pair("llama"), batch(lengths=(5,))
    sites = activation_sites(hooked.tuned, ("embed", "z", "mlp_out"))
    patch = asked(hooked, "clean_into_corrupt").patch(rows, {})
    found = {hook: score[0] for hook, score in ig_inputs(patch, sites, nodes=100).items()}
    slow = _slow_integral(rows.ids, rows.corrupted().ids, rows.answer_ids[0], rows.wrong_ids[0])
    assert slow.keys() == found.keys()
    for hook, product in slow.items():
        by_head = product.unflatten(-1, (4, 8)).sum((0, 2)) if "hook_z" in hook else None
        expected = product.sum()[None] if by_head is None else by_head
        torch.testing.assert_close(found[hook], expected, rtol=5e-4, atol=2e-5)


def _slow_integral(ids, corrupt, answers, wrongs, points=2_000):
    """(clean - corrupt) * mean gradient on the way, [pos, width] by hook."""
    model = pairs.hf_model("llama")
    pairs.noised(model)
    table, seen = model.model.embed_tokens.weight.detach(), {}

    def keep(name, tensor):
        seen[name] = tensor
        if tensor.requires_grad:
            tensor.retain_grad()

    for number, layer in enumerate(model.model.layers):
        z, mlp = (f"blocks.{number}.{name}" for name in ("attn.hook_z", "hook_mlp_out"))
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a, z=z: keep(z, a[0]))
        layer.mlp.register_forward_hook(lambda m, a, out, mlp=mlp: keep(mlp, out))
    ends = []
    for tokens in (ids, corrupt):
        with torch.no_grad():
            model(tokens)
        ends.append({**{n: t.detach() for n, t in seen.items()}, "hook_embed": table[tokens]})
    clean, start = ends
    ways, total = {name: (clean[name] - start[name])[0] for name in clean}, {}
    for first in range(0, points, 100):
        s = (torch.arange(first, first + 100) + 0.5) / points
        moved = start["hook_embed"] + s[:, None, None] * ways["hook_embed"]
        keep("hook_embed", moved.requires_grad_(True))
        logits = model(inputs_embeds=moved).logits[:, 4]
        (logits[:, int(answers[0])] - logits[:, int(wrongs[0])]).sum().backward()
        for name, tensor in seen.items():
            total[name] = total.get(name, 0.0) + tensor.grad.sum(0) / points
    return {name: ways[name] * gradient for name, gradient in total.items()}


@pytest.mark.slow
def test_edges_along_inputs_sum_to_the_scores_of_their_sources():
    from tvlens.attribution.edges import edge_scores

    hooked, rows = pairs.hooked_pair("llama"), batch()
    nodes = scored(hooked, rows, "clean_into_corrupt", parts=("embed", "z", "mlp_out"))
    edges = edge_scores(
        asked(hooked, "clean_into_corrupt"), rows, estimator="ig_inputs"
    )  # fmt: skip
    assert (edges.run.nodes, edges.run.status) == (nodes.run.nodes, nodes.run.status)
    by_part = {cut.part: values for cut, values in nodes.values.items()}
    out, allowed = edges.values.sum(2), 1e-4 * float(edges.values.abs().max())
    for place, source in enumerate(edges.graph.sources):
        part = {"result": "z"}.get(source.part, source.part)
        if part in by_part:
            expected = by_part[part][:, source.layer or 0, source.index or 0].double()
            torch.testing.assert_close(out[:, place], expected, rtol=0, atol=allowed)


@pytest.mark.slow
def test_an_effect_hidden_by_saturation_is_seen_along_the_way():
    """A metric that is flat where the gradient is taken and not on the way to the other prompt."""
    from tvlens.attribution.activations import activation_scores
    from tvlens.attribution.nodes import EMBEDDING
    from tvlens.models import Metric

    hooked, rows = pairs.hooked_pair("llama"), batch(lengths=(6, 7))
    plain = metric()
    ends = change(hooked, rows)
    patch = asked(hooked, "clean_into_corrupt").patch(rows, {})
    with torch.no_grad():
        corrupt = patch.reading.value(patch.reading.logits(hooked.tuned, patch.receiver_ids))
    middle = corrupt + ends.float() / 2

    def steep(run, cut):
        rows_here = slice(None) if len(run.logits) == 2 else slice(0, len(run.logits))
        away = (plain(run, cut) - middle[rows_here]) / ends.float().abs()[rows_here]
        return torch.sigmoid(40 * away) * ends.sign()[rows_here]

    saturated = Metric("steep", "", "higher", steep, needs=plain.needs, answers_only=True)
    question = asked(hooked, "clean_into_corrupt", metric=saturated)
    first, along = (
        activation_scores(question, rows, parts=("embed",), estimator=estimator)
        for estimator in ("first_order", "ig_inputs")
    )
    assert first.values[EMBEDDING].abs().max() < 1e-2
    torch.testing.assert_close(
        along.values[EMBEDDING].flatten(1).sum(1).double() + torch.tensor(along.run.gap),
        torch.ones(2, dtype=torch.float64),
        rtol=0,
        atol=1e-3,
    )


@pytest.mark.slow
def test_equal_prompts_have_no_scores_and_directions_of_one_prompt_no_line():
    from tvlens.attribution.activations import activation_scores
    from tvlens.attribution.nodes import EMBEDDING
    from tvlens.errors import HostError
    from tvlens.models.prompts import Batch

    hooked, ids = pairs.hooked_pair("llama"), [[3, 4, 5], [6, 7, 8]]
    rows = Batch.of_ids(ids, answers=[[7], [9]], wrongs=[[8], [2]], corrupts=ids)
    found = scored(hooked, rows, "clean_into_corrupt")
    assert not any(bool(values.any()) for values in found.values.values())
    assert not found.values[EMBEDDING].any()
    for direction in ("tuned_into_base", "zero_ablation", "mean_ablation"):
        with pytest.raises(HostError, match="no line between its inputs"):
            activation_scores(asked(hooked, direction), rows, estimator="ig_inputs")


@pytest.mark.slow
def test_the_rows_say_how_well_the_line_was_integrated():
    import tvlens as tv

    hooked, rows = pairs.hooked_pair("llama"), batch()
    frame = tv.attribute(
        hooked,
        rows,
        "logit_diff",
        space="activation",
        direction="clean_into_corrupt",
        estimator="ig_inputs",
    ).to_frame()
    assert set(frame["method"]) == {"activation_ig_inputs"}
    by_prompt = frame[frame["prompt"].notna()]
    assert by_prompt["nodes"].nunique() == 1
    gaps = by_prompt.groupby("prompt")["gap"].unique()
    embed = by_prompt[by_prompt["component"] == "embed"].set_index("prompt")["score"]
    expected = change(hooked, rows)
    for prompt in range(3):
        assert embed[prompt] + gaps[prompt].item() == pytest.approx(
            float(expected[prompt]), abs=2e-5
        )


@pytest.mark.slow
def test_models_are_left_as_found():
    from .test_attribution_activations import state

    hooked = pairs.hooked_pair("llama")
    before = state(hooked)
    scored(hooked, batch(), "clean_into_corrupt", by_position=True)
    assert state(hooked) == before
