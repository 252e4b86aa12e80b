"""How well each estimator of activations agrees with exact patching.

    python benchmarks/estimators.py [--base demo:base --tuned demo:med --file demo:med] [--each 32]

Every query, key and head output and both sub-layers' outputs of every block, or so many of each
drawn at random, are patched exactly on some prompts, drawn at random too, and estimated in three
ways, between two prompts in a fourth; one line for each estimator, direction
and activation: components, Spearman (worst prompt), slope of exact per estimate, equal signs, and
the seconds of one thread that the estimate and the exact patches took.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tvlens.attribution.activations import activation_scores, exact_activations
from tvlens.attribution.directions import CORRUPTED, question
from tvlens.attribution.fidelity import fidelity_table
from tvlens.attribution.sampling import checked_rows
from tvlens.components import Component
from tvlens.models.metrics import SHIPPED
from tvlens.models.pair import HookedPair
from tvlens.models.prompts import load_prompts, tokenised
from tvlens.weights.matching import load_pair

DIRECTIONS = ("tuned_into_base", "base_into_tuned", "clean_into_corrupt")
ESTIMATORS = ("first_order", "qk_fix", "atp_star", "ig_inputs")
PARTS = ("q", "k", "z", "attn_out", "mlp_out")


def components(hooked: HookedPair, each: int, seed: int) -> list[Component]:
    """What is patched: all of every part, or ``each`` drawn at random."""
    model = hooked.base
    counts = {"q": model.n_heads, "z": model.n_heads, "k": model.n_kv_heads}
    found = []
    for layer in range(model.n_layers):
        for part in PARTS:
            kind = {"q": "head", "z": "head", "k": "kv_head"}.get(part, "node")
            numbers = range(counts[part]) if part in counts else [None]
            found += [Component(kind, layer, number, part) for number in numbers]
    drawn = np.random.default_rng(seed).permutation(len(found)).tolist()
    by_part = {part: [i for i in drawn if found[i].part == part] for part in PARTS}
    kept = sorted(i for places in by_part.values() for i in places[: each or None])
    return [found[i] for i in kept]


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call gives, and its processor seconds."""
    started = time.process_time()
    return call(), time.process_time() - started


def main() -> None:
    """Print the table."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--base", default="demo:base")
    asked.add_argument("--tuned", default="demo:med")
    asked.add_argument("--file", default="demo:med", help="prompts")
    asked.add_argument("--each", type=int, default=0, help="components of each part; 0 for all")
    asked.add_argument("--metric", default="logit_diff")
    asked.add_argument("--prompts", type=int, default=8)
    asked.add_argument("--seed", type=int, default=0)
    given = asked.parse_args()
    torch.set_num_threads(1)
    hooked, metric = HookedPair(load_pair(given.base, given.tuned)), SHIPPED[given.metric]
    batch = tokenised(load_prompts(given.file), hooked.tokenizer)
    rows = checked_rows(batch, given.seed, given.prompts)
    every = components(hooked, given.each, given.seed)
    for direction in DIRECTIONS:
        exact, exact_seconds = timed(
            lambda d=direction: exact_activations(hooked, rows, metric, every, direction=d)
        )
        between = direction in CORRUPTED
        for estimator in [e for e in ESTIMATORS if e != "ig_inputs" or between]:
            found, seconds = timed(
                lambda d=direction, e=estimator: activation_scores(
                    question(hooked, metric, d), rows, parts=PARTS, estimator=e
                ).table()
            )
            for row in fidelity_table(found, exact, {"all": every}).to_frame().itertuples():
                what = row.part if isinstance(row.part, str) else row.kind
                print(
                    f"{direction:18s} {estimator:11s} {what:5s} n={row.n:<3d} "
                    f"rho {row.spearman:.3f} ({row.spearman_worst:.3f}) slope {row.slope:.2f} "
                    f"signs {row.sign_agreement:.2f}  {seconds:.2f} s, exact {exact_seconds:.2f} s"
                )


if __name__ == "__main__":
    main()
