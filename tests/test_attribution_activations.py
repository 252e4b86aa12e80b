"""Activation attribution: planted differences, TransformerLens's numbers, slow loops."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr, t

from tests.tiny_checkpoints import add_noise, copy_with, tiny_gpt2, tiny_llama
from tvlens.attribution.activations import (
    activation_scores,
    activation_sites,
    attribute_activations,
    exact_activations,
)
from tvlens.attribution.directions import question
from tvlens.components import Component
from tvlens.errors import HostError, MetricError, PromptError
from tvlens.models import SHIPPED, Batch, HookedPair, Metric, Run

LOGIT_DIFF = SHIPPED["logit_diff"]
CROSS = ("tuned_into_base", "base_into_tuned")
PROMPTS = [[0, 5, 6], [0, 7, 8, 9, 4, 11], [0, 12, 13, 14], [0, 3]]
ANSWERS = [[3], [14, 5], [9, 8, 7], [21]]
WRONGS = [[12], [3], [4, 4], [6]]
CORRUPTS = [[0, 9, 9], [0, 2, 8, 2, 4, 3], [0, 4, 13, 30], [0, 8]]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("a") / "base")


@pytest.fixture(scope="module")
def hooked(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> HookedPair:
    """Everything moved a little, so that first order is a good estimate."""
    tuned = copy_with(base_folder, tmp_path_factory.mktemp("a") / "tuned", add_noise(scale=0.01))
    return HookedPair((base_folder, tuned))


@pytest.fixture
def batch() -> Batch:
    return Batch.of_ids(PROMPTS, answers=ANSWERS, wrongs=WRONGS, corrupts=CORRUPTS)


def scores(table) -> dict[tuple[str, int], float]:
    frame = table.to_frame().dropna(subset=["prompt"])
    return {
        (c, int(p)): s for c, p, s in zip(frame.component, frame.prompt, frame.score, strict=True)
    }


def largest(values: dict[tuple[str, int], float]) -> float:
    return max(abs(v) for v in values.values())


def planted(base_folder: Path, folder: Path, edit) -> HookedPair:
    return HookedPair((base_folder, copy_with(base_folder, folder, edit)))


def state(hooked: HookedPair) -> list[object]:
    """All that a call could leave behind in the two models and in torch."""
    found: list[object] = [torch.is_grad_enabled()]
    for lens in (hooked.base, hooked.tuned):
        points = lens.model.hook_dict.values()
        found.append([len(p._forward_hooks) + len(p._backward_hooks) for p in points])
        found.append([m.training for m in lens.model.original_model.modules()])
        found.append([(p.requires_grad, p.grad is None) for p in lens.model.parameters()])
        found.append(torch.cat([p.detach().flatten() for p in lens.model.parameters()]).tolist())
    return found


@pytest.mark.slow
def test_node_scores_equal_those_of_transformerlens(hooked: HookedPair, batch: Batch) -> None:
    from transformer_lens.tools.analysis.attribution_patching import attribution_patch

    for prompt in range(len(batch)):
        alone = batch.rows([prompt])
        table = attribute_activations(hooked, alone, LOGIT_DIFF, direction="clean_into_corrupt")
        ours = scores(table)
        last, answer, wrong = len(PROMPTS[prompt]) - 1, ANSWERS[prompt][0], WRONGS[prompt][0]
        theirs = attribution_patch(
            hooked.tuned.model,
            alone.ids,
            alone.corrupt_ids[0][None],
            lambda logits, p=last, a=answer, w=wrong: logits[0, p, a] - logits[0, p, w],
        )
        summed: dict[str, float] = {}
        for node, score in theirs.node_scores.items():
            label = {"embed": "embed", "mlp_out": f"L{node.layer}.mlp_out"}.get(
                node.kind, f"L{node.layer}H{node.head}.z"
            )
            summed[label] = summed.get(label, 0.0) + score
        assert len(summed) == 1 + 2 * (4 + 1)
        # fp32 sums over positions in another order
        allowed = 1e-6 * max(map(abs, summed.values()))
        for label, score in summed.items():
            assert ours[label, prompt] == pytest.approx(score, abs=allowed), label


@pytest.mark.slow
@pytest.mark.parametrize("direction", CROSS)
def test_scores_equal_gradients_of_a_leaf_added_at_each_activation(
    hooked: HookedPair, batch: Batch, direction: str
) -> None:
    ours = scores(
        attribute_activations(hooked, batch, LOGIT_DIFF, direction=direction, neurons=None)
    )
    models = (hooked.base, hooked.tuned)
    receiver = models[direction == "base_into_tuned"]
    allowed = 1e-5 * largest(ours)  # fp32 sums in another order
    for prompt in range(len(batch)):
        alone = batch.rows([prompt])
        for site in activation_sites(hooked.base):
            acts = []
            for lens in models:
                _, cache = lens.model.run_with_cache(alone.ids)
                acts.append(cache[site.hook].detach())
            leaf = torch.zeros_like(acts[0]).requires_grad_(True)
            with receiver.model.hooks(fwd_hooks=[(site.hook, lambda t, hook, e=leaf: t + e)]):
                logits = receiver.model(alone.ids)[0, len(PROMPTS[prompt]) - 1]
            (logits[ANSWERS[prompt][0]] - logits[WRONGS[prompt][0]]).backward()
            receiver.model.zero_grad()
            product = (acts[1] - acts[0]) * leaf.grad
            values = product.sum((0, 1)) if site.cut.kind == "neuron" else product.sum((0, 1, -1))
            for index, value in enumerate(values.reshape(-1).tolist()):
                number = index if site.cut.kind in ("head", "neuron") else None
                label = str(Component(site.cut.kind, site.layer, number, site.cut.part))
                assert ours[label, prompt] == pytest.approx(value, abs=allowed), label


@pytest.mark.slow
def test_scores_equal_finite_differences_in_double_precision(tmp_path: Path) -> None:
    base = tiny_gpt2(tmp_path / "base")
    tuned = copy_with(base, tmp_path / "tuned", add_noise())
    pair = HookedPair((base, tuned), dtype=torch.float64)
    batch = Batch.of_ids(PROMPTS[1:2], answers=ANSWERS[1:2])
    metric = SHIPPED["logprob"]
    ours = scores(attribute_activations(pair, batch, metric, direction="tuned_into_base"))
    step = 1e-4
    allowed = 1e-6 * largest(ours)  # GPT-2 is double throughout; the step's error is quadratic
    for site in activation_sites(pair.base):
        if site.cut.kind == "neuron":
            continue
        acts = [
            m.model.run_with_cache(batch.ids)[1][site.hook].detach()
            for m in (pair.base, pair.tuned)
        ]
        for index in range(4 if site.cut.kind == "head" else 1):
            change = torch.zeros_like(acts[0])
            chosen = (..., index, slice(None)) if site.cut.kind == "head" else (...,)
            change[chosen] = (acts[1] - acts[0])[chosen]
            ends = []
            for h in (step, -step):
                hook = (site.hook, lambda t, hook, h=h, c=change: t + h * c)
                with torch.no_grad(), pair.base.model.hooks(fwd_hooks=[hook]):
                    logits = pair.base.model(batch.ids).log_softmax(-1)[0]
                ends.append(logits[5, 14] + logits[6, 5])
            slope = float((ends[0] - ends[1]) / (2 * step))
            number = index if site.cut.kind == "head" else None
            label = str(Component(site.cut.kind, site.layer, number, site.cut.part))
            assert ours[label, 0] == pytest.approx(slope, abs=allowed), label


@pytest.mark.slow
def test_a_changed_value_head_is_seen_in_the_query_heads_that_read_it_alone(
    base_folder: Path, tmp_path: Path, batch: Batch
) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.v_proj.weight"][8:] += 0.2  # kv head 1 of width 8

    pair = planted(base_folder, tmp_path / "tuned", edit)
    for direction in CROSS:
        frame = attribute_activations(pair, batch, LOGIT_DIFF, direction=direction).to_frame()
        moved = frame[frame.score != 0]
        heads = moved[moved.kind == "head"]
        assert set(heads.component) == {"L1H2.z", "L1H3.z"}
        assert set(heads.kv_index) == {1}
        assert set(moved[moved.kind == "node"].component) == {"L1.attn_out", "L1.mlp_out"}
        assert (moved[moved.kind == "neuron"].layer == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("direction", CROSS)
def test_the_exact_score_of_the_only_changed_neuron_is_the_change_of_the_metric(
    base_folder: Path, tmp_path: Path, batch: Batch, direction: str
) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.gate_proj.weight"][7] += 0.5

    pair = planted(base_folder, tmp_path / "tuned", edit)
    change = pair.values(pair.tuned, LOGIT_DIFF, batch) - pair.values(pair.base, LOGIT_DIFF, batch)
    assert change.abs().min() > 1e-3
    asked = [Component("neuron", 1, 7), Component("neuron", 1, 8), Component("head", 1, 2, "z")]
    exact = scores(exact_activations(pair, batch, LOGIT_DIFF, asked, direction=direction))
    for prompt, expected in enumerate(change.tolist()):
        assert exact["L1N7.post", prompt] == pytest.approx(expected, abs=1e-5)  # fp32 logits
        assert exact["L1N8.post", prompt] == 0
        assert exact["L1H2.z", prompt] == 0
    estimate = attribute_activations(pair, batch, LOGIT_DIFF, direction=direction).to_frame()
    moved = estimate[(estimate.kind == "neuron") & (estimate.score != 0)]
    assert set(moved.component) == {"L1N7.post"}


@pytest.mark.slow
@pytest.mark.parametrize("direction", [*CROSS, "clean_into_corrupt"])
def test_exact_scores_equal_patching_one_prompt_and_one_component_at_a_time(
    hooked: HookedPair, batch: Batch, direction: str
) -> None:
    asked = [
        Component("head", 0, 1, "z"),
        Component("head", 1, 3, "z"),
        Component("neuron", 0, 40, "post"),
        Component("node", 1, None, "mlp_out"),
        Component("node", 0, None, "attn_out"),
        Component("node", None, None, "embed"),
    ]
    names = ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z", "blocks.0.mlp.hook_post"]
    names += ["blocks.1.hook_mlp_out", "blocks.0.hook_attn_out", "hook_embed"]
    ours = scores(exact_activations(hooked, batch, LOGIT_DIFF, asked, direction=direction))
    donor = hooked.base if direction == "base_into_tuned" else hooked.tuned
    receiver = hooked.base if direction == "tuned_into_base" else hooked.tuned
    for prompt in range(len(batch)):
        clean = torch.tensor([PROMPTS[prompt]])
        ids = torch.tensor([CORRUPTS[prompt]]) if direction == "clean_into_corrupt" else clean
        for component, name in zip(asked, names, strict=True):
            donated = donor.model.run_with_cache(clean)[1][name]

            def exchange(t, hook, c=component, d=donated):
                if c.index is None:
                    return d
                t = t.clone()
                t[:, :, c.index] = d[:, :, c.index]
                return t

            with torch.no_grad():
                before = receiver.model(ids)[0, -1]
                with receiver.model.hooks(fwd_hooks=[(name, exchange)]):
                    after = receiver.model(ids)[0, -1]
            moved = after - before if direction != "base_into_tuned" else before - after
            expected = float(moved[ANSWERS[prompt][0]] - moved[WRONGS[prompt][0]])
            assert ours[str(component), prompt] == pytest.approx(expected, abs=1e-5)  # fp32 logits


@pytest.mark.parametrize("direction", CROSS)
def test_first_order_agrees_with_exact_where_the_difference_is_small(
    hooked: HookedPair, batch: Batch, direction: str
) -> None:
    estimate = attribute_activations(hooked, batch, LOGIT_DIFF, direction=direction)
    heads = [Component("head", layer, head, "z") for layer in range(2) for head in range(4)]
    asked = [*heads, *(Component("neuron", i % 2, 3 * i, "post") for i in range(16))]
    exact = scores(exact_activations(hooked, batch, LOGIT_DIFF, asked, direction=direction))
    ours = scores(estimate)
    pairs = [(ours[key], value) for key, value in exact.items()]
    estimated, true = (torch.tensor(side) for side in zip(*pairs, strict=True))
    assert len(pairs) == 24 * len(batch)
    assert spearmanr(estimated, true).statistic > 0.98
    assert float(estimated @ true / (estimated @ estimated)) == pytest.approx(1, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("direction", [*CROSS, "clean_into_corrupt"])
@pytest.mark.parametrize("metric", ["logit_diff", "logprob", "kl_to_base"])
def test_a_prompt_scores_the_same_alone_as_in_a_batch(
    hooked: HookedPair, batch: Batch, direction: str, metric: str
) -> None:
    asked = [Component("head", 0, 1), Component("neuron", 1, 3), Component("head", 1, 0)]
    vanishes = (metric, direction) == ("kl_to_base", "tuned_into_base")
    for function in (
        (exact_activations,) if vanishes else (attribute_activations, exact_activations)
    ):
        more = (asked,) if function is exact_activations else ()
        together = scores(function(hooked, batch, SHIPPED[metric], *more, direction=direction))
        allowed = 1e-5 * largest(together) + 3e-6  # fp32 noise of another matmul shape
        for prompt in range(len(batch)):
            row = batch.rows([prompt])
            alone = scores(function(hooked, row, SHIPPED[metric], *more, direction=direction))
            for key, value in alone.items():
                assert together[key] == pytest.approx(value, abs=allowed), key


def test_scores_do_not_depend_on_how_many_prompts_run_at_once(
    hooked: HookedPair, batch: Batch
) -> None:
    asked = question(hooked, LOGIT_DIFF, CROSS[0])
    whole, split = (
        scores(activation_scores(asked, batch, rows_at_once=rows).table()) for rows in (16, 3)
    )
    assert whole.keys() == split.keys()
    for key, value in whole.items():
        assert split[key] == pytest.approx(value, abs=1e-5 * largest(whole))


def test_neurons_have_a_mean_over_prompts_and_rows_of_the_largest(
    hooked: HookedPair, batch: Batch
) -> None:
    table = attribute_activations(hooked, batch, LOGIT_DIFF, direction=CROSS[0], neurons=5)
    frame = table.where(kind="neuron").to_frame()
    means, rows = frame[frame.prompt.isna()], frame[frame.prompt.notna()]
    assert len(means) == 2 * 48
    assert set(means.nlargest(5, "mean_abs").component) <= set(rows.component)
    assert rows.component.nunique() == 5 + 64
    for name, group in rows.groupby("component"):
        mean = means[means.component == name].iloc[0]
        assert mean.score == pytest.approx(group.score.mean())
        assert mean.sd == pytest.approx(group.score.std())
        assert mean.mean_abs == pytest.approx(group.score.abs().mean())
        assert mean.ci_low < mean.score < mean.ci_high
        assert mean.n == len(group) == len(batch)
        half = t.ppf(0.975, len(batch) - 1) * mean.sd / len(batch) ** 0.5
        assert mean.ci_high - mean.score == pytest.approx(half)


@contextmanager
def mixed_flags(hooked: HookedPair) -> Iterator[None]:
    parameters = list(hooked.base.model.parameters())
    for parameter in parameters[::2]:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class Stop(Exception):
    pass


def _raises(run: Run, batch: Batch) -> torch.Tensor:
    raise Stop


@pytest.mark.parametrize("where", ["nowhere", "metric", "hook"])
@pytest.mark.parametrize("direction", [*CROSS, "clean_into_corrupt"])
def test_models_are_left_as_found(
    hooked: HookedPair, batch: Batch, direction: str, where: str
) -> None:
    metric = Metric("raises", "nats", "higher", _raises) if where == "metric" else LOGIT_DIFF
    asked = [Component("head", 0, 1), Component("node", 1, None, "mlp_out")]
    breaks = [("blocks.1.hook_mlp_out", _broken)] if where == "hook" else []
    with mixed_flags(hooked), torch.no_grad():
        before = state(hooked)
        for function, more in ((attribute_activations, ()), (exact_activations, (asked,))):
            with hooked.base.hooks(fwd=breaks), hooked.tuned.hooks(fwd=breaks):
                if where == "nowhere":
                    function(hooked, batch, metric, *more, direction=direction)
                else:
                    with pytest.raises(Stop):
                        function(hooked, batch, metric, *more, direction=direction)
            assert state(hooked) == before


def _broken(activation: torch.Tensor, hook: object) -> None:
    raise Stop


def test_a_callers_own_hooks_stay(hooked: HookedPair, batch: Batch) -> None:
    seen = []
    with hooked.base.hooks(fwd=[("blocks.0.attn.hook_z", lambda t, hook: seen.append(1))]):
        attribute_activations(hooked, batch, LOGIT_DIFF, direction=CROSS[0])
        count = len(seen)
        hooked.base(batch.ids, batch.mask)
        assert len(seen) == count + 1


def test_training_mode_and_inference_mode_are_refused(hooked: HookedPair, batch: Batch) -> None:
    hooked.base.model.original_model.train()
    try:
        with pytest.raises(HostError, match="training mode"):
            attribute_activations(hooked, batch, LOGIT_DIFF, direction=CROSS[0])
        with pytest.raises(HostError, match="training mode"):
            exact_activations(
                hooked, batch, LOGIT_DIFF, [Component("head", 0, 0)], direction=CROSS[0]
            )
    finally:
        hooked.base.model.original_model.eval()
    with torch.inference_mode(), pytest.raises(HostError, match="inference_mode"):
        attribute_activations(hooked, batch, LOGIT_DIFF, direction=CROSS[0])


def test_requests_that_cannot_be_met_are_refused_by_name(
    hooked: HookedPair, batch: Batch, base_folder: Path
) -> None:
    bare = Batch.of_ids(PROMPTS, answers=ANSWERS, wrongs=WRONGS)
    with pytest.raises(PromptError, match="corrupt"):
        attribute_activations(hooked, bare, LOGIT_DIFF, direction="clean_into_corrupt")
    with pytest.raises(HostError, match="cannot be taken at 'tuned'"):
        attribute_activations(hooked, batch, LOGIT_DIFF, direction=CROSS[0], at="tuned")
    for missing in (Component("head", 0, 4), Component("head", 2, 0), Component("matrix", 0)):
        with pytest.raises(HostError):
            exact_activations(hooked, batch, LOGIT_DIFF, [missing], direction=CROSS[0])
    flat = Metric("flat", "nats", "higher", lambda run, batch: torch.zeros(len(batch)))
    with pytest.raises(MetricError, match="flat"):
        attribute_activations(hooked, batch, flat, direction=CROSS[0])
    coarse = HookedPair((base_folder, base_folder), dtype=torch.bfloat16)
    with pytest.raises(HostError, match="float32"):
        exact_activations(coarse, batch, LOGIT_DIFF, [Component("head", 0, 0)], direction=CROSS[0])


@pytest.mark.parametrize(
    ("end", "direction", "at"),
    [
        ("base", "tuned_into_base", ""),
        ("tuned", "base_into_tuned", ""),
        ("base", "corrupt_into_clean", "base"),
        ("tuned", "zero_ablation", "tuned"),
    ],
)
def test_a_distance_to_the_very_run_that_is_differentiated_is_explained(
    hooked: HookedPair, batch: Batch, end: str, direction: str, at: str
) -> None:
    metric = SHIPPED[f"kl_to_{end}"]
    with pytest.raises(MetricError, match=f"distance to the {end} model.*gradient.*is zero"):
        attribute_activations(hooked, batch, metric, direction=direction, at=at)
    other = SHIPPED["kl_to_tuned" if end == "base" else "kl_to_base"]
    assert largest(scores(attribute_activations(hooked, batch, other, direction=direction, at=at)))
    exact = exact_activations(
        hooked, batch, metric, [Component("head", 0, 1)], direction=direction, at=at
    )
    assert largest(scores(exact)) > 0


def test_only_prompts_with_a_corrupt_are_patched_and_keep_their_numbers(hooked: HookedPair) -> None:
    some = Batch.of_ids(
        PROMPTS, answers=ANSWERS, wrongs=WRONGS, corrupts=[[], CORRUPTS[1], [], CORRUPTS[3]]
    )
    table = attribute_activations(hooked, some, LOGIT_DIFF, direction="clean_into_corrupt")
    assert set(table.to_frame().prompt.dropna()) == {1, 3}


def test_no_components_give_an_empty_table(hooked: HookedPair, batch: Batch) -> None:
    assert len(exact_activations(hooked, batch, LOGIT_DIFF, [], direction=CROSS[0])) == 0
