"""Measures that read what a model writes: answers, choices, instructions, quality."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tvlens.models.generation import Continuation, continued
from tvlens.models.prompts import Chat, Prompt, prompt_ids
from tvlens.models.reading import MakesLogits

from .answers import chosen, is_exact, is_strict, with_options
from .instructions import judged
from .measures import Item
from .tasks import HarnessTask, Instruction, Kind, Question, Task
from .texts import likeness, missing_packages, quality


@dataclass(frozen=True)
class ReadyWriting:
    """Prompts that a model continues.

    Attributes:
        task: The task.
        ids: The prompts' tokens, in the order of the task's items.
        tokenizer: Reads what was written; its end-of-text token ends it.
        warnings: Measures that will be missing, and why.
    """

    task: Task
    ids: list[list[int]] = field(repr=False)
    tokenizer: Any = field(repr=False)
    warnings: tuple[str, ...] = ()

    def items(self, lens: MakesLogits) -> Iterator[Item]:
        """The rows of every prompt, with what was written on one of them."""
        spec, end = self.task.spec, self.tokenizer.eos_token_id
        made = continued(
            lens, self.ids, max_new_tokens=spec.max_new_tokens, stop=() if end is None else (end,)
        )
        judge = _JUDGES[spec.kind]
        for (number, item), continuation in zip(self.task.items.items(), made, strict=True):
            text = self.tokenizer.decode(continuation.ids, skip_special_tokens=True)
            yield from judge(number, item, _until(text, spec.until), continuation)


def _until(text: str, ends: tuple[str, ...]) -> str:
    """The text before the first of ``ends`` that is in it."""
    return text[: min((place for end in ends if (place := text.find(end)) >= 0), default=None)]


def _answer(number: int, item: Prompt, text: str, made: Continuation) -> Iterator[Item]:
    answer = item.answer or ""
    yield Item(number, "exact", float(is_exact(text, answer)), response=text)
    yield Item(number, "strict", float(is_strict(text, answer)))


def _choice(number: int, item: Question, text: str, made: Continuation) -> Iterator[Item]:
    named = chosen(text, item.choices)
    yield Item(number, "said", float(named == item.right), response=text)
    yield Item(number, "valid", float(named is not None))


def _constraints(number: int, item: Instruction, text: str, made: Continuation) -> Iterator[Item]:
    yield from judged(number, text, item.constraints)


def _quality(number: int, item: Prompt, text: str, made: Continuation) -> Iterator[Item]:
    found = dict(quality(text, made.ids, ended=made.ended))
    if item.answer is not None:
        found.update(likeness(text, item.answer.strip()))
    for name, value in found.items():
        yield Item(number, name, value, response=text if name == "length" else None)


_JUDGES: Mapping[Kind, Callable[[int, Any, str, Continuation], Iterator[Item]]] = {
    "choice_generated": _choice,
    "exact": _answer,
    "generation": _quality,
    "instructions": _constraints,
}


def ready_writing(task: Task, tokenizer: Any, chat: Chat) -> ReadyWriting:
    """The prompts of a task whose answers are written, tokenised."""
    texts = [
        with_options(item.prompt, item.choices) if isinstance(item, Question) else item.prompt
        for item in task.items.values()
        if not isinstance(item, HarnessTask)
    ]
    return ReadyWriting(task, prompt_ids(texts, tokenizer, chat=chat), tokenizer, _missing(task))


def _missing(task: Task) -> tuple[str, ...]:
    """What will not be measured because a package is missing."""
    referred = any(isinstance(i, Prompt) and i.answer is not None for i in task.items.values())
    if task.spec.kind != "generation" or not referred:
        return ()
    return tuple(
        f"{task.spec.name}: {measure} is not measured: the package {package} is not installed "
        "(pip install 'tvlens[eval]')."
        for measure, package in missing_packages().items()
    )
