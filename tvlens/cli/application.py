"""The command line as one object, and what every command of it shares."""

import sys
from typing import Annotated

import typer

from tvlens.errors import TvlensError

app = typer.Typer(
    help="What did fine-tuning do to this model?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

INTERRUPTED = 130


def _print_version(asked: bool | None) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"tvlens {version('tvlens')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool | None,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print it and stop."
        ),
    ] = None,
) -> None:
    """What did fine-tuning do to this model?"""


def main() -> None:
    """Run the command line and turn what went wrong into a sentence and an exit status."""
    try:
        status = app(standalone_mode=False)
    except TvlensError as error:
        typer.echo(f"tvlens: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except Exception as error:
        if (code := getattr(error, "exit_code", None)) is None:
            raise
        show = getattr(error, "show", None)
        if callable(show):
            show()
        sys.exit(int(code))
    if status == INTERRUPTED:  # typer turns the interrupt of a command into this status
        typer.echo("tvlens: interrupted; tables that are whole were kept (--resume).", err=True)
    sys.exit(status if isinstance(status, int) else 0)
