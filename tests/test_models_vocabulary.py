"""One sequence of ids for two models: only tokens that mean the same to both, or a refusal."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.test_weights_vocabulary import EMBED, HEAD, WORDS, plant, resized, word_tokenizer
from tests.tiny_checkpoints import (
    add_noise,
    copy_with,
    tiny_adapter,
    tiny_gpt2,
    tiny_llama,
    tiny_neox,
)
from tvlens.errors import IncomparableModelsError, PromptError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("hooked") / "base")
    word_tokenizer(folder, WORDS)
    return folder


@pytest.fixture(scope="module")
def longer(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five tokens more than the base and eight rows more; every shared weight moved a little."""
    root = tmp_path_factory.mktemp("longer")
    rows = resized(base, root / "rows", [*range(64), *[None] * 8])
    folder = copy_with(rows, root / "longer", add_noise(scale=0.02))
    word_tokenizer(folder, WORDS, added=tuple(f"<{i}>" for i in range(5)))
    return folder


def _batch(tokenizer: object):
    from tvlens.models.prompts import Prompt, PromptSet, tokenised

    asked = (Prompt("w1 w2 w3", " w4", " w5"), Prompt("w9 w8 <1> w7 w6", " w3", " w2"))
    return tokenised(PromptSet(asked), tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("swapped", [False, True])
def test_attribution_runs_on_the_rows_that_both_have_and_says_so(
    base: Path, longer: Path, swapped: bool
) -> None:
    from tvlens.attribution.weights import weight_scores
    from tvlens.models.metrics import SHIPPED
    from tvlens.models.pair import HookedPair
    from tvlens.weights.matching import load_pair

    folders = (longer, base) if swapped else (base, longer)
    hooked = HookedPair(load_pair(*folders))
    assert hooked.base.d_vocab == hooked.tuned.d_vocab == 64
    assert hooked.tokenizer.get_vocab() == {word: i for i, word in enumerate(WORDS)}
    who = "base" if swapped else "tuned model"
    assert hooked.warnings[0].startswith(f"the vocabularies differ: only the {who} knows '<0>'")
    assert "first 64 rows" in hooked.warnings[1]
    batch = _batch(hooked.tokenizer)
    metric = SHIPPED["logit_diff"]
    scores = weight_scores(hooked, batch, metric)
    assert scores.completeness < 0.002
    values = [hooked.values(lens, metric, batch) for lens in (hooked.base, hooked.tuned)]
    plain = [_plain_logit_diff(folder, batch) for folder in folders]
    torch.testing.assert_close(torch.stack(values), torch.stack(plain), atol=2e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [tiny_gpt2, tiny_neox, partial(tiny_llama, tie_word_embeddings=True)]
)
def test_every_family_is_cut_to_the_shared_rows(make: Callable[..., Path], tmp_path: Path) -> None:
    """Against transformers' own logits of the whole, longer model."""
    from transformers import AutoModelForCausalLM

    from tvlens.models.pair import HookedPair
    from tvlens.models.prompts import Batch
    from tvlens.weights.matching import load_pair

    base = make(tmp_path / "base")
    longer = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    longer.resize_token_embeddings(70, mean_resizing=False)
    longer.save_pretrained(tmp_path / "longer")
    word_tokenizer(base, WORDS)
    word_tokenizer(tmp_path / "longer", WORDS, added=("<x>",))
    pair = load_pair(base, tmp_path / "longer")
    assert len(pair.rows) == 64
    assert pair.read(pair.components[0]).delta.norm() == 0
    hooked = HookedPair(pair)
    batch = Batch.of_ids([[1, 2, 3, 4]])
    logits = [lens(batch.ids, batch.mask) for lens in (hooked.base, hooked.tuned)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-6, rtol=0)
    whole = longer(batch.ids).logits[..., :64]
    torch.testing.assert_close(logits[1], whole, atol=2e-5, rtol=1e-5)


def _plain_logit_diff(folder: Path, batch) -> torch.Tensor:
    """Of the whole model as transformers runs it, nothing cut off."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    with torch.no_grad():
        for row in range(len(batch)):
            start = int(batch.prompt_lengths[row])
            logits = model(batch.ids[row : row + 1, :start]).logits[0, -1]
            found.append(logits[batch.answer_ids[row][0]] - logits[batch.wrong_ids[row][0]])
    return torch.stack(found)


def test_moved_tokens_are_refused_with_a_token_named(base: Path, tmp_path: Path) -> None:
    from tvlens.models.pair import HookedPair

    tuned = resized(base, tmp_path / "tuned", [1, 0, *range(2, 64)])
    word_tokenizer(tuned, [WORDS[1], WORDS[0], *WORDS[2:]])
    sentence = r"token 'w0' is number 0 in the base and 1 in the tuned model \(2 tokens moved\)"
    with pytest.raises(IncomparableModelsError, match=sentence):
        HookedPair((base, tuned))


def test_unequal_lengths_without_tokenizers_are_refused(base: Path, tmp_path: Path) -> None:
    from tvlens.models.pair import HookedPair

    tuned = resized(base, tmp_path / "tuned", [*range(64), None])
    (tuned / "tokenizer.json").unlink()
    with pytest.raises(IncomparableModelsError, match="has 64 tokens, the tuned model 65, and a"):
        HookedPair((base, tuned))


def test_a_token_that_only_one_knows_is_refused_in_a_prompt(base: Path, tmp_path: Path) -> None:
    from tvlens.models.pair import HookedPair
    from tvlens.models.prompts import Batch

    tuned = shutil.copytree(base, tmp_path / "tuned")
    word_tokenizer(tuned, [*WORDS[:5], "other", *WORDS[6:]])
    hooked = HookedPair((base, tuned))
    good, bad = Batch.of_ids([[1, 2, 3]]), Batch.of_ids([[1, 5, 3]])
    assert hooked.base(good.ids, good.mask).shape == (1, 3, 64)
    for lens in (hooked.base, hooked.tuned):
        with pytest.raises(PromptError, match="token 5, 'other', which only one of the two"):
            lens(bad.ids, bad.mask)
    beyond = Batch.of_ids([[1, 64]])
    with pytest.raises(PromptError, match="token 64, but the embedding has 64 rows"):
        hooked.base(beyond.ids, beyond.mask)


def test_an_adapters_added_tokens_have_no_row_so_the_bases_tokenizer_reads_prompts(
    base: Path, tmp_path: Path
) -> None:
    from tvlens.models.pair import HookedPair

    adapter = tiny_adapter(base, tmp_path / "adapter")
    word_tokenizer(adapter, WORDS, added=("<pad>", *(f"<{i}>" for i in range(5))))
    hooked = HookedPair((base, adapter))
    assert len(hooked.tokenizer) == 60
    assert "only the tuned model knows '<0>'" not in hooked.warnings[0]
    assert "only the tuned model knows '<pad>', '<0>'" in hooked.warnings[0]


def test_the_same_vocabulary_is_read_with_the_tuned_models_tokenizer(
    base: Path, tmp_path: Path
) -> None:
    from tvlens.models.pair import HookedPair

    tuned = shutil.copytree(base, tmp_path / "tuned")
    hooked = HookedPair((base, tuned))
    assert hooked.warnings == ()
    assert hooked.tokenizer.name_or_path == str(tuned)


@pytest.mark.slow
def test_a_study_of_moved_tokens_is_refused_before_any_stage(base: Path, tmp_path: Path) -> None:
    from tvlens.study.plan import StudyPlan
    from tvlens.study.runner import run_study

    tuned = resized(base, tmp_path / "tuned", [1, 0, *range(2, 64)])
    word_tokenizer(tuned, [WORDS[1], WORDS[0], *WORDS[2:]])
    plan = StudyPlan(base=str(base), tuned=(str(tuned),))
    with pytest.raises(IncomparableModelsError, match=r"2 tokens moved.*tvlens decompose"):
        run_study(plan, tmp_path / "study")
    assert not (tmp_path / "study").exists()
    weights = run_study(plan.model_copy(update={"stages": ("decompose",)}), tmp_path / "study")
    assert len(weights.weights) > 0


@pytest.mark.slow
def test_held_out_losses_of_a_longer_vocabulary_are_read_with_common_tokens(
    base: Path, longer: Path, tmp_path: Path
) -> None:
    from tvlens.study.plan import StudyPlan
    from tvlens.study.runner import run_study

    texts = tmp_path / "texts.txt"
    texts.write_text("w1 w2 w3 w4\n\nw5 <1> w6 w7")
    plan = StudyPlan(
        base=str(base), tuned=(str(longer),), stages=("evaluate",), evaluate={"words": str(texts)}
    )
    study = run_study(plan, tmp_path / "study")
    assert len(study.table("evaluation")) == 2
    assert any("only the tuned model knows '<0>'" in w for w in study.manifest["warnings"])


@pytest.mark.slow
def test_tokens_planted_in_rows_of_both_are_attributed_to_their_own_row(
    base: Path, tmp_path: Path
) -> None:
    """A change of one token's rows alone is all that the embeddings' scores see."""
    from tvlens.attribution.weights import weight_scores
    from tvlens.models.metrics import SHIPPED
    from tvlens.models.pair import HookedPair

    tuned = resized(base, tmp_path / "tuned", [*range(64), None, None])
    word_tokenizer(tuned, WORDS, added=("<x>",))
    plant(tuned, {EMBED: {30: 1.0}, HEAD: {4: 0.5}})  # w30 is in no prompt, w4 is an answer
    hooked = HookedPair((base, tuned))
    scores = weight_scores(hooked, _batch(hooked.tokenizer), SHIPPED["logit_diff"])
    by_name = {str(c): scores.values[i] for i, c in enumerate(scores.components)}
    assert by_name["embed.W_E"].abs().max() == 0
    torch.testing.assert_close(by_name["unembed.W_U"], scores.change, atol=1e-5, rtol=1e-4)
    assert by_name["unembed.W_U"][0].abs() > 1e-3
