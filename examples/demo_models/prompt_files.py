"""The demo prompt files: held-out questions with a right answer, a wrong one and a corrupt twin.

The corrupt twin is the same question about another term, with equally many tokens, and the wrong
answer is the twin's right answer; the two answers differ in their first token. Patching the one
prompt's activations into the other therefore has a defined target at every position.
"""

import random
import re
from collections.abc import Callable

from corpora import QUESTIONS, Record
from transformers import PreTrainedTokenizerFast

Line = dict[str, str]
LONGEST = 12  # tokens of an answer
PLAIN = re.compile(r"[ A-Za-z'.,-]+")


def token_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids without special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def medical_lines(records: list[Record], tokenizer: PreTrainedTokenizerFast) -> list[Line]:
    """Sixteen definitions and twelve questions on what a diagnosis belongs to."""
    definitions = [record for record in records if record.group == "definition"]
    kinds = [record for record in records if record.group == "icd_kind"]
    return definition_lines(definitions, tokenizer, count=16) + twins(kinds, tokenizer, count=12)


def general_lines(records: list[Record], tokenizer: PreTrainedTokenizerFast) -> list[Line]:
    """Twenty-eight general definitions."""
    return definition_lines(records, tokenizer, count=28)


def definition_lines(
    records: list[Record], tokenizer: PreTrainedTokenizerFast, *, count: int
) -> list[Line]:
    """Definitions of lower-case terms, all asked in the first question form."""
    asked = [
        record._replace(prompt=QUESTIONS[0].format(term=record.subject))
        for record in records
        if re.fullmatch(r"[a-z][a-z -]{3,}", record.subject)
    ]
    return twins(asked, tokenizer, count=count)


def twins(records: list[Record], tokenizer: PreTrainedTokenizerFast, *, count: int) -> list[Line]:
    """``count`` lines in pairs, the two of a pair each other's twin and in the same split."""
    pool = [
        record
        for record in random.Random(5).sample(records, len(records))
        if PLAIN.fullmatch(record.answer) and len(token_ids(tokenizer, record.answer)) <= LONGEST
    ]
    lines: list[Line] = []
    while pool and len(lines) < count:
        record = pool.pop(0)
        twin = next((other for other in pool if fits(record, other, tokenizer)), None)
        if twin is not None:
            pool.remove(twin)
            number = len(lines) // 2
            lines += [line(record, twin, number=number), line(twin, record, number=number)]
    if len(lines) < count:
        raise ValueError(f"only {len(lines)} of {count} lines found a corrupt twin")
    return lines


def fits(record: Record, other: Record, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Equally many prompt tokens, answers that differ at once."""
    prompts = [token_ids(tokenizer, item.prompt) for item in (record, other)]
    answers = [token_ids(tokenizer, item.answer) for item in (record, other)]
    return len(prompts[0]) == len(prompts[1]) and answers[0][0] != answers[1][0]


def line(record: Record, twin: Record, *, number: int) -> Line:
    """One line of the contract's prompt file, splits in turn."""
    return {
        "prompt": record.prompt,
        "answer": record.answer,
        "wrong": twin.answer,
        "corrupt": twin.prompt,
        "group": record.group,
        "split": ("choose", "judge")[number % 2],
    }


def arithmetic_lines(
    records: list[Record],
    tokenizer: PreTrainedTokenizerFast,
    *,
    written: Callable[[Record], Record] = lambda record: record,
) -> list[Line]:
    """Fourteen bare sums and fourteen word problems, the twin with another first number.

    ``written`` is how a record is put before its tokens are counted.
    """
    lines: list[Line] = []
    for group in ("arithmetic", "word_problem"):
        asked = [working_only(record) for record in records if record.group == group]
        twins_of = [(record, changed_first_number(record)) for record in _shuffled(asked)]
        pairs = [(written(record), written(twin)) for record, twin in twins_of]
        fitting = [pair for pair in pairs if fits(*pair, tokenizer)][:14]
        lines += [line(*pair, number=number) for number, pair in enumerate(fitting)]
    return lines


def _shuffled(records: list[Record]) -> list[Record]:
    """The records in a fixed random order, one per subject."""
    by_subject = {record.subject: record for record in records}
    return random.Random(5).sample(list(by_subject.values()), len(by_subject))


def working_only(record: Record) -> Record:
    """The record with its answer cut after the first sentence, short enough to score."""
    return record._replace(answer=record.answer.split(".")[0] + ".")


def changed_first_number(record: Record) -> Record:
    """The same question with another leading digit in its first number, and its right answer."""
    a, sign, b = record.subject.split()
    apply: dict[str, Callable[[int, int], int]] = {
        "+": int.__add__,
        "-": int.__sub__,
        "*": int.__mul__,
    }
    other = int(a) + 10 ** (len(a) - 1)
    if len(str(other)) > len(a):
        other = int(a) - 10 ** (len(a) - 1)
    total = apply[sign](other, int(b))
    working = f"{other} {sign} {b} = " if record.group == "word_problem" else ""
    prompt = re.sub(rf"\b{a}\b", str(other), record.prompt, count=1)
    return record._replace(prompt=prompt, answer=f" {working}{total}.")


PROMPTS = {"med": medical_lines, "math": arithmetic_lines, "gen": general_lines}
