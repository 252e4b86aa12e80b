"""What a command shows while it works: on standard error, never on standard output."""

import logging
import sys

import typer


class Progress:
    """Stage names on standard error, with a spinner on a terminal and plain lines elsewhere."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._status = None

    def __enter__(self) -> "Progress":
        """Start the spinner, on a terminal."""
        if self._shown and sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True).status("starting")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it, whatever happened."""
        if self._status is not None:
            self._status.stop()

    def __call__(self, text: str) -> None:
        """Name the stage that begins."""
        if self._status is not None:
            self._status.update(text)
        elif self._shown:
            typer.echo(text, err=True)

    def passing(self, text: str) -> None:
        """Show what the next text replaces; where lines stay, nothing."""
        if self._status is not None:
            self._status.update(text)


def log_to_stderr() -> None:
    """Show what the package logs; other libraries' logs stay as they are."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    package = logging.getLogger("tvlens")
    package.addHandler(handler)
    package.setLevel(logging.INFO)
