"""Whether the labels can be believed: the suites, and the command that prints their tables.

    python -m tests.calibration            what docs/calibration.md shows: the demo models, and
                                           SmolLM2-135M where its fine-tunes are
    python -m tests.calibration detection  the table of small plants alone

The fine-tunes are looked for in ``TVLENS_REAL`` or ``~/.cache/tvlens/real`` (``base``, ``ctl``,
``ctl-1``, ``med``, ``med-lora``); examples/real_models makes them.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from tests.null_suites import (
    FACTOR_SIZES,
    OV_PARTS,
    against_inputs,
    evidence,
    factor_noise,
    from_inputs,
    gain_in_bf16,
    isotropic,
    labels,
    pair_of,
    round_trip,
    shuffled,
    small_p,
    tuned_in_bf16,
)
from tests.planted_suites import (
    CELL,
    FAMILIES,
    PARTS,
    SEEDS,
    Ground,
    always_unresolved,
    by_raw_cosine,
    called,
    evidence_of,
    false_gains,
    ground_of,
    made_ground,
    missed_bars,
    quiet_on_noise,
    recalls,
)
from tvlens.geometry.classify import labelled

REAL = Path(os.environ.get("TVLENS_REAL", Path.home() / ".cache" / "tvlens" / "real"))
NEURON_PARTS = ("W_out", "W_gate")
NULL_PARTS = (*OV_PARTS, *NEURON_PARTS)
HEAD_DRAWS = 4
"""Draws of noise for the p-values of heads: a layer has few."""
INPUT_DRAWS = 2
"""Draws from the inputs, of every matrix of every layer."""
CLASSIFIERS = (labelled, always_unresolved, by_raw_cosine)


DETECTION_SIZES = (0.0005, 0.001, 0.002, 0.005, 0.01)
"""A quarter of a background's norm to five times it: 6 % of the energy to 96 %."""


class Model(NamedTuple):
    """A base, its control fine-tune, and how much of it the suites use.

    Attributes:
        layers: Number of layers.
        head_layers: Layers of a seed in the suite of heads, which has few in each.
        step: Every how many layers the suites of storage look at all matrices.
        null_step: The same of the p-values of neurons.
        made: No model, but matrices of SmolLM2-135M's shapes and spectra.
    """

    name: str
    base: str
    layers: int
    head_layers: int
    step: int
    null_step: int
    made: bool = False

    def ground(self, layer: int) -> Ground:
        return made_ground(layer) if self.made else ground_of(self.pair(), layer)

    def pair(self, tuned: str = "ctl") -> object:
        from tvlens.weights.matching import load_pair

        beside = f"demo:{tuned}" if self.base.startswith("demo:") else str(REAL / tuned)
        return load_pair(self.base, beside, scan=False)

    def grounds(
        self, tuned: str = "ctl", *, parts: Sequence[str] = PARTS, step: int = 1
    ) -> Iterator[Ground]:
        """Every ``step``-th layer, one in memory at a time."""
        pair = self.pair(tuned)
        for layer in range(0, self.layers, step):
            yield ground_of(pair, layer, parts)


DEMO = Model("demo", "demo:base", 8, 2, 1, 1)
MADE = Model("random weights of SmolLM2-135M's shapes and spectra", "", 10, 2, 1, 1, made=True)
SMOL = Model("SmolLM2-135M", str(REAL / "base"), 30, 2, 6, 3)


def planted(
    model: Model, family: str, seeds: Sequence[int] = SEEDS, **cells: Sequence[object]
) -> pd.DataFrame:
    """Evidence of one family of plants; every seed has layers of its own."""
    count = model.head_layers if family == "heads" else 1
    frames = []
    for number, seed in enumerate(seeds):
        for place in range(count):
            layer = (number + len(seeds) * place) * model.layers // (len(seeds) * count)
            frames.append(evidence_of(family, model.ground(layer), seed, **cells))
    return pd.concat(frames, ignore_index=True)


