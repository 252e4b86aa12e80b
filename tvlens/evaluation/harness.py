"""Tasks of EleutherAI's lm-eval, run by lm-eval itself on a model in memory.

The file of such a task is a YAML configuration of lm-eval with one ``task:`` in it, whose data lie
in local files. lm-eval (the extra ``lm-eval``) makes the prompts, runs the model through its
``HFLM`` and scores the answers; tvlens keeps its values of single documents, so that models and
doses are compared as on every other task.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tvlens.errors import HostError, PromptError
from tvlens.models.lens import LensModel
from tvlens.models.prompts import Chat
from tvlens.models.reading import MakesLogits

from .likelihood import ROWS
from .measures import Item
from .tasks import MEASURED, HarnessTask, Task

PACKAGE = "lm_eval"


@dataclass(frozen=True)
class ReadyHarness:
    """A task that lm-eval runs.

    Attributes:
        task: The task.
        path: Its YAML file.
        tokenizer: The tokenizer of the models.
        chat: Whether lm-eval puts its prompts into the chat template; its default is not to.
        warnings: What the reader should know.
    """

    task: Task
    path: Path
    tokenizer: Any = field(repr=False)
    chat: bool = False
    warnings: tuple[str, ...] = ()

    def items(self, lens: MakesLogits) -> Iterator[Item]:
        """The values of every document, of the measures that tvlens has a name for.

        Raises:
            HostError: The model is none that transformers runs.
            PromptError: lm-eval cannot load or run the task, or does not measure its metric.
        """
        wanted, samples = MEASURED["lm_eval"], self._samples(lens)
        if lacking := self._lacking(samples[0]):
            raise PromptError(lacking)
        for sample in samples:
            for name in wanted:
                if name in sample:
                    text = _written(sample) if name == wanted[-1] else None
                    yield Item(int(sample["doc_id"]), name, float(sample[name]), response=text)

    def _lacking(self, sample: dict[str, Any]) -> str:
        """What to say where a task measures nothing that is kept, or not what a curve shows."""
        there = [name for name in MEASURED["lm_eval"] if name in sample]
        if self.task.spec.primary in there:
            return ""
        given = f"it has {', '.join(there)}: name one as 'metric'" if there else "it has none kept"
        return f"{self.path.name}: lm-eval measures no {self.task.spec.primary!r} here; {given}."

    def _samples(self, lens: MakesLogits) -> list[dict[str, Any]]:
        """lm-eval's own rows, one a document, of one filter of answers."""
        from lm_eval import evaluator
        from lm_eval.tasks import TaskManager

        run: Any = evaluator.simple_evaluate  # its decorator hides its parameters
        manager = TaskManager(include_path=str(self.path.parent), include_defaults=False)
        with _harness_model(lens, self.tokenizer) as model:
            try:
                found = run(
                    model=model,
                    tasks=[str(self.path)],
                    limit=self.task.spec.limit,
                    task_manager=manager,
                    apply_chat_template=self.chat,
                    bootstrap_iters=0,
                )
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise PromptError(f"lm-eval cannot run {self.path.name}: {error}") from error
        samples = [row for rows in (found or {}).get("samples", {}).values() for row in rows]
        if not samples:
            raise PromptError(f"lm-eval found nothing to run in {self.path.name}.")
        there = list(dict.fromkeys(str(row.get("filter")) for row in samples))
        wanted = self.task.spec.filter or there[0]
        if wanted not in there:
            raise PromptError(_no_filter(self.path, wanted, there))
        return [row for row in samples if str(row.get("filter")) == wanted]


def read_harness_task(path: Path) -> HarnessTask:
    """What an lm-eval file says of itself.

    Raises:
        PromptError: It cannot be read, has no task, or lm-eval is not installed.
    """
    try:
        content = yaml.load(path.read_text("utf-8"), _Loader)
    except OSError as error:
        raise PromptError(f"cannot read {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PromptError(f"{path.name} is not YAML: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("task"), str):
        raise PromptError(f"{path.name} has no 'task': it is no task of lm-eval.")
    if importlib.util.find_spec(PACKAGE) is None:
        raise PromptError("lm-eval is not installed: pip install 'tvlens[lm-eval]'.")
    return HarnessTask(content["task"], path, _filters(content))


def _filters(content: dict[str, Any]) -> tuple[str, ...]:
    """Names of the filters; a file that includes another may leave them to it."""
    listed = content.get("filter_list")
    entries = listed if isinstance(listed, list) else []
    return tuple(str(one["name"]) for one in entries if isinstance(one, dict) and "name" in one)


def _no_filter(path: Path, wanted: str, there: Sequence[str]) -> str:
    return f"{path.name} has no filter {wanted!r}; it has {', '.join(there)}."


class _Loader(yaml.SafeLoader):
    """YAML whose ``!function`` tags are passed over: lm-eval resolves them."""


def _passed_over(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    return str(getattr(node, "value", ""))


_Loader.add_constructor("!function", _passed_over)


def ready_harness(task: Task, tokenizer: Any, chat: Chat) -> ReadyHarness:
    """A task of lm-eval; in the chat template only where that was asked for by ``on``."""
    (one,) = task.items.values()
    if not isinstance(one, HarnessTask):
        raise TypeError(f"expected a task of lm-eval, got {one!r}.")
    wanted, warnings = task.spec.filter, ()
    if wanted and one.filters and wanted not in one.filters:
        raise PromptError(_no_filter(one.path, wanted, one.filters))
    if wanted is None and len(one.filters) > 1:
        named = ", ".join(one.filters)
        warnings = (f"it has the filters {named}: the first counts; 'filter' names another.",)
    return ReadyHarness(task, one.path, tokenizer, chat == "on", warnings)


@contextmanager
def _harness_model(lens: MakesLogits, tokenizer: Any) -> Iterator[Any]:
    """lm-eval's view of a model, edits and hooks included.

    lm-eval ties the embeddings of a model that it is given. Where an edit has parted them that
    would undo it, so it is kept from doing so.

    Raises:
        HostError: The model is none that transformers runs, or the tokenizer has no end of text.
    """
    from lm_eval.models import huggingface

    harness: Any = huggingface.HFLM  # its parameters are those of its metaclass to a type checker
    model = getattr(lens.model, "original_model", None) if isinstance(lens, LensModel) else None
    if model is None:
        raise HostError(
            "lm-eval runs models of transformers; this one is not.",
            hint="Use a TransformerBridge, with the edit in its weights.",
        )
    if tokenizer.eos_token_id is None:
        raise HostError("lm-eval needs a tokenizer with a token for the end of text.")
    model.tie_weights = _nothing
    try:
        yield harness(pretrained=model, tokenizer=tokenizer, batch_size=ROWS)
    finally:
        del model.tie_weights


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Ties nothing."""


def _written(sample: dict[str, Any]) -> str | None:
    """What the model wrote, where it had to write."""
    answers = sample.get("filtered_resps") or [None]
    return answers[0] if isinstance(answers[0], str) else None
