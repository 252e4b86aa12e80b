"""How much ``import tvlens`` adds to bare Python, and how long ``tvlens --help`` takes.

Run ``python benchmarks/startup.py`` on an idle machine; prints medians of five, in seconds.
Bars: the import adds at most 0.3 s, the help takes at most 0.6 s.
"""

import statistics
import subprocess
import sys
import time

RUNS = 5


def median_seconds(command: list[str]) -> float:
    """Median wall time of ``RUNS`` runs, after one that warms the file cache."""
    subprocess.run(command, check=True, capture_output=True)
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    """Print the three medians and the difference."""
    bare = median_seconds([sys.executable, "-c", "pass"])
    imported = median_seconds([sys.executable, "-c", "import tvlens"])
    shown = median_seconds([sys.executable, "-m", "tvlens", "--help"])
    print(f"bare python          {bare:.3f}")
    print(f"import tvlens        {imported:.3f}  (adds {imported - bare:.3f})")
    print(f"tvlens --help        {shown:.3f}")


if __name__ == "__main__":
    main()
