"""Tasks: what a model is measured on, from local files alone.

A task file is a YAML list; the file of a task is looked for beside it:

    - {name: medical, kind: loss, file: medical.txt}
    - {name: exam, kind: choice, file: exam.jsonl, split: judge, metric: acc_norm}

``name``, ``kind`` and ``file`` are needed; ``split`` (all, choose, judge), ``metric`` (the measure
that a curve shows), ``limit`` (the first so many items), ``max_new_tokens``, ``until`` (texts that
end an answer) and ``domain`` (the fine-tune that learnt it; where vectors are combined, a task of
none is elsewhere) are not. What the files hold:

================  ============================================================================
loss, kl          documents (.txt) or JSON lines with ``prompt`` and ``answer``
choice            JSON lines with ``prompt``, ``choices`` and ``answer`` (a place from 0, a letter
                  or the text); or ``prompt``, ``answer`` and ``wrong``
choice_generated  the same, asked with lettered options and answered in writing
exact             JSON lines with ``prompt`` and ``answer`` (worked: the last number counts)
generation        JSON lines with ``prompt`` and perhaps ``answer``, then a reference
instructions      JSON lines with ``prompt``, ``instruction_id_list`` and ``kwargs``, as IFEval's
lm_eval           a YAML task of lm-eval with data in local files, which lm-eval itself runs
================  ============================================================================

``demo:med`` is a shipped file (texts for loss, kl and generation, questions for the others) and
``shipped:instructions`` the instructions written for tvlens.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tvlens.errors import PromptError
from tvlens.models.prompts import Prompt, PromptSet, load_prompts, load_texts, split_of

from .answers import LETTERS
from .instructions import Constraint, constraint

Kind = Literal[
    "loss",
    "kl",
    "choice",
    "choice_generated",
    "exact",
    "generation",
    "instructions",
    "lm_eval",
]
MEASURED: Mapping[Kind, tuple[str, ...]] = {
    "loss": ("loss", "perplexity", "bits_per_byte"),
    "kl": ("kl_to_base", "kl_to_tuned", "agree_base", "agree_tuned"),
    "choice": ("acc", "acc_norm", "choice_logprob"),
    "choice_generated": ("said", "valid"),
    "exact": ("exact", "strict"),
    "generation": (
        *("rep_4", "distinct_1", "distinct_2", "loop", "length", "ended", "chrf", "rouge_l"),
    ),
    "instructions": (
        *("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose"),
    ),
    "lm_eval": ("acc", "acc_norm", "exact_match"),
}
"""The measures of a kind; the first one is its metric where none is given."""
WRITTEN: tuple[Kind, ...] = ("choice_generated", "exact", "generation", "instructions")
"""Kinds for which a model has to write."""
INSTRUCTIONS = Path(__file__).parent / "data" / "instructions.jsonl"


class TaskSpec(BaseModel):
    """One entry of a task file.

    Attributes:
        name: What tables call the task.
        kind: What is measured.
        file: The items.
        split: Only the items of this split.
        metric: The measure that a curve shows; None for the first of the kind.
        limit: Only the first so many items.
        max_new_tokens: Tokens that may be written.
        until: An answer ends before any of these texts.
        domain: Name of the fine-tune whose domain it is; None where it is of none.
        filter: Of lm-eval's filters of answers the one that counts; None for the first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    kind: Kind
    file: str = Field(min_length=1)
    split: Literal["all", "choose", "judge"] = "all"
    metric: str | None = None
    limit: int | None = Field(default=None, ge=1)
    max_new_tokens: int = Field(default=64, ge=1)
    until: tuple[str, ...] = ()
    domain: str | None = Field(default=None, min_length=1)
    filter: str | None = Field(default=None, min_length=1)

    @property
    def primary(self) -> str:
        """The measure that stands for the task."""
        return self.metric or MEASURED[self.kind][0]


@dataclass(frozen=True)
class Question:
    """A question with choices.

    Attributes:
        prompt: The question.
        choices: The choices, each as it would continue the prompt.
        right: Place of the right one.
        split: ``choose`` or ``judge``.
    """

    prompt: str
    choices: tuple[str, ...]
    right: int
    split: str


@dataclass(frozen=True)
class Instruction:
    """A prompt with constraints that can be checked.

    Attributes:
        prompt: The prompt.
        constraints: What is asked.
        split: ``choose`` or ``judge``.
    """

    prompt: str
    constraints: tuple[Constraint, ...]
    split: str


