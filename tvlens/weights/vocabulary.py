"""Which embedding rows of two checkpoints stand for the same token.

Rows are matched by the token's string where both tokenizers are there: a fine-tune may add tokens,
drop some or number them anew. A row that no token of a tokenizer names is padding, and padding is
matched by its number. Without both tokenizers only equal numbers of rows can be matched, by number.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tvlens.errors import CheckpointError

Tokens = Mapping[int, str]
"""Token string by number."""
NAMED_AT_MOST = 5
"""Tokens that a sentence names; the load report holds up to ``LISTED_AT_MOST``."""
LISTED_AT_MOST = 50


@dataclass(frozen=True, eq=False)
class RowMatch:
    """Which row of the base's embedding is which row of the tuned model's.

    Row ``k`` of a pair's W_E, and column ``k`` of its W_U, is row ``base[k]`` of the base's tensor
    and row ``tuned[k]`` of the tuned model's.

    Attributes:
        base: Matched rows of the base, ascending.
        tuned: The tuned model's row for each.
        sizes: Rows that base and tuned have.
        by_token: How many of the pairs have the same token string.
        tokens: Token strings of both by number, None where a tokenizer is missing and all rows
            are matched by number.
    """

    base: Int[Tensor, " row"]
    tuned: Int[Tensor, " row"]
    sizes: tuple[int, int]
    by_token: int = 0
    tokens: tuple[Tokens, Tokens] | None = field(default=None, repr=False)

    @classmethod
    def by_number(cls, size: int) -> "RowMatch":
        """Every row of ``size`` is matched with the row of the same number."""
        return cls(torch.arange(size), torch.arange(size), (size, size))

    def __len__(self) -> int:
        """Number of matched rows."""
        return len(self.base)

    @cached_property
    def moved(self) -> int:
        """Matched rows that have another number in the tuned model."""
        return int((self.base != self.tuned).sum())

    @property
    def padding(self) -> int:
        """Rows matched by number because one of the tokenizers, or both, has no token there."""
        return len(self) - self.by_token if self.tokens else 0

    @cached_property
    def whole(self) -> bool:
        """Every row of both is matched, with the row of the same number."""
        return self.sizes == (len(self), len(self)) and not self.moved

    @cached_property
    def new(self) -> tuple[int, ...]:
        """Rows of the tuned model without a counterpart in the base."""
        return _left_out(self.tuned, self.sizes[1])

    @cached_property
    def gone(self) -> tuple[int, ...]:
        """Rows of the base without a counterpart in the tuned model."""
        return _left_out(self.base, self.sizes[0])

    @cached_property
    def new_tokens(self) -> dict[int, str]:
        """Tokens that stand for a row in the tuned model alone, by their number there.

        Those among ``new``, and those that took a row which the base had as padding.
        """
        return self._alone(1)

    @cached_property
    def gone_tokens(self) -> dict[int, str]:
        """Tokens that stand for a row in the base alone, by their number there."""
        return self._alone(0)

    @property
    def rowless(self) -> tuple[int, int]:
        """Tokens of base and tuned that are numbered beyond the rows of their embedding."""
        if self.tokens is None:
            return 0, 0
        counts = [
            sum(number >= size for number in tokens)
            for tokens, size in zip(self.tokens, self.sizes, strict=True)
        ]
        return counts[0], counts[1]

    @property
    def sentence(self) -> str:
        """How the rows were matched and what was left out, for people."""
        if self.tokens is None:
            return f"{len(self):,} rows by number, since a tokenizer is missing"
        parts = [f"{self.by_token:,} rows by token string"]
        if self.moved:
            parts[0] += f" ({self.moved:,} at another number)"
        if self.padding:
            parts.append(f"{self.padding:,} padding rows by number")
        for word, rows, tokens in (
            ("new", self.new, self.new_tokens),
            ("gone", self.gone, self.gone_tokens),
        ):
            if rows or tokens:
                parts.append(_unmatched(word, rows, tokens))
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """What load_report.json holds of it."""
        return {
            "rule": "token string" if self.tokens else "number",
            "rows": list(self.sizes),
            "matched": len(self),
            "by_token": self.by_token,
            "moved": self.moved,
            "padding": self.padding,
            "new": _listed(self.new, self.new_tokens),
            "gone": _listed(self.gone, self.gone_tokens),
            "sentence": self.sentence,
        }

    def _alone(self, side: int) -> dict[int, str]:
        """Tokens of one side whose string the other side's row does not have."""
        if self.tokens is None:
            return {}
        own, other = (self.base, self.tuned) if side == 0 else (self.tuned, self.base)
        partner = dict(zip(own.tolist(), other.tolist(), strict=True))
        theirs = self.tokens[1 - side]
        return {
            number: token
            for number, token in sorted(self.tokens[side].items())
            if number < self.sizes[side]
            and (number not in partner or theirs.get(partner[number]) != token)
        }


