"""From what a user writes to an opened source."""

from pathlib import Path
from typing import Any

from tvlens.errors import CheckpointError

from .files import ADAPTER_CONFIG, has_model
from .folder import Source, open_folder
from .gguf import SUFFIX, gguf_in, open_gguf
from .hub import snapshot
from .memory import open_model

DEMO = "demo:"


def open_source(spec: Any) -> Source:
    """The checkpoint or adapter that ``spec`` names; reads headers only.

    Args:
        spec: A folder, a GGUF file, ``org/model[@revision][#subfolder]``,
            ``demo:base|med|math|ctl``, or a model in memory (see ``memory``); a source is given
            back as it is.

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
        return _of_file(path)
    if path.is_dir() or isinstance(spec, Path) or _is_path(text):
        return _of_folder(path)
    found = snapshot(text)
    return open_folder(found.folder, text, revision=found.revision)


def _of_file(path: Path) -> Source:
    if path.suffix != SUFFIX:
        raise CheckpointError(f"{path} is a file.", hint="Give the folder that holds it.")
    return open_gguf(path, path.stem)


def _of_folder(path: Path) -> Source:
    """A folder's model or adapter; a GGUF file counts where there is nothing else."""
    if path.suffix == SUFFIX and not path.exists():
        raise CheckpointError(f"there is no file {path}.", hint="Check its path.")
    name = path.resolve().name
    other = has_model(path) or (path / ADAPTER_CONFIG).is_file()
    if not other and (found := gguf_in(path)) is not None:
        return open_gguf(found, name)
    return open_folder(path, name)


def _demo(spec: str) -> Path:
    from tvlens.demo.models import demo_folder

    try:
        return demo_folder(spec.removeprefix(DEMO))
    except ValueError as error:
        raise CheckpointError(f"{error}.", hint="Write demo:base or demo:med.") from error


def _is_path(text: str) -> bool:
    repository = text.split("#")[0].split("@")[0]
    begins = text.startswith((".", "/", "~"))
    return begins or text.endswith(SUFFIX) or repository.count("/") != 1