@dataclass(frozen=True)
class HarnessTask:
    """A task of lm-eval, whose documents lm-eval reads.

    Attributes:
        name: What lm-eval calls it.
        path: Its YAML file.
        filters: The names of its filters of answers, as far as this file says.
        split: None is known: its documents are all measured.
    """

    name: str
    path: Path
    filters: tuple[str, ...] = ()
    split: str = "all"


TaskItem = Prompt | Question | Instruction | HarnessTask


@dataclass(frozen=True)
class Task:
    """A task with its items read.

    Attributes:
        spec: What was asked.
        items: The items of its split, by their number in the file.
    """

    spec: TaskSpec
    items: dict[int, TaskItem]


def load_tasks(spec: str | Path) -> list[Task]:
    """Read a task file and all the files that it names.

    Args:
        spec: The YAML file, or ``demo:med``, ``demo:math``.

    Raises:
        PromptError: Something is wrong; everything that is, is named at once.
    """
    path = _task_file(spec)
    specs = _specs(path)
    tasks, bad = [], []
    for one in specs:
        try:
            tasks.append(_task(one, path.parent))
        except PromptError as error:
            bad.append(f"{one.name}: {error}")
    if bad:
        raise PromptError(f"{path.name} cannot be used: {' '.join(bad)}")
    return tasks


def _task_file(spec: str | Path) -> Path:
    if not str(spec).startswith("demo:"):
        return Path(spec)
    from tvlens.demo.models import DATA

    path = DATA / f"tasks_{str(spec).removeprefix('demo:')}.yaml"
    if not path.is_file():
        there = ", ".join(
            sorted(f"demo:{p.stem.removeprefix('tasks_')}" for p in _demo_tasks(DATA))
        )
        raise PromptError(f"there are no tasks {str(spec)!r}.", hint=f"The demo has {there}.")
    return path


def _demo_tasks(folder: Path) -> Iterator[Path]:
    yield from folder.glob("tasks_*.yaml")


