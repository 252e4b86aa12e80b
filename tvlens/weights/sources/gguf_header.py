"""The header of a GGUF file, read with every length held against the file.

The readers of ``gguf`` and transformers believe what a file says, and an array that claims 2**62
entries has no end; so nothing reaches them before this has walked over all of it. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tvlens.errors import CheckpointError, UnsupportedFormatError

from .gguf_blocks import FLOATS, LOWEST_BITS

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = "BbHhIif?  Qqd"
"""``struct`` formats by the number of a type; the two gaps are strings and arrays."""
STRING, ARRAY = 8, 9
MOST_ENTRIES = 1 << 22
"""Of all arrays together: four lists over the largest vocabularies have a quarter of this."""
MOST_DIMENSIONS = 4
ALIGNMENT = 32
_COPY = "The file is truncated or corrupt; copy it again."
_OTHER_TYPE = (
    "Requantise the model as one of " + ", ".join(LOWEST_BITS) + ", f16 or bf16, or compare the "
    "checkpoint that it was made from."
)


class StoredBlocks(NamedTuple):
    """Where a tensor lies in a GGUF file.

    Attributes:
        kind: ggml's name of its type in lower case: ``f32``, ``q4_k``, ...
        shape: Rows first, as torch has it.
        offset: Its first byte in the file.
        size: Its length in bytes.
    """

    kind: str
    shape: tuple[int, ...]
    offset: int
    size: int


class Header(NamedTuple):
    """What a GGUF file says of itself.

    Attributes:
        settings: Its numbers and strings by key; lists are left out.
        tensors: Every tensor by its name in the file.
    """

    settings: dict[str, Any]
    tensors: dict[str, StoredBlocks]


def gguf_header(path: Path) -> Header:
    """The header of a GGUF file.

    Raises:
        CheckpointError: The file is truncated, or lies about what it holds.
        UnsupportedFormatError: A version, a byte order or a type of blocks that is not read.
        OSError: The file cannot be opened.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise _broken(path, "it does not begin as one")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                return _header(_Cursor(path, content))
            except UnicodeDecodeError as error:
                raise _broken(path, "a name in it is no text") from error


class _Cursor:
    """A place in a file that moves on with everything that is read."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.place = path, content, len(MAGIC)
        self.entries = 0

    def number(self, form: str) -> Any:
        """The next number of a ``struct`` format."""
        form = f"<{form}"
        start = self.skip(struct.calcsize(form))
        return struct.unpack_from(form, self.content, start)[0]

    def text(self) -> str:
        """The next string."""
        length = self.number("Q")
        start = self.skip(length)
        return self.content[start : start + length].decode("utf-8")

    def skip(self, length: int) -> int:
        """Go past so many bytes; where they began."""
        start = self.place
        if length > len(self.content) - start:
            raise _broken(self.path, f"it ends before byte {start + length}")
        self.place = start + length
        return start


def _header(at: _Cursor) -> Header:
    version = at.number("I")
    if version not in VERSIONS:
        raise UnsupportedFormatError(
            f"{at.path} is GGUF of version {version} or of the other byte order; tvlens reads "
            f"versions {' and '.join(map(str, VERSIONS))}, low bytes first.",
            hint="Convert the model again with a current llama.cpp.",
        )
    count, keys = at.number("Q"), at.number("Q")
    settings: dict[str, Any] = {}
    for _ in range(keys):
        key = at.text()
        if key in settings:
            raise _broken(at.path, f"it gives {key[:80]!r} twice")
        settings[key] = _value(at, at.number("I"))
    found: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(count):
        name = at.text()
        if name in found:
            raise _broken(at.path, f"it holds {name[:80]!r} twice")
        found[name] = _entry(at)
    return Header(settings, _placed(at, settings, found))


def _value(at: _Cursor, kind: int) -> Any:
    """A setting; None for a list, which is only walked over."""
    if kind == STRING:
        return at.text()
    if kind == ARRAY:
        return _walk_list(at)
    return at.number(_scalar(at, kind))


def _scalar(at: _Cursor, kind: int) -> str:
    form = SCALARS[kind : kind + 1].strip()
    if not form:
        raise _broken(at.path, f"it has a setting of type {kind}")
    return form


def _walk_list(at: _Cursor) -> None:
    kind, length = at.number("I"), at.number("Q")
    at.entries += length
    if at.entries > MOST_ENTRIES:
        raise _broken(at.path, f"it claims a list of {length} entries")
    if kind != STRING:
        at.skip(length * struct.calcsize(f"<{_scalar(at, kind)}"))
        return
    for _ in range(length):
        at.text()


def _entry(at: _Cursor) -> tuple[int, tuple[int, ...], int]:
    """Number of the type, shape and relative offset of the next tensor."""
    dimensions = at.number("I")
    if not 0 < dimensions <= MOST_DIMENSIONS:
        raise _broken(at.path, f"it has a tensor of {dimensions} dimensions")
    shape = tuple(at.number("Q") for _ in range(dimensions))[::-1]
    return at.number("I"), shape, at.number("Q")


def _placed(
    at: _Cursor, settings: Mapping[str, Any], found: Mapping[str, tuple[int, tuple[int, ...], int]]
) -> dict[str, StoredBlocks]:
    """The tensors with their bytes, all of which the file must hold."""
    alignment = settings.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise _broken(at.path, f"it gives {str(alignment)[:40]!r} as its alignment")
    start = -(-at.place // alignment) * alignment
    placed: dict[str, StoredBlocks] = {}
    for name, (number, shape, offset) in found.items():
        kind, entries, size = _block(at.path, name, number)
        total = math.prod(shape)
        length = total // entries * size
        if not total or shape[-1] % entries:
            raise _broken(
                at.path, f"it gives {name[:80]!r} the shape {shape} in blocks of {entries}"
            )
        if start + offset + length > len(at.content):
            raise _broken(at.path, f"{name[:80]!r} ends beyond its {len(at.content)} bytes")
        placed[name] = StoredBlocks(kind, shape, start + offset, length)
    return placed


def _block(path: Path, name: str, number: int) -> tuple[str, int, int]:
    """Name of a type, and entries and bytes of its blocks."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    known = {int(kind): kind for kind in GGMLQuantizationType}
    kind = known[number].name.lower() if number in known else f"type {number}"
    if kind not in FLOATS and kind not in LOWEST_BITS:
        raise UnsupportedFormatError(
            f"{path} stores {name[:80]!r} as {kind.upper()}, whose blocks tvlens does not read.",
            hint=_OTHER_TYPE,
        )
    return kind, *GGML_QUANT_SIZES[known[number]]


def _broken(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read as GGUF: {reason}.", hint=_COPY)
