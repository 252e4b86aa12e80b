"""A GGUF file as a source: opened by its header, read one tensor at a time.

Values are what transformers makes of the file with ``from_pretrained(gguf_file=...)``, bit for bit.
A step is the distance between the values that a block can hold: what rounding to it costs is
``step**2 / 12``, as for the spacing of a float. Where a K-type's scale of a sub-block is itself
rounded to zero, its entries have the step zero and count as exact.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int, UInt8
from torch import Tensor

from tvlens.errors import CheckpointError, UnsupportedFormatError

from .folder import Source, TensorInfo
from .gguf_blocks import FLOATS, neighbours, values
from .gguf_header import Header, StoredBlocks, gguf_header
from .gguf_names import Names, names_of

SUFFIX = ".gguf"
Rows = UInt8[np.ndarray, "row byte"]
Reading = Callable[[Rows, str], Float32[np.ndarray, "row entry"]]


@dataclass(frozen=True, eq=False)
class GgufSource(Source):
    """A GGUF file; ``folder`` is the path of the file itself.

    Attributes:
        stored: Where each tensor lies, by its checkpoint name.
        named: Names in the file by checkpoint name.
        reads: What transformers knows about the file.
    """

    stored: Mapping[str, StoredBlocks] = field(kw_only=True, repr=False)
    named: Mapping[str, str] = field(kw_only=True, repr=False)
    reads: Names = field(kw_only=True, repr=False)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the file holds a tokenizer."""
        return self.tokens is not None

    def read(self, name: str) -> Float32[Tensor, "..."]:
        """One tensor, dequantised.

        Raises:
            CheckpointError: There is no such tensor, or the file cannot be read.
        """
        shape = self._info(name).shape
        return torch.from_numpy(self._whole(name, values)).reshape(shape)

    def read_rows(self, name: str, start: int, stop: int) -> Float32[Tensor, "..."]:
        """Rows ``start`` to ``stop`` of one tensor, dequantised.

        Raises:
            CheckpointError: There is no such tensor, or the file cannot be read.
        """
        shape = self._info(name).shape
        if (order := self._order(name)) is None:
            return self.read(name)[start:stop]
        rows = values(self._bytes(name)[order[start:stop]], self.stored[name].kind)
        return torch.from_numpy(rows).reshape(-1, *shape[1:])

    def has_steps(self, name: str) -> bool:
        """Whether a tensor is stored in blocks, or as floats that a constant was added to."""
        stored, original = self.stored[name], self.named[name]
        return stored.kind not in FLOATS or self.reads.is_shifted(original, stored.shape)

    def read_steps(self, name: str, start: int, stop: int) -> Float32[Tensor, "..."]:
        """The steps of rows ``start`` to ``stop`` of one tensor, in weight units.

        Raises:
            CheckpointError: There is no such tensor, or the file cannot be read.
        """
        shape, kind = self._info(name).shape, self.stored[name].kind
        if (order := self._order(name)) is not None:
            rows = self._bytes(name)[order[start:stop]]
            steps = np.abs(neighbours(rows, kind) - values(rows, kind))
            return torch.from_numpy(steps).reshape(-1, *shape[1:])
        steps = np.abs(self._whole(name, neighbours) - self._whole(name, values))
        return torch.from_numpy(steps).reshape(shape)[start:stop]

    def sha256(self) -> dict[str, str]:
        """The digest of the file."""
        with self.folder.open("rb") as file:
            return {self.folder.name: hashlib.file_digest(file, "sha256").hexdigest()}

    def _whole(self, name: str, reading: Reading) -> Float32[np.ndarray, "..."]:
        """A tensor as the model has it."""
        stored, original = self.stored[name], self.named[name]
        found = reading(self._bytes(name), stored.kind)
        found = self.reads.restored(found.reshape(stored.shape), original)
        if found.size != math.prod(self.tensors[name].shape):
            raise CheckpointError(
                f"{self.folder} gives {original} the shape {stored.shape}, its model "
                f"{self.tensors[name].shape}.",
                hint="Copy the file again.",
            )
        return np.ascontiguousarray(found, dtype=np.float32)

    def _bytes(self, name: str) -> Rows:
        """The rows of a tensor, still in the file; every axis but the last makes rows."""
        stored = self.stored[name]
        count = math.prod(stored.shape[:-1])
        shape = (count, stored.size // count)
        try:
            return np.memmap(self.folder, np.uint8, "r", offset=stored.offset, shape=shape)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder} cannot be read any more: {error}.", hint="Did it change?"
            ) from error

    def _order(self, name: str) -> Int[np.ndarray, " row"] | None:
        """The rows of the file that rows of a tensor are, None where it must be read whole."""
        return self.reads.row_order(self.named[name], self.stored[name].shape)


def gguf_in(folder: Path) -> Path | None:
    """The GGUF file of a folder, None where there is none.

    Raises:
        UnsupportedFormatError: There are several.
    """
    found = sorted(path for path in folder.glob(f"*{SUFFIX}") if path.is_file())
    if len(found) > 1:
        raise UnsupportedFormatError(
            f"{folder} holds {len(found)} GGUF files, {found[0].name} among them.",
            hint="Give the path of one of them; parts are joined with llama-gguf-split --merge.",
        )
    return found[0] if found else None


def open_gguf(path: Path, name: str) -> GgufSource:
    """The model in a GGUF file.

    Raises:
        CheckpointError: The file is truncated, or not what its name says.
        UnsupportedFormatError: Blocks or an architecture that are not read, or gguf is missing.
    """
    if find_spec("gguf") is None:
        raise UnsupportedFormatError(
            f"{path} is a GGUF file, and the package that reads its blocks is not installed.",
            hint="pip install 'tvlens[gguf]'.",
        )
    header = gguf_header(path)
    reads = names_of(path, header)
    named = {reads.names.get(original, original): original for original in header.tensors}
    stored = {found: header.tensors[original] for found, original in named.items()}
    tensors = {found: _info(path, reads, named[found], blocks) for found, blocks in stored.items()}
    return GgufSource(
        name,
        path,
        reads.config,
        tensors,
        notes=_notes(name, header),
        tokens=reads.tokens,
        stored=stored,
        named=named,
        reads=reads,
    )


def _info(path: Path, reads: Names, original: str, blocks: StoredBlocks) -> TensorInfo:
    """What tables say of a tensor; the model's shape where the tensor is stored in another one."""
    shape = reads.shapes.get(reads.names.get(original, ""), blocks.shape)
    by_row = reads.row_order(original, blocks.shape) is not None
    other = by_row or math.prod(shape) != math.prod(blocks.shape)
    kind = FLOATS.get(blocks.kind, blocks.kind)
    return TensorInfo(kind, blocks.shape if other else shape, path.name, blocks.size)


def _notes(name: str, header: Header) -> tuple[str, ...]:
    kinds = sorted({blocks.kind for blocks in header.tensors.values()} - FLOATS.keys())
    if not kinds:
        return ()
    return (
        f"{name} is block-quantised ({', '.join(kinds)}): its rounding is part of every "
        "difference, and what is no larger than that has no label.",
    )
