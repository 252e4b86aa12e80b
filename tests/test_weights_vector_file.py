"""A saved vector comes back bit for bit, and a damaged one is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_checkpoints import add_noise, copy_with, tiny_adapter, tiny_gpt2, tiny_llama
from tvlens.errors import CheckpointError, SelectionError, UnsupportedFormatError

KEY = "tvlens_vector"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("files")
    base = tiny_llama(root / "base", tie_word_embeddings=True)

    def edit(tensors: dict[str, Tensor]) -> None:
        kept = tensors["model.layers.0.mlp.up_proj.weight"].clone()
        add_noise(1)(tensors)
        tensors["model.layers.0.mlp.up_proj.weight"] = kept

    return {
        "base": base,
        "one": copy_with(base, root / "one", edit),
        "adapter": tiny_adapter(base, root / "adapter"),
    }


@pytest.fixture
def saved(folders: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / "v.safetensors"
    _vector(folders, "one").save(path)
    return path


def _pair(folders: dict[str, Path], name: str):
    from tvlens.weights.matching import load_pair

    return load_pair(folders["base"], folders[name], names=("base", name))


def _vector(folders: dict[str, Path], name: str):
    from tvlens.weights.vector import tuning_vector

    return tuning_vector(_pair(folders, name))


def _assert_equal(found, expected) -> None:
    assert list(found) == list(expected)
    for component in expected:
        assert type(found[component]) is type(expected[component]), component
        for side in ("tensor", "left", "right", "shape"):
            one, two = (getattr(v[component], side, None) for v in (found, expected))
            assert torch.equal(one, two) if isinstance(two, Tensor) else one == two, component


@pytest.mark.parametrize("name", ["one", "adapter", "base"])
def test_a_vector_comes_back_bit_for_bit_in_its_form(
    folders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    from tvlens.weights.vector_file import load_vector

    vector = _vector(folders, name)
    vector.save(tmp_path / "new" / "v.safetensors")
    found = load_vector(tmp_path / "new" / "v.safetensors")
    _assert_equal(found, vector)
    assert (found.name, found.base_name, found.scale) == (vector.name, "base", 1.0)
    assert found.base.layout == vector.base.layout
    assert found.base.digests == vector.base.digests
    assert (found - vector).norm() <= 1e-14 * vector.norm()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["v.safetensors"]


def test_the_streamed_file_is_that_of_the_vector_in_memory(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    from tvlens.weights.vector_file import load_vector, save_pair_vector

    text = "kind == 'head' and layer == 1 or kind == 'norm'"
    for name in ("one", "adapter"):
        path = tmp_path / f"{name}.safetensors"
        made = save_pair_vector(_pair(folders, name), path, select=text, scale=-0.5, command="c")
        whole = _vector(folders, name)
        expected = whole.select(text) * -0.5
        found = load_vector(path)
        _assert_equal(found, expected)
        assert (found.selection, found.scale) == (text, -0.5)
        assert found.name == f"-0.5 * {name}[{text}]"
        assert made.header.command == "c"
        assert made.whole_norm == pytest.approx(whole.norm())
        assert made.selected_norm == pytest.approx(2 * expected.norm())
        assert made.relative_loss == 0


def test_the_same_inputs_give_the_same_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    from tvlens.weights.vector_file import save_pair_vector

    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for path in paths:
        save_pair_vector(_pair(folders, "one"), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_other_tools_read_the_file_as_safetensors(folders: dict[str, Path], saved: Path) -> None:
    base, tuned = (load_file(folders[n] / "model.safetensors") for n in ("base", "one"))
    name = "model.layers.1.mlp.down_proj.weight"
    found = load_file(saved)
    assert torch.equal(found["L1.W_out"], (tuned[name] - base[name]).T)
    assert "L0.W_in" not in found  # it did not change
    assert "unembed.W_U" not in found  # it is tied


def test_the_provenance_names_every_input_file(folders: dict[str, Path], saved: Path) -> None:
    import hashlib

    from tvlens.weights.vector_file import read_header

    header = read_header(saved)
    by_role = {entry.role: entry for entry in header.inputs}
    for role, name in (("base", "base"), ("tuned", "one")):
        for file, digest in by_role[role].sha256.items():
            content = (folders[name] / file).read_bytes()
            assert hashlib.sha256(content).hexdigest() == digest
        assert set(by_role[role].sha256) == {"config.json", "model.safetensors"}
    assert header.orientation == "canonical: x @ W"
    forms = {str(part.component): part.form for part in header.parts}
    assert forms["L0.W_in"] == "absent"
    assert forms["L0.W_Q"] == "dense"


def test_storing_in_bfloat16_says_what_it_lost(folders: dict[str, Path], tmp_path: Path) -> None:
    from tvlens.weights.vector_file import load_vector, read_header

    for name in ("one", "adapter"):
        vector = _vector(folders, name)
        made = vector.save(tmp_path / "v.safetensors", dtype="bfloat16")
        found = load_vector(tmp_path / "v.safetensors")
        assert found.stored_dtype == "bfloat16"
        lost = (found - vector).norm() / vector.norm()
        assert made.relative_loss == pytest.approx(lost, rel=1e-6)
        assert 5e-4 < lost < 2**-8 * 2
        assert read_header(tmp_path / "v.safetensors").loss == made.header.loss
        again = found.save(tmp_path / "w.safetensors", dtype="bfloat16")
        assert again.relative_loss == 0


def test_a_combination_keeps_the_inputs_of_all_its_terms(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    from tvlens.weights.vector_file import load_vector, read_header

    total = _vector(folders, "one") - 2 * _vector(folders, "adapter")
    total.save(tmp_path / "v.safetensors")
    header = read_header(tmp_path / "v.safetensors")
    assert header.name == "one - (2 * adapter)"
    assert [entry.name for entry in header.inputs] == ["base", "one", "adapter"]
    assert header.scale is None
    _assert_equal(load_vector(tmp_path / "v.safetensors"), total)


def test_a_selection_that_fails_leaves_no_file(folders: dict[str, Path], tmp_path: Path) -> None:
    from tvlens.weights.vector_file import save_pair_vector

    with pytest.raises(SelectionError):
        save_pair_vector(_pair(folders, "one"), tmp_path / "v.safetensors", select="layer == 9")
    with pytest.raises(CheckpointError, match="is a folder"):
        save_pair_vector(_pair(folders, "one"), tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_an_interrupted_write_keeps_the_old_file(folders: dict[str, Path], saved: Path) -> None:
    from tvlens.weights import vector_file

    before = saved.read_bytes()
    calls = []

    def failing(component, weight, delta):
        calls.append(component)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return delta

    with pytest.raises(KeyboardInterrupt):
        vector_file.save_pair_vector(_pair(folders, "one"), saved, select=failing)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def _rewritten(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    """An edit of the JSON entry; the tensors stay."""

    def damage(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()[KEY])
        tensors = load_file(path)
        edit(header)
        if header.pop("drop", None):
            tensors.pop("L0.W_Q")
        if header.pop("extra", None):
            tensors["other"] = torch.zeros(1)
        save_file(tensors, path, {KEY: json.dumps(header)})
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        import hashlib

        header["data_sha256"] = hashlib.sha256(content[start:]).hexdigest()
        save_file(tensors, path, {KEY: json.dumps(header)})

    return damage


def _without(name: str) -> Callable[[dict], object]:
    return lambda header: header.pop(name)


@pytest.mark.parametrize(
    ("damage", "error", "sentence"),
    [
        (lambda p: p.unlink(), CheckpointError, "there is no file"),
        (lambda p: p.write_bytes(p.read_bytes()[:-9]), CheckpointError, "cannot be read as safe"),
        (lambda p: p.write_bytes(p.read_bytes()[:50]), CheckpointError, "cannot be read as safe"),
        (lambda p: p.write_bytes(b""), CheckpointError, "cannot be read as safetensors"),
        (_flip, CheckpointError, "was changed after it was written"),
        (
            lambda p: save_file({"a": torch.zeros(2)}, p),
            UnsupportedFormatError,
            "is a safetensors file, but no tuning vector",
        ),
        (
            lambda p: save_file({"a": torch.zeros(2)}, p, {KEY: "{"}),
            CheckpointError,
            "does not hold together",
        ),
        (
            lambda p: save_file({"a": torch.zeros(2)}, p, {KEY: "[1]"}),
            CheckpointError,
            "does not hold together",
        ),
        (
            _rewritten(lambda h: h.update(format=2)),
            UnsupportedFormatError,
            "is a tuning vector of format 2; this tvlens reads format 1",
        ),
        (_rewritten(_without("config")), CheckpointError, "does not hold together"),
        (_rewritten(lambda h: h.update(more=1)), CheckpointError, "does not hold together"),
        (_rewritten(lambda h: h.update(drop=1)), CheckpointError, "lacks L0.W_Q"),
        (_rewritten(lambda h: h.update(extra=1)), CheckpointError, "holds other, which no"),
        (
            _rewritten(lambda h: h["parts"].pop()),
            CheckpointError,
            "lists other components than its config",
        ),
        (
            _rewritten(lambda h: h["config"].update(intermediate_size=64)),
            CheckpointError,
            r"is \(32, 48\), expected \(32, 64\)",
        ),
        (
            _rewritten(lambda h: h["config"].update(model_type="bert")),
            UnsupportedFormatError,
            "model_type 'bert'",
        ),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(
    saved: Path, damage: Callable[[Path], None], error: type[Exception], sentence: str
) -> None:
    from tvlens.weights.vector_file import load_vector

    damage(saved)
    with pytest.raises(error, match=sentence):
        load_vector(saved)


def test_values_that_a_dtype_cannot_hold_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    vector = _vector(folders, "one") * 1e36
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        (vector * 1e6).save(tmp_path / "v.safetensors")
    assert [*tmp_path.iterdir()] == []


def test_a_fused_family_is_stored_by_its_parts(tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair
    from tvlens.weights.vector_file import load_vector, save_pair_vector

    base = tiny_gpt2(tmp_path / "base")
    tuned = copy_with(base, tmp_path / "tuned", add_noise(1))
    save_pair_vector(load_pair(base, tuned), tmp_path / "v.safetensors", select="L0H1,L1.mlp")
    found = load_vector(tmp_path / "v.safetensors")
    assert {str(c) for c in found} == {
        *("L0.W_Q", "L0.b_Q", "L0.W_O", "L1.W_in", "L1.W_out", "L1.b_in", "L1.b_out")
    }
