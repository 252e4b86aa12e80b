"""From what a user writes to an opened source."""

from pathlib import Path
from typing import Any

from tvlens.errors import CheckpointError, UnsupportedFormatError

from .folder import Source, open_folder
from .hub import snapshot
from .memory import open_model

DEMO = "demo:"


def open_source(spec: Any) -> Source:
    """The checkpoint or adapter that ``spec`` names; reads headers only.

    Args:
        spec: A folder, ``org/model[@revision][#subfolder]``, ``demo:base|med|math|ctl``, or a
            model in memory (see ``memory``); a source is given back as it is.

    Raises:
        CheckpointError: It does not exist or cannot be read.
        UnsupportedFormatError: Its form is not one tvlens reads.
    """
    if isinstance(spec, Source):
        return spec
    if not isinstance(spec, str | Path):
        return open_model(spec)
    try:
        return _opened(spec)
    except OSError as error:
        raise CheckpointError(
            f"{spec} cannot be read: {error.strerror or error}.",
            hint="Check its path and its permissions.",
        ) from error


def _opened(spec: str | Path) -> Source:
    text = str(spec)
    if text.startswith(DEMO):
        return open_folder(_demo(text), text)
    path = Path(spec).expanduser()
    if path.is_file():
        raise _a_file(path)
    if path.is_dir() or isinstance(spec, Path) or _is_path(text):
        return open_folder(path, path.resolve().name)
    found = snapshot(text)
    return open_folder(found.folder, text, revision=found.revision)


def _demo(spec: str) -> Path:
    from tvlens.demo.models import demo_folder

    try:
        return demo_folder(spec.removeprefix(DEMO))
    except ValueError as error:
        raise CheckpointError(f"{error}.", hint="Write demo:base or demo:med.") from error


def _is_path(text: str) -> bool:
    repository = text.split("#")[0].split("@")[0]
    return text.startswith((".", "/", "~")) or repository.count("/") != 1


def _a_file(path: Path) -> CheckpointError:
    if path.suffix == ".gguf":
        return UnsupportedFormatError(
            f"{path} is a GGUF file, which tvlens does not read yet.",
            hint="Dequantise it with transformers and save_pretrained().",
        )
    return CheckpointError(f"{path} is a file.", hint="Give the folder that holds it.")
