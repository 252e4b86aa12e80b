"""Weight files written tensor by tensor: copied bytes, or new contents, in the file's own order.

A safetensors file is eight bytes with the length of a header, a JSON header, and the tensors one
after the other. Where no name, dtype or shape changes, the header is taken over byte by byte, so a
file in which no tensor changes comes out as it was.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from tvlens.errors import CheckpointError

CHUNK = 1 << 24
"""Bytes copied at once."""
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The header's words for dtypes."""


class Entry(NamedTuple):
    """A tensor of a file.

    Attributes:
        name: Its name.
        code: The header's word for its dtype.
        shape: Its shape.
        start: Where its bytes begin, counted from the end of the header.
        size: How many bytes it has.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    start: int
    size: int


class Header(NamedTuple):
    """What a file says before its tensors.

    Attributes:
        entries: Its tensors, in the order of their bytes.
        metadata: Its texts.
        text: The header itself, blanks included.
    """

    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    text: bytes

    @property
    def data(self) -> int:
        """Where the tensors begin in the file."""
        return 8 + len(self.text)


class Content(NamedTuple):
    """A tensor to write.

    Attributes:
        name: Its name.
        code: The header's word for its dtype.
        shape: Its shape.
        size: How many bytes it has.
        chunks: Gives its bytes, once.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    size: int
    chunks: Callable[[], Iterator[Any]]


class Written(NamedTuple):
    """A finished file.

    Attributes:
        sha256: Its digest.
        size: Its bytes, header included.
    """

    sha256: str
    size: int


def read_header(path: Path) -> Header:
    """The header of a safetensors file that can be opened.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            text = file.read(int.from_bytes(file.read(8), "little"))
        found = json.loads(text)
        metadata = found.pop("__metadata__", {})
        entries = [_entry(name, about) for name, about in found.items()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors: {error}.", hint="Copy the file again."
        ) from error
    return Header(tuple(sorted(entries, key=lambda e: (e.start, e.size))), metadata, text)


def copied(path: Path, header: Header, entry: Entry) -> Iterator[Any]:
    """The bytes of one tensor of a file."""
    with path.open("rb") as file:
        file.seek(header.data + entry.start)
        left = entry.size
        while left:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                raise CheckpointError(f"{path} ends within {entry.name}.", hint="Copy it again.")
            left -= len(chunk)
            yield chunk


def bytes_of(tensor: Shaped[Tensor, "..."]) -> Iterator[Any]:
    """The bytes of a tensor, little-endian, row by row."""
    yield tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def write_file(
    path: Path, contents: Sequence[Content], metadata: Mapping[str, str], *, like: Header | None
) -> Written:
    """Write a safetensors file, hashed on the way.

    Args:
        path: A file that is not there yet.
        contents: Its tensors, in order.
        metadata: Its texts.
        like: The header to take over where it says the same; None for none.

    Raises:
        CheckpointError: A tensor has another number of bytes than its shape says.
    """
    text = like.text if like and _says(like, contents) else _header_text(contents, metadata)
    digest = hashlib.sha256()
    with path.open("xb") as file:
        _put(file, digest, len(text).to_bytes(8, "little"))
        _put(file, digest, text)
        for content in contents:
            size = sum(_put(file, digest, chunk) for chunk in content.chunks())
            if size != content.size:
                raise CheckpointError(f"{content.name} has {size} bytes, not {content.size}.")
        return Written(digest.hexdigest(), file.tell())


def _put(file: BinaryIO, digest: Any, chunk: Any) -> int:
    file.write(chunk)
    digest.update(chunk)
    return len(chunk)


def _entry(name: str, about: Mapping[str, Any]) -> Entry:
    start, stop = about["data_offsets"]
    return Entry(name, about["dtype"], tuple(about["shape"]), start, stop - start)


def _says(header: Header, contents: Sequence[Content]) -> bool:
    """Whether a header describes just these contents, in this order."""
    ours = [(c.name, c.code, tuple(c.shape)) for c in contents]
    return ours == [(e.name, e.code, e.shape) for e in header.entries]


def _header_text(contents: Sequence[Content], metadata: Mapping[str, str]) -> bytes:
    found: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for content in contents:
        offsets = [start, start + content.size]
        found[content.name] = {
            "dtype": content.code,
            "shape": list(content.shape),
            "data_offsets": offsets,
        }
        start = offsets[1]
    text = json.dumps(found, separators=(",", ":")).encode()
    return text.ljust(len(text) + -len(text) % 8)
