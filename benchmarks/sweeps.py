"""What the edits of a sweep cost beside plain evaluations of the same texts.

    python benchmarks/sweeps.py BASE TUNED FILE FILE FILE FILE [--threads 1] [--repeats 3]

Both sides read the loss of every text of four files in one interpreter, turn by turn; medians:

    sweep    ten doses of the tuning vector, of which one is the base and one the stored fine-tune:
             edited in the resident model, read, put back
    plain    the resident model as it is, ten times
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from weights import refuse_a_busy_machine

from tvlens.compose.edits import EditableModel, scaled
from tvlens.evaluation.suite import Ready, Variant, measured, ready
from tvlens.evaluation.tasks import load_tasks
from tvlens.weights.matching import load_pair

DOSES = (-0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
BAR = 1.2


def tasks_of(files: Sequence[str], model: EditableModel, limit: int) -> list[Ready]:
    """A loss task for each file."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tasks.yaml"
        lines = [
            f"- {{name: domain {number}, kind: loss, file: {Path(file).resolve()}, limit: {limit}}}"
            for number, file in enumerate(files)
        ]
        path.write_text("\n".join(lines), encoding="utf-8")
        return ready(load_tasks(str(path)), model.tokenizer)


def swept(model: EditableModel, tasks: Sequence[Ready]) -> int:
    """Every dose, edited, read and put back."""
    read = 0
    for dose in DOSES:
        with model.edited(scaled(dose)) as lens:
            read += len(measured(Variant("tuning", scale=dose), lens, tasks).items)
    return read


def plain(model: EditableModel, tasks: Sequence[Ready]) -> int:
    """The same number of evaluations of the resident model."""
    return sum(len(measured(Variant("base"), model.lens, tasks).items) for _ in DOSES)


def seconds(work: Callable[[], int]) -> float:
    """What a piece of work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Print both sides and their ratio."""
    asked = argparse.ArgumentParser(description=__doc__)
    for name in ("base", "tuned"):
        asked.add_argument(name)
    asked.add_argument("files", nargs=4)
    asked.add_argument("--limit", type=int, default=48)
    asked.add_argument("--threads", type=int, default=1)
    asked.add_argument("--repeats", type=int, default=3)
    asked.add_argument("--force", action="store_true", help="time on a busy machine")
    given = asked.parse_args()
    refuse_a_busy_machine(given.force)
    torch.set_num_threads(given.threads)
    model = EditableModel.of_pair(load_pair(given.base, given.tuned, scan=False))
    tasks = tasks_of(given.files, model, given.limit)
    plain(model, tasks)  # first calls are in no figure
    sides: dict[str, list[float]] = {"sweep": [], "plain": []}
    for _ in range(given.repeats):
        sides["sweep"].append(seconds(lambda: swept(model, tasks)))
        sides["plain"].append(seconds(lambda: plain(model, tasks)))
    one, other = (statistics.median(found) for found in sides.values())
    verdict = "passes" if one / other <= BAR else "FAILS"
    print(
        f"sweep / plain, {given.threads} threads: {one:.1f} s, {other:.1f} s, "
        f"{one / other:.2f} (bar {BAR}) {verdict}"
    )


if __name__ == "__main__":
    main()