def detection(model: Model, family: str) -> pd.DataFrame:
    """Labels of plants that are smaller and larger than the background they stand on."""
    seeds = SEEDS if model is DEMO else SEEDS[:2]
    backgrounds = ("isotropic",) if model.made else ("isotropic", "control")
    cells = {"backgrounds": backgrounds, "sizes": DETECTION_SIZES}
    return called(planted(model, family, seeds, **cells))


def factors(model: Model, *, seed: int = 20) -> pd.DataFrame:
    """Random factors: share unresolved, and the planted heads of equal size that are found."""
    rows = []
    grounds = list(model.grounds(parts=OV_PARTS))
    for size in FACTOR_SIZES:
        calls = factor_noise(grounds, size, seed)
        noisy, beside = calls[~calls["planted"]], calls[calls["planted"]]
        quiet = (noisy["label"] == "unresolved").mean()
        found = (beside["label"] == "amplified").mean()
        rows.append((size, len(noisy), quiet, len(beside), found))
    return pd.DataFrame(rows, columns=["size", "n", "unresolved", "planted", "found"])


def null_p_values(model: Model, *, seed: int = 20) -> pd.DataFrame:
    """Share of p < .05 on isotropic noise, shuffled control updates, and these as they are.

    Heads of every layer with several draws of noise; neurons of every third layer.
    """
    frames: dict[str, list[pd.DataFrame]] = {"isotropic": [], "shuffled": [], "control": []}
    for ground in model.grounds(parts=NULL_PARTS):
        changes = [("isotropic", isotropic(ground, OV_PARTS, seed + i)) for i in range(HEAD_DRAWS)]
        changes.append(("control", {part: ground.control[part] for part in OV_PARTS}))
        if ground.layer % model.null_step == 0:
            changes.append(("isotropic", isotropic(ground, NEURON_PARTS, seed)))
            changes.append(("shuffled", shuffled(ground, seed)))
            changes.append(("control", {part: ground.control[part] for part in NEURON_PARTS}))
        for parts in (OV_PARTS, NEURON_PARTS):
            some = [(name, change) for name, change in changes if parts[0] in change]
            pairs = [pair_of(ground, change) for _, change in some]
            for (name, _), frame in zip(some, evidence(ground, pairs, seed=seed), strict=True):
                frames[name].append(frame)
    tables = [small_p(some).assign(change=name) for name, some in frames.items()]
    return pd.concat(tables, ignore_index=True)[["change", "kind", "part", "test", "n", "below"]]


def known_inputs(model: Model) -> object:
    """Covariances of the base's inputs on the demo's general texts, or on the neutral ones."""
    from tvlens import HookedPair, covariances
    from tvlens.models import load_prompts, load_texts, tokenised

    hooked = HookedPair(model.pair())
    texts = load_texts("demo:gen") if model is DEMO else load_prompts()
    return covariances(hooked, tokenised(texts, hooked.tokenizer))


def input_p_values(model: Model, *, seed: int = 20) -> pd.DataFrame:
    """Share of p < .05 of gains and reads against the inputs and against isotropic noise."""
    known, frames = known_inputs(model), []
    for ground in model.grounds(step=model.null_step):
        changes = {
            f"drawn from the inputs {i}": from_inputs(ground, known, seed + i)
            for i in range(INPUT_DRAWS)
        }
        changes["control"] = ground.control
        frames.append(against_inputs(ground, known, changes, seed=seed))
    rows = pd.concat(frames, ignore_index=True)
    nulls = rows["null"].isin(("covariance_matched", "isotropic"))
    rows = rows[nulls & rows["p_value"].notna() & (rows["statistic"] != "structured_share")]
    rows = rows.assign(
        change=rows["change"].str.replace(r" \d+$", "", regex=True),
        below=pd.to_numeric(rows["p_value"]) < 0.05,
    )
    keys = ["change", "kind", "statistic", "side", "null"]
    return rows.groupby(keys, sort=False)["below"].agg(["size", "mean"]).reset_index()