def _specs(path: Path) -> list[TaskSpec]:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
        specs = TypeAdapter(list[TaskSpec]).validate_python(content)
    except OSError as error:
        raise PromptError(f"cannot read the tasks {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PromptError(f"{path} is not YAML: {error}") from error
    except ValidationError as error:
        raise PromptError(f"{path.name} has {_faults(error)}.", hint=_HINT) from error
    bad = [text for one in specs if (text := _refused(one))]
    names = [one.name for one in specs]
    bad += [f"two tasks are called {name!r}" for name in names if names.count(name) > 1][:1]
    if bad or not specs:
        raise PromptError(f"{path.name}: {'; '.join(bad) or 'no task'}.", hint=_HINT)
    return specs


_HINT = (
    f"A task is {{name, kind, file, split, metric, domain}}; kinds are {', '.join(get_args(Kind))}."
)


def _faults(error: ValidationError) -> str:
    faults = []
    for fault in error.errors():
        place = [str(step) for step in fault["loc"]]
        where = f"task {int(place[0]) + 1}" if place and place[0].isdigit() else "the list"
        faults.append(f"{where}{' ' + '.'.join(place[1:]) if place[1:] else ''}: {fault['msg']}")
    return "; ".join(faults)


def _refused(spec: TaskSpec) -> str:
    if spec.filter is not None and spec.kind != "lm_eval":
        return f"{spec.name}: only tasks of kind lm_eval have a filter"
    if spec.metric is None or spec.metric in MEASURED[spec.kind]:
        return ""
    measured = ", ".join(MEASURED[spec.kind])
    return f"{spec.name}: {spec.kind} has no metric {spec.metric!r}; it has {measured}"


def _task(spec: TaskSpec, folder: Path) -> Task:
    items = _READERS[spec.kind](spec, folder)
    kept = {i: one for i, one in enumerate(items) if spec.split in ("all", one.split)}
    numbers = list(kept)[: spec.limit]
    if not numbers:
        raise PromptError(f"{spec.file} has no item of the split {spec.split!r}.")
    return Task(spec, {i: kept[i] for i in numbers})


def _file(spec: TaskSpec, folder: Path) -> str | Path:
    """A shipped file by its name, any other beside the task file."""
    return spec.file if spec.file.startswith("demo:") else folder / spec.file


def _texts(spec: TaskSpec, folder: Path) -> list[Prompt]:
    return list(load_texts(_file(spec, folder)))


def _answered(spec: TaskSpec, folder: Path) -> list[Prompt]:
    found: PromptSet = load_prompts(_file(spec, folder))
    if not found.all_have("answer"):
        raise PromptError(f"{spec.file}: every line needs an 'answer'.")
    return list(found)


def _questions(spec: TaskSpec, folder: Path) -> list[Question]:
    path = _file(spec, folder)
    if isinstance(path, str):
        return [_two_choices(prompt) for prompt in load_prompts(path)]
    return _lines(path, _question)


def _instructions(spec: TaskSpec, folder: Path) -> list[Instruction]:
    path = INSTRUCTIONS if spec.file == "shipped:instructions" else folder / spec.file
    return _lines(path, _instruction)


def _of_harness(spec: TaskSpec, folder: Path) -> list[HarnessTask]:
    from .harness import read_harness_task

    if spec.split != "all":
        raise PromptError(f"{spec.file}: lm-eval's documents have no splits; leave 'split' out.")
    return [read_harness_task((folder / spec.file).expanduser())]


_READERS: Mapping[Kind, Callable[[TaskSpec, Path], list[Any]]] = {
    "loss": _texts,
    "kl": _texts,
    "choice": _questions,
    "choice_generated": _questions,
    "exact": _answered,
    "generation": _texts,
    "instructions": _instructions,
    "lm_eval": _of_harness,
}


def _lines(path: Path, read: Callable[[dict[str, Any]], Any]) -> list[Any]:
    """The items of JSON lines; all bad lines are named at once."""
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise PromptError(f"cannot read {path}: {error.strerror}.") from error
    found, bad = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
                raise PromptError("expected an object with a 'prompt'")
            found.append(read(entry))
        except json.JSONDecodeError as error:
            bad.append(f"line {number}: not JSON ({error.msg})")
        except PromptError as error:
            bad.append(f"line {number}: {error}")
    if bad:
        raise PromptError(f"{path.name} has {len(bad)} bad lines: {'; '.join(bad)}.")
    return found


def _question(entry: dict[str, Any]) -> Question:
    if "choices" not in entry:
        answer, wrong = entry.get("answer"), entry.get("wrong")
        if not (isinstance(answer, str) and isinstance(wrong, str)):
            raise PromptError("neither 'choices' nor 'answer' and 'wrong'")
        return _two_choices(Prompt(entry["prompt"], answer, wrong, split=_split(entry)))
    choices = entry["choices"]
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise PromptError("'choices' must be a list of texts")
    if not 2 <= len(choices) <= len(LETTERS):
        raise PromptError(f"{len(choices)} choices, expected 2 to {len(LETTERS)}")
    return Question(
        entry["prompt"], tuple(choices), _right(entry.get("answer"), choices), _split(entry)
    )


def _right(answer: object, choices: list[str]) -> int:
    """The place that an answer names: itself, a letter's, or its text's."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str):
        texts = [choice.strip() for choice in choices]
        if answer.strip() in texts:
            return texts.index(answer.strip())
        if len(answer) == 1 and answer in LETTERS[: len(choices)]:
            return LETTERS.index(answer)
    raise PromptError(f"'answer' is {answer!r}, expected a choice's place, letter or text")


def _two_choices(prompt: Prompt) -> Question:
    """The right and the wrong answer in an order that depends on the prompt alone."""
    if prompt.answer is None or prompt.wrong is None:
        raise PromptError("every line needs 'answer' and 'wrong'")
    swapped = hashlib.sha256(prompt.prompt.encode()).digest()[1] % 2
    pair = (prompt.answer, prompt.wrong)
    return Question(prompt.prompt, pair[::-1] if swapped else pair, swapped, prompt.split)


def _split(entry: dict[str, Any]) -> str:
    split = entry.get("split") or split_of(entry.get("group") or entry["prompt"])
    if split not in ("choose", "judge"):
        raise PromptError(f"'split' is {split!r}, expected choose or judge")
    return split


def _instruction(entry: dict[str, Any]) -> Instruction:
    names, arguments = entry.get("instruction_id_list"), entry.get("kwargs")
    if not isinstance(names, list) or not names:
        raise PromptError("no 'instruction_id_list'")
    if not isinstance(arguments, list) or len(arguments) != len(names):
        raise PromptError("'kwargs' must be a list with one entry a constraint")
    asked = tuple(
        constraint(str(n), given or {}) for n, given in zip(names, arguments, strict=True)
    )
    return Instruction(entry["prompt"], asked, _split(entry))
