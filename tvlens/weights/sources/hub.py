"""Checkpoints by hub id: ``org/model[@revision][#subfolder]``."""

import re
from pathlib import Path
from typing import NamedTuple

from tvlens.errors import CheckpointError

HUB_ID = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^#]+))?(#(?P<subfolder>.+))?$")
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""Configs, weights and tokenizers."""
PICKLES = ["pytorch_model*.bin", "adapter_model.bin"]
"""Weights that are fetched only where a repository has no safetensors."""


class Snapshot(NamedTuple):
    """A downloaded repository.

    Attributes:
        folder: Where its files lie.
        revision: The commit they belong to.
    """

    folder: Path
    revision: str


def snapshot(spec: str) -> Snapshot:
    """The files of a hub id, from the local cache where they are there.

    Raises:
        CheckpointError: ``spec`` is no hub id, or the hub cannot be reached or lacks it.
    """
    match = HUB_ID.match(spec)
    if match is None:
        raise CheckpointError(
            f"{spec!r} is neither a folder nor a hub id.",
            hint="Give a folder, org/model[@revision][#subfolder], or demo:base.",
        )
    subfolder = match["subfolder"] or ""
    if ".." in Path(subfolder).parts or Path(subfolder).is_absolute():
        raise CheckpointError(f"the subfolder {subfolder!r} of {spec!r} leaves the repository.")
    folder = _downloaded(spec, match["repo"], match["revision"], subfolder)
    return Snapshot(folder / subfolder, folder.name)


def _downloaded(spec: str, repo: str, revision: str | None, subfolder: str) -> Path:
    from huggingface_hub import snapshot_download

    def fetched(names: list[str]) -> Path:
        patterns = [f"{subfolder}/{name}" for name in names] if subfolder else names
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))

    try:
        folder = fetched(FILES)
        if not any((folder / subfolder).glob("*.safetensors")):
            folder = fetched([*FILES, *PICKLES])
    except Exception as error:  # the hub's client raises errors of four libraries
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"there is no folder {spec!r} here, and the hub did not give it: {reason}",
            hint="Check the spelling, or download it elsewhere and give its folder.",
        ) from error
    return folder
