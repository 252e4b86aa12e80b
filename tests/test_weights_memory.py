"""Models in memory give the pair that their saved folders give."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_checkpoints import (
    add_noise,
    copy_with,
    tiny_adapter,
    tiny_gpt2,
    tiny_llama,
    tiny_neox,
)
from tvlens.errors import (
    AdapterError,
    CheckpointError,
    HostError,
    IncomparableModelsError,
    UnsupportedFormatError,
)

pytestmark = pytest.mark.slow

MAKERS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "neox": tiny_neox}


@pytest.fixture(params=MAKERS)
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Path]:
    base = MAKERS[request.param](tmp_path / "base")
    return {"base": base, "tuned": copy_with(base, tmp_path / "tuned", add_noise(1))}


@pytest.fixture
def llama(tmp_path: Path) -> dict[str, Path]:
    base = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    return {
        "base": base,
        "tuned": copy_with(base, tmp_path / "tuned", add_noise(1)),
        "adapter": tiny_adapter(base, tmp_path / "adapter"),
    }


def _model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()


def _peft(llama: dict[str, Path], **options: Any) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(_model(llama["base"]), llama["adapter"], **options).eval()


def _bridge(folder: Path) -> Any:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = _model(folder)
    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)


def _load(base: Any, tuned: Any, **options: Any):
    from tvlens.weights.matching import load_pair

    return load_pair(base, tuned, **options)


def _assert_same_pair(found, expected) -> None:
    assert found.components == expected.components
    assert found.layout == expected.layout
    for component in expected.components:
        ours, theirs = found.read(component), expected.read(component)
        assert type(ours.delta) is type(theirs.delta)
        assert torch.equal(ours.base, theirs.base), component
        assert torch.equal(ours.dense_delta(), theirs.dense_delta()), component
        if theirs.floor is not None:
            assert torch.equal(ours.floor, theirs.floor), component


def _statuses(pair) -> list[str]:
    """What became of the tensors; transformers calls some by other names than the file does."""
    statuses = [entry.status for entry in pair.load_report.tensors if entry.status != "tied"]
    return sorted(status.replace("renamed", "compared") for status in statuses)


@pytest.mark.parametrize("sides", ["both", "base", "tuned"])
def test_transformers_models_are_read_like_their_folders(
    folders: dict[str, Path], sides: str
) -> None:
    given = [_model(p) if sides in ("both", n) else p for n, p in folders.items()]
    pair, expected = _load(*given), _load(*folders.values())
    _assert_same_pair(pair, expected)
    assert _statuses(pair) == _statuses(expected)
    assert pair.load_report.config_differences == []
    assert pair.load_report.identical is False
    warned = [w for w in pair.load_report.warnings if "rounding floors are those" in w]
    assert len(warned) == (2 if sides == "both" else 1)
    assert "(float32)" in warned[0]


def test_bridges_are_read_like_their_folders(folders: dict[str, Path]) -> None:
    from tvlens.models.lens import LensModel

    base, tuned = _bridge(folders["base"]), LensModel.load(folders["tuned"])
    _assert_same_pair(_load(base, tuned), _load(*folders.values()))


def test_a_tied_model_in_memory_is_tied(llama: dict[str, Path]) -> None:
    pair = _load(_model(llama["base"]), _model(llama["tuned"]))
    assert pair.layout.tied
    _assert_same_pair(pair, _load(llama["base"], llama["tuned"]))


def test_a_peft_model_is_read_like_its_folder(llama: dict[str, Path]) -> None:
    from tvlens.weights.delta import LowRank

    tuned = _peft(llama)
    expected = _load(llama["base"], llama["adapter"])
    for base in (llama["base"], _model(llama["base"]), tuned.get_base_model()):
        pair = _load(base, tuned)
        _assert_same_pair(pair, expected)
        assert any(isinstance(pair.read(c).delta, LowRank) for c in pair.components)


@pytest.mark.slow
def test_what_peft_saves_whole_is_read_whole(llama: dict[str, Path], tmp_path: Path) -> None:
    llama["base"] = tiny_llama(tmp_path / "untied")
    llama["adapter"] = tiny_adapter(llama["base"], tmp_path / "a", modules_to_save=["lm_head"])
    tuned, from_files = _peft(llama), _load(llama["base"], llama["adapter"])
    head = next(c for c in from_files.components if c.part == "W_U")
    stored = from_files.read(head).dense_delta()
    assert stored.abs().max() > 0
    assert torch.equal(_load(llama["base"], tuned).read(head).dense_delta(), stored)
    with torch.no_grad():
        tuned.get_base_model().lm_head.modules_to_save["default"].weight.add_(0.25)
    moved = _load(llama["base"], tuned).read(head).dense_delta()
    assert torch.allclose(moved - stored, torch.tensor(0.25), atol=1e-6)


def test_another_active_adapter_is_the_one_that_is_read(
    llama: dict[str, Path], tmp_path: Path
) -> None:
    other = tiny_adapter(llama["base"], tmp_path / "other", seed=5)
    tuned = _peft(llama)
    tuned.load_adapter(str(other), adapter_name="second")
    tuned.set_adapter("second")
    _assert_same_pair(_load(llama["base"], tuned), _load(llama["base"], other))


def test_nothing_is_copied_until_it_is_read_and_nothing_reaches_back(
    llama: dict[str, Path],
) -> None:
    model = _model(llama["base"])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    pair = _load(model, _model(llama["tuned"]))
    name = "model.embed_tokens.weight"
    assert pair.base.live[name].data_ptr() == model.model.embed_tokens.weight.data_ptr()
    for component in pair.components:
        pair.read(component).base.zero_()
        pair.base_weight(component).zero_()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_nan_in_memory_is_refused_with_tensor_and_index(llama: dict[str, Path]) -> None:
    tuned = _model(llama["tuned"])
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight[2, 5] = torch.nan
    with pytest.raises(CheckpointError, match=r"up_proj\.weight\[2, 5\] in memory is NaN") as error:
        _load(llama["base"], tuned)
    assert "refused" in {entry.status for entry in error.value.report.tensors}


def test_the_digest_follows_the_bytes(llama: dict[str, Path]) -> None:
    model = _model(llama["base"])
    pair = _load(model, _model(llama["tuned"]))
    first = pair.base.sha256()
    assert set(first) == {"config.json", "memory"}
    assert _load(_model(llama["base"]), llama["tuned"]).base.sha256() == first
    with torch.no_grad():
        weight = model.model.norm.weight
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    assert pair.base.sha256() != first


def test_a_vector_from_memory_is_that_of_the_folders(
    llama: dict[str, Path], tmp_path: Path
) -> None:
    from tvlens.weights.vector import tuning_vector
    from tvlens.weights.vector_file import load_vector

    vector = tuning_vector(_load(_model(llama["base"]), _model(llama["tuned"])))
    stored = tuning_vector(_load(llama["base"], llama["tuned"]))
    assert vector.base.digests == stored.base.digests
    vector.save(tmp_path / "v.safetensors")
    with pytest.warns(UserWarning, match="other names but the same weights"):
        assert (load_vector(tmp_path / "v.safetensors") - stored).norm() == 0


def test_half_precision_in_memory_has_its_own_floors(llama: dict[str, Path]) -> None:
    pair = _load(_model(llama["base"]), _model(llama["tuned"], torch.bfloat16))
    weight = pair.read(pair.components[0])
    assert (weight.base_dtype, weight.tuned_dtype) == ("float32", "bfloat16")
    assert any("(bfloat16)" in warning for warning in pair.load_report.warnings)


def test_a_study_of_models_in_memory_is_refused(llama: dict[str, Path], tmp_path: Path) -> None:
    from tvlens.errors import StudyError

    pair = _load(_model(llama["base"]), llama["tuned"])
    with pytest.raises(StudyError, match="base in memory is in memory, but a study"):
        pair.compare(out=tmp_path / "study")


def test_what_is_no_model_is_refused(llama: dict[str, Path]) -> None:
    for thing, sentence in ((3, "expected a folder, a name or a model, got int"),):
        with pytest.raises(CheckpointError, match=sentence):
            _load(llama["base"], thing)
    with pytest.raises(CheckpointError, match="this Linear has no config"):
        _load(llama["base"], torch.nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"not in memory \(device meta\)"):
        _load(llama["base"], _model(llama["tuned"]).to("meta"))
    quantised = _model(llama["tuned"])
    quantised.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(UnsupportedFormatError, match="holds quantised weights"):
        _load(llama["base"], quantised)


def test_models_of_other_families_are_not_compared(llama: dict[str, Path], tmp_path: Path) -> None:
    other = _model(tiny_gpt2(tmp_path / "gpt2"))
    with pytest.raises(IncomparableModelsError, match="is a llama model"):
        _load(_model(llama["base"]), other)


def test_an_adapter_on_another_base_is_refused(llama: dict[str, Path], tmp_path: Path) -> None:
    tuned, other = _peft(llama), tiny_llama(tmp_path / "other", seed=9, tie_word_embeddings=True)
    with pytest.raises(AdapterError, match=r"differs from other in model\.embed_tokens\.weight"):
        _load(other, tuned)


def test_adapters_that_do_not_act_as_they_say_are_refused(llama: dict[str, Path]) -> None:
    tuned = _peft(llama)
    tuned.merge_adapter()
    for base in (llama["base"], tuned.get_base_model()):
        with pytest.raises(AdapterError, match=r"is merged into model\.layers\.0"):
            _load(base, tuned)
    tuned.unmerge_adapter()
    layer = tuned.get_base_model().model.layers[0].self_attn.q_proj
    layer.scaling["default"] *= 2
    with pytest.raises(AdapterError, match="is scaled by 3 in memory; the adapter's config says"):
        _load(llama["base"], tuned)
    layer.scaling["default"] /= 2
    with tuned.disable_adapter(), pytest.raises(AdapterError, match="has a disabled adapter"):
        _load(llama["base"], tuned)
    with pytest.raises(AdapterError, match="has the layers of an adapter inside"):
        _load(llama["base"], tuned.get_base_model())
    with pytest.raises(AdapterError, match="the base must be a full checkpoint"):
        _load(tuned, llama["tuned"])


def test_adapters_that_train_the_base_in_place_are_refused(
    llama: dict[str, Path], tmp_path: Path
) -> None:
    tuned = _peft(llama)
    tuned.peft_config["default"].bias = "all"
    with pytest.raises(UnsupportedFormatError, match="trains weights of the base in place"):
        _load(llama["base"], tuned)


def test_a_bridge_that_computes_with_other_weights_is_refused(folders: dict[str, Path]) -> None:
    bridge = _bridge(folders["base"])
    with torch.no_grad():
        weight = bridge.blocks[1].attn.q.original_component.weight
        before = weight.clone()
        weight[0, 0] += 1
    if "gpt_neox" in (folders["base"] / "config.json").read_text():  # computes with a copy
        with pytest.raises(
            HostError, match=r"other weights than its checkpoint's \(L1\.W_Q differs"
        ):
            _load(bridge, folders["tuned"])
        with torch.no_grad():
            weight.copy_(before)
    _load(bridge, folders["tuned"])


def test_a_processed_bridge_is_refused(llama: dict[str, Path]) -> None:
    for process in ("enable_compatibility_mode", "process_weights"):
        bridge = _bridge(llama["base"])
        getattr(bridge, process)()
        with pytest.raises(HostError, match="folded, centred, or trained in the bridge"):
            _load(bridge, llama["tuned"])


def test_the_module_under_a_bridge_is_refused_with_the_way_out(llama: dict[str, Path]) -> None:
    with pytest.raises(HostError, match=r"belong to a TransformerBridge\. Give the bridge"):
        _load(_bridge(llama["base"]).original_model, llama["tuned"])


def test_a_hooked_object_of_another_library_is_refused(llama: dict[str, Path]) -> None:
    class Hooked:
        hook_dict = None

    with pytest.raises(HostError, match="expected a TransformerBridge or a HookedTransformer"):
        _load(Hooked(), llama["tuned"])
