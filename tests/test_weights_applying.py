"""A vector put back onto a base: bit for bit, only what changed, and left as found."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny_checkpoints import (
    add_noise,
    copy_with,
    tiny_adapter,
    tiny_gpt2,
    tiny_llama,
    tiny_neox,
    tiny_qwen2,
)
from tvlens.components import Component
from tvlens.errors import CheckpointError, IncomparableModelsError

MAKERS: dict[str, Callable[..., Path]] = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "gpt2": tiny_gpt2,
    "neox": tiny_neox,
}


@pytest.fixture(params=MAKERS)
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Path]:
    base = MAKERS[request.param](tmp_path / "base")
    return {"base": base, "tuned": copy_with(base, tmp_path / "tuned", add_noise(1))}


@pytest.fixture
def llama(tmp_path: Path) -> dict[str, Path]:
    base = tiny_llama(tmp_path / "base")
    return {"base": base, "tuned": copy_with(base, tmp_path / "tuned", add_noise(1))}


def _vector(folders: dict[str, Path], tuned: str = "tuned"):
    from tvlens.weights.matching import load_pair
    from tvlens.weights.vector import tuning_vector

    return tuning_vector(load_pair(folders["base"], folders[tuned]))


def _model(folder: Path, dtype: torch.dtype = torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()


def _stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def _ulp(tensor: Tensor) -> Tensor:
    return torch.nextafter(tensor.abs(), torch.full_like(tensor, torch.inf)) - tensor.abs()


def _bits(model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same(model, before: dict[str, Tensor]) -> bool:
    return all(
        torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
        for name, tensor in model.state_dict().items()
    )


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_base_plus_vector_is_the_tuned_model(
    folders: dict[str, Path], tmp_path: Path, scale: float
) -> None:
    folders["far"] = copy_with(folders["base"], tmp_path / "far", add_noise(2, scale))
    base, tuned = _stored(folders["base"]), _stored(folders["far"])
    new = dict(_vector(folders, "far").apply_to(folders["base"]))
    assert new.keys() == tuned.keys()
    for name, tensor in new.items():
        assert tensor.dtype == tuned[name].dtype
        assert tensor.shape == tuned[name].shape
        exact = (tuned[name] - base[name]).double() == tuned[name].double() - base[name].double()
        assert torch.equal(tensor[exact], tuned[name][exact]), name
        larger = torch.maximum(base[name].abs(), tuned[name].abs())
        assert bool(((tensor - tuned[name]).abs() <= _ulp(larger)).all()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_come_back_bit_for_bit(
    folders: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    def narrow(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    short = {n: copy_with(folders[n], tmp_path / f"{n}16", narrow) for n in ("base", "tuned")}
    tuned, new = _stored(short["tuned"]), dict(_vector(short).apply_to(short["base"]))
    assert new
    for name, tensor in new.items():
        assert torch.equal(tensor, tuned[name]), name


def test_one_part_of_a_fused_tensor_leaves_the_others_bit_for_bit(
    folders: dict[str, Path],
) -> None:
    """Compared through the host-checked reading of components, not through this code's inverse."""
    from tvlens.weights.matching import load_pair

    base = folders["base"]
    vector = _vector(folders).select('part == "W_K" and layer == 1')
    new = dict(vector.apply_to(base))
    assert len(new) == 1

    def put(tensors: dict[str, Tensor]) -> None:
        tensors.update(new)

    pair = load_pair(base, copy_with(base, base.parent / "new", put))
    tuned = load_pair(base, folders["tuned"])
    for component in pair.components:
        source = tuned if component == Component("matrix", 1, None, "W_K") else pair
        expected = (
            source.tuned_weight(component) if source is tuned else pair.base_weight(component)
        )
        assert torch.allclose(pair.tuned_weight(component), expected, rtol=0, atol=2e-7)
        if source is pair:
            assert torch.equal(pair.tuned_weight(component), expected), component


