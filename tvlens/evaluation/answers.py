"""What a written answer says: a number, a choice, a text.

A number is the last one in the text, with its sign and decimals; commas between digits are left
out. Of worked solutions this reads the result in any format; ``strict`` asks for the format too.
"""

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_MARKED = re.compile(r"####\s*(-?[\d,.]*\d)")


def last_number(text: str) -> float | None:
    """The last number of a text; after ``####`` where that is there; None without one."""
    found = _MARKED.findall(text) or _numbers(text)
    return float(found[-1].replace(",", "")) if found else None


def _numbers(text: str) -> list[str]:
    """All numbers; a minus counts as a sign unless it follows what it can be taken from."""
    found = []
    for match in _NUMBER.finditer(text):
        before = text[: match.start()].rstrip()[-1:]
        taken = match[0].startswith("-") and (before.isdigit() or before == ")")
        found.append(match[0][1:] if taken else match[0])
    return found


def is_exact(response: str, answer: str) -> bool:
    """Whether the last number written is the answer's last; without one, whether texts agree."""
    wanted = last_number(answer)
    if wanted is None:
        return is_strict(response, answer)
    return last_number(response) == wanted


def is_strict(response: str, answer: str) -> bool:
    """Whether the first line written is the answer, but for case and spaces."""
    return _plain(first_line(response)) == _plain(answer)


def first_line(text: str) -> str:
    """The first line with something on it; empty where there is none."""
    return next((line for line in text.splitlines() if line.strip()), "")


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def chosen(response: str, choices: Sequence[str]) -> int | None:
    """The choice that a response names: by its letter first of all, or by its text; or None.

    A letter is one that stands alone, as in ``B``, ``(B)``, ``B.`` or ``the answer is B``; the
    article ``A`` before a word of small letters is none.
    """
    letters = LETTERS[: len(choices)]
    text = response.strip()
    opened = re.match(rf"\(?([{letters}])(?:[).:,]|\s*$|\n)", text)
    if opened:
        return letters.index(opened[1])
    by_text = [i for i, choice in enumerate(choices) if _plain(text).startswith(_plain(choice))]
    if by_text:
        return max(by_text, key=lambda i: len(choices[i]))
    stated = re.search(rf"(?i:answer(?: is)?:?)\s*\(?([{letters}])\b", text)
    return letters.index(stated[1]) if stated else None


def with_options(prompt: str, choices: Sequence[str]) -> str:
    """A question with its choices by letter, to be answered with one; its own ``A:`` is moved."""
    prompt = re.sub(r"\n\s*(A|Answer):\s*\Z", "", prompt)
    listed = "\n".join(f"{LETTERS[i]}. {choice.strip()}" for i, choice in enumerate(choices))
    return f"{prompt.strip()}\n{listed}\nAnswer:"