def matched_rows(tokens: tuple[Tokens, Tokens], sizes: tuple[int, int]) -> RowMatch:
    """Match rows by token string, and padding rows by number.

    A row that is padding on one side alone is matched by number too, unless any token has moved:
    then the same number no longer means the same row.

    Args:
        tokens: Token strings of base and tuned by number.
        sizes: Rows of their embeddings.
    """
    first, second = (_numbered(t, size) for t, size in zip(tokens, sizes, strict=True))
    pairs = {number: second[key] for key, number in first.items() if key in second}
    by_token = len(pairs)
    moved = any(base != tuned for base, tuned in pairs.items())
    taken = set(pairs.values())
    for number in range(min(sizes)):
        named = (number in tokens[0]) + (number in tokens[1])
        if number not in pairs and number not in taken and named < (1 if moved else 2):
            pairs[number] = number
    base = torch.tensor(sorted(pairs), dtype=torch.long)
    tuned = torch.tensor([pairs[number] for number in sorted(pairs)], dtype=torch.long)
    return RowMatch(base, tuned, sizes, by_token, tokens)


def token_strings(folder: Path) -> dict[int, str] | None:
    """Token by number from the tokenizer's files, None where no readable file lists them.

    tokenizer.json or vocab.json, with what added_tokens.json and tokenizer_config.json add to
    it. A sentencepiece model alone (tokenizer.model) is not read.

    Raises:
        CheckpointError: One of these files is not what its name says.
    """
    main = next((f for f in ("tokenizer.json", "vocab.json") if (folder / f).is_file()), None)
    if main is None:
        return None
    found = _read(folder / main, _of_tokenizer if main == "tokenizer.json" else _by_number)
    for name, parse in (
        ("added_tokens.json", _by_number),
        ("tokenizer_config.json", _of_tokenizer_config),
    ):
        if (folder / name).is_file():
            found = _read(folder / name, parse) | found
    return found


def _numbered(tokens: Tokens, size: int) -> dict[tuple[str, int], int]:
    """Number of each token that has a row; a string used twice counts its occurrences."""
    seen: dict[str, int] = {}
    found = {}
    for number in sorted(tokens):
        token = tokens[number]
        if number < size:
            seen[token] = seen.get(token, -1) + 1
            found[token, seen[token]] = number
    return found


def _left_out(rows: Int[Tensor, " row"], size: int) -> tuple[int, ...]:
    missing = torch.ones(size, dtype=torch.bool)
    missing[rows] = False
    return tuple(missing.nonzero().flatten().tolist())


def named(tokens: Iterable[str]) -> str:
    """The first few tokens in quotes, and how many more there are."""
    listed = list(tokens)
    shown = ", ".join(map(repr, listed[:NAMED_AT_MOST]))
    more = len(listed) - NAMED_AT_MOST
    return f"{shown} and {more:,} more" if more > 0 else shown


def _unmatched(word: str, rows: tuple[int, ...], tokens: dict[int, str]) -> str:
    """``3 new rows without a counterpart, 2 of them tokens ('<a>', '<b>')``."""
    alone = set(rows)
    lone = [token for number, token in tokens.items() if number in alone]
    other = [token for number, token in tokens.items() if number not in alone]
    parts = []
    if rows:
        text = f"{len(rows):,} {word} rows without a counterpart"
        parts.append(f"{text}, tokens {named(lone)}" if lone else f"{text}, all padding")
    if other:
        parts.append(f"{len(other):,} {word} tokens at padding rows of the other: {named(other)}")
    return "; ".join(parts)


def _listed(rows: tuple[int, ...], tokens: dict[int, str]) -> dict[str, Any]:
    first = list(tokens.items())[:LISTED_AT_MOST]
    return {"rows": len(rows), "tokens": len(tokens), "first": {str(n): t for n, t in first}}


def _read(path: Path, parse: Any) -> dict[int, str]:
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a tokenizer: {error}.", hint="Copy it again."
        ) from error


def _by_number(vocabulary: dict[str, int]) -> dict[int, str]:
    return {int(index): token for token, index in vocabulary.items()}


def _of_tokenizer_config(config: dict[str, Any]) -> dict[int, str]:
    added = config.get("added_tokens_decoder") or {}
    return {int(index): entry["content"] for index, entry in added.items()}


def _of_tokenizer(tokenizer: dict[str, Any]) -> dict[int, str]:
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, dict):
        found = _by_number(vocabulary)
    else:
        found = {index: entry[0] for index, entry in enumerate(vocabulary)}
    added = tokenizer.get("added_tokens") or []
    return found | {entry["id"]: entry["content"] for entry in added}
