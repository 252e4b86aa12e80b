"""Options that take several words at once."""

from collections.abc import Callable
from typing import Any

from typer.core import TyperCommand


def takes_many(option: str, fits: Callable[[str], bool] = lambda word: True) -> type[TyperCommand]:
    """A command that also takes ``OPTION A B`` for ``OPTION A OPTION B``.

    Args:
        option: The option, such as ``--parents``.
        fits: Whether a word can be another value of it; the first that cannot ends the list, as
            the next option does.
    """

    class Command(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            written, inside = [], False
            for word in args:
                if word.startswith("--"):
                    inside = word == option
                elif inside and written[-1] != option:
                    inside = fits(word)
                    written += [option] if inside else []
                written.append(word)
            return super().parse_args(ctx, written)

    return Command


def is_number(word: str) -> bool:
    """Whether a word is a number."""
    try:
        float(word)
    except ValueError:
        return False
    return True
