"""What a study does not hold, and the command that would add it: one quiet line at the end."""

from typing import NamedTuple

from .folder import StudyFolder

SECTIONS = {
    "load_report": "what was compared",
    "weights": "where the weights changed",
    "contrasts": "MLP against attention",
    "labels": "labels",
    "directions": "new directions by name",
    "readings": "the paper's readings",
    "attribution": "what matters",
    "fidelity": "how far the estimates can be trusted",
    "prompts": "prompts token by token",
    "shares": "what carries it",
    "grafts": "the smallest set that carries it",
    "sweep": "by dose",
    "representations": "what it does to the representations",
    "combinations": "tuning vectors combined",
    "evaluation": "held-out data",
}
"""What the page calls each part, by the table that it is made from, or the stage."""


class Absent(NamedTuple):
    """Parts that one command would add.

    Attributes:
        parts: What the page would call them.
        command: The command.
    """

    parts: str
    command: str


def absent(study: StudyFolder) -> list[Absent]:
    """All that the study could hold and does not, command by command."""
    by_command: dict[str, list[str]] = {}
    for name, words in SECTIONS.items():
        if command := study.missing(name):
            by_command.setdefault(command, []).append(words)
    return [Absent(", ".join(parts), command) for command, parts in by_command.items()]
