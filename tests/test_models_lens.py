"""The hooked model: Hugging Face's logits, checked hook names, flags put back."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.tiny_checkpoints import (
    FAMILIES,
    add_noise,
    copy_with,
    tiny_adapter,
    tiny_llama,
)
from tvlens.errors import AdapterError, CheckpointError, HostError, IncomparableModelsError
from tvlens.models import SHIPPED, Batch, HookedPair, LensModel
from tvlens.models.pair import tokenizer_in

BATCH = Batch.of_ids([[0, 5, 6], [0, 7, 8, 9, 4, 11]], answers=[[3], [4, 5]], wrongs=[[2], [3]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("lens") / "base")


@pytest.fixture(scope="module")
def lens(base: Path) -> LensModel:
    return LensModel.load(base)


def huggingface_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_checkpoint_in_transformers(tmp_path: Path, family: str) -> None:
    folder = FAMILIES[family](tmp_path / family)
    lens = LensModel.load(folder)
    with torch.no_grad():
        ours = lens(BATCH.ids, BATCH.mask)
    for row in range(len(BATCH)):
        length = int(BATCH.lengths[row])
        theirs = huggingface_logits(folder, BATCH.ids[row : row + 1, :length])[0]
        # other attention kernels and another batch shape in fp32
        assert torch.allclose(ours[row, :length], theirs, atol=1e-4, rtol=1e-5)


def test_sizes_are_those_of_the_config(lens: LensModel) -> None:
    sizes = (lens.n_layers, lens.n_heads, lens.n_kv_heads, lens.d_head, lens.d_model, lens.d_mlp)
    assert sizes == (2, 4, 2, 8, 32, 48)
    assert lens.d_vocab == 64
    assert lens.dtype == torch.float32
    assert lens.device == torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_an_adapter_is_merged_into_a_copy(tmp_path: Path, family: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = FAMILIES[family](tmp_path / "base")
    adapter = tiny_adapter(folder, tmp_path / "adapter")
    pair = HookedPair((folder, adapter))
    assert (pair.base_name, pair.tuned_name) == ("base", "adapter")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, str(adapter)).eval()
    with torch.no_grad():
        ours = pair.tuned(BATCH.ids[1:], BATCH.mask[1:])
        assert torch.allclose(ours, theirs(BATCH.ids[1:]).logits, atol=1e-4)
        untouched = pair.base(BATCH.ids[1:], BATCH.mask[1:])
    assert torch.allclose(untouched, huggingface_logits(folder, BATCH.ids[1:]), atol=1e-4)
    assert (ours - untouched).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_an_adapter_of_one_use_of_a_tied_embedding_acts_as_in_training(
    tmp_path: Path, targets: list[str]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = FAMILIES["llama"](tmp_path / "base", tie_word_embeddings=True)
    adapter = tiny_adapter(folder, tmp_path / "adapter", target_modules=targets)
    pair = HookedPair((folder, adapter))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, str(adapter)).eval()
    with torch.no_grad():
        ours = pair.tuned(BATCH.ids[1:], BATCH.mask[1:])
        assert torch.allclose(ours, theirs(BATCH.ids[1:]).logits, atol=1e-4)


class _Sealed:
    """Something that must not be printed: it stands for one that holds large tensors."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __repr__(self) -> str:
        raise AssertionError("TransformerLens printed what a hook is bound to")

    def see(self, activation: torch.Tensor, hook: object) -> None:
        self.seen.append(tuple(activation.shape))


@pytest.mark.parametrize("bound", [False, True])
def test_what_a_hook_is_bound_to_is_never_printed(lens: LensModel, bound: bool) -> None:
    sealed = _Sealed()
    function = partial(_Sealed.see, sealed) if bound else sealed.see
    with torch.no_grad(), lens.hooks(fwd=[("hook_embed", function)]):
        lens(BATCH.ids, BATCH.mask)
    assert sealed.seen == [(*BATCH.ids.shape, 32)]


def test_an_unknown_hook_is_refused_before_anything_runs(lens: LensModel) -> None:
    called = []
    good = ("hook_embed", lambda t, hook: called.append(1))
    with pytest.raises(HostError, match=r"blocks\.9\.hook_resid_pre"):
        with lens.hooks(fwd=[good], bwd=[("blocks.9.hook_resid_pre", lambda g, hook: None)]):
            pytest.fail("the block must not be entered")
    lens(BATCH.ids, BATCH.mask)
    assert called == []


def test_hooks_are_gone_after_the_block_and_after_an_exception(lens: LensModel) -> None:
    seen = []
    hook = ("blocks.0.attn.hook_z", lambda t, hook: seen.append(tuple(t.shape)))
    with lens.hooks(fwd=[hook]):
        lens(BATCH.ids, BATCH.mask)
    assert seen == [(2, 8, 4, 8)]
    with pytest.raises(ZeroDivisionError), lens.hooks(fwd=[hook]):
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="mine"), lens.hooks(fwd=[hook]):
        raise ValueError("mine")
    lens(BATCH.ids, BATCH.mask)
    assert len(seen) == 1


def test_frozen_puts_every_flag_back_also_after_an_exception(lens: LensModel) -> None:
    parameters = list(lens.model.parameters())
    parameters[1].requires_grad_(False)
    before = [p.requires_grad for p in parameters]
    try:
        with lens.frozen():
            assert not any(p.requires_grad for p in parameters)
        assert [p.requires_grad for p in parameters] == before
        with pytest.raises(ZeroDivisionError), lens.frozen():
            raise ZeroDivisionError
        assert [p.requires_grad for p in parameters] == before
    finally:
        parameters[1].requires_grad_(True)


def test_folders_that_do_not_load_are_refused_by_name(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        LensModel.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError):
        LensModel.load(tmp_path)
    with pytest.raises(AdapterError):
        LensModel.load(base, adapter=tmp_path)
    with pytest.raises(HostError, match="TransformerBridge"):
        LensModel.wrap(object())


def test_a_pair_takes_names_and_folders_from_a_loaded_pair(base: Path, tmp_path: Path) -> None:
    tuned = copy_with(base, tmp_path / "tuned", add_noise())
    loaded = SimpleNamespace(
        base=SimpleNamespace(folder=base, is_adapter=False),
        tuned=SimpleNamespace(folder=tuned, is_adapter=False),
        base_name="org/base",
        tuned_name="org/tuned",
    )
    pair = HookedPair(loaded)
    assert (pair.base_name, pair.tuned_name) == ("org/base", "org/tuned")
    assert pair.tokenizer is None
    metric = SHIPPED["kl_to_base"]
    assert pair.values(pair.base, metric, BATCH).abs().max() == 0
    assert (pair.values(pair.tuned, metric, BATCH) > 0).all()


def test_models_of_other_shapes_are_refused(base: Path, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", intermediate_size=64)
    with pytest.raises(IncomparableModelsError, match="d_mlp"):
        HookedPair((base, other))


def test_the_tokenizer_is_the_first_folders_that_has_one(base: Path, tmp_path: Path) -> None:
    from tests.test_models_prompts import words_tokenizer

    words_tokenizer().save_pretrained(tmp_path)
    assert tokenizer_in([base]) is None
    assert tokenizer_in([base, tmp_path])("The")["input_ids"]
