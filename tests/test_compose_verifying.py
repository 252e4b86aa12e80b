"""A merged folder against its manifest and its inputs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_checkpoints import add_noise, copy_with, tiny_adapter, tiny_llama
from tvlens.errors import CheckpointError, StudyError

pytestmark = pytest.mark.slow

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tvlens.compose.combining import merge

    root = tmp_path_factory.mktemp("verify")
    base = tiny_llama(root / "base")

    def narrow(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    found = {
        "base": base,
        "short": copy_with(base, root / "short", narrow),
        "a": copy_with(base, root / "a", add_noise(1)),
        "b": copy_with(base, root / "b", add_noise(2)),
        "lora": tiny_adapter(base, root / "lora"),
    }
    both = [found["a"], found["lora"]]
    for method in ("task", "ties", "dare", "mergekit:ties"):
        found[method] = root / method.replace(":", "-")
        merge(base, both, scales=[0.5, 0.7], method=method, seed=2).save(found[method])
    found["scope"] = root / "scope"
    merge(found["short"], both, scales=0.5, select="L1H2,L0.mlp").save(found["scope"])
    found["wide"] = root / "wide"
    merge(found["short"], both, scales=0.5).save(found["wide"], dtype="float32")
    found["adapter"] = root / "adapter"
    merge(base, both, select='kind == "matrix"').save(found["adapter"], as_lora=5)
    return found


def _verify(folder: Path, **options):
    from tvlens.compose.verifying import verify

    return verify(folder, **options)


def _changed(folder: Path, out: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    shutil.copytree(folder, out)
    file = next(out.glob("*.safetensors"))
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})
    return out


@pytest.mark.parametrize(
    "name", ["task", "ties", "dare", "mergekit:ties", "scope", "wide", "adapter"]
)
def test_what_apply_wrote_holds(folders: dict[str, Path], name: str) -> None:
    verdict = _verify(folders[name])
    assert verdict.holds, verdict.sentence
    assert verdict.checked > 5
    assert "tensors are" in verdict.sentence


def test_another_entry_is_named_with_its_size(folders: dict[str, Path], tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[NAME][3, 4] += 0.5
        tensors[NAME][5, 6] -= 0.25

    verdict = _verify(_changed(folders["task"], tmp_path / "m", edit))
    assert not verdict.holds
    assert list(verdict.tensors) == [NAME]
    assert "differs in 2 entries" in verdict.tensors[NAME]
    assert "by up to 0.5" in verdict.tensors[NAME]
    assert NAME in verdict.sentence
    assert verdict.files == {"model.safetensors": "was changed after it was written"}


def test_an_untouched_tensor_must_keep_its_bits(folders: dict[str, Path], tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        word = tensors[NAME].view(torch.int16)
        word[0, 0] ^= 1  # the last bit of one entry

    verdict = _verify(_changed(folders["scope"], tmp_path / "m", edit))
    assert list(verdict.tensors) == [NAME]
    assert "differs in 1 entries" in verdict.tensors[NAME]


@pytest.mark.parametrize("scale", [0.45, -0.5])
def test_another_scale_is_another_merge(
    folders: dict[str, Path], tmp_path: Path, scale: float
) -> None:
    out = tmp_path / "m"
    shutil.copytree(folders["task"], out)
    manifest = json.loads((out / "tvlens_manifest.json").read_text())
    manifest["terms"][0]["scale"] = scale
    (out / "tvlens_manifest.json").write_text(json.dumps(manifest))
    verdict = _verify(out)
    assert len(verdict.tensors) == len(manifest["changed"])
    assert "more tensors" in verdict.sentence


def test_missing_new_and_misshapen_tensors_are_named(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors[NAME]
        tensors["extra.weight"] = torch.ones(2)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].double()

    found = _verify(_changed(folders["task"], tmp_path / "m", edit)).tensors
    assert found[NAME] == "is missing"
    assert found["extra.weight"] == "is no tensor of the base"
    assert found["model.norm.weight"].startswith("is torch.float64 (32,), not torch.float32")


def test_other_files_count_too(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "m"
    shutil.copytree(folders["task"], out)
    (out / "generation_config.json").unlink()
    (out / "README.md").write_text("mine")
    (out / "more.safetensors").write_bytes(b"x")
    verdict = _verify(out)
    assert not verdict.holds
    assert not verdict.tensors
    assert verdict.files == {
        "generation_config.json": "is missing",
        "README.md": "was changed after it was written",
        "more.safetensors": "was not written by tvlens",
    }


def test_an_adapter_that_was_changed_is_off(folders: dict[str, Path], tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[f"base_model.model.{NAME.removesuffix('.weight')}.lora_B.weight"] *= 1.01

    verdict = _verify(_changed(folders["adapter"], tmp_path / "m", edit))
    assert list(verdict.tensors) == [NAME]
    assert "of its change, stated" in verdict.sentence


def test_inputs_must_be_those_of_the_day(folders: dict[str, Path], tmp_path: Path) -> None:
    from tvlens.compose.combining import merge

    base = copy_with(folders["base"], tmp_path / "base", lambda tensors: None)
    out = tmp_path / "m"
    merge(base, [folders["a"]]).save(out)
    assert _verify(out).holds
    moved = tmp_path / "moved"
    base.rename(moved)
    with pytest.raises(CheckpointError, match="there is no folder"):
        _verify(out)
    assert _verify(out, base=moved).holds
    with pytest.raises(CheckpointError, match="is not the checkpoint that was merged"):
        _verify(out, base=folders["b"])
    with pytest.raises(CheckpointError, match="is not the checkpoint that was merged"):
        _verify(out, base=moved, vectors=[folders["b"]])
    with pytest.raises(StudyError, match="got 2 vectors"):
        _verify(out, base=moved, vectors=[folders["a"], folders["b"]])


def test_vectors_in_memory_must_be_given_again(folders: dict[str, Path], tmp_path: Path) -> None:
    from tvlens.compose.combining import merge
    from tvlens.weights.matching import load_pair
    from tvlens.weights.vector import tuning_vector

    vector = tuning_vector(load_pair(folders["base"], folders["a"]))
    merge(folders["base"], [0.5 * vector]).save(tmp_path / "m")
    with pytest.raises(StudyError, match="given as an object in memory"):
        _verify(tmp_path / "m")
    assert _verify(tmp_path / "m", vectors=[0.5 * vector]).holds
    assert not _verify(tmp_path / "m", vectors=[0.4 * vector]).holds


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (lambda m: m.unlink(), "was not written by `tvlens apply`"),
        (lambda m: m.write_text('{"format": 9}'), "has format 9"),
        (lambda m: m.write_text('{"format": 1}'), "does not hold together"),
        (lambda m: m.write_text("{"), "is not JSON"),
    ],
)
def test_a_broken_manifest_is_a_sentence(
    folders: dict[str, Path], tmp_path: Path, break_it: Callable, sentence: str
) -> None:
    out = tmp_path / "m"
    shutil.copytree(folders["task"], out)
    break_it(out / "tvlens_manifest.json")
    with pytest.raises(CheckpointError, match=sentence):
        _verify(out)
    with pytest.raises(CheckpointError, match="there is no folder"):
        _verify(tmp_path / "nowhere")
