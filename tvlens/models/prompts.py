"""Prompts: read from a file, checked line by line, tokenised once for both models.

One sequence of token ids serves base and fine-tune, so that positions align. Rows are padded on
the right: a causal model's real tokens never see what follows them. A ``Batch`` padded on the left
gives the same numbers to rounding.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tvlens.errors import HostError, PromptError

Chat = Literal["auto", "on", "off"]
NEUTRAL = Path(__file__).with_name("neutral.txt")
"""General English paragraphs written for tvlens, used where no prompts are given."""
_SPLITS = ("choose", "judge")
_NAMED_AT_MOST = 8


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        prompt: The text before the answer, or a whole document.
        answer: The right continuation, with its leading space if it has one.
        wrong: A wrong continuation.
        corrupt: Another prompt of as many tokens, for patching within one model.
        group: Prompts that belong together and share a split.
        split: Components are chosen on ``choose`` and judged on ``judge``.
    """

    prompt: str
    answer: str | None = None
    wrong: str | None = None
    corrupt: str | None = None
    group: str | None = None
    split: str = ""

    def __post_init__(self) -> None:
        """Give the prompt its split, by a hash of its group or of its text."""
        if not self.split:
            object.__setattr__(self, "split", split_of(self.group or self.prompt))


def split_of(key: str) -> str:
    """``choose`` or ``judge``, the same on every machine and in every session."""
    return _SPLITS[hashlib.sha256(key.encode("utf-8")).digest()[0] % 2]


