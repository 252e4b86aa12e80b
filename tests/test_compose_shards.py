"""Safetensors files written tensor by tensor."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tvlens.errors import CheckpointError


def _file(folder: Path) -> Path:
    tensors = {
        "b": torch.randn(5, 3).bfloat16(),
        "a": torch.randn(4),
        "count": torch.tensor(3),
        "none": torch.zeros(0, 2),
        "flags": torch.tensor([True, False, True]),
    }
    save_file(tensors, folder / "in.safetensors", {"format": "pt", "note": "ö"})
    return folder / "in.safetensors"


def _contents(path: Path, **new: torch.Tensor):
    from tvlens.compose.shards import CODES, Content, bytes_of, copied, read_header

    header = read_header(path)
    found = []
    for entry in header.entries:
        tensor = new.get(entry.name)
        if tensor is None:
            chunks = lambda entry=entry: copied(path, header, entry)  # noqa: E731
            found.append(Content(entry.name, entry.code, entry.shape, entry.size, chunks))
        else:
            shape, size = tuple(tensor.shape), tensor.numel() * tensor.element_size()
            chunks = lambda tensor=tensor: bytes_of(tensor)  # noqa: E731
            found.append(Content(entry.name, CODES[tensor.dtype], shape, size, chunks))
    return header, found


def test_a_file_that_is_copied_tensor_by_tensor_is_the_file(tmp_path: Path) -> None:
    from tvlens.compose.shards import write_file

    path, out = _file(tmp_path), tmp_path / "out.safetensors"
    header, contents = _contents(path)
    written = write_file(out, contents, header.metadata, like=header)
    assert out.read_bytes() == path.read_bytes()
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert written.size == path.stat().st_size


def test_new_contents_and_new_dtypes_are_read_by_safetensors(tmp_path: Path) -> None:
    from tvlens.compose.shards import write_file

    path, out = _file(tmp_path), tmp_path / "out.safetensors"
    new = {"a": torch.randn(4), "b": torch.randn(3, 5).T}
    header, contents = _contents(path, **new)
    write_file(out, contents, header.metadata, like=header)
    before, after = load_file(path), load_file(out)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        wanted = new.get(name, before[name])
        assert tensor.dtype == wanted.dtype
        assert torch.equal(tensor, wanted)
    with safe_open(out, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "ö"}
    assert (8 + int.from_bytes(out.read_bytes()[:8], "little")) % 8 == 0


def test_a_content_of_another_length_is_refused(tmp_path: Path) -> None:
    from tvlens.compose.shards import Content, write_file

    short = Content("a", "F32", (4,), 16, lambda: iter([b"1234"]))
    with pytest.raises(CheckpointError, match="a has 4 bytes, not 16"):
        write_file(tmp_path / "x", [short], {}, like=None)


def test_what_is_no_safetensors_file_is_a_sentence(tmp_path: Path) -> None:
    from tvlens.compose.shards import read_header

    (tmp_path / "x").write_bytes(b"\x10" + b"\0" * 7 + b"not json")
    for name in ("x", "nowhere"):
        with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
            read_header(tmp_path / name)
