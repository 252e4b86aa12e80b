"""``pytorch_model.bin``: tensors out of a pickle, without running what a pickle may hold.

Only ``torch.load(weights_only=True)`` opens it, which builds tensors and refuses every other call,
and with ``mmap=True``, so that the numbers stay in the file until they are read.
"""

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.nn import Parameter

from tvlens.errors import CheckpointError, UnsupportedFormatError

LARGEST_PROGRAM = 1 << 28
"""Bytes of the pickle proper; a name and a shape take about a hundred a tensor."""
ZIP = b"PK\x03\x04"
NEEDS_CODE = re.compile(r"(?:GLOBAL|class|function) ([\w.]+)")
CONVERT = "Load it with transformers and save_pretrained(), which writes safetensors."


def pickled_tensors(path: Path) -> dict[str, Shaped[Tensor, "..."]]:
    """Every tensor of a PyTorch file by name, mapped and not yet read.

    Raises:
        CheckpointError: The file is truncated, corrupt, or claims more than it holds.
        UnsupportedFormatError: It needs code, is in the format before PyTorch 1.6, or holds
            more than a flat state dict.
    """
    _refuse_other_containers(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # garbage makes an unpickler raise anything
        raise _unreadable(path, error) from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise _no_state_dict(path, type(found).__name__)
    return {name: _refused_or_plain(path, name, value) for name, value in found.items()}


def _refuse_other_containers(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(ZIP))
    if start != ZIP and start[:1] == b"\x80":
        raise UnsupportedFormatError(
            f"{path} is a pickle in the format before PyTorch 1.6, which cannot be read in parts.",
            hint="Rewrite it: torch.save(torch.load(path, weights_only=True), path).",
        )
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception as error:  # zipfile does not say what a garbled directory raises
        raise _unreadable(path, error) from error
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.file_size > size:
            raise CheckpointError(
                f"{path} claims {record.file_size} bytes for {record.filename!r}, compressed or "
                f"more than the file's {size}.",
                hint="PyTorch did not write this; copy the file again.",
            )
        if record.filename.endswith(".pkl") and record.file_size > LARGEST_PROGRAM:
            raise UnsupportedFormatError(
                f"{path} has a pickle of {record.file_size} bytes, far beyond a list of tensors.",
                hint=CONVERT,
            )


def _refused_or_plain(path: Path, name: str, value: Any) -> Shaped[Tensor, "..."]:
    if type(value) not in (Tensor, Parameter):
        raise _no_state_dict(path, f"{type(value).__name__} under {name!r}")
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        raise UnsupportedFormatError(
            f"{path} stores {name!r} as a sparse, quantised or meta tensor.", hint=CONVERT
        )
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path} claims shape {tuple(value.shape)} for {name!r}, more than it stores.",
            hint="The file is corrupt; copy it again.",
        )
    return value.detach()


def _no_state_dict(path: Path, found: str) -> UnsupportedFormatError:
    return UnsupportedFormatError(
        f"{path} holds {found}, expected a flat dict of tensors.",
        hint="Save model.state_dict() alone, or use save_pretrained().",
    )


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    if found := NEEDS_CODE.search(str(error)):
        return UnsupportedFormatError(
            f"{path} is a pickle that needs {found[1]!r} to run, and tvlens runs no code from a "
            "checkpoint.",
            hint=CONVERT,
        )
    return CheckpointError(
        f"{path} cannot be read as a PyTorch file ({type(error).__name__}).",
        hint="The file is truncated or corrupt; copy it again.",
    )