@dataclass(frozen=True)
class PromptSet:
    """Prompts with the name of where they come from.

    Attributes:
        prompts: The prompts in file order; their place is their number in every table.
        name: File name or ``demo:med``.
        skipped: What was wrong with the lines that were left out on request.
    """

    prompts: tuple[Prompt, ...]
    name: str = "prompts"
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        """The prompts in order."""
        return iter(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        """The prompt of a number."""
        return self.prompts[index]

    def all_have(self, name: str) -> bool:
        """Whether every prompt has the field ``name``."""
        return bool(self.prompts) and all(getattr(p, name, None) is not None for p in self.prompts)


def load_prompts(spec: str | Path | None = None, *, skip_bad_lines: bool = False) -> PromptSet:
    """Read JSON lines, a ``.txt`` of documents, a demo's prompts, or the neutral texts.

    Args:
        spec: A file; ``demo:med``, ``demo:math``, ``demo:gen``; None for the neutral
            texts. Documents in a ``.txt`` are separated by blank lines.
        skip_bad_lines: Go on without the bad lines and keep what was wrong in ``skipped``.

    Raises:
        PromptError: No such file, or bad lines: all of them are named at once.
    """
    if isinstance(spec, str) and spec.startswith("demo:"):
        return _demo_file(spec, "demo_prompts")
    path = NEUTRAL if spec is None else Path(spec)
    text = _text(path)
    if path.suffix == ".txt":
        found: list[Prompt] = [Prompt(document) for document in _documents(text)]
        bad: list[str] = []
    else:
        found, bad = _parsed_lines(text)
    if bad and not skip_bad_lines:
        raise PromptError(
            f"{path.name} has {len(bad)} bad lines: {'; '.join(bad)}.",
            hint="Correct them, or go on without them with skip_bad_lines (--skip-bad-lines).",
        )
    if not found:
        raise PromptError(f"{path.name} has no prompt.", hint="One JSON object to a line.")
    return PromptSet(tuple(found), "neutral" if spec is None else path.name, tuple(bad))


def load_texts(spec: str | Path, *, skip_bad_lines: bool = False) -> PromptSet:
    """Held-out texts to measure a loss on: a file as for ``load_prompts``, or ``demo:med``.

    Raises:
        PromptError: As for ``load_prompts``.
    """
    if isinstance(spec, str) and spec.startswith("demo:"):
        return _demo_file(spec, "demo_texts")
    return load_prompts(spec, skip_bad_lines=skip_bad_lines)


def _demo_file(spec: str, function: str) -> PromptSet:
    from tvlens.demo import models as demo

    domain = spec.removeprefix("demo:")
    if domain not in (known := get_args(demo.Domain)):
        raise PromptError(
            f"there are no prompts {spec!r}.", hint=f"The demo has {', '.join(known)}."
        )
    return replace(load_prompts(Path(getattr(demo, function)(domain))), name=spec)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PromptError(f"cannot read the prompts {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not UTF-8: {error.reason} at byte {error.start}.") from error


def _documents(text: str) -> list[str]:
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            blocks[-1].append(line.strip())
        else:
            blocks.append([])
    return ["\n".join(block) for block in blocks if block]


def _parsed_lines(text: str) -> tuple[list[Prompt], list[str]]:
    """The prompts of JSON lines and what is wrong with the others."""
    found, bad = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(_prompt(json.loads(line)))
        except json.JSONDecodeError as error:
            bad.append(f"line {number}: not JSON ({error.msg})")
        except PromptError as error:
            bad.append(f"line {number}: {error}")
    return found, bad


def _prompt(entry: Any) -> Prompt:
    if not isinstance(entry, dict):
        raise PromptError(f"expected an object, got {type(entry).__name__}")
    known = [item.name for item in fields(Prompt)]
    if unknown := [name for name in entry if name not in known]:
        raise PromptError(f"unknown field {unknown[0]!r}")
    for name, value in entry.items():
        if value is not None and (not isinstance(value, str) or not value):
            raise PromptError(f"{name!r} must be text that is not empty")
    if not entry.get("prompt"):
        raise PromptError("no 'prompt'")
    if entry.get("wrong") and not entry.get("answer"):
        raise PromptError("'wrong' without 'answer'")
    if (split := entry.get("split")) and split not in _SPLITS:
        raise PromptError(f"'split' is {split!r}, expected choose or judge")
    return Prompt(**{name: value for name, value in entry.items() if value is not None})


@dataclass(frozen=True, eq=False)
class Batch:
    """Token ids of prompts, ready for both models.

    Attributes:
        ids: Prompt and answer, padded on one side.
        mask: 1 at real tokens.
        prompt_lengths: Tokens before the answer; of a document all of them.
        answer_ids: Tokens of each answer, empty where there is none.
        wrong_ids: Tokens of each wrong answer, empty where there is none.
        corrupt_ids: Tokens of each corrupt prompt with the answer, empty where there is none.
        texts: What was tokenised before the answer, with the chat template.
        numbers: Place of each row in its prompt set.
        warnings: What the caller should read.
        adds_bos: Whether the tokenizer began the rows with its beginning-of-text token.
        chat: Whether a chat template was used.
    """

    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    prompt_lengths: Int[Tensor, " batch"]
    answer_ids: list[Tensor]
    wrong_ids: list[Tensor]
    corrupt_ids: list[Tensor]
    texts: list[str]
    numbers: list[int]
    warnings: list[str] = field(default_factory=list)
    adds_bos: bool = False
    chat: bool = False

    @classmethod
    def of_ids(
        cls,
        prompts: Sequence[Sequence[int]],
        *,
        answers: Sequence[Sequence[int]] | None = None,
        wrongs: Sequence[Sequence[int]] | None = None,
        corrupts: Sequence[Sequence[int]] | None = None,
        pad: int = 0,
        side: Literal["left", "right"] = "right",
    ) -> "Batch":
        """A batch of token ids; ``corrupts`` are prompts, the answer is appended to them too."""
        nothing: list[list[int]] = [[] for _ in prompts]
        answer, wrong, corrupt = (list(x) if x else nothing for x in (answers, wrongs, corrupts))
        rows = [[*p, *a] for p, a in zip(prompts, answer, strict=True)]
        ids, mask = _padded([_long(row) for row in rows], pad, side)
        return cls(
            ids=ids,
            mask=mask,
            prompt_lengths=torch.tensor([len(p) for p in prompts]),
            answer_ids=[_long(a) for a in answer],
            wrong_ids=[_long(w) for w in wrong],
            corrupt_ids=[
                _long([*c, *a] if c else []) for c, a in zip(corrupt, answer, strict=True)
            ],
            texts=[""] * len(rows),
            numbers=list(range(len(rows))),
        )

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.answer_ids)

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Real tokens of every row."""
        return self.mask.sum(1)

    @property
    def starts(self) -> Int[Tensor, " batch"]:
        """The place of every row's first real token: 0 where it is padded on the right."""
        return self.mask.argmax(1) if self.mask.numel() else self.prompt_lengths.clone()

    @property
    def last_of_prompt(self) -> Int[Tensor, " batch"]:
        """The place of the last token before every row's answer."""
        return self.starts + self.prompt_lengths - 1

    @property
    def scored(self) -> Bool[Tensor, "batch pos"]:
        """The tokens whose probability counts: the answer's, or all but the first of a document.

        The logits that predict the token at position p are those at p - 1.
        """
        place = torch.arange(self.ids.shape[1])[None]
        return (place >= (self.starts + self._first_scored)[:, None]) & self.mask.bool()

    @property
    def answer_positions(self) -> Bool[Tensor, "batch pos"]:
        """The positions whose logits predict a scored token: ``scored`` one place earlier."""
        return torch.cat([self.scored[:, 1:], torch.zeros(len(self), 1, dtype=torch.bool)], 1)

    @property
    def n_scored(self) -> Int[Tensor, " batch"]:
        """How many tokens of every row count."""
        return self.scored.sum(1)

    def rows(self, chosen: Sequence[int]) -> "Batch":
        """The given rows, trimmed to the longest of them."""
        pick = torch.tensor(list(chosen), dtype=torch.long)
        used = self.mask[pick].any(0).nonzero().flatten().tolist()
        span = slice(used[0], used[-1] + 1) if used else slice(0, 0)
        return replace(
            self,
            ids=self.ids[pick, span],
            mask=self.mask[pick, span],
            prompt_lengths=self.prompt_lengths[pick],
            answer_ids=[self.answer_ids[i] for i in chosen],
            wrong_ids=[self.wrong_ids[i] for i in chosen],
            corrupt_ids=[self.corrupt_ids[i] for i in chosen],
            texts=[self.texts[i] for i in chosen],
            numbers=[self.numbers[i] for i in chosen],
        )

    @property
    def reading_positions(self) -> Int[Tensor, "batch read"]:
        """The places that predict each row's scored tokens, and the last scored token's own.

        Rows have different numbers of them; the longest sets the width, and what lies past a
        row's end is the last place of the batch.
        """
        before = self._first_scored - 1
        width = int((self.lengths - before).max()) if len(self) else 0
        start = self.starts + before
        return (start[:, None] + torch.arange(width)[None]).clamp_max(self.ids.shape[1] - 1)

    def cut_to_answers(self) -> "Batch":
        """The same prompts from ``reading_positions`` on: one token, then the scored ones.

        A metric that reads only scored tokens gives the same numbers for logits [batch, read,
        d_vocab] at those positions and this batch as for all logits and the whole batch.
        """
        where = self.reading_positions
        left = self.lengths - self._first_scored + 1
        return replace(
            self,
            ids=self.ids.gather(1, where),
            mask=(torch.arange(where.shape[1])[None] < left[:, None]).long(),
            prompt_lengths=torch.ones_like(self.prompt_lengths),
        )

    @property
    def _first_scored(self) -> Int[Tensor, " batch"]:
        answered = torch.tensor([len(a) > 0 for a in self.answer_ids], dtype=torch.bool)
        return torch.where(answered, self.prompt_lengths, torch.ones_like(self.prompt_lengths))

    def chunks(self, size: int) -> Iterator["Batch"]:
        """Batches of at most ``size`` rows, in order."""
        for start in range(0, len(self), size):
            yield self.rows(range(start, min(start + size, len(self))))

    def with_corrupt(self) -> "Batch":
        """The rows that have a corrupt prompt."""
        return self.rows([i for i, ids in enumerate(self.corrupt_ids) if len(ids)])

    def corrupted(self) -> "Batch":
        """The same rows with the corrupt prompts' tokens in place of the prompts'.

        Raises:
            PromptError: Some row has no corrupt prompt, or one of another length.
        """
        if any(len(ids) == 0 for ids in self.corrupt_ids):
            raise PromptError("some prompts have no 'corrupt'.", hint="Use with_corrupt() first.")
        if [len(ids) for ids in self.corrupt_ids] != self.lengths.tolist():
            raise PromptError("some corrupt prompts have another token length than their prompt.")
        ids = self.ids.clone()
        ids[self.mask.bool()] = torch.cat(self.corrupt_ids)
        return replace(self, ids=ids)