def stored(model: Model, *, gain: float = 1.003) -> dict[str, pd.DataFrame]:
    """Labels of the base rounded to bf16, and of a gain on its bf16 weights."""
    grounds = list(model.grounds(step=model.step))
    return {
        "round trip": labels(evidence(g, [round_trip(g)])[0] for g in grounds),
        f"gain {gain:g}": labels(evidence(g, [gain_in_bf16(g, gain)])[0] for g in grounds),
    }


def fine_tune_stored(model: Model, tuned: str) -> pd.DataFrame:
    """Labels of a fine-tune that was stored in bf16, as its base was; heads of every layer."""
    frames = []
    for ground in model.grounds(tuned):
        parts = PARTS if ground.layer % model.step == 0 else OV_PARTS
        frames += evidence(ground, [tuned_in_bf16(ground, parts)])
    return labels(frames)


def tested(calls: pd.DataFrame) -> pd.DataFrame:
    """The kinds that are classified here."""
    return calls[calls["kind"].isin(["matrix", "head", "neuron"])]


def counts(calls: pd.DataFrame) -> pd.DataFrame:
    """Labels by kind."""
    calls = tested(calls)
    return pd.crosstab(calls["kind"], calls["label"]).reset_index()


# --- tables -------------------------------------------------------------------------------------


def markdown(table: pd.DataFrame) -> str:
    """A table for docs; shares with three decimals."""
    rows = [
        [f"{x:.3f}" if isinstance(x, float) else str(x) for x in row]
        for row in table.itertuples(index=False)
    ]
    lines = [list(map(str, table.columns)), ["---"] * len(table.columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def recall_table(calls: pd.DataFrame) -> pd.DataFrame:
    """Recall by plant, one column a background and size."""
    table = recalls(calls)
    table["cell"] = table["background"] + " " + (100 * table["size"]).map("{:g} %".format)
    keys = ["family", "plant", "expected"]
    wide = table.pivot_table(index=keys, columns="cell", values="recall", sort=False)
    n = table.groupby(keys)["n"].first().rename("n")
    return wide.join(n).reset_index()


def _print_planted(model: Model) -> None:
    for family in FAMILIES:
        found = planted(model, family)
        calls = called(found)
        print(f"\n### {model.name}: {family}\n\n{markdown(recall_table(calls))}\n")
        print(markdown(false_gains(calls)[[*CELL, "quiet", "named", "wrong"]]))
        if len(quiet := quiet_on_noise(calls)):
            print(f"\nUntouched, isotropic background: {quiet['mean'].min():.4f} unresolved.")
        for classifier in CLASSIFIERS:
            missed = missed_bars(called(found, classifier))
            print(f"\n`{classifier.__name__}` misses {len(missed)} bars.")
            if classifier is labelled:
                print("".join(f"\n- {sentence}" for sentence in missed))


def _print_detection(model: Model) -> None:
    for family in FAMILIES:
        calls = detection(model, family)
        table = markdown(recall_table(calls))
        print(f"\n### {model.name}: {family}\n\n{table}\n", flush=True)
        gains, quiet = false_gains(calls), quiet_on_noise(calls)
        print(f"False gains: {gains['wrong'].sum()} of {gains['named'].sum()} calls.")
        if len(quiet):
            print(f"Untouched, isotropic background: {quiet['mean'].min():.4f} unresolved.")


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:] == ["detection"]:
        for model in (DEMO, MADE, SMOL) if REAL.is_dir() else (DEMO, MADE):
            _print_detection(model)
        return
    for model in (DEMO, SMOL) if REAL.is_dir() else (DEMO,):
        _print_planted(model)
        print(f"\n### {model.name}: random factors\n\n{markdown(factors(model))}")
        print(f"\n### {model.name}: p < .05\n\n{markdown(null_p_values(model))}")
        print(f"\n### {model.name}: inputs, p < .05\n\n{markdown(input_p_values(model))}")
        for name, calls in stored(model).items():
            print(f"\n### {model.name}: {name}\n\n{markdown(counts(calls))}")
    for tuned in ("med", "ctl-1") if REAL.is_dir() else ():
        print(f"\n### {tuned} in bf16\n\n{markdown(counts(fine_tune_stored(SMOL, tuned)))}")


if __name__ == "__main__":
    main()
