"""What attribution costs against TransformerLens's own and against bare passes.

    python benchmarks/attribution.py --out attribution.json

Sides (``attribution_sides.py``) take turns in interpreters of their own on a SmolLM2-shaped pair,
threads pinned to 1 and again to 2; medians are compared (``weights.py`` has the harness). Every
side's work is run once before it is timed, so that no first call is in a figure.
"""

import json
import sys
from pathlib import Path

from weights import (
    PAIRS,
    Bench,
    Comparison,
    Run,
    line,
    machine,
    measured,
    pair_at,
    parser_of,
    refuse_a_busy_machine,
)

HERE = Path(__file__).resolve().parent


def comparisons(pair: str) -> list[Comparison]:
    """The claims."""
    bars = (
        ("nodes", "host_nodes", 0.4),
        ("nodes", "passes", 1.25),
        ("edges", "passes", 4.0),
        ("swap_node", "one_pass", 1.5),
        ("gate_node", "one_pass", 2.1),
        ("heads_exact", "heads_naive", 0.6),
    )
    timed = [
        Comparison(f"{ours} / {theirs}", Run(ours, pair), Run(theirs, pair), bar)
        for ours, theirs, bar in bars
    ]
    memory = Comparison(
        "memory, nodes / one_pass", Run("nodes", pair), Run("one_pass", pair), 1.5, "anonymous"
    )
    return [*timed, memory]


class AttributionBench(Bench):
    """The harness with this file's sides."""

    def command(self, run: Run) -> list[str]:
        """The command line of a side on a pair."""
        pair = pair_at(PAIRS[run.pair], self.folder / run.pair)
        script = str(HERE / "attribution_sides.py")
        return [sys.executable, script, run.side, *map(str, pair), str(self.threads)]


def main() -> None:
    """Measure, print and write what the command line asks for."""
    options = parser_of(__doc__ or "").parse_args()
    load = refuse_a_busy_machine(options.force)
    print(f"{'':36} {'pair':20} T {'ours':>10} {'theirs':>10} {'ratio':>7} {'bar':>5}")
    found = []
    for threads in options.threads:
        bench = AttributionBench(options.folder, None, threads)
        for compared in comparisons("tiny_4" if options.quick else "smol"):
            if options.only and options.only not in compared.name:
                continue
            if compared.quantity != "seconds" and threads != options.threads[0]:
                continue
            repeats = 1 if "naive" in compared.name else options.repeats
            found.append(measured(bench, compared, repeats))
            print(line(found[-1]), flush=True)
            if options.out:
                text = {"machine": machine(load), "comparisons": found}
                options.out.write_text(json.dumps(text, indent=2))


if __name__ == "__main__":
    main()
