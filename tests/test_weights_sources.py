"""Opening checkpoints, and one clear sentence for each that cannot be opened."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_checkpoints import tiny_llama
from tvlens.errors import CheckpointError, UnsupportedFormatError

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("original") / "model")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same checkpoint in two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2]}
    halves["model-00002-of-00002.safetensors"] = names[1::2]
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    _write_index(folder, weight_map)
    (folder / "model.safetensors").unlink()
    return folder


def _write_index(folder: Path, weight_map: dict[str, str]) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def _edit_config(folder: Path, **entries: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_one_file_gives_every_tensor_as_it_is_stored(folder: Path) -> None:
    from tvlens.weights.sources.opening import open_source

    source, stored = open_source(str(folder)), load_file(folder / "model.safetensors")
    assert source.name == "model"
    assert not source.is_adapter
    assert not source.has_tokenizer
    assert source.rounding is None
    assert source.tensors.keys() == stored.keys()
    for name, tensor in stored.items():
        assert source.tensors[name].dtype == "float32"
        assert source.tensors[name].shape == tuple(tensor.shape)
        assert torch.equal(source.read(name), tensor)
    assert torch.equal(source.read_rows(Q_PROJ, 3, 7), stored[Q_PROJ][3:7])


def test_shards_give_the_same_tensors_as_one_file(original: Path, sharded: Path) -> None:
    from tvlens.weights.sources.opening import open_source

    one, two = open_source(original), open_source(sharded)
    assert len(two.files) == 2
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one.read(name), two.read(name)) for name in one.tensors)


def test_low_precision_tensors_keep_their_dtype(folder: Path) -> None:
    from tvlens.weights.sources.opening import open_source

    tensors = load_file(folder / "model.safetensors")
    save_file({k: t.bfloat16() for k, t in tensors.items()}, folder / "model.safetensors")
    source = open_source(folder)
    assert source.tensors[Q_PROJ].dtype == "bfloat16"
    assert source.read(Q_PROJ).dtype == torch.bfloat16


def test_digests_are_those_of_the_files(sharded: Path) -> None:
    from tvlens.weights.sources.opening import open_source

    digests = open_source(sharded).sha256()
    assert len(digests) == 3
    for name, digest in digests.items():
        assert digest == hashlib.sha256((sharded / name).read_bytes()).hexdigest()


def test_the_storage_note_and_the_tokenizer_are_noticed(folder: Path) -> None:
    from tvlens.weights.sources.opening import open_source

    (folder / "tvlens_storage.json").write_text('{"rounding": {"dtype": "float16"}}')
    (folder / "tokenizer.json").write_text("{}")
    source = open_source(folder)
    assert source.rounding == {"dtype": "float16"}
    assert source.has_tokenizer


def test_a_tensor_that_is_not_there_is_named(folder: Path) -> None:
    from tvlens.weights.sources.opening import open_source

    with pytest.raises(CheckpointError, match="model has no tensor 'nothing'"):
        open_source(folder).read("nothing")


def _truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _corrupt(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 200)


def _empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _shards_without_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def _config_of_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def _unnamed_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model-00001-of-00002.bin")


def _lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def _deep_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 100_000)


def _repeated_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", "model_type": "gpt2"}')


def _large_config(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse: nothing is written, and nothing may be read


def _folder_for_a_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def _foreign_rounding(folder: Path) -> None:
    (folder / "tvlens_storage.json").write_text(
        json.dumps({"rounding": {"step": {Q_PROJ: [0.1] * 3}}})
    )


def _adapter_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text("{}")


BROKEN: dict[str, tuple[Callable[[Path], object], type[CheckpointError], str]] = {
    "truncated": (_truncated, CheckpointError, "cannot be read as safetensors.*truncated or"),
    "corrupt": (_corrupt, CheckpointError, "cannot be read as safetensors"),
    "empty file": (_empty, CheckpointError, "cannot be read as safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), CheckpointError, "has no config.json"),
    "config is no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        CheckpointError,
        "config.json is not JSON",
    ),
    "config is a list": (_config_of_a_list, CheckpointError, "holds list, expected a JSON object"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        CheckpointError,
        "has no weights: expected model.safetensors",
    ),
    "safetensors named bin": (_pickle, CheckpointError, "cannot be read as a PyTorch file"),
    "bin shards without index": (
        _unnamed_pickle,
        CheckpointError,
        r"pytorch_model-00001-of-00002\.bin but no pytorch_model\.bin\.index\.json",
    ),
    "git-lfs pointer": (_lfs_pointer, CheckpointError, "is a pointer of git-lfs.*git lfs pull"),
    "deep config": (_deep_config, CheckpointError, "is not JSON"),
    "config with a key twice": (_repeated_config, CheckpointError, "gives 'model_type' twice"),
    "config of a terabyte": (_large_config, CheckpointError, "which no config.json needs"),
    "folder for a file": (_folder_for_a_file, CheckpointError, "has model.safetensors but no"),
    "rounding of other weights": (
        _foreign_rounding,
        CheckpointError,
        "rounding that does not fit the weights",
    ),
    "no index": (_shards_without_index, CheckpointError, "but no model.safetensors.index.json"),
    "quantised": (
        lambda f: _edit_config(f, quantization_config={"quant_method": "gptq"}),
        UnsupportedFormatError,
        r"quantised weights \(quant_method 'gptq'.*quantised from",
    ),
    "adapter without weights": (
        _adapter_without_weights,
        CheckpointError,
        "but no adapter_model.safetensors",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_gets_its_sentence(folder: Path, case: str) -> None:
    from tvlens.weights.sources.opening import open_source

    damage, error, sentence = BROKEN[case]
    damage(folder)
    with pytest.raises(error, match=sentence):
        open_source(folder)


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("../secret.safetensors", "which leaves the folder"),
        ("/etc/secret.safetensors", "which leaves the folder"),
        ("a/../../secret.safetensors", "which leaves the folder"),
        ("..\\secret.safetensors", "which leaves the folder"),
        ("model-00003-of-00003.safetensors", "is missing"),
        ("model-00001-of-00002.safetensors", "holds .*, but it does not"),
    ],
)
def test_an_index_that_points_wrong_is_refused(sharded: Path, file: str, sentence: str) -> None:
    from tvlens.weights.sources.opening import open_source

    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    elsewhere = next(name for name, shard in index.items() if shard.startswith("model-00002"))
    _write_index(sharded, index | {elsewhere: file})
    with pytest.raises(CheckpointError, match=sentence):
        open_source(sharded)


def test_a_shard_that_a_link_takes_elsewhere_is_refused(sharded: Path, tmp_path: Path) -> None:
    from tvlens.weights.sources.opening import open_source

    shard = sharded / "model-00001-of-00002.safetensors"
    outside = shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(outside)
    with pytest.raises(CheckpointError, match="which leaves the folder"):
        open_source(sharded)


def test_the_links_of_the_hubs_cache_are_followed(sharded: Path, tmp_path: Path) -> None:
    from tvlens.weights.sources.opening import open_source

    expected = open_source(sharded).read(Q_PROJ)
    repository = tmp_path / "models--org--model"
    snapshot = repository / "snapshots" / "abc123"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in sharded.iterdir():
        path.rename(repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert torch.equal(open_source(snapshot).read(Q_PROJ), expected)


def test_one_file_goes_before_shards_and_the_report_says_so(sharded: Path, original: Path) -> None:
    from tvlens.weights.matching import load_pair

    shutil.copy2(original / "model.safetensors", sharded)
    warnings = load_pair(original, sharded).load_report.warnings
    assert (
        "model holds model.safetensors beside model.safetensors.index.json; "
        "only model.safetensors is read." in warnings
    )


def test_a_folder_that_may_not_be_read_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tvlens.weights.sources.opening import open_source

    def denied(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", denied)
    with pytest.raises(CheckpointError, match=r"cannot be read: Permission denied\. Check its"):
        open_source(folder)


def test_an_index_without_a_map_is_refused(sharded: Path) -> None:
    from tvlens.weights.sources.opening import open_source

    _write_index(sharded, {})
    with pytest.raises(CheckpointError, match="has no weight_map"):
        open_source(sharded)


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    from tvlens.weights.sources.opening import open_source

    for spec in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere", "nowhere"):
        with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere.*demo:base"):
            open_source(spec)


def test_a_file_in_place_of_a_folder_is_explained(folder: Path) -> None:
    from tvlens.weights.sources.opening import open_source

    with pytest.raises(CheckpointError, match=r"is a file\. Give the folder"):
        open_source(folder / "model.safetensors")
    (folder / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="cannot be read as GGUF: it ends before byte 8"):
        open_source(folder / "model.gguf")


def test_an_unknown_demo_model_is_refused() -> None:
    from tvlens.weights.sources.opening import open_source

    with pytest.raises(CheckpointError, match="no demo model 'law'"):
        open_source("demo:law")


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    from tvlens.weights.sources.opening import open_source

    def unreachable(*_: object, **__: object) -> str:
        raise ConnectionError("no route\nand a long trace")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError) as caught:
        open_source("org/model@main")
    sentence = str(caught.value)
    assert sentence.startswith("there is no folder 'org/model@main' here, and the hub did not give")
    assert "no route Check" in sentence
    assert "\n" not in sentence


def test_a_hub_id_is_taken_apart(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from tvlens.weights.sources.opening import open_source

    shutil.copytree(original, tmp_path / "abc123" / "inner")
    asked: dict[str, object] = {}

    def download(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path / "abc123")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = open_source("org/model@v2#inner")
    assert asked["repo"] == "org/model"
    assert asked["revision"] == "v2"
    assert "inner/*.safetensors" in asked["allow_patterns"]
    assert source.revision == "abc123"
    assert source.folder == tmp_path / "abc123" / "inner"
    assert source.name == "org/model@v2#inner"


def test_the_hub_gives_pickles_only_where_there_are_no_safetensors(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from tvlens.weights.sources.opening import open_source

    folder = shutil.copytree(original, tmp_path / "abc123")
    weights = folder / "model.safetensors"
    asked: list[list[str]] = []

    def download(repo: str, **options: list[str]) -> str:
        asked.append(options["allow_patterns"])
        if any(pattern.endswith(".bin") for pattern in asked[-1]):
            torch.save(load_file(original / "model.safetensors"), folder / "pytorch_model.bin")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_source("org/model").files == ["model.safetensors"]
    assert len(asked) == 1
    weights.unlink()
    assert open_source("org/model").files == ["pytorch_model.bin"]
    assert len(asked) == 3


def test_a_hub_subfolder_may_not_leave_the_repository() -> None:
    from tvlens.weights.sources.opening import open_source

    with pytest.raises(CheckpointError, match="leaves the repository"):
        open_source("org/model#../../x")


def test_all_rows_of_a_tensor_are_the_mapped_file_and_some_are_a_copy(folder: Path) -> None:
    from tvlens.weights.sources.opening import open_source

    source = open_source(str(folder))
    name = next(name for name, info in source.tensors.items() if len(info.shape) == 2)
    whole, rows = source.read(name), source.tensors[name].shape[0]
    assert source.read_rows(name, 0, rows).data_ptr() == whole.data_ptr()
    assert torch.equal(source.read_rows(name, 1, rows), whole[1:])
