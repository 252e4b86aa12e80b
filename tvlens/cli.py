"""The command line: thin commands over the Python functions, one sentence per error.

Exit status: 0 done; 2 the request cannot be met; 3 it ran and the verdict is negative;
130 interrupted; 1 a bug.
"""

import json as json_format
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from .errors import StudyError, TvlensError

if TYPE_CHECKING:
    from .study.plan import StudyPlan
    from .study.store import Study

app = typer.Typer(
    help="What did fine-tuning do to this model?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

INTERRUPTED = 130


class _ManyParents(TyperCommand):
    """A command that also takes ``--parents A B`` for ``--parents A --parents B``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option's name before each of its values."""
        written, inside = [], False
        for word in args:
            if word.startswith("--"):
                inside = word == "--parents"
            elif inside and written[-1] != "--parents":
                written.append("--parents")
            written.append(word)
        return super().parse_args(ctx, written)


Base = Annotated[str, typer.Argument(help="Folder, org/model[@revision], or demo:base.")]
Tuned = Annotated[list[str], typer.Argument(help="Fine-tunes: folders, adapters, hub ids.")]
Out = Annotated[Path, typer.Option("--out", help="Study folder to write.")]
Prompts = Annotated[str | None, typer.Option(help="Prompt file (.jsonl, .txt) or demo:NAME.")]
MetricName = Annotated[
    str | None, typer.Option("--metric", help="Name or package.module:function.")
]
Names = Annotated[list[str] | None, typer.Option("--tuned-name", help="A name per fine-tune.")]
Parent = Annotated[str | None, typer.Option(help="Lies between base and the fine-tunes.")]
Parents = Annotated[list[str] | None, typer.Option(help="Rank these and BASE as its parent.")]
Controls = Annotated[list[str] | None, typer.Option("--control", help="A control fine-tune.")]
Canonical = Annotated[
    bool,
    typer.Option("--canonical", help="Weights in the base's coordinates: order, scale, basis."),
]
CheckExact = Annotated[int | None, typer.Option(min=1, help="Components checked exactly.")]
CheckSeconds = Annotated[float, typer.Option(min=1.0, help="Time for exact checks.")]
Chat = Annotated[Literal["auto", "on", "off"], typer.Option(help="Apply the chat template.")]
Neurons = Annotated[Literal["top", "all"], typer.Option(help="Per-prompt rows of neurons.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad-lines", help="Go on without bad prompt lines.")]
Device = Annotated[str, typer.Option(help="auto, cpu, or a torch device.")]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]
Json = Annotated[bool, typer.Option("--json", help="Print a JSON summary.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the study in --out.")]
Resume = Annotated[bool, typer.Option("--resume", help="Keep tables that are already complete.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only the result.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Also print what is being counted.")]


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


