"""A folder with weight files, opened by its headers and read one tensor at a time."""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float32, Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tvlens.errors import CheckpointError

from .files import ADAPTER_CONFIG, WeightFiles, adapter_files, has_model, model_files
from .json_file import read_json
from .pickled import pickled_tensors
from .quantised import refuse_quantised_config, refuse_quantised_tensors

STORAGE = "tvlens_storage.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
LARGEST_STEP = 1e18
"""Its square is still a float32."""
LFS_POINTER = b"version https://git-lfs"


class TensorInfo(NamedTuple):
    """What a header says about a tensor.

    Attributes:
        dtype: ``float32``, ``bfloat16``, ... or the header's own word for what is no float.
        shape: Stored shape.
        file: File name inside the folder.
        size: Bytes in the file where its blocks set them, None where the dtype does.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    size: int | None = None

    @property
    def pickled(self) -> bool:
        """Whether the file is PyTorch's own, not safetensors."""
        return self.file.endswith(".bin")

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensor in its file: the number at the end of a dtype's name is its bits."""
        if self.size is not None:
            return self.size
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(bits[0]) // 8 if bits else 1)


@dataclass(frozen=True, eq=False)
class Source:
    """Weights that can be read a tensor at a time; opening it reads headers only.

    Attributes:
        name: What reports call it.
        folder: Where it lies.
        config: config.json, or adapter_config.json of an adapter.
        tensors: Every stored tensor by name.
        is_adapter: The folder holds low-rank factors, not a model.
        revision: The hub commit, None for a folder.
        rounding: How the weights were rounded before they were stored, from
            tvlens_storage.json; None where the file is absent.
        notes: Sentences on what the folder holds besides and is not read.
        tokens: Token strings by number where the weight file itself has a tokenizer.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo] = field(repr=False)
    is_adapter: bool = False
    revision: str | None = None
    rounding: dict[str, Any] | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()
    tokens: dict[int, str] | None = field(default=None, repr=False)
    _pickles: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    _opened: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder holds a tokenizer."""
        return any((self.folder / name).is_file() for name in TOKENIZER_FILES)

    @property
    def adapter_beside(self) -> bool:
        """Whether a model's folder also holds an adapter, which is not read."""
        return not self.is_adapter and (self.folder / ADAPTER_CONFIG).is_file()

    @property
    def files(self) -> list[str]:
        """Names of the weight files, sorted."""
        return sorted({info.file for info in self.tensors.values()})

    def read(self, name: str) -> Shaped[Tensor, "..."]:
        """One tensor in its stored dtype.

        Raises:
            CheckpointError: There is no such tensor, or its file cannot be read.
        """
        return self._whole(name, self._info(name))

    def read_rows(self, name: str, start: int, stop: int) -> Shaped[Tensor, "..."]:
        """Rows ``start`` to ``stop`` of one tensor in its stored dtype; all of them are not copied.

        Raises:
            CheckpointError: There is no such tensor, or its file cannot be read.
        """
        info = self._info(name)
        if (start, stop) == (0, info.shape[0]):
            return self._whole(name, info)
        if info.pickled:
            return self._mapped(info.file, name)[start:stop].contiguous().clone()
        try:
            return self._file(info.file).get_slice(name)[start:stop]
        except (SafetensorError, OSError) as error:
            raise _unreadable(self.folder / info.file, error) from error

    def _whole(self, name: str, info: TensorInfo) -> Shaped[Tensor, "..."]:
        if info.pickled:
            return self._mapped(info.file, name).contiguous().clone()
        try:
            return self._file(info.file).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _unreadable(self.folder / info.file, error) from error

    def has_steps(self, name: str) -> bool:
        """Whether a tensor was rounded otherwise than its dtype says, as blocks are."""
        return False

    def read_steps(self, name: str, start: int, stop: int) -> Float32[Tensor, "..."]:
        """How far apart the values lie that rows can hold, in weight units.

        Raises:
            CheckpointError: The tensor has no steps but those of its dtype.
        """
        raise CheckpointError(f"{name} of {self.name} is {self._info(name).dtype}, not blocks.")

    def sha256(self) -> dict[str, str]:
        """The digest of each weight file and config."""
        config = ADAPTER_CONFIG if self.is_adapter else "config.json"
        digests: dict[str, str] = {}
        for name in [config, *self.files]:
            with (self.folder / name).open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return digests

    def _file(self, name: str) -> Any:
        """A safetensors file, opened once: its header is read again at every opening."""
        if name not in self._opened:
            self._opened[name] = safe_open(self.folder / name, framework="pt")
        return self._opened[name]

    def _mapped(self, file: str, name: str) -> Shaped[Tensor, "..."]:
        """A pickled tensor, still in the file."""
        if file not in self._pickles:
            self._pickles[file] = pickled_tensors(self.folder / file)
        return self._pickles[file][name]

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.name} has no tensor {name!r}; it has {len(self.tensors)} others."
            )
        return self.tensors[name]


