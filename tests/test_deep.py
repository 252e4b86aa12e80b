"""Slow checks outside CI: every shipped pair, and the real pair of examples/real_models.

The real models are looked for in ``TVLENS_REAL`` or ``~/.cache/tvlens/real``.
"""

import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.deep
REAL = Path(os.environ.get("TVLENS_REAL", Path.home() / ".cache" / "tvlens" / "real"))
EXAMPLES = Path(__file__).parent.parent / "examples" / "real_models"
PROMPTS = EXAMPLES / "prompts_med.jsonl"


def _scores(base: str, tuned: str, prompts: str, metric: str, *, most: int):
    from tvlens.attribution.weights import weight_scores
    from tvlens.models import HookedPair, load_prompts, resolve_metric, tokenised
    from tvlens.weights.matching import load_pair

    hooked = HookedPair(load_pair(base, tuned, scan=False))
    asked = load_prompts(prompts)
    batch = tokenised(asked, hooked.tokenizer)
    chosen = batch.rows(range(min(most, len(batch))))
    return weight_scores(hooked, chosen, resolve_metric(metric, asked))


@pytest.mark.parametrize("domain", ["med", "math", "gen"])
@pytest.mark.parametrize("metric", ["logprob", "logit_diff"])
def test_weight_scores_sum_to_the_change_on_every_shipped_pair(domain: str, metric: str) -> None:
    tuned = "demo:ctl" if domain == "gen" else f"demo:{domain}"
    scores = _scores("demo:base", tuned, f"demo:{domain}", metric, most=28)
    print(f"{tuned} {metric}: gap {scores.completeness:.3%} with {scores.nodes} nodes")
    assert scores.completeness <= 0.002  # the contract's bar


def test_weight_scores_sum_to_the_change_on_the_real_pair() -> None:
    assert (REAL / "med" / "config.json").is_file(), "make it with examples/real_models first"
    scores = _scores(str(REAL / "base"), str(REAL / "med"), str(PROMPTS), "logprob", most=8)
    print(f"SmolLM2 med logprob: gap {scores.completeness:.3%} with {scores.nodes} nodes")
    assert scores.completeness <= 0.002


@pytest.mark.parametrize("tuned", ["med", "math", "med-lora", "ctl"])
def test_estimates_agree_with_exact_patches_on_the_real_pairs(tuned: str) -> None:
    from benchmarks.fidelity import rows

    assert (REAL / tuned).is_dir(), "make it with examples/real_models first"
    prompts = EXAMPLES / ("prompts_math.jsonl" if tuned == "math" else "prompts_med.jsonl")
    found = list(rows(str(REAL / "base"), str(REAL / tuned), str(prompts)))
    print("\n".join(row.markdown() for row in found))
    assert [f"{row.what}, {row.kind}" for row in found if not row.passed] == []


def test_noise_on_smollm2_shows_no_contrast(tmp_path: Path) -> None:
    from tests.noise_copies import noise_of_relative_size
    from tests.tiny_checkpoints import copy_with
    from tvlens.geometry.contrasts import contrasts_table
    from tvlens.geometry.decompose import decompose
    from tvlens.weights.matching import load_pair

    assert (REAL / "base" / "config.json").is_file(), "make it with examples/real_models first"
    edit = noise_of_relative_size(0.002, only=("o_proj", "down_proj"))
    noise = copy_with(REAL / "base", tmp_path / "noise", edit)
    weights = decompose(load_pair(str(REAL / "base"), str(noise), scan=False)).to_frame()
    for row in contrasts_table(weights).to_frame().itertuples():
        print(f"{row.claim}: {row.mean:+.5f}, {row.ci_low:+.5f} to {row.ci_high:+.5f}")
        assert abs(row.mean) < 0.005
        assert row.verdict == "not supported"
