"""Studies that are killed at given moments and resumed, each run in a fork of one warm process.

``python -m tests.killed_runs ASKED``, with ASKED a JSON object:

    words    a command line of tvlens, to which ``--out`` and ``--resume`` are added
    place    where the study folders go
    moments  when to kill: shares of the seconds that a whole run takes
    stride   or: before every so manyth change of a file in the study folder, from ``first`` on

One JSON object a line comes back: the whole run first, then what each kill left and what the
resumed run made of it. The process runs the study once itself, so that its forks import nothing.
"""

import hashlib
import itertools
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def main() -> None:
    """Run whole, then killed and resumed at every moment that was asked for."""
    asked = json.loads(sys.argv[1])
    words, place = asked["words"], Path(asked["place"])
    out, changes = place / "whole", []
    with watched(out, lambda event, name: changes.append(f"{event} {name}")):
        run([*words, "--out", str(out)])
    say(state=state(out), changes=changes)
    for number, kill in enumerate(kills(asked, len(changes))):
        out = place / str(number)
        ended = kill([*words, "--out", str(out)], out)
        found = sorted(path.name for path in out.rglob("*")) if out.is_dir() else []
        again = forked(lambda out=out: run([*words, "--out", str(out), "--resume"]))
        say(killed=ended == signal.SIGKILL, found=found, status=again, state=state(out))


def kills(asked: dict[str, Any], changes: int) -> Iterator[Callable[[list[str], Path], int]]:
    """What starts a run into a folder and ends it, for every moment."""
    if "stride" in asked:
        for count in range(asked.get("first", 0), changes, asked["stride"]):
            yield lambda words, out, count=count: forked(lambda: stopped(words, out, count))
        return
    begun, timed = time.perf_counter(), Path(asked["place"]) / "timed"
    forked(lambda: run([*asked["words"], "--out", str(timed)]))
    seconds = time.perf_counter() - begun
    for share in asked["moments"]:
        yield lambda words, out, share=share: forked(lambda: run(words), after=share * seconds)


def run(words: list[str]) -> None:
    """The command line in this process, silent."""
    from tvlens import cli

    with redirect_stdout(StringIO()):
        cli.app([*words, "--quiet"], standalone_mode=False)


def stopped(words: list[str], out: Path, count: int) -> None:
    """A run that is killed before it changes a file in its folder for the ``count``-th time."""
    left = itertools.count(count, -1)

    def one(event: str, name: str) -> None:
        if not next(left):
            os.kill(os.getpid(), signal.SIGKILL)

    with watched(out, one):
        run(words)


@contextmanager
def watched(out: Path, tell: Callable[[str, str], None]) -> Iterator[None]:
    """Tell of every change of a file in ``out`` before it is made (not of Arrow's own)."""

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if not on or event not in CHANGES or not isinstance(given[0], str | os.PathLike):
            return
        path = Path(os.fspath(given[0]))
        if path.is_relative_to(out) and (event != "open" or given[2] & WRITING):
            tell(event, str(path.relative_to(out)))

    on = [True]
    sys.addaudithook(hook)
    yield
    on.clear()


def forked(work: Callable[[], None], *, after: float | None = None) -> int:
    """The wait status of a fork that does ``work``, killed after so many seconds."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def state(folder: Path) -> dict[str, Any]:
    """What a study folder holds, less seconds and memory: hashes, and the manifest itself."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.name == "report.html":
            content = re.sub(rb"(seconds|peak_resident_bytes)\D{1,9}[\d.]+", rb"\1", content)
        if path.name == "manifest.json":
            manifest = json.loads(content)
            found[path.name] = {**manifest, "stages": list(manifest["stages"])}
        else:
            found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def say(**found: Any) -> None:
    """One line for the test."""
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