def open_folder(folder: Path, name: str, *, revision: str | None = None) -> Source:
    """The checkpoint or adapter in ``folder``.

    Raises:
        CheckpointError: A file is missing, truncated or not what its name says.
        UnsupportedFormatError: Weights in a form that tvlens does not read.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no folder {folder}.",
            hint="Give a Hugging Face checkpoint folder, a hub id org/model, or demo:base.",
        )
    is_adapter = (folder / ADAPTER_CONFIG).is_file() and not has_model(folder)
    config = read_json(folder / (ADAPTER_CONFIG if is_adapter else "config.json"))
    if not is_adapter:
        refuse_quantised_config(folder, config)
    files = adapter_files(folder) if is_adapter else model_files(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in files.names:
        tensors |= _headers(folder, file)
    _refuse_missing(folder, files, tensors)
    refuse_quantised_tensors(folder, {name: info.dtype for name, info in tensors.items()})
    return Source(
        name,
        folder,
        config,
        tensors,
        is_adapter=is_adapter,
        revision=revision,
        rounding=_rounding(folder, tensors),
        notes=files.notes,
    )


def _headers(folder: Path, file: str) -> dict[str, TensorInfo]:
    path = folder / file
    if file.endswith(".bin"):
        found = pickled_tensors(path)
        return {
            name: TensorInfo(str(t.dtype).removeprefix("torch."), tuple(t.shape), file)
            for name, t in found.items()
        }
    try:
        with safe_open(path, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            return {name: _header(part, file) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _header(part: Any, file: str) -> TensorInfo:
    dtype = str(part.get_dtype())
    return TensorInfo(DTYPES.get(dtype, dtype), tuple(part.get_shape()), file)


def _refuse_missing(folder: Path, files: WeightFiles, tensors: dict[str, TensorInfo]) -> None:
    if not tensors:
        raise CheckpointError(
            f"the weight files of {folder} hold no tensor.", hint="Copy the checkpoint again."
        )
    for name, file in files.shards.items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(
                f"{folder / files.index} says {file} holds {name!r}, but it does not.",
                hint="Index and shards come from different saves; copy both again.",
            )


def _rounding(folder: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
    """What the storage note says: a dtype, and a step or a list of steps by tensor."""
    if not (folder / STORAGE).is_file():
        return None
    rounding = read_json(folder / STORAGE).get("rounding")
    if rounding is None or _is_rounding(rounding, tensors):
        return rounding
    raise CheckpointError(
        f"{folder / STORAGE} notes a rounding that does not fit the weights.",
        hint="Copy the file again, or remove it if the weights were not rounded otherwise.",
    )


def _is_rounding(rounding: Any, tensors: Mapping[str, TensorInfo]) -> bool:
    if not isinstance(rounding, dict) or not isinstance(rounding.get("dtype", ""), str):
        return False
    steps = rounding.get("step") or {}
    return isinstance(steps, dict) and all(
        _is_step(step, tensors[name].shape) for name, step in steps.items() if name in tensors
    )


def _is_step(step: Any, shape: tuple[int, ...]) -> bool:
    """Whether a step is a number, a list with one a row, or an object with their ``rms``."""
    if isinstance(step, list):
        fits = len(step) == shape[0] if shape else False
        return fits and all(map(_is_distance, step))
    return _is_distance(step.get("rms") if isinstance(step, dict) else step)


def _is_distance(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < LARGEST_STEP


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    if _starts_with(path, LFS_POINTER):
        return CheckpointError(
            f"{path} is a pointer of git-lfs, not the file itself.", hint="Run `git lfs pull`."
        )
    return CheckpointError(
        f"{path} cannot be read as safetensors: {error}.",
        hint="The file is truncated or corrupt; copy it again.",
    )


def _starts_with(path: Path, start: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(start)) == start
    except OSError:
        return False