def _long(ids: Sequence[int]) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.long)


def _padded(
    rows: Sequence[Tensor], pad: int, side: Literal["left", "right"]
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    width = max([0, *(len(row) for row in rows)])
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = 1
    return ids, mask


def tokenised(prompts: PromptSet, tokenizer: Any, *, chat: Chat = "auto") -> Batch:
    """The token ids of ``prompts``: the prompt's, with the answer's appended.

    Whether a beginning-of-text token comes first is the tokenizer's own convention. A corrupt
    prompt of another length than its prompt is left out and named in ``warnings``.

    Args:
        prompts: What to tokenise.
        tokenizer: A Hugging Face tokenizer, best the tuned model's.
        chat: Whether prompts with an answer go through the chat template; ``auto``: if it exists.

    Raises:
        HostError: There is no tokenizer.
        PromptError: Some prompt or answer has no token, or a template is asked for and missing.
    """
    _require_tokenizer(tokenizer)
    encode = _Encoder(tokenizer, _uses_chat(tokenizer, chat))
    parts = [_row(encode, prompt) for prompt in prompts]
    _refuse_empty(prompts, parts)
    warnings = [*_length_warnings(parts), *_joint_warnings(encode, prompts, parts)]
    made = Batch.of_ids(
        [part.prompt for part in parts],
        answers=[part.answer for part in parts],
        wrongs=[part.wrong for part in parts],
        corrupts=[c if len(c := part.corrupt) == len(part.prompt) else [] for part in parts],
        pad=_pad_id(tokenizer),
    )
    return replace(
        made,
        texts=[part.text for part in parts],
        warnings=warnings,
        adds_bos=encode.adds_bos,
        chat=encode.chat,
    )


def prompt_ids(texts: Sequence[str], tokenizer: Any, *, chat: Chat = "auto") -> list[list[int]]:
    """The token ids of texts that an answer is to follow, in the chat template as ``tokenised``.

    Raises:
        HostError: There is no tokenizer.
        PromptError: A text has no token, or a template is asked for and missing.
    """
    _require_tokenizer(tokenizer)
    encode = _Encoder(tokenizer, _uses_chat(tokenizer, chat))
    rows = [encode.prompt(text, answered=True) for text in texts]
    if empty := [number for number, row in enumerate(rows, 1) if not row]:
        raise PromptError(f"prompts {_listed(empty)} have no token.")
    return rows


def _require_tokenizer(tokenizer: Any) -> None:
    if tokenizer is None:
        raise HostError(
            "neither model has a tokenizer.",
            hint="Put the tokenizer's files into the folder, or build a Batch from ids.",
        )


@dataclass
class _Row:
    text: str
    prompt: list[int]
    answer: list[int]
    wrong: list[int]
    corrupt: list[int]


class _Encoder:
    """Text to ids by the tokenizer's own conventions."""

    def __init__(self, tokenizer: Any, chat: bool) -> None:
        self.tokenizer = tokenizer
        self.chat = chat
        self.prefix: list[int] = _prefix(tokenizer)
        self.adds_bos = bool(self.prefix)

    def rendered(self, text: str, answered: bool) -> str:
        """The text in the chat template, for prompts with an answer."""
        if not (self.chat and answered):
            return text
        turn = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

    def plain(self, text: str | None) -> list[int]:
        """The ids of a text without special tokens around it."""
        if text is None:
            return []
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, text: str, answered: bool) -> list[int]:
        """The ids of a prompt; a template brings its own beginning."""
        ids = self.plain(self.rendered(text, answered))
        return ids if self.chat and answered else [*self.prefix, *ids]


