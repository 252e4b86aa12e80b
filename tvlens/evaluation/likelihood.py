"""Measures that read probabilities: losses of texts, distance to other models, choices.

Rows are sorted by length and run in chunks; a chunk's logits exist once and only at the tokens
that count. Distances to the base and to the tuned model keep those models' logits at the same
places: texts x tokens x vocabulary numbers in float32, which ``BYTES`` bounds.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.errors import BudgetError
from tvlens.models.metrics import SHIPPED, Run
from tvlens.models.prompts import Batch, Chat, Prompt, PromptSet, tokenised
from tvlens.models.reading import MakesLogits, Reading

from .measures import Item
from .tasks import Question, Task

ROWS = 32  # texts a forward pass: about 2,000 tokens, past which two CPU cores gain nothing
BYTES = 4 * 2**30  # of reference logits: fits beside a model where the model itself fits


@dataclass(frozen=True)
class ReadyTexts:
    """Texts whose loss is measured.

    Attributes:
        task: The task.
        parts: The texts in chunks; ``numbers`` are their numbers in the file.
        sizes: Bytes of what counts of each text, by number.
        warnings: What tokenising them says.
    """

    task: Task
    parts: list[Batch] = field(repr=False)
    sizes: Mapping[int, int] = field(repr=False)
    warnings: tuple[str, ...] = ()

    def items(self, lens: MakesLogits) -> Iterator[Item]:
        """Loss, perplexity and bits per byte of every text."""
        for part in self.parts:
            reading = Reading.of(SHIPPED["loss"], part)
            with torch.no_grad():
                losses = reading.value(reading.logits(lens)).double().cpu()
            for number, loss, count in zip(
                part.numbers, losses.tolist(), part.n_scored.tolist(), strict=True
            ):
                size = self.sizes[number]
                yield Item(number, "loss", loss)
                yield Item(number, "perplexity", loss, weight=count)
                bits = loss * count / (size * math.log(2))
                yield Item(number, "bits_per_byte", bits, weight=size)


@dataclass(frozen=True)
class ReadyDistances:
    """Texts on which a model is compared with others.

    Attributes:
        task: The task.
        parts: The texts in chunks.
        references: Logits of ``base`` and ``tuned`` at the tokens that count, chunk by chunk.
        warnings: What tokenising them says.
    """

    task: Task
    parts: list[Batch] = field(repr=False)
    references: Mapping[str, list[Tensor]] = field(default_factory=dict, repr=False)
    warnings: tuple[str, ...] = ()

    def with_reference(self, name: str, lens: MakesLogits) -> "ReadyDistances":
        """The same with the logits of ``base`` or ``tuned``.

        Raises:
            BudgetError: They would take more than ``BYTES``.
        """
        readings = [Reading.of(SHIPPED["loss"], part) for part in self.parts]
        held: list[Tensor] = []
        for reading in readings:
            with torch.no_grad():
                held.append(reading.logits(lens).float().cpu())
            if (taken := sum(4 * logits.numel() for logits in held)) > BYTES:
                raise BudgetError(
                    f"{self.task.spec.name}: the logits of {name} take more than "
                    f"{taken / 2**30:.1f} GiB.",
                    hint="Give the task a limit, or shorter texts.",
                )
        return replace(self, references={**self.references, name: held})

    def items(self, lens: MakesLogits) -> Iterator[Item]:
        """KL from each reference, and how often the likeliest token is its likeliest."""
        for place, part in enumerate(self.parts):
            reading = Reading.of(SHIPPED["loss"], part)
            with torch.no_grad():
                logits = reading.logits(lens).float().cpu()
            for name, held in self.references.items():
                run = Run(logits, held[place])
                kl = SHIPPED[f"kl_to_{name}"](run, reading.cut).double()
                agreed = _agreement(logits, held[place], reading.cut).double()
                for number, distance, same in zip(
                    part.numbers, kl.tolist(), agreed.tolist(), strict=True
                ):
                    yield Item(number, f"kl_to_{name}", distance)
                    yield Item(number, f"agree_{name}", same)


def _agreement(
    logits: Float[Tensor, "batch read d_vocab"],
    other: Float[Tensor, "batch read d_vocab"],
    cut: Batch,
) -> Float[Tensor, " batch"]:
    """Share of scored tokens at which two models' likeliest next token is the same."""
    same = (logits.argmax(-1) == other.argmax(-1))[:, :-1] & cut.scored[:, 1:]
    return same.sum(1).float() / cut.n_scored


