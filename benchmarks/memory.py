"""Peak memory of a command, seen from outside.

Anonymous memory (RssAnon) is what a process has made; pages of a mapped checkpoint do not count,
because the system takes them back whenever it wants. The kernel keeps no high-water mark of it, so
it is sampled: a peak shorter than the interval is missed. Resident memory (VmHWM) counts mapped
pages too and its mark is the kernel's own.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

INTERVAL = 0.002
"""Seconds between samples: a step over 100 MB of numbers takes tens of milliseconds."""
STATUS = ("RssAnon", "VmHWM")


class Peak(NamedTuple):
    """What a command needed.

    Attributes:
        anonymous: Highest RssAnon seen, bytes.
        resident: VmHWM, bytes.
        samples: How often was looked.
        output: What it printed.
    """

    anonymous: int
    resident: int
    samples: int
    output: str


def is_measurable() -> bool:
    """Whether this system tells a process's anonymous memory."""
    path = Path("/proc/self/status")
    return path.is_file() and "RssAnon" in path.read_text()


def peak_memory(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Peak:
    """Run a command to its end and watch its memory.

    Raises:
        RuntimeError: The command failed.
    """
    anonymous = resident = samples = 0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=err)
        while process.poll() is None:
            now = _status(process.pid)
            anonymous = max(anonymous, now.get("RssAnon", 0))
            resident = max(resident, now.get("VmHWM", 0))
            samples += 1
            time.sleep(INTERVAL)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{err.read()[-2000:]}")
        return Peak(anonymous, resident, samples, out.read())


def _status(pid: int) -> dict[str, int]:
    """Bytes by name from /proc; empty once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines)
    return {words[0][:-1]: int(words[1]) * 1024 for words in fields if words[0][:-1] in STATUS}


def main() -> None:
    """Run the command line's command and print its peaks."""
    peak = peak_memory(sys.argv[1:])
    print(peak.output, end="")
    print(f"RssAnon {peak.anonymous / 1e6:,.0f} MB, VmHWM {peak.resident / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
