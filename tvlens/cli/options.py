"""The options of commands, each declared once; a command names those that it takes."""

import functools
import inspect
from collections.abc import Callable
from enum import StrEnum, auto
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer


class Estimator(StrEnum):
    """Estimators of activations; typer takes no list of literals."""

    first_order = auto()
    qk_fix = auto()
    atp_star = auto()
    ig_inputs = auto()


class Option(NamedTuple):
    """One option of the command line.

    Attributes:
        type: What typer reads: the type and its help.
        default: What a command gets where the option is not given.
    """

    type: Any
    default: Any


Base = Annotated[str, typer.Argument(help="Folder, .gguf, org/model[@revision], or demo:base.")]
Tuned = Annotated[list[str], typer.Argument(help="Fine-tunes: folders, adapters, .gguf, hub ids.")]
Out = Annotated[Path, typer.Option("--out", help="Study folder to write.")]


def _flag(name: str, text: str) -> Option:
    return Option(Annotated[bool, typer.Option(f"--{name}", help=text)], False)


MODELS = {
    "parent": Option(
        Annotated[str | None, typer.Option(help="Lies between base and the fine-tunes.")], None
    ),
    "control": Option(
        Annotated[list[str] | None, typer.Option("--control", help="A control fine-tune.")], None
    ),
    "canonical": _flag("canonical", "Weights in the base's coordinates: order, scale, basis."),
}
"""Beside base and fine-tunes."""
NAMES = {
    "tuned_name": Option(
        Annotated[list[str] | None, typer.Option("--tuned-name", help="A name per fine-tune.")],
        None,
    ),
}
PROMPTS = {
    "prompts": Option(
        Annotated[str | None, typer.Option(help="Prompt file (.jsonl, .txt) or demo:NAME.")], None
    ),
    "metric": Option(
        Annotated[
            str | None, typer.Option("--metric", help="Name, anchor@LAYER, or module:function.")
        ],
        None,
    ),
    "chat": Option(
        Annotated[Literal["auto", "on", "off"], typer.Option(help="Apply the chat template.")],
        "auto",
    ),
    "skip_bad_lines": _flag("skip-bad-lines", "Go on without bad prompt lines."),
    "device": Option(Annotated[str, typer.Option(help="auto, cpu, or a torch device.")], "auto"),
}
"""What the models are run on."""
GEOMETRY = {
    "covariances": Option(
        Annotated[str, typer.Option(help="What the base reads: auto, off, or a file.")], "auto"
    ),
    "classifier": Option(
        Annotated[str | None, typer.Option(help="Your own labels: package.module:function.")], None
    ),
    "measure": Option(
        Annotated[list[str] | None, typer.Option("--measure", help="Your own number, likewise.")],
        None,
    ),
}
"""What the weights side is judged by."""
CHECKS = {
    "check_exact": Option(
        Annotated[int | None, typer.Option(min=1, help="Components checked exactly.")], None
    ),
    "select": Option(
        Annotated[str, typer.Option(help="Check these exactly: an expression or sites.")],
        "",
    ),
    "check_seconds": Option(
        Annotated[float, typer.Option(min=1.0, help="Time for exact checks.")], 60.0
    ),
    "dtype": Option(
        Annotated[
            Literal["float32", "bfloat16"],
            typer.Option(help="bfloat16: a scan of estimates, nothing exact."),
        ],
        "float32",
    ),
    "neurons": Option(
        Annotated[Literal["top", "all"], typer.Option(help="Per-prompt rows of neurons.")], "top"
    ),
    "estimator": Option(
        Annotated[
            list[Estimator] | None,
            typer.Option("--estimator", help="Of activations; may be given several times."),
        ],
        None,
    ),
}
"""What attribution measures and how it is checked."""
ACTIVATIONS = {
    "nodes": Option(
        Annotated[str, typer.Option(help="Activations: z,q,k,v,pattern,..., default or all.")],
        "default",
    ),
    "direction": Option(
        Annotated[
            list[str] | None,
            typer.Option("--direction", help="What is put where: NAME, NAME@base, default, all."),
        ],
        None,
    ),
    "edges": _flag("edges", "Exchange edges too: what one component writes as one other reads it."),
    "position": _flag("position", "Keep scores by position in positions/."),
}
"""Which activations are exchanged, and how."""
DIVIDED = {
    "parts": _flag("parts", "Divide weight scores over gains, rewiring and new directions."),
    "circuits": _flag("circuits", "Weight scores of OV and QK of every query head."),
}
"""Further divisions of the scores of weights."""
FOUND = {
    "study": Option(
        Annotated[
            str | None,
            typer.Option(help="A study of these models: --select may use label, score."),
        ],
        None,
    ),
    "top": Option(
        Annotated[int | None, typer.Option(min=1, help="So many of what is selected, by |score|.")],
        None,
    ),
    "parts": Option(
        Annotated[str, typer.Option(help="Geometric parts alone: new_write,new_both,...")], ""
    ),
    "along": Option(
        Annotated[
            str,
            typer.Option(help="What is written along the study's directions: L5.W_out.d0,..."),
        ],
        "",
    ),
}
"""What of a tuning vector is let in, beside a selection."""
SEED = {"seed": Option(Annotated[int, typer.Option(help="Seed of every random draw.")], 0)}
JSON = {"json": _flag("json", "Print a JSON summary.")}
SHOWN = {
    **JSON,
    "force": _flag("force", "Replace the study in --out."),
    "quiet": _flag("quiet", "Print only the result."),
    "verbose": _flag("verbose", "Also print what is being counted."),
}
RUN = {"resume": _flag("resume", "Keep tables that are already complete."), **SHOWN}
"""How a study is run and shown."""
REPEATED = {
    **{"tuned_name": "tuned_names", "control": "controls"},
    **{"estimator": "estimators", "measure": "measures", "direction": "directions"},
}
"""Options given once per value, and the field of a plan that holds all values."""


def plan_fields(given: dict[str, Any]) -> dict[str, Any]:
    """What was given, by the fields of a plan; what was not is left to the plan."""
    return {REPEATED.get(name, name): value for name, value in given.items() if value is not None}


def takes(*groups: dict[str, Option]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that ends in ``**given`` the options of ``groups``, in their order.

    Args:
        *groups: Options by parameter name.

    Returns:
        A decorator; typer reads the options from the signature that it sets.
    """
    offered = {name: option for group in groups for name, option in group.items()}

    def give(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def called(**given: Any) -> None:
            command(**given)

        own = list(inspect.signature(command).parameters.values())
        named = [parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD]
        options = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=option.type
            )
            for name, option in offered.items()
        ]
        plain = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in named]
        called.__signature__ = inspect.Signature([*plain, *options])  # type: ignore[attr-defined]
        return called

    return give