@dataclass(frozen=True)
class ReadyChoices:
    """Questions answered by the likelihood of each choice.

    Attributes:
        task: The task.
        parts: One row for each choice, in chunks; ``numbers`` are rows.
        rows: For each row its question's number and the choice's place.
        warnings: What tokenising them says.
    """

    task: Task
    parts: list[Batch] = field(repr=False)
    rows: list[tuple[int, int]] = field(repr=False)
    warnings: tuple[str, ...] = ()

    def items(self, lens: MakesLogits) -> Iterator[Item]:
        """Accuracy by summed log p and per byte, and the right choice's log share."""
        found: dict[int, dict[int, float]] = {}
        for part in self.parts:
            reading = Reading.of(SHIPPED["logprob"], part)
            with torch.no_grad():
                values = reading.value(reading.logits(lens)).double().tolist()
            for row, value in zip(part.numbers, values, strict=True):
                question, place = self.rows[row]
                found.setdefault(question, {})[place] = value
        for number, question in self.task.items.items():
            if isinstance(question, Question):
                yield from _judged(number, question, found[number])


def _judged(number: int, question: Question, logprobs: Mapping[int, float]) -> Iterator[Item]:
    sums = torch.tensor([logprobs[place] for place in range(len(question.choices))]).double()
    sizes = torch.tensor([len(choice.encode()) for choice in question.choices]).double()
    yield Item(number, "acc", float(int(sums.argmax()) == question.right))
    yield Item(number, "acc_norm", float(int((sums / sizes).argmax()) == question.right))
    yield Item(number, "choice_logprob", float(sums.log_softmax(0)[question.right]))


def ready_texts(task: Task, tokenizer: Any, chat: Chat) -> ReadyTexts:
    """The texts of a ``loss`` task, tokenised."""
    batch = _tokenised(task, tokenizer, chat)
    sizes = {
        number: len((prompt.answer or prompt.prompt).encode())
        for number, prompt in task.items.items()
        if isinstance(prompt, Prompt)
    }
    return ReadyTexts(task, sorted_chunks(batch), sizes, tuple(batch.warnings))


def ready_distances(task: Task, tokenizer: Any, chat: Chat) -> ReadyDistances:
    """The texts of a ``kl`` task, tokenised."""
    batch = _tokenised(task, tokenizer, chat)
    return ReadyDistances(task, sorted_chunks(batch), warnings=tuple(batch.warnings))


def ready_choices(task: Task, tokenizer: Any, chat: Chat) -> ReadyChoices:
    """The questions of a ``choice`` task, a row for each choice."""
    rows, prompts = [], []
    for number, question in task.items.items():
        if isinstance(question, Question):
            for place, choice in enumerate(question.choices):
                rows.append((number, place))
                prompts.append(Prompt(question.prompt, answer=choice))
    batch = tokenised(PromptSet(tuple(prompts), task.spec.file), tokenizer, chat=chat)
    return ReadyChoices(task, sorted_chunks(batch), rows, tuple(batch.warnings))


def _tokenised(task: Task, tokenizer: Any, chat: Chat) -> Batch:
    prompts = tuple(item for item in task.items.values() if isinstance(item, Prompt))
    batch = tokenised(PromptSet(prompts, task.spec.file), tokenizer, chat=chat)
    return replace(batch, numbers=list(task.items))


def sorted_chunks(batch: Batch, rows: int = ROWS) -> list[Batch]:
    """The rows by length, in chunks: little of a pass is padding."""
    order: Sequence[int] = batch.lengths.argsort(stable=True).tolist()
    return [batch.rows(order[start : start + rows]) for start in range(0, len(order), rows)]
