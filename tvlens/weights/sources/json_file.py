"""JSON files of a checkpoint: configs, indices, storage notes."""

import json
from pathlib import Path
from typing import Any

from tvlens.errors import CheckpointError

LARGEST = 1 << 26
"""Bytes; the index of the largest published models is a few million."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint.

    Raises:
        CheckpointError: The file is missing, too large, or holds no JSON object with distinct keys.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} has no {path.name}.",
            hint="A checkpoint folder holds config.json beside its weight files.",
        )
    if (size := path.stat().st_size) > LARGEST:
        raise CheckpointError(
            f"{path} has {size} bytes, which no {path.name} needs.", hint="Copy the file again."
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_distinct)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not JSON: {error}.", hint="Copy the file again."
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path} holds {type(found).__name__}, expected a JSON object.",
            hint="Copy the file again.",
        )
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it gives {next(n for n in names if names.count(n) > 1)!r} twice")
    return found