@app.command()
def compare(
    base: Base,
    tuned: Tuned,
    out: Out,
    prompts: Prompts = None,
    metric: MetricName = None,
    parent: Parent = None,
    control: Controls = None,
    canonical: Canonical = False,
    tuned_name: Names = None,
    check_exact: CheckExact = None,
    check_seconds: CheckSeconds = 60.0,
    chat: Chat = "auto",
    neurons: Neurons = "top",
    skip_bad_lines: SkipBad = False,
    device: Device = "auto",
    seed: Seed = 0,
    json: Json = False,
    resume: Resume = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """What was written, what kind it is, and what it does: the whole study."""
    from .study.plan import StudyPlan

    plan = StudyPlan(
        base=base,
        tuned=tuple(tuned),
        tuned_names=tuple(tuned_name or ()),
        parent=parent,
        controls=tuple(control or ()),
        canonical=canonical,
        prompts=prompts,
        metric=metric,
        check_exact=check_exact,
        check_seconds=check_seconds,
        chat=chat,
        neurons=neurons,
        skip_bad_lines=skip_bad_lines,
        device=device,
        seed=seed,
    )
    _run(plan, out, json=json, resume=resume, force=force, quiet=quiet, verbose=verbose)


@app.command()
def decompose(
    base: Base,
    tuned: Tuned,
    out: Out,
    parent: Parent = None,
    control: Controls = None,
    canonical: Canonical = False,
    tuned_name: Names = None,
    seed: Seed = 0,
    json: Json = False,
    resume: Resume = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """The weights side alone: what was written and what kind it is. Loads no model."""
    from .study.plan import StudyPlan

    plan = StudyPlan(
        base=base,
        tuned=tuple(tuned),
        tuned_names=tuple(tuned_name or ()),
        parent=parent,
        controls=tuple(control or ()),
        canonical=canonical,
        stages=("decompose",),
        seed=seed,
    )
    _run(plan, out, json=json, resume=resume, force=force, quiet=quiet, verbose=verbose)


@app.command()
def attribute(
    base: Base,
    tuned: Tuned,
    out: Out,
    prompts: Prompts = None,
    metric: MetricName = None,
    parent: Parent = None,
    tuned_name: Names = None,
    check_exact: CheckExact = None,
    check_seconds: CheckSeconds = 60.0,
    chat: Chat = "auto",
    neurons: Neurons = "top",
    skip_bad_lines: SkipBad = False,
    device: Device = "auto",
    seed: Seed = 0,
    json: Json = False,
    resume: Resume = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """The attribution side alone: which parts the behaviour on the prompts depends on."""
    from .study.plan import StudyPlan

    plan = StudyPlan(
        base=base,
        tuned=tuple(tuned),
        tuned_names=tuple(tuned_name or ()),
        parent=parent,
        prompts=prompts,
        metric=metric,
        stages=("attribute",),
        check_exact=check_exact,
        check_seconds=check_seconds,
        chat=chat,
        neurons=neurons,
        skip_bad_lines=skip_bad_lines,
        device=device,
        seed=seed,
    )
    _run(plan, out, json=json, resume=resume, force=force, quiet=quiet, verbose=verbose)


@app.command()
def graft(
    base: Base,
    tuned: Tuned,
    out: Out,
    prompts: Prompts = None,
    keep: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share to restore.")] = 0.9,
    metric: MetricName = None,
    tuned_name: Names = None,
    chat: Chat = "auto",
    skip_bad_lines: SkipBad = False,
    device: Device = "auto",
    seed: Seed = 0,
    json: Json = False,
    resume: Resume = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """The smallest sets of components whose tuning vectors carry the behaviour, tried for real."""
    from .study.plan import StudyPlan

    plan = StudyPlan(
        base=base,
        tuned=tuple(tuned),
        tuned_names=tuple(tuned_name or ()),
        prompts=prompts,
        metric=metric,
        stages=("graft",),
        keep=keep,
        chat=chat,
        skip_bad_lines=skip_bad_lines,
        device=device,
        seed=seed,
    )
    _run(plan, out, json=json, resume=resume, force=force, quiet=quiet, verbose=verbose)


@app.command(cls=_ManyParents)
def inspect(
    base: Base,
    tuned: Tuned,
    prompts: Prompts = None,
    metric: MetricName = None,
    parents: Parents = None,
    graft: Annotated[bool, typer.Option("--graft", help="Plan a graft too.")] = False,
    check_exact: CheckExact = None,
    check_seconds: CheckSeconds = 60.0,
    chat: Chat = "auto",
    neurons: Neurons = "top",
    skip_bad_lines: SkipBad = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """What a comparison would do, from headers alone: tensors, rows, bytes, seconds, memory."""
    from .study.inspection import inspection, parent_ranking

    inspected: list[dict[str, Any]] = []
    for spec in tuned:
        found = inspection(
            base,
            spec,
            prompts=prompts,
            metric=metric,
            stages=("decompose", "attribute", *(("graft",) if graft else ())),
            check_exact=check_exact,
            check_seconds=check_seconds,
            chat=chat,
            neurons=neurons,
            skip_bad_lines=skip_bad_lines,
            device=device,
        )
        ranking = parent_ranking(spec, [base, *parents]) if parents else None
        inspected.append(found if ranking is None else {**found, "parents": ranking})
    if json:
        shown = inspected if inspected[1:] else inspected[0]
        typer.echo(json_format.dumps(shown, indent=1))
    else:
        _print_inspections(inspected)


@app.command()
def vector(
    base: Base,
    tuned: Annotated[str, typer.Argument(help="A fine-tune: folder, adapter, hub id.")],
    out: Annotated[Path, typer.Option("--out", help="The safetensors file to write.")],
    select: Annotated[str, typer.Option(help="Expression over the key, or L3H7,L5N120.")] = "",
    scale: Annotated[float, typer.Option(help="Multiply the vector by this number.")] = 1.0,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Stored.")] = "float32",
    json: Json = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Save a tuning vector with its provenance, read one component at a time."""
    from .weights.matching import load_pair
    from .weights.vector_file import save_pair_vector

    if out.exists() and not force:
        raise StudyError(f"{out} is there already.", hint="Give --force to replace it.")
    pair = load_pair(base, tuned, scan=False)
    for warning in pair.load_report.warnings:
        typer.echo(f"warning: {warning}", err=True)
    command = shlex.join(["tvlens", *sys.argv[1:]])
    saved = save_pair_vector(pair, out, select=select, scale=scale, dtype=dtype, command=command)
    summary = saved.summary
    typer.echo(json_format.dumps(summary, indent=1) if json else saved.sentence)


@app.command()
def report(study: Annotated[Path, typer.Argument(help="A study folder.")]) -> None:
    """Make report.html again from the tables of a study."""
    from .reporting.report import render_report
    from .study.store import existing_study

    typer.echo(f"report: {render_report(existing_study(study).folder)}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Study folder to write.")] = Path(
        "tvlens-demo"
    ),
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare the shipped base with its medical fine-tune, with a format control."""
    from .study.demo import demo_plan

    _run(demo_plan(), out, json=json, resume=False, force=force, quiet=quiet, verbose=verbose)


def _run(
    plan: "StudyPlan",
    out: Path,
    *,
    json: bool,
    resume: bool,
    force: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    from .study.runner import run_study

    if verbose:
        _log_to_stderr()
    with _Progress(shown=not quiet and not json) as progress:
        study = run_study(plan, out, force=force, resume=resume, progress=progress)
    summary = study_summary(study)
    typer.echo(json_format.dumps(summary, indent=1) if json else _summary_text(summary))


def study_summary(study: "Study") -> dict[str, object]:
    """The result of a study in a few JSON values."""
    manifest = study.manifest
    return {
        "study": str(study.folder),
        "report": str(study.folder / "report.html"),
        "identical": manifest["identical"],
        "headline": _headlines(study),
        "graft": {
            name: facts["graft"]
            for name, facts in manifest.get("facts", {}).items()
            if "graft" in facts
        },
        "warnings": manifest["warnings"],
        "tables": {name: len(study.table(name)) for name in study.tables},
        "seconds": manifest["stages"],
    }


def _headlines(study: "Study") -> dict[str, list[dict[str, object]]]:
    """The contrasts to quote, by fine-tune: claim, verdict, sentence and the numbers behind it."""
    if "contrasts" not in study.tables:
        return {}
    rows = study.contrasts.where(headline=True).data.to_pylist()
    listed = ("layers", "by_layer")
    found: dict[str, list[dict[str, object]]] = {}
    for row in rows:
        kept = {name: value for name, value in row.items() if not name.endswith(listed)}
        found.setdefault(row["tuned"], []).append(kept)
    return found


def _summary_text(summary: dict[str, object]) -> str:
    lines = [f"warning: {text}" for text in summary["warnings"]]  # type: ignore[attr-defined]
    for name, same in summary["identical"].items():  # type: ignore[attr-defined]
        if same:
            lines.append(
                f"{name}: identical to the base, bit for bit; there is nothing to explain."
            )
    for name, quoted in summary["headline"].items():  # type: ignore[attr-defined]
        lines += [f"{name}: {contrast['sentence']}" for contrast in quoted]
    for name, graft in summary["graft"].items():  # type: ignore[attr-defined]
        lines += [f"{name}: {found['sentence']}" for found in graft.values()]
    return "\n".join([*lines, f"report: {summary['report']}"])


def _print_inspections(inspected: list[dict[str, Any]]) -> None:
    from rich.console import Console

    from .reporting.inspected import inspection_view, ranking_view

    console = Console(highlight=False, soft_wrap=False)
    for number, found in enumerate(inspected):
        if number:
            console.rule()
        console.print(inspection_view(found))
        if "parents" in found:
            console.print(ranking_view(found["parents"]))


def _log_to_stderr() -> None:
    """Show what the package logs; other libraries' logs stay as they are."""
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    package = logging.getLogger(__package__)
    package.addHandler(handler)
    package.setLevel(logging.INFO)


class _Progress:
    """Stage names on standard error, with a spinner on a terminal and plain lines elsewhere."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._status = None

    def __enter__(self) -> "_Progress":
        if self._shown and sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True).status("starting")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def __call__(self, text: str) -> None:
        if self._status is not None:
            self._status.update(text)
        elif self._shown:
            typer.echo(text, err=True)

    def passing(self, text: str) -> None:
        """Show what the next text replaces; where lines stay, nothing."""
        if self._status is not None:
            self._status.update(text)


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
