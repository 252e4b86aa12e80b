"""Changes that carry nothing: random factors, isotropic noise, shuffled updates, storage in bf16.

All of them are made on single layers of a trained model (``tests.planted_suites.Ground``) and come
back as labels or as evidence with its p-values.
"""

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from tests.geometry_pairs import FakePair, FakeWeight
from tests.planted_suites import PARTS, RELATIVE, Ground, noise, sized, stream
from tvlens.geometry.blocks import Ask, findings_of_block
from tvlens.geometry.classify import labelled, with_q_values
from tvlens.weights.precision import rounding_energy

FACTOR_SIZES = (0.002, 0.01, 0.1, 0.5)
"""Of random changes of both factors of a head, over the norm of the factor."""
OV_PARTS = ("W_V", "W_O")
LEVEL = 0.05


def pair_of(
    ground: Ground,
    deltas: Mapping[str, Tensor],
    *,
    base: Mapping[str, Tensor] | None = None,
    dtype: str = "float32",
) -> FakePair:
    """A pair of one layer from its changes; ``dtype`` is what both sides were stored in."""
    weights = {}
    for part, delta in deltas.items():
        own, component = (base or ground.base)[part], ground.component(part)
        floor = rounding_energy((own + delta).float(), dtype)
        weights[component] = FakeWeight(component, own, delta, floor)
    return FakePair(weights, ground.layout)


def evidence(ground: Ground, pairs: Sequence[FakePair], *, seed: int = 0) -> list[pd.DataFrame]:
    """The evidence about all components of each pair of one layer."""
    asks = [Ask(pair, pair.components, seed=seed) for pair in pairs]
    return [found.evidence.frame for found in findings_of_block(asks)]


def labels(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Labels of the evidence of several layers of one pair."""
    return labelled(with_q_values(pd.concat(frames, ignore_index=True)))


# --- random factors -----------------------------------------------------------------------------


def factor_noise(grounds: Sequence[Ground], size: float, seed: int) -> pd.DataFrame:
    """Labels of heads whose two factors changed at random, but for one a layer that is amplified.

    The amplified head's W_O is longer by ``size``; its kv head's W_V stays. Column ``planted``.
    """
    frames = []
    for ground in grounds:
        deltas, planted = _factor_deltas(ground, size, seed)
        (frame,) = evidence(ground, [pair_of(ground, deltas)], seed=seed)
        frame = frame[(frame["kind"] == "head") & (frame["part"] == "OV")]
        frames.append(frame.assign(planted=frame["index"] == planted))
    return labels(frames)


def _factor_deltas(ground: Ground, size: float, seed: int) -> tuple[dict[str, Tensor], int]:
    generator = stream(5, seed, ground.layer)
    heads, kv_heads = ground.layout.n_heads, ground.layout.n_kv_heads
    planted = int(torch.randint(heads, (1,), generator=generator))
    deltas = {
        part: sized(noise(ground.base[part], generator), size, ground.base[part])
        for part in OV_PARTS
    }
    own = ground.base["W_O"].unflatten(0, (heads, -1))
    deltas["W_O"].unflatten(0, (heads, -1))[planted] = size * own[planted]
    deltas["W_V"].unflatten(1, (kv_heads, -1))[:, planted // (heads // kv_heads)] = 0
    return deltas, planted


# --- p-values -----------------------------------------------------------------------------------


def isotropic(ground: Ground, parts: Sequence[str], seed: int) -> dict[str, Tensor]:
    return {part: ground.background("isotropic", part, seed) for part in parts}


def shuffled(ground: Ground, seed: int) -> dict[str, Tensor]:
    """The control's changes of neurons, each given to another neuron: exchangeable by design."""
    generator = stream(6, seed, ground.layer)
    order = torch.randperm(len(ground.control["W_out"]), generator=generator)
    return {
        "W_out": ground.control["W_out"][order],
        "W_gate": ground.control["W_gate"][:, order],
    }


def from_inputs(ground: Ground, known: object, seed: int) -> dict[str, Tensor]:
    """Changes whose reads are drawn from what each matrix reads, and nothing else."""
    changes = {}
    for number, part in enumerate(PARTS):
        base, generator = ground.base[part], stream(9, seed, ground.layer, number)
        root = torch.linalg.cholesky(known.of(ground.component(part)).double())
        changes[part] = sized(root @ noise(base, generator), RELATIVE, base)
    return changes


def against_inputs(
    ground: Ground, known: object, changes: Mapping[str, Mapping[str, Tensor]], *, seed: int = 0
) -> pd.DataFrame:
    """Rows of tests against both nulls, by the name of the change."""
    asks = [
        Ask(pair, pair.components, seed=seed, covariances=known)
        for pair in (pair_of(ground, change) for change in changes.values())
    ]
    found = findings_of_block(asks)
    frames = [
        one.evidence.tests.assign(change=name) for name, one in zip(changes, found, strict=True)
    ]
    return pd.concat(frames, ignore_index=True)


def small_p(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Share of p-values below ``LEVEL`` by kind, part and test."""
    frame = pd.concat(frames, ignore_index=True)
    rows = []
    for test in ("gain", "within"):
        tested = frame[frame[f"p_{test}"].notna() & (frame["delta_norm"] > 0)]
        tested = tested.assign(below=tested[f"p_{test}"] < LEVEL)
        for (kind, part), group in tested.groupby(["kind", "part"]):
            if kind == "head" or test == "gain":  # the other test of neurons is of structure
                rows.append((kind, part, test, len(group), float(group["below"].mean())))
    return pd.DataFrame(rows, columns=["kind", "part", "test", "n", "below"])


# --- storage ------------------------------------------------------------------------------------


def in_bf16(weights: Tensor) -> Tensor:
    return weights.bfloat16().float()


def round_trip(ground: Ground, parts: Sequence[str] = PARTS) -> FakePair:
    """The base against itself in bf16."""
    deltas = {part: in_bf16(ground.base[part]) - ground.base[part] for part in parts}
    return pair_of(ground, deltas, dtype="bfloat16")


def gain_in_bf16(ground: Ground, scale: float, parts: Sequence[str] = PARTS) -> FakePair:
    """The base in bf16 against ``scale`` times that, rounded again."""
    base = {part: in_bf16(ground.base[part]) for part in parts}
    deltas = {part: in_bf16(scale * own) - own for part, own in base.items()}
    return pair_of(ground, deltas, base=base, dtype="bfloat16")


def tuned_in_bf16(ground: Ground, parts: Sequence[str] = PARTS) -> FakePair:
    """The base and its fine-tune, each rounded to bf16."""
    base = {part: in_bf16(ground.base[part]) for part in parts}
    deltas = {
        part: in_bf16(ground.base[part] + ground.control[part]) - own for part, own in base.items()
    }
    return pair_of(ground, deltas, base=base, dtype="bfloat16")