def _prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text; what it puts after would cut off the answer."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


def _uses_chat(tokenizer: Any, chat: Chat) -> bool:
    template = bool(getattr(tokenizer, "chat_template", None))
    if chat == "on" and not template:
        raise PromptError("the tokenizer has no chat template.", hint="Use --chat auto or off.")
    return template and chat != "off"


def _pad_id(tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _row(encode: _Encoder, prompt: Prompt) -> _Row:
    answered = prompt.answer is not None
    return _Row(
        text=encode.rendered(prompt.prompt, answered),
        prompt=encode.prompt(prompt.prompt, answered),
        answer=encode.plain(prompt.answer),
        wrong=encode.plain(prompt.wrong),
        corrupt=[] if prompt.corrupt is None else encode.prompt(prompt.corrupt, answered),
    )


def _refuse_empty(prompts: PromptSet, rows: list[_Row]) -> None:
    bad = []
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True), 1):
        if prompt.answer is None and len(row.prompt) < 2:
            bad.append(f"prompt {number}: a document needs two tokens")
        elif not row.prompt:
            bad.append(f"prompt {number}: no token")
        for name, ids in (("answer", row.answer), ("wrong", row.wrong)):
            if getattr(prompt, name) is not None and not ids:
                bad.append(f"prompt {number}: {name!r} has no token")
    if bad:
        raise PromptError(f"{prompts.name} cannot be tokenised: {'; '.join(bad)}.")


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:_NAMED_AT_MOST]))
    return shown if len(numbers) <= _NAMED_AT_MOST else f"{shown} and others"