def test_a_heads_slice_changes_that_head_alone(folders: dict[str, Path]) -> None:
    from tvlens.geometry.heads import slices_of_heads
    from tvlens.weights.matching import load_pair

    base = folders["base"]
    new = dict(_vector(folders).select("L0H2").apply_to(base))
    made = load_pair(base, copy_with(base, base.parent / "n", lambda t: t.update(new)))
    for part in ("W_Q", "W_O"):
        component = Component("matrix", 0, None, part)
        change = made.tuned_weight(component) - made.base_weight(component)
        per_head = slices_of_heads(change, part, 4).abs().amax(dim=(1, 2))
        assert (per_head > 0).tolist() == [False, False, True, False]


def test_negative_zeros_that_did_not_change_keep_their_sign(tmp_path: Path) -> None:
    def zero(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.h.0.attn.c_attn.weight"][:, 3] = -0.0

    base = copy_with(tiny_gpt2(tmp_path / "first"), tmp_path / "base", zero)
    tuned = copy_with(base, tmp_path / "tuned", add_noise(1))
    vector = _vector({"base": base, "tuned": tuned}).select("L0H1.W_Q")
    ((name, tensor),) = vector.apply_to(base)
    stored = _stored(base)[name]
    assert torch.equal(tensor[:, :8].view(torch.int32), stored[:, :8].view(torch.int32))


def test_a_low_rank_vector_gives_what_peft_merges(llama: dict[str, Path], tmp_path: Path) -> None:
    from peft import PeftModel

    llama["adapter"] = tiny_adapter(llama["base"], tmp_path / "adapter")
    new = dict(_vector(llama, "adapter").apply_to(llama["base"]))
    merged = PeftModel.from_pretrained(_model(llama["base"]), llama["adapter"]).merge_and_unload()
    expected, base = merged.state_dict(), _stored(llama["base"])
    assert new.keys() == {n for n in base if not torch.equal(base[n], expected[n])}
    assert len(new) == 6
    for name, tensor in new.items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name


def test_a_model_in_memory_becomes_the_tuned_one_and_comes_back(folders: dict[str, Path]) -> None:
    model, tuned = _model(folders["base"]), _model(folders["tuned"])
    before, flags = _bits(model), [p.requires_grad for p in model.parameters()]
    ids = torch.arange(12).reshape(2, 6)
    expected, original = tuned(ids).logits, model(ids).logits
    with _vector(folders).apply_to(model) as changed:
        assert changed is model
        assert torch.allclose(model(ids).logits, expected, atol=1e-6)
    assert _same(model, before)
    assert torch.equal(model(ids).logits, original)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_model_comes_back_after_an_exception(llama: dict[str, Path]) -> None:
    model = _model(llama["base"])
    before = _bits(model)
    application = (3 * _vector(llama)).apply_to(model)

    def interrupted() -> None:
        with application:
            assert not _same(model, before)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        interrupted()
    assert _same(model, before)


def test_a_failure_half_way_puts_back_what_was_written(llama: dict[str, Path]) -> None:
    from tvlens.weights.delta import Dense

    vector = _vector(llama)
    deltas = dict(vector.deltas)
    last = list(deltas)[-1]
    deltas[last] = Dense(torch.full(deltas[last].shape, 3e38))
    model = _model(llama["base"]).half()
    before = _bits(model)
    bad = type(vector)(vector.base, "bad", deltas)
    with pytest.raises(CheckpointError, match="overflows"), bad.apply_to(model, any_base=True):
        pass
    assert _same(model, before)


def test_only_the_tensors_of_a_selection_are_touched(llama: dict[str, Path]) -> None:
    model = _model(llama["base"])
    before = _bits(model)
    with _vector(llama).select("L1N3").apply_to(model):
        changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    stem = "model.layers.1.mlp."
    assert changed == {f"{stem}{n}_proj.weight" for n in ("gate", "up", "down")}


def test_another_base_is_refused_unless_asked_for(llama: dict[str, Path], tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", seed=9)
    vector, model = _vector(llama), _model(other)
    before = _bits(model)
    for base in (other, model):
        with pytest.raises(IncomparableModelsError, match=r"embed\.W_E of this model is not that"):
            list(vector.apply_to(base))
    with pytest.raises(IncomparableModelsError), vector.apply_to(model):
        pass
    assert _same(model, before)
    stored, tuned = _stored(other), dict(vector.apply_to(other, any_base=True))
    name = "model.layers.0.self_attn.q_proj.weight"
    delta = vector[Component("matrix", 0, None, "W_Q")].dense().T
    assert torch.allclose(tuned[name], stored[name] + delta, atol=1e-7)


def test_bases_of_another_shape_are_refused_with_the_number(
    llama: dict[str, Path], tmp_path: Path
) -> None:
    vector = _vector(llama)
    wide = tiny_llama(tmp_path / "wide", intermediate_size=64)
    with pytest.raises(IncomparableModelsError, match="a base with d_mlp 48; wide has 64"):
        list(vector.apply_to(wide))
    with pytest.raises(IncomparableModelsError, match="family 'llama'; other has 'gpt2'"):
        list(vector.apply_to(tiny_gpt2(tmp_path / "other")))
    short = tiny_llama(tmp_path / "short", vocab_size=60)
    with pytest.raises(IncomparableModelsError, match="64 embedding rows; short has 60"):
        list(vector.apply_to(short, any_base=True))
    tied = tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    tied_vector = _vector({"base": tied, "tuned": copy_with(tied, tmp_path / "t", add_noise())})
    with pytest.raises(IncomparableModelsError, match="stores two"):
        list(tied_vector.apply_to(llama["base"]))


def test_a_tied_model_changes_once_and_both_names_agree(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    vector = _vector({"base": base, "tuned": copy_with(base, tmp_path / "t", add_noise(1))})
    tuned = _model(tmp_path / "t")
    model = _model(base)
    before, ids = _bits(model), torch.arange(6)[None]
    assert "lm_head.weight" not in dict(vector.apply_to(base))
    with vector.apply_to(model):
        assert torch.allclose(model(ids).logits, tuned(ids).logits, atol=1e-6)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert _same(model, before)


def test_a_vector_that_unties_the_unembedding_gives_it_and_says_so(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    untied = tiny_llama(tmp_path / "untied", seed=4)
    vector = _vector({"base": base, "tuned": untied})
    application = vector.apply_to(base)
    new, tuned = dict(application), _stored(untied)
    assert application.config_changes == {"tie_word_embeddings": False}
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.allclose(new[name], tuned[name], atol=2e-7), name
    only = dict(vector.select("embed").apply_to(base))
    assert torch.equal(only["lm_head.weight"], _stored(base)["model.embed_tokens.weight"])
    inner = vector.select("layer == 0").apply_to(base)
    assert inner.config_changes == {}
    assert "lm_head.weight" not in dict(inner)
    model = _model(base)
    with pytest.raises(IncomparableModelsError, match="but this one ties"), vector.apply_to(model):
        pass


def test_a_longer_base_keeps_its_further_rows(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    vector = _vector({"base": base, "tuned": copy_with(base, tmp_path / "t", add_noise(1))})

    def lengthen(tensors: dict[str, Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.ones(4, 32)])

    longer = copy_with(base, tmp_path / "longer", lengthen)
    config = (longer / "config.json").read_text().replace('"vocab_size": 64', '"vocab_size": 68')
    (longer / "config.json").write_text(config)
    new, tuned = dict(vector.apply_to(longer)), _stored(tmp_path / "t")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.allclose(new[name][:64], tuned[name], atol=2e-7)
        assert torch.equal(new[name][64:], torch.ones(4, 32))
    with pytest.raises(IncomparableModelsError, match="64 embedding rows; longer has 68"):
        list(vector.apply_to(longer, any_base=True))


def test_a_folder_cannot_be_entered_and_a_context_not_twice(llama: dict[str, Path]) -> None:
    vector, model = _vector(llama), _model(llama["base"])
    with (
        pytest.raises(CheckpointError, match="on disk is not changed"),
        vector.apply_to(llama["base"]),
    ):
        pass
    application = vector.apply_to(model)
    before = _bits(model)
    with application:
        with pytest.raises(CheckpointError, match="already open"):
            application.__enter__()
        assert not _same(model, before)
    assert _same(model, before)
    with application:
        pass
    assert _same(model, before)


def test_it_works_under_no_grad_and_inference_mode(llama: dict[str, Path]) -> None:
    tuned = _stored(llama["tuned"])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            new = dict(_vector(llama).apply_to(llama["base"]))
        assert all(torch.allclose(t, tuned[n], atol=2e-7) for n, t in new.items())


@pytest.mark.slow
def test_a_hooked_model_computes_with_the_vector_and_comes_back(folders: dict[str, Path]) -> None:
    """GPT-NeoX's bridge computes with copies of query, key and value: they must change too."""
    from tvlens.models.lens import LensModel

    lens, tuned = LensModel.load(folders["base"]), LensModel.load(folders["tuned"])
    ids = torch.arange(12).reshape(2, 6)
    mask = torch.ones_like(ids)
    original, expected = lens(ids, mask), tuned(ids, mask)
    before = {n: p.clone() for n, p in lens.model.named_parameters()}
    for model in (lens, lens.model):
        with _vector(folders).apply_to(model):
            assert torch.allclose(lens(ids, mask), expected, atol=1e-6)
        assert torch.equal(lens(ids, mask), original)
        assert all(torch.equal(p, before[n]) for n, p in lens.model.named_parameters())
    with pytest.raises(CheckpointError, match="hooked model has no stored tensors"):
        list(_vector(folders).apply_to(lens))


@pytest.mark.slow
def test_a_hooked_model_of_another_base_is_refused(llama: dict[str, Path], tmp_path: Path) -> None:
    from tvlens.models.lens import LensModel

    lens = LensModel.load(tiny_llama(tmp_path / "other", seed=9))
    before = _bits(lens.model)
    with (
        pytest.raises(IncomparableModelsError, match="is not that of base"),
        _vector(llama).apply_to(lens),
    ):
        pass
    assert _same(lens.model, before)
    wide = LensModel.load(tiny_llama(tmp_path / "wide", intermediate_size=64))
    with (
        pytest.raises(IncomparableModelsError, match=r"has no L0\.W_gate of shape"),
        _vector(llama).select("layer == 0 and part == 'W_gate'").apply_to(wide),
    ):
        pass


@pytest.mark.slow
def test_a_hooked_model_that_ties_is_not_given_two_ends(tmp_path: Path) -> None:
    from tvlens.models.lens import LensModel

    base = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    lens = LensModel.load(base)
    untying = _vector({"base": base, "tuned": tiny_llama(tmp_path / "untied", seed=4)})
    with pytest.raises(IncomparableModelsError, match="differ in whether"), untying.apply_to(lens):
        pass
    tied = _vector({"base": base, "tuned": copy_with(base, tmp_path / "t", add_noise(1))})
    ids, expected = torch.arange(6)[None], LensModel.load(tmp_path / "t")
    with tied.apply_to(lens):
        mask = torch.ones_like(ids)
        assert torch.allclose(lens(ids, mask), expected(ids, mask), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "text"),
    [("head", "L1H2"), ("kv_head", "L1K1"), ("neuron", "L1N5"), ("kv_group", "L1G1")],
)
def test_a_selected_site_is_what_attribution_patches(
    folders: dict[str, Path], kind: str, text: str
) -> None:
    """Two ways to insert one site's tuning vector, which share no code, give the same logits."""
    from tvlens.attribution.sites import pieces, weight_path
    from tvlens.models.lens import LensModel
    from tvlens.models.pair import HookedPair

    hooked = HookedPair((folders["base"], folders["tuned"]))
    ids = torch.arange(12).reshape(2, 6)
    mask = torch.ones_like(ids)
    component = Component(kind, 1, int(text[-1]))
    with (
        weight_path(hooked) as path,
        path.placed(pieces(component, hooked.base, path.sites), "tuned"),
    ):
        expected = hooked.base(ids, mask)
    lens = LensModel.load(folders["base"])
    with _vector(folders).select(text).apply_to(lens):
        assert torch.allclose(lens(ids, mask), expected, atol=1e-6)
    assert not torch.allclose(lens(ids, mask), expected, atol=1e-5)
