"""What measuring a pair's weights costs against a plain pass, modeldelta and TransformerLens.

    python benchmarks/weights.py --modeldelta-python ENV/bin/python --out weights.json

Each side runs in an interpreter of its own (``sides.py``) on synthetic pairs (``synthetic.py``,
written once into ``--folder``), threads pinned by the environment and by torch to 1 and again to
2. The sides of a comparison take turns, ``--repeats`` times, and medians are compared. Seconds are
those of the work after the imports; the files are in the page cache, because every file is read
once before. ``waited`` is the share of a side's time in which it did not compute: above a few per
cent the machine was not idle and the figures are no results. A load average above ``IDLE`` is
refused unless ``--force`` is given, and is noted with the figures.

modeldelta needs an environment of its own, with the torch of this repository:

    python -m venv ENV
    ENV/bin/pip install -c constraints.txt torch==2.13.0
    ENV/bin/pip install -c constraints.txt modeldelta==0.4.4
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from memory import is_measurable, peak_memory
from synthetic import PRESETS, Shape, further_at, pair_at

HERE = Path(__file__).resolve().parent
IDLE = 0.5
"""Load average of the last minute above which nothing is timed."""
WAITED = 0.05
"""Share of a side's time without a processor from which on a figure is marked."""
FURTHER = 1.7
"""Two fine-tunes of one base cost at most so much of one: the second at most 0.7 of the first."""
SMALL = Shape(4, 64, 160, 4, 2, 16, 1024, shards=2)
PAIRS: dict[str, Shape] = {
    **PRESETS,
    "smol_32": replace(PRESETS["smol"], layers=32),
    "smol_8": replace(PRESETS["smol"], layers=8, vocabulary=PRESETS["smol"].vocabulary // 4),
    "tiny_4": SMALL,
    "tiny_1": replace(SMALL, layers=1, vocabulary=SMALL.vocabulary // 4),
}
"""Pairs by name; of two that are compared for growth one has four times the bytes."""


class Run(NamedTuple):
    """A side at work on a pair."""

    side: str
    pair: str


@dataclass(frozen=True)
class Comparison:
    """Two runs and the bar of their ratio.

    Attributes:
        name: What is claimed.
        ours: The numerator.
        theirs: The denominator.
        bar: Largest ratio that passes, None for a figure without a claim.
        quantity: ``seconds``, or ``anonymous`` or ``peak_resident`` for memory.
    """

    name: str
    ours: Run
    theirs: Run
    bar: float | None
    quantity: str = "seconds"


@dataclass
class Figures:
    """What a run gave: one entry a repetition.

    Attributes:
        seconds: Of the work.
        processor_seconds: Of the processor, all threads.
        peak_resident: Bytes.
        anonymous: Bytes; only memory runs sample it.
        result: What came out, to be seen that something did.
    """

    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    peak_resident: list[float] = field(default_factory=list)
    anonymous: list[float] = field(default_factory=list)
    result: Any = None

    @property
    def waited(self) -> float:
        """Share of the time in which the work had no processor, 0 with several threads at work."""
        return max(0.0, 1 - sum(self.processor_seconds) / max(sum(self.seconds), 1e-9))


def comparisons(small: str, large: str, quarter: str, growth: tuple[str, str]) -> list[Comparison]:
    """The claims, on a pair whose spectra are quick, and on a large one with its quarter."""
    found: list[Comparison] = []
    for pair in (small, large):
        plain = Run("plain", pair)
        claim = "no spectra / plain pass"
        found.append(Comparison(claim, Run("basic", pair), plain, 2.0))
        found.append(Comparison(f"{claim}, with scan", Run("basic_scanned", pair), plain, None))
    theirs = Run("modeldelta", small)
    found += [
        Comparison("modeldelta's measures / modeldelta", Run("spectra", small), theirs, 1 / 3),
        Comparison("all of decompose / modeldelta", Run("full", small), theirs, None),
        Comparison("tables and labels / modeldelta", Run("labelled", small), theirs, 1.0),
        Comparison(
            "labels of two fine-tunes / of one",
            Run("labelled_both", small),
            Run("labelled", small),
            FURTHER,
        ),
        Comparison(
            "4 times the bytes, no spectra", Run("basic", large), Run("basic", quarter), 4.4
        ),
        Comparison("4 times the bytes, all", Run("full", growth[0]), Run("full", growth[1]), 4.4),
    ]
    return found


def memory_comparisons(small: str, large: str) -> list[Comparison]:
    """Peak memory against both models in TransformerLens.

    The bar is on what each process made itself, where the host makes all of its weights: from a
    bf16 file in float32. A float32 file it maps, as tvlens does, so there only resident memory
    compares like with like; it counts mapped pages, which the system takes back at will.
    """
    ways = (("no spectra", "basic_scanned"), ("all", "full"))
    found = [
        Comparison(f"memory made, {name}", Run(side, large), Run("host", large), 0.25, "anonymous")
        for name, side in ways
    ]
    return found + [
        Comparison(
            f"memory with mapped, {name}", Run(side, pair), Run("host", pair), None, "peak_resident"
        )
        for pair in (small, large)
        for name, side in ways
    ]


@dataclass(frozen=True)
class Bench:
    """Where and how the sides run.

    Attributes:
        folder: Holds the synthetic pairs.
        modeldelta_python: An interpreter with modeldelta, None leaves its comparisons out.
        threads: Of every side.
    """

    folder: Path
    modeldelta_python: str | None
    threads: int

    def command(self, run: Run) -> list[str]:
        """The command line of a side on a pair."""
        python = self.modeldelta_python if run.side == "modeldelta" else sys.executable
        base, tuned, *_ = self.models(run)
        script = str(HERE / "sides.py")
        return [str(python), script, run.side, str(base), str(tuned), str(self.threads)]

    def models(self, run: Run) -> list[Path]:
        """The folders that a side reads, written now where they are not there."""
        shape, folder = PAIRS[run.pair], self.folder / run.pair
        further = [further_at(shape, folder)] if run.side == "labelled_both" else []
        return [*pair_at(shape, folder), *further]

    def environment(self, run: Run) -> dict[str, str]:
        """Threads pinned, no network, and tvlens from beside this script."""
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        pinned = {**os.environ, **dict.fromkeys(names, str(self.threads)), "HF_HUB_OFFLINE": "1"}
        pinned.pop("PYTHONPATH", None)
        return pinned if run.side == "modeldelta" else {**pinned, "PYTHONPATH": str(HERE.parent)}

    def timed(self, run: Run, into: Figures) -> None:
        """Run a side once and enter its figures.

        Raises:
            RuntimeError: The side failed or cannot run here.
        """
        done = subprocess.run(
            self.command(run), env=self.environment(run), capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{run.side} on {run.pair}: {done.stderr[-2000:]}")
        _enter(into, done.stdout)

    def watched(self, run: Run, into: Figures) -> None:
        """Run a side once and enter its memory."""
        peak = peak_memory(self.command(run), self.environment(run))
        _enter(into, peak.output)
        into.anonymous.append(peak.anonymous)

    def read_all(self, runs: Iterable[Run]) -> None:
        """Bring the files of some runs into the page cache."""
        for folder in sorted({folder for run in runs for folder in self.models(run)}):
            for path in sorted(folder.glob("*.safetensors")):
                with path.open("rb") as file:
                    while file.read(1 << 24):
                        pass


def _enter(into: Figures, output: str) -> None:
    found = json.loads(output.splitlines()[-1])
    for name in ("seconds", "processor_seconds", "peak_resident"):
        getattr(into, name).append(found[name])
    into.result = found["result"]


def measured(bench: Bench, compared: Comparison, repeats: int) -> dict[str, Any]:
    """Both sides in turns; the medians, their ratio and whether it passes."""
    figures = {run: Figures() for run in (compared.theirs, compared.ours)}
    memory = compared.quantity != "seconds"
    bench.read_all(figures)
    for _ in range(1 if memory else repeats):  # memory does not vary enough to repeat it
        for run, into in figures.items():
            (bench.watched if memory else bench.timed)(run, into)
    ours, theirs = (
        statistics.median(getattr(figures[run], compared.quantity))
        for run in (compared.ours, compared.theirs)
    )
    return {
        "name": compared.name,
        "threads": bench.threads,
        "quantity": compared.quantity,
        "ours": {**compared.ours._asdict(), **_noted(figures[compared.ours])},
        "theirs": {**compared.theirs._asdict(), **_noted(figures[compared.theirs])},
        "ratio": ours / theirs,
        "bar": compared.bar,
        "passes": None if compared.bar is None else ours / theirs <= compared.bar,
    }


def _noted(figures: Figures) -> dict[str, Any]:
    return {**asdict(figures), "waited": figures.waited}


def line(found: dict[str, Any]) -> str:
    """One row of the printed table."""
    sides = [_amount(found[side], found["quantity"]) for side in ("ours", "theirs")]
    bar = "" if found["bar"] is None else f"{found['bar']:.2f}"
    verdict = {None: "", True: "passes", False: "FAILS"}[found["passes"]]
    waited = max(found[side]["waited"] for side in ("ours", "theirs"))
    busy = f"waited {waited:.0%}" if waited > WAITED else ""
    pairs = "/".join(dict.fromkeys(found[side]["pair"] for side in ("ours", "theirs")))
    return (
        f"{found['name']:36} {pairs:20} {found['threads']} {sides[0]:>10} {sides[1]:>10} "
        f"{found['ratio']:7.2f} {bar:>5} {verdict:7} {busy}"
    )


def _amount(side: dict[str, Any], quantity: str) -> str:
    middle = statistics.median(side[quantity])
    return f"{middle:.3f} s" if quantity == "seconds" else f"{middle / 1e6:,.0f} MB"


def refuse_a_busy_machine(force: bool) -> float:
    """The load average; stops the program where something else is at work."""
    load = os.getloadavg()[0]
    if load > IDLE:
        sentence = f"the load average is {load:.2f}: other work would be timed too."
        if not force:
            raise SystemExit(f"{sentence} Wait for an idle machine, or give --force.")
        print(f"BUSY MACHINE, no result: {sentence}", file=sys.stderr)
    return load


def machine(load: float) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "processors": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformer_lens": version("transformer-lens"),
        "load_average_at_start": load,
    }


def asked(options: argparse.Namespace) -> list[Comparison]:
    """The comparisons that the command line wants and this machine can make."""
    pairs = ("tiny_4", "tiny_4", "tiny_1", ("tiny_4", "tiny_1"))
    if not options.quick:
        pairs = ("smol", "one_billion", "quarter", ("smol_32", "smol_8"))
    found = comparisons(*pairs)
    if is_measurable():
        found += memory_comparisons(pairs[0], pairs[1])
    if not options.modeldelta_python:
        print("without --modeldelta-python its comparisons are left out", file=sys.stderr)
        found = [c for c in found if c.theirs.side != "modeldelta"]
    return [c for c in dict.fromkeys(found) if not options.only or options.only in c.name]


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All measurements, one after the other; memory only with the first number of threads.

    A side that cannot run is said and left out: the others may have taken hours.
    """
    for threads in options.threads:
        bench = Bench(options.folder, options.modeldelta_python, threads)
        for compared in asked(options):
            if compared.quantity != "seconds" and threads != options.threads[0]:
                continue
            try:
                yield measured(bench, compared, options.repeats)
            except RuntimeError as error:
                print(f"{compared.name:36} left out: {error}", file=sys.stderr, flush=True)


def parser_of(about: str) -> argparse.ArgumentParser:
    """The options that every benchmark with this harness takes."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache/tvlens/benchmarks")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", help="part of the names of the comparisons that are wanted")
    parser.add_argument("--quick", action="store_true", help="tiny pairs: does everything run?")
    parser.add_argument("--force", action="store_true", help="time on a busy machine")
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    return parser


def main() -> None:
    """Measure, print and write what the command line asks for."""
    parser = parser_of(__doc__ or "")
    parser.add_argument("--modeldelta-python", help="python of an environment with modeldelta")
    options = parser.parse_args()
    load = refuse_a_busy_machine(options.force)
    print(f"{'':36} {'pair':20} T {'ours':>10} {'theirs':>10} {'ratio':>7} {'bar':>5}")
    found = []
    for row in rows(options):
        found.append(row)
        print(line(row), flush=True)
        if options.out:
            text = json.dumps({"machine": machine(load), "comparisons": found}, indent=2)
            options.out.write_text(text)


if __name__ == "__main__":
    main()
