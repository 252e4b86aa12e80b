"""PyTorch's own files: the same numbers as safetensors, and no code from a checkpoint."""

import hashlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_checkpoints import add_noise, copy_with, tiny_adapter, tiny_gpt2
from tvlens.errors import CheckpointError, UnsupportedFormatError

C_FC = "transformer.h.0.mlp.c_fc.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt2(tmp_path_factory.mktemp("original") / "model")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """The checkpoint with a pickle in place of its safetensors."""
    return _as_pickle(original, tmp_path / "model")


def _as_pickle(original: Path, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    shutil.copytree(original, out)
    weights = out / "model.safetensors"
    torch.save({k: t.to(dtype) for k, t in load_file(weights).items()}, out / "pytorch_model.bin")
    weights.unlink()
    return out


def _as_shards(original: Path, out: Path) -> Path:
    shutil.copytree(original, out)
    tensors = load_file(out / "model.safetensors")
    names = sorted(tensors)
    halves = {"pytorch_model-00001-of-00002.bin": names[::2]}
    halves["pytorch_model-00002-of-00002.bin"] = names[1::2]
    for file, part in halves.items():
        torch.save({name: tensors[name] for name in part}, out / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (out / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (out / "model.safetensors").unlink()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_comes_back_bit_equal_from_both_formats(
    original: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    from tvlens.weights.sources.opening import open_source

    def cast(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    safe = open_source(copy_with(original, tmp_path / "safe", cast))
    pickled = open_source(_as_pickle(original, tmp_path / "pickled", dtype))
    expected = load_file(original / "model.safetensors")
    assert safe.tensors.keys() == pickled.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert safe.tensors[name][:2] == pickled.tensors[name][:2]
        assert pickled.tensors[name].dtype == str(dtype).removeprefix("torch.")
        for source in (safe, pickled):
            assert torch.equal(source.read(name), tensor.to(dtype))
            assert torch.equal(source.read_rows(name, 1, 3), tensor.to(dtype)[1:3])


def test_shards_and_digests_of_pickles(original: Path, tmp_path: Path) -> None:
    from tvlens.weights.sources.opening import open_source

    source = open_source(_as_shards(original, tmp_path / "shards"))
    expected = load_file(original / "model.safetensors")
    assert len(source.files) == 2
    assert all(torch.equal(source.read(name), tensor) for name, tensor in expected.items())
    for name, digest in source.sha256().items():
        assert digest == hashlib.sha256((source.folder / name).read_bytes()).hexdigest()


def test_what_was_read_can_be_written_on_without_changing_the_source(
    original: Path, folder: Path
) -> None:
    from tvlens.weights.sources.opening import open_source

    source = open_source(folder)
    before = load_file(original / "model.safetensors")[C_FC]
    source.read(C_FC).zero_()
    source.read_rows(C_FC, 0, 4).zero_()
    assert torch.equal(source.read(C_FC), before)


def test_parameters_and_views_are_read_as_they_are(folder: Path) -> None:
    from tvlens.weights.sources.opening import open_source

    tensor = torch.randn(6, 4)
    stored = {"a": torch.nn.Parameter(tensor), "b": tensor.T, "c": tensor[2:5, 1:3]}
    torch.save(stored, folder / "pytorch_model.bin")
    source = open_source(folder)
    assert not source.read("a").requires_grad
    assert all(torch.equal(source.read(name), value) for name, value in stored.items())
    assert torch.equal(source.read_rows("b", 1, 3), tensor.T[1:3])


def test_a_pair_of_a_pickle_and_safetensors_is_that_of_two_safetensors(
    original: Path, folder: Path, tmp_path: Path
) -> None:
    from tvlens.weights.matching import load_pair

    tuned = copy_with(original, tmp_path / "tuned", add_noise())
    expected, pair = load_pair(original, tuned), load_pair(folder, tuned)
    for component in expected.components:
        assert torch.equal(
            pair.read(component).dense_delta(), expected.read(component).dense_delta()
        )
    assert load_pair(original, folder).load_report.identical is True


def test_safetensors_win_over_a_pickle_and_the_report_says_so(original: Path, folder: Path) -> None:
    from tvlens.weights.matching import load_pair

    torch.save({"wrong": torch.ones(1)}, folder / "pytorch_model.bin")
    shutil.copy2(original / "model.safetensors", folder)
    report = load_pair(original, folder).load_report
    assert report.identical is True
    assert (
        "model holds model.safetensors beside pytorch_model.bin; only model.safetensors is read."
        in report.warnings
    )


@pytest.mark.slow
def test_an_adapter_in_a_pickle_is_the_adapter(original: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    safe = tiny_adapter(original, tmp_path / "safe")
    pickled = shutil.copytree(safe, tmp_path / "pickled")
    weights = pickled / "adapter_model.safetensors"
    torch.save(load_file(weights), pickled / "adapter_model.bin")
    both = load_pair(original, pickled).load_report.warnings
    assert any("only adapter_model.safetensors is read" in warning for warning in both)
    weights.unlink()
    expected, pair = load_pair(original, safe), load_pair(original, pickled)
    assert pair.tuned.files == ["adapter_model.bin"]
    for component in expected.components:
        assert torch.equal(
            pair.read(component).dense_delta(), expected.read(component).dense_delta()
        )


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/tvlens-was-here",)


def _compressed(path: Path) -> None:
    records = {}
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def _saver(content: object, **options: bool) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path, **options)


TENSOR = torch.ones(3)
OLD = {"_use_new_zipfile_serialization": False}
BAD: dict[str, tuple[Callable[[Path], object], type[CheckpointError], str]] = {
    "code": (_saver({"a": _Code()}), UnsupportedFormatError, r"needs '\w+\.system' to run, and"),
    "module": (_saver(torch.nn.Linear(2, 2)), UnsupportedFormatError, "runs no code"),
    "old format": (_saver({"a": TENSOR}, **OLD), UnsupportedFormatError, "before PyTorch 1.6"),
    "plain pickle": (
        lambda path: path.write_bytes(pickle.dumps({"a": _Code()})),
        UnsupportedFormatError,
        "before PyTorch 1.6",
    ),
    "training checkpoint": (
        _saver({"model": {"a": TENSOR}, "epoch": 3}),
        UnsupportedFormatError,
        "holds dict under 'model', expected a flat dict",
    ),
    "a number": (_saver({"a": 1.0}), UnsupportedFormatError, "holds float under 'a'"),
    "a list": (_saver([TENSOR]), UnsupportedFormatError, "holds list, expected a flat dict"),
    "numbers for names": (_saver({1: TENSOR}), UnsupportedFormatError, "expected a flat dict"),
    "no tensor": (_saver({}), CheckpointError, "hold no tensor"),
    "sparse": (_saver({"a": TENSOR.to_sparse()}), UnsupportedFormatError, "'a' as a sparse"),
    "meta": (_saver({"a": torch.ones(2, device="meta")}), UnsupportedFormatError, "or meta"),
    "expanded": (
        _saver({"a": torch.ones(1).expand(1 << 20, 1 << 20)}),
        CheckpointError,
        "more than it stores",
    ),
    "truncated": (
        lambda path: path.write_bytes(path.read_bytes()[:-300]),
        CheckpointError,
        "cannot be read as a PyTorch file",
    ),
    "compressed": (_compressed, CheckpointError, "compressed or more"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_pickle_gets_its_sentence_and_runs_nothing(folder: Path, case: str) -> None:
    from tvlens.weights.sources.opening import open_source

    damage, error, sentence = BAD[case]
    damage(folder / "pytorch_model.bin")
    with pytest.raises(error, match=sentence) as caught:
        open_source(folder)
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    assert not Path("/tmp/tvlens-was-here").exists()


QUANTISED = {
    "model.layers.0.self_attn.q_proj.qweight": (torch.int32, "GPTQ or AWQ"),
    "model.layers.0.self_attn.q_proj.weight.absmax": (torch.uint8, "bitsandbytes"),
    "model.layers.0.self_attn.q_proj.SCB": (torch.float32, "bitsandbytes"),
    "model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4": (
        torch.uint8,
        "bitsandbytes",
    ),
    "model.layers.0.self_attn.q_proj.W_q": (torch.uint8, "HQQ"),
    "model.layers.0.self_attn.q_proj.weight_packed": (torch.int32, "compressed-tensors"),
    "model.layers.0.self_attn.q_proj.weight_scale_inv": (torch.float32, "fp8"),
    "model.layers.0.self_attn.q_proj.weight": (torch.float8_e4m3fn, ".* is .*8_?e4m3"),
}


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_tensors_are_refused_by_their_method(
    original: Path, tmp_path: Path, name: str, pickled: bool
) -> None:
    from tvlens.weights.sources.opening import open_source

    dtype, reason = QUANTISED[name]
    folder = shutil.copytree(original, tmp_path / "model")
    tensors = {name: torch.zeros(4, 4).to(dtype)}
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UnsupportedFormatError, match=rf"(?i)quantised weights \({reason}") as e:
        open_source(folder)
    assert "quantised from" in e.value.hint


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json"])
def test_the_config_of_a_quantiser_is_enough(original: Path, tmp_path: Path, file: str) -> None:
    from tvlens.weights.sources.opening import open_source

    folder = shutil.copytree(original, tmp_path / "model")
    (folder / file).write_text("{}")
    with pytest.raises(UnsupportedFormatError, match=f"it has {file}"):
        open_source(folder)
