"""Metrics that need the models: a study makes the anchor's direction, and explains KL's ends."""

import json
from pathlib import Path

import pytest
import torch

from tests.test_weights_vocabulary import WORDS, word_tokenizer
from tests.tiny_checkpoints import add_noise, copy_with, tiny_llama

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A pair and six prompts, three of them of each split."""
    root = tmp_path_factory.mktemp("pair")
    base = tiny_llama(root / "base")
    word_tokenizer(base, WORDS)
    tuned = copy_with(base, root / "tuned", add_noise(scale=0.1))
    word_tokenizer(tuned, WORDS)
    lines = [
        {
            "prompt": f"w{n} w{n + 9} w{2 * n}",
            "answer": f" w{n + 20} w{n + 2}",
            "split": ("choose", "judge")[n % 2],
        }
        for n in range(1, 7)
    ]
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"base": str(base), "tuned": str(tuned), "prompts": str(prompts)}


def run(asked: dict[str, str], out: Path, metric: str, stage: str = "attribute", **options):
    from tvlens.study.plan import StudyPlan
    from tvlens.study.runner import run_study

    plan = StudyPlan(
        base=asked["base"],
        tuned=(asked["tuned"],),
        prompts=asked["prompts"],
        metric=metric,
        stages=(stage,),
        check_exact=10,
        check_nodes=2,
        **options,
    )
    return run_study(plan, out)


@pytest.mark.parametrize("stage", ["attribute", "graft"])
def test_an_anchor_is_made_of_choose_kept_in_the_study_and_measured_on_all(
    asked, tmp_path: Path, stage: str
) -> None:
    from tvlens.models import HookedPair, load_prompts, tokenised
    from tvlens.models.anchors import anchor

    study = run(asked, tmp_path / "s", "anchor@0", stage)
    pair = HookedPair((Path(asked["base"]), Path(asked["tuned"])))
    batch = tokenised(load_prompts(asked["prompts"]), pair.tokenizer)
    wanted = anchor(pair, batch.rows([1, 3, 5]), hook="blocks.0.hook_resid_post")
    torch.testing.assert_close(study.anchors["tuned"], wanted.direction)
    facts = study.manifest["facts"]["tuned"]["anchor"]
    assert facts == {"hook": wanted.hook, "gap": pytest.approx(wanted.gap), "prompts": 3}
    assert any("by construction" in warning for warning in study.manifest["warnings"])
    if stage == "graft":
        assert set(study.table("curves").to_frame()["metric"]) == {"anchor@0"}
        return
    rows = study.table("prompts").to_frame()
    assert len(rows) == 6
    ahead = (rows["metric_tuned"] - rows["metric_base"])[rows["split"] == "choose"]
    assert ahead.mean() == pytest.approx(wanted.gap, rel=1e-4)
    scores = study.attribution.where(method="weight_ig").to_frame()
    assert set(scores["unit"]) == {"residual"}
    late = scores[(scores["layer"] == 1) & scores["prompt"].notna()]
    assert len(late)
    assert not late["score"].any()
    assert scores[scores["layer"] == 0]["score"].abs().max() > 0.01


@pytest.mark.parametrize("end", ["base", "tuned"])
def test_a_study_of_kl_leaves_out_what_vanishes_says_why_and_keeps_the_rest(
    asked, tmp_path: Path, end: str
) -> None:
    study = run(asked, tmp_path / "s", f"kl_to_{end}")
    into = {"base": "tuned_into_base", "tuned": "base_into_tuned"}
    frame = study.attribution.to_frame()
    estimates = frame[frame["estimator"] == "first_order"]
    assert set(zip(estimates["space"], estimates["at"], strict=True)) == {
        ("activation", "tuned" if end == "base" else "base"),
        ("weight", "tuned" if end == "base" else "base"),
    }
    assert into[end] not in set(estimates["direction"])
    assert {"weight_ig", "exact_weight_insert", "exact_weight_path"} <= set(frame["method"])
    (sentence,) = [w for w in study.manifest["warnings"] if "distance to the" in w]
    assert f"{into[end].replace('_', ' ')}, weights at {end}" in sentence
    assert "gradient at that model is zero" in sentence


def test_several_estimators_are_checked_side_by_side(asked, tmp_path: Path) -> None:
    wanted = ("first_order", "qk_fix", "atp_star")
    study = run(asked, tmp_path / "s", "logprob", estimators=wanted)
    checked = study.fidelity.to_frame()
    methods = {f"cross_model_{name}" for name in wanted}
    assert methods <= set(checked["method"])
    samples = [
        {
            (row.direction, row.kind, row.part if isinstance(row.part, str) else "", row.stratum)
            for row in checked[checked["method"] == method].itertuples()
        }
        for method in sorted(methods)
    ]
    assert samples[0] == samples[1] == samples[2]
    assert {part for _, _, part, _ in samples[0]} >= {"q", "k", "z", "post"}
