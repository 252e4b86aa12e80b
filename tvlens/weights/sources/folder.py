"""A folder with safetensors files, opened by its headers and read one tensor at a time."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tvlens.errors import CheckpointError, UnsupportedFormatError

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
STORAGE = "tvlens_storage.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class TensorInfo(NamedTuple):
    """What a header says about a tensor.

    Attributes:
        dtype: ``float32``, ``bfloat16``, ... or the header's own word for what is no float.
        shape: Stored shape.
        file: File name inside the folder.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str


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
    """

    name: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo] = field(repr=False)
    is_adapter: bool = False
    revision: str | None = None
    rounding: dict[str, Any] | None = field(default=None, repr=False)

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
        info = self._info(name)
        try:
            with safe_open(self.folder / info.file, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _unreadable(self.folder / info.file, error) from error

    def read_rows(self, name: str, start: int, stop: int) -> Shaped[Tensor, "..."]:
        """Rows ``start`` to ``stop`` of one tensor in its stored dtype.

        Raises:
            CheckpointError: There is no such tensor, or its file cannot be read.
        """
        info = self._info(name)
        try:
            with safe_open(self.folder / info.file, framework="pt") as file:
                return file.get_slice(name)[start:stop]
        except (SafetensorError, OSError) as error:
            raise _unreadable(self.folder / info.file, error) from error

    def sha256(self) -> dict[str, str]:
        """The digest of each weight file and config."""
        config = ADAPTER_CONFIG if self.is_adapter else "config.json"
        digests: dict[str, str] = {}
        for name in [config, *self.files]:
            with (self.folder / name).open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return digests

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
    is_adapter = (folder / ADAPTER_CONFIG).is_file() and not _model_files(folder)
    config = read_json(folder / (ADAPTER_CONFIG if is_adapter else "config.json"))
    if not is_adapter:
        _refuse_quantised(config, folder)
    tensors: dict[str, TensorInfo] = {}
    for file in _adapter_files(folder) if is_adapter else _weight_files(folder):
        tensors |= _headers(folder, file)
    _refuse_missing(folder, tensors)
    rounding = None
    if (folder / STORAGE).is_file():
        rounding = read_json(folder / STORAGE).get("rounding")
    return Source(
        name, folder, config, tensors, is_adapter=is_adapter, revision=revision, rounding=rounding
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint.

    Raises:
        CheckpointError: The file is missing or holds no JSON object.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} has no {path.name}.",
            hint="A checkpoint folder holds config.json beside its safetensors files.",
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not JSON: {error}.", hint="Copy the file again."
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds {type(found).__name__}, expected a JSON object.")
    return found


def _model_files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("model*.safetensors"))


def _adapter_files(folder: Path) -> list[str]:
    if (folder / ADAPTER_WEIGHTS).is_file():
        return [ADAPTER_WEIGHTS]
    if (folder / "adapter_model.bin").is_file():
        raise UnsupportedFormatError(
            f"{folder} holds adapter_model.bin, a pickle, which tvlens does not open.",
            hint="Load it with peft and save_pretrained(..., safe_serialization=True).",
        )
    raise CheckpointError(
        f"{folder} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}.", hint="Copy the adapter again."
    )


def _weight_files(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        return _indexed_files(folder)
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if shards := _model_files(folder):
        raise CheckpointError(
            f"{folder} has {shards[0]} but no {INDEX}, which says what the shards hold.",
            hint="Copy the index file too.",
        )
    if (folder / "pytorch_model.bin").is_file() or (
        folder / "pytorch_model.bin.index.json"
    ).is_file():
        raise UnsupportedFormatError(
            f"{folder} holds pytorch_model.bin, a pickle, which tvlens does not open.",
            hint="Load it with transformers and save_pretrained(), which writes safetensors.",
        )
    raise CheckpointError(
        f"{folder} has no weights: expected {WEIGHTS} or {INDEX}.",
        hint="Give the folder that save_pretrained() wrote.",
    )


def _indexed_files(folder: Path) -> list[str]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map.", hint="Copy the index again.")
    files = sorted({str(file) for file in weight_map.values()})
    for file in files:
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or "\\" in file:
            raise CheckpointError(
                f"{folder / INDEX} names {file!r}, which leaves the folder.",
                hint="Do not use this checkpoint: its index points elsewhere.",
            )
        if not (folder / file).is_file():
            raise CheckpointError(
                f"{folder / INDEX} names the shard {file!r}, which is missing.",
                hint="Download the missing shard.",
            )
    return files


def _headers(folder: Path, file: str) -> dict[str, TensorInfo]:
    path = folder / file
    try:
        with safe_open(path, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            return {name: _header(part, file) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _header(part: Any, file: str) -> TensorInfo:
    dtype = str(part.get_dtype())
    return TensorInfo(DTYPES.get(dtype, dtype), tuple(part.get_shape()), file)


def _refuse_missing(folder: Path, tensors: dict[str, TensorInfo]) -> None:
    if not tensors:
        raise CheckpointError(f"the weight files of {folder} hold no tensor.")
    if not (folder / INDEX).is_file() or (folder / ADAPTER_WEIGHTS).is_file():
        return
    for name, file in read_json(folder / INDEX)["weight_map"].items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(
                f"{folder / INDEX} says {file} holds {name!r}, but it does not.",
                hint="Index and shards come from different saves; copy both again.",
            )


def _refuse_quantised(config: dict[str, Any], folder: Path) -> None:
    if quantisation := config.get("quantization_config"):
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        raise UnsupportedFormatError(
            f"{folder} holds quantised weights (quant_method {method!r}).",
            hint="Dequantise the model and save it in float32, float16 or bfloat16 first.",
        )


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read as safetensors: {error}.",
        hint="The file is truncated or corrupt; copy it again.",
    )
