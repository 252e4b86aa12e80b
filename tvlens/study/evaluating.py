"""Tasks on any models, side by side: tables in a folder, without a pair or a study plan."""

import platform
import shlex
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tvlens.errors import StudyError
from tvlens.evaluation.suite import (
    Measured,
    Ready,
    Variant,
    evaluation_tables,
    measured,
    ready,
    warnings_of,
    with_reference,
)
from tvlens.evaluation.tasks import load_tasks
from tvlens.models.lens import LensModel, refuse_gguf
from tvlens.models.pair import tokenizer_in
from tvlens.models.prompts import Chat
from tvlens.tables import Table
from tvlens.weights.sources.opening import open_source

from .plan import name_of
from .store import MANIFEST, prepared_folder, write_json

if TYPE_CHECKING:
    from tvlens.evaluation.tasks import Task
    from tvlens.weights.sources.folder import Source

Progress = Callable[[str], None]


def evaluate(
    models: Sequence[str],
    tasks: str,
    out: Path,
    *,
    names: Sequence[str] = (),
    chat: Chat = "auto",
    device: str = "cpu",
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> Table:
    """Measure every model on every task and write ``evaluation`` and ``evaluation_items``.

    The others are compared with the first, item by item; distances (``kl``) are from it too. An
    adapter is put on the first model.

    Args:
        models: Specifications.
        tasks: The task file.
        out: The folder to write; made if absent.
        names: Names in the tables, one each.
        chat: Whether prompts go through the chat template.
        device: Where the models run.
        seed: Seed of the bootstrap.
        force: Replace the tables of other models in ``out``.
        progress: Called with one line for each model.

    Raises:
        StudyError: Two models are called the same, or the folder holds others.
        TvlensError: A model or a task cannot be used.
    """
    say = progress or (lambda text: None)
    called = _names(models, names)
    found = load_tasks(tasks)
    sources = [open_source(spec) for spec in models]
    for source in sources:
        refuse_gguf(source.folder)
    inputs = {name: source.sha256() for name, source in zip(called, sources, strict=True)}
    prepared_folder(out, inputs, force=force)
    results, warnings = _measured(sources, called, found, chat=chat, device=device, say=say)
    evaluation, items = evaluation_tables(
        results, found, against=called[0] if called[1:] else None, seed=seed
    )
    for table in (evaluation, items):
        table.save(out)
    write_json(
        out / MANIFEST,
        {
            "format": 1,
            "versions": {"python": platform.python_version(), **_versions()},
            "command": _command(models, tasks, names, chat=chat, seed=seed),
            "inputs": inputs,
            "seed": seed,
            "device": device,
            "tasks": [task.spec.model_dump(mode="json") for task in found],
            "warnings": warnings,
        },
    )
    return evaluation


def _measured(
    sources: "Sequence[Source]",
    names: Sequence[str],
    tasks: "list[Task]",
    *,
    chat: Chat,
    device: str,
    say: Progress,
) -> tuple[list[Measured], list[str]]:
    first = sources[0]
    results: list[Measured] = []
    warnings: list[str] = []
    shared: list[Ready] = []
    for source, name in zip(sources, names, strict=True):
        say(f"tasks: {name}")
        lens = _lens(source, first, device)
        if not shared:
            shared = _prepared(source, first, tasks, chat)
            shared = with_reference(shared, "base", lens)
            warnings += warnings_of(shared)
            prepared = shared
        elif _same_tokenizer(source, first):
            prepared = shared
        else:
            warnings.append(
                f"{name} has another tokenizer than {names[0]}: losses by token do not compare "
                "(bits_per_byte does), and distances are left out."
            )
            apart = [task for task in tasks if task.spec.kind != "kl"]
            prepared = _prepared(source, first, apart, chat)
        found = measured(Variant(name), lens, prepared)
        missing = {task.spec.name: [] for task in tasks if task.spec.name not in found.items}
        results.append(Measured(found.variant, {**found.items, **missing}))
    return results, warnings


def _prepared(source: "Source", first: "Source", tasks: "list[Task]", chat: Chat) -> list[Ready]:
    return ready(tasks, tokenizer_in((source.folder, first.folder)), chat=chat)


def _lens(source: "Source", first: "Source", device: str) -> LensModel:
    if not source.is_adapter:
        return LensModel.load(source.folder, device=device, dtype=torch.float32)
    if source is first:
        raise StudyError(
            f"{source.name} is an adapter, and an adapter alone computes nothing.",
            hint="Give its base first: tvlens evaluate BASE ADAPTER.",
        )
    return LensModel.load(first.folder, adapter=source.folder, device=device)


def _same_tokenizer(source: "Source", first: "Source") -> bool:
    mine, other = (tokenizer_in((one.folder,)) for one in (source, first))
    if mine is None or other is None:
        return True  # one of them is read with the other's
    return mine.get_vocab() == other.get_vocab()


def _names(models: Sequence[str], names: Sequence[str]) -> list[str]:
    called = list(names) or [name_of(spec) for spec in models]
    if len(called) != len(models):
        raise StudyError(f"{len(models)} models but {len(called)} names.")
    if len(set(called)) != len(called):
        raise StudyError(
            f"two models are called the same: {', '.join(called)}.",
            hint="Give each a name with --name.",
        )
    return called


def _command(
    models: Sequence[str], tasks: str, names: Sequence[str], *, chat: Chat, seed: int
) -> str:
    """The command line that measures the same again."""
    named = [word for name in names for word in ("--name", name)]
    words = ["tvlens", "evaluate", *models, "--tasks", tasks, *named, "--chat", chat]
    return shlex.join([*words, "--seed", str(seed), "--out", "DIR"])


def _versions() -> dict[str, Any]:
    return {name: version(name) for name in ("tvlens", "torch", "transformer-lens", "transformers")}
