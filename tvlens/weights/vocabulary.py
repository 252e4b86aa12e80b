"""Do two checkpoints give the same number to the same token?"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from tvlens.errors import CheckpointError


class Disagreement(NamedTuple):
    """A token number that means two things.

    Attributes:
        index: The number.
        base: The base's token.
        tuned: The tuned model's token.
    """

    index: int
    base: str
    tuned: str


def token_strings(folder: Path) -> dict[int, str] | None:
    """Token by number from the tokenizer's files, None where no readable file lists them.

    Raises:
        CheckpointError: tokenizer.json or vocab.json is not JSON.
    """
    path = folder / "tokenizer.json"
    try:
        if path.is_file():
            return _of_tokenizer(json.loads(path.read_text(encoding="utf-8")))
        path = folder / "vocab.json"
        if path.is_file():
            vocabulary = json.loads(path.read_text(encoding="utf-8"))
            return {index: token for token, index in vocabulary.items()}
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a tokenizer: {error}.", hint="Copy it again."
        ) from error
    return None


def first_disagreement(base: dict[int, str], tuned: dict[int, str]) -> Disagreement | None:
    """The smallest number that both define differently.

    A number that only one defines is a padding row of the other, or a token that tuning added.
    """
    for index in sorted(base.keys() & tuned.keys()):
        if base[index] != tuned[index]:
            return Disagreement(index, base[index], tuned[index])
    return None


def _of_tokenizer(tokenizer: dict[str, Any]) -> dict[int, str]:
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, dict):
        found = {index: token for token, index in vocabulary.items()}
    else:
        found = {index: entry[0] for index, entry in enumerate(vocabulary)}
    added = tokenizer.get("added_tokens") or []
    return found | {entry["id"]: entry["content"] for entry in added}
