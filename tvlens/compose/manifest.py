"""``tvlens_manifest.json``: what a merged folder was made from, and what it holds.

It names inputs as they were given, so that ``tvlens verify`` finds them again, with the sha256 of
each of their files; method, scales and selection; what rounding lost; and the sha256 of every file
that was written. It holds no date: the same inputs give the same bytes.
"""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tvlens.errors import CheckpointError, UnsupportedFormatError
from tvlens.weights.sources.json_file import read_json

MANIFEST = "tvlens_manifest.json"
FORMAT = 1
_STRICT = ConfigDict(frozen=True, extra="forbid")


class InputRecord(BaseModel):
    """A model or vector that went in."""

    model_config = _STRICT
    name: str
    given: str
    kind: str
    scale: float | None = None
    weighted: bool = False
    revision: str | None = None
    sha256: dict[str, str]


class RoundingRecord(BaseModel):
    """What storing lost: relative to the change's length, and in entries."""

    model_config = _STRICT
    relative: float
    share_of_entries_lost: float
    entries: int


class AdapterRecord(BaseModel):
    """What an adapter of limited rank lost, by matrix, and what it cannot hold."""

    model_config = _STRICT
    rank: int
    relative_error: float
    by_tensor: dict[str, float]
    left_out: dict[str, float]
    left_out_share_of_squared_norm: float


class Manifest(BaseModel):
    """The content of the file."""

    model_config = _STRICT
    format: int = FORMAT
    made_by: str
    versions: dict[str, str]
    command: str
    kind: Literal["checkpoint", "adapter"]
    name: str
    base: InputRecord
    terms: tuple[InputRecord, ...]
    method: str
    density: float
    seed: int
    selection: str
    dtype: str
    config_changes: dict[str, Any]
    changed: tuple[str, ...]
    rounding: RoundingRecord
    rounding_by_tensor: dict[str, RoundingRecord]
    adapter: AdapterRecord | None = None
    files: dict[str, str]
    untouched_files: tuple[str, ...]

    @property
    def stored_as(self) -> str:
        """How weights are stored, as the end of a sentence."""
        return "in the base's dtypes" if self.dtype == "stored" else f"as {self.dtype}"

    def save(self, folder: Path) -> Path:
        """Write it into a folder."""
        path = folder / MANIFEST
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return path


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a folder that ``tvlens apply`` wrote.

    Raises:
        CheckpointError: There is no folder or manifest, or it does not hold together.
        UnsupportedFormatError: It is of another format.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no folder {folder}.", hint="Give what `tvlens apply` wrote."
        )
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST}, so it was not written by `tvlens apply`.",
            hint="Give the folder that it wrote.",
        )
    content = read_json(folder / MANIFEST)
    if content.get("format") != FORMAT:
        raise UnsupportedFormatError(
            f"{folder / MANIFEST} has format {content.get('format')!r}; this tvlens reads {FORMAT}."
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{folder / MANIFEST} does not hold together: {reason}.") from error


def versions() -> dict[str, str]:
    """The versions that a merged weight may depend on."""
    found = {"python": platform.python_version()}
    for package in ("tvlens", "torch", "safetensors", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "from source"
    return found
