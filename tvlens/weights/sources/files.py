"""Which files of a folder hold the weights: one file, shards with an index, or an adapter's file.

safetensors go before pickles and one file before shards, which is the order of transformers, so
that weights and hooked models come from the same files; a folder that holds more than one of them
is noted.
"""

import os
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tvlens.errors import CheckpointError

from .json_file import read_json

ADAPTER_CONFIG = "adapter_config.json"


class Form(NamedTuple):
    """One way of storing a model's weights.

    Attributes:
        single: The file's name where there is one.
        index: The index's name where there are shards.
        pattern: What all of its weight files match.
        adapter: The file's name in an adapter's folder.
    """

    single: str
    index: str
    pattern: str
    adapter: str


FORMS = (
    Form(
        "model.safetensors",
        "model.safetensors.index.json",
        "model*.safetensors",
        "adapter_model.safetensors",
    ),
    Form(
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "pytorch_model*.bin",
        "adapter_model.bin",
    ),
)


class WeightFiles(NamedTuple):
    """The weight files of a folder.

    Attributes:
        names: File names.
        index: Name of the index file, empty where there is one weight file.
        shards: File by tensor, as the index says; empty without one.
        notes: Sentences on other weight files that are not read.
    """

    names: list[str]
    index: str
    shards: dict[str, str]
    notes: tuple[str, ...]


def has_model(folder: Path) -> bool:
    """Whether a folder holds weights of a whole model."""
    return any(True for form in FORMS for _ in folder.glob(form.pattern))


def adapter_files(folder: Path) -> WeightFiles:
    """The weight file of an adapter.

    Raises:
        CheckpointError: There is none.
    """
    found = [form.adapter for form in FORMS if (folder / form.adapter).is_file()]
    if not found:
        raise CheckpointError(
            f"{folder} has {ADAPTER_CONFIG} but no {FORMS[0].adapter}.",
            hint="Copy the adapter again.",
        )
    return WeightFiles(found[:1], "", {}, _note_of_others(folder, found))


def model_files(folder: Path) -> WeightFiles:
    """The weight files of a model.

    Raises:
        CheckpointError: There are none, or an index does not fit them.
    """
    names = [name for form in FORMS for name in (form.single, form.index)]
    found = [name for name in names if (folder / name).is_file()]
    if not found:
        raise _nothing(folder)
    notes = _note_of_others(folder, found)
    if not found[0].endswith(".json"):
        return WeightFiles(found[:1], "", {}, notes)
    shards = _shards(folder, found[0])
    return WeightFiles(sorted(set(shards.values())), found[0], shards, notes)


def _note_of_others(folder: Path, found: list[str]) -> tuple[str, ...]:
    if not found[1:]:
        return ()
    others = " and ".join(found[1:])
    return (f"{folder.name} holds {found[0]} beside {others}; only {found[0]} is read.",)


def _nothing(folder: Path) -> CheckpointError:
    for form in FORMS:
        if shards := sorted(path.name for path in folder.glob(form.pattern)):
            return CheckpointError(
                f"{folder} has {shards[0]} but no {form.index}, which says what the shards hold.",
                hint="Copy the index file too.",
            )
    return CheckpointError(
        f"{folder} has no weights: expected {', '.join(form.single for form in FORMS)} or an "
        "index of shards.",
        hint="Give the folder that save_pretrained() wrote.",
    )


def _shards(folder: Path, index: str) -> dict[str, str]:
    shards = read_json(folder / index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{folder / index} has no weight_map.", hint="Copy the index again.")
    suffix = ".bin" if ".bin." in index else ".safetensors"
    for file in sorted(set(map(str, shards.values()))):
        _refuse_elsewhere(folder, index, file)
        if not (folder / file).is_file():
            raise CheckpointError(
                f"{folder / index} names the shard {file!r}, which is missing.",
                hint="Download the missing shard.",
            )
        if not file.endswith(suffix):
            raise CheckpointError(
                f"{folder / index} names {file!r}, expected files that end in {suffix}.",
                hint="Copy the index again.",
            )
    return shards


def _refuse_elsewhere(folder: Path, index: str, file: str) -> None:
    """Neither by its name nor through a link may a shard lie outside the checkpoint.

    The hub's cache is the exception: its snapshots link to the ``blobs`` beside them.
    """
    path = PurePosixPath(file)
    home = Path(os.path.realpath(folder))
    caches = [p.parent / "blobs" for p in (home, *home.parents) if p.name == "snapshots"]
    target = Path(os.path.realpath(folder / file.replace("\0", "")))
    inside = any(target.is_relative_to(root) for root in (home, *caches))
    if path.is_absolute() or ".." in path.parts or "\\" in file or "\0" in file or not inside:
        raise CheckpointError(
            f"{folder / index} names {file!r}, which leaves the folder.",
            hint="Give a folder that holds its own shards, or copy them into it.",
        )