def _length_warnings(rows: list[_Row]) -> list[str]:
    bad = [i for i, r in enumerate(rows, 1) if r.corrupt and len(r.corrupt) != len(r.prompt)]
    if not bad:
        return []
    return [
        f"{len(bad)} prompts ({_listed(bad)}) have a corrupt prompt of another token length; "
        "they are left out of clean/corrupt patching."
    ]


def _joint_warnings(encode: _Encoder, prompts: PromptSet, rows: list[_Row]) -> list[str]:
    """A sentence where tokenising prompt and answer in one piece gives other tokens."""
    different, example = [], ""
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True), 1):
        if prompt.answer is None:
            continue
        apart = [*encode.plain(row.text), *row.answer]
        joint = encode.plain(row.text + prompt.answer)
        if apart != joint:
            different.append(number)
            example = example or _both_splits(encode, apart, joint)
    if not different:
        return []
    return [
        f"{len(different)} prompts ({_listed(different)}) tokenise differently in one piece: "
        f"{example}."
    ]


def _both_splits(encode: _Encoder, apart: list[int], joint: list[int]) -> str:
    """Both token lists from the first difference on."""
    same = next((i for i, (a, b) in enumerate(zip(apart, joint, strict=False)) if a != b), 0)
    words = [encode.tokenizer.convert_ids_to_tokens(ids[same : same + 4]) for ids in (apart, joint)]
    return f"{words[0]} here, {words[1]} jointly"
