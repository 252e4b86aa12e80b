"""Planted suites: known changes on trained weights, and how often the labels say what was planted.

Three families (heads, neurons, whole matrices), on three backgrounds: nothing, isotropic noise,
and the tuning vector of a control fine-tune, each scaled to ``RELATIVE`` of every matrix's norm.
A plant's size is its norm over that of the base weights of its component. What is planted:

    gain, loss           the component's own base weights, longer or shorter
    gain of the top      of a matrix: its strongest directions, each longer by the same factor
    rotation, mixture    new combinations of what the component already reads or writes
    new, rank 1 or 4     directions that stand in no relation to the base's: drawn at random, for
                         heads outside their own span
    gain and new         half the energy each
    noise                entries drawn anew

Every function is pure; seeds say all. ``tests.calibration`` prints the table of docs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import torch
from scipy import optimize
from torch import Tensor

from tests.geometry_pairs import FakePair, FakeWeight
from tvlens.components import READING_PARTS, Component
from tvlens.geometry.blocks import Ask, findings_of_block
from tvlens.geometry.classify import labelled, with_q_values

BACKGROUNDS = ("none", "isotropic", "control")
SIZES = (0.02, 0.05)
SEEDS = range(20, 25)
"""Rules and constants were chosen on others."""
RELATIVE = 0.002
"""Norm of a background over that of the matrix: what 90 steps at 5e-5 leave."""
RECALL, FALSE_GAINS, QUIET = 0.95, 0.05, 0.95
"""Bars: least recall of a plant, most false gains, least share of noise that stays unresolved."""
GAINS = ("amplified", "attenuated", "flipped")
CELL = ["family", "background", "size"]

Shape = Callable[[Tensor, torch.Generator], Tensor]
"""A change [rows, d_model] of a component with base weights [rows, d_model]; its length is free."""
Classifier = Callable[[pd.DataFrame], pd.DataFrame]


# --- what is planted ----------------------------------------------------------------------------


def gain(base: Tensor, _: torch.Generator) -> Tensor:
    return base.double()


def loss(base: Tensor, _: torch.Generator) -> Tensor:
    return -base.double()


def noise(base: Tensor, generator: torch.Generator) -> Tensor:
    return _normal(*base.shape, generator=generator)


def rotation(base: Tensor, generator: torch.Generator) -> Tensor:
    """The rows of a head turned among themselves: (R - I) W for a small rotation R."""
    mixer = _normal(len(base), len(base), generator=generator)
    return (mixer - mixer.T) @ base.double()


def outside(rank: int) -> Shape:
    """``rank`` directions outside the span of the rows: only narrow components have any."""

    def change(base: Tensor, generator: torch.Generator) -> Tensor:
        beyond = torch.linalg.svd(base.double()).Vh[len(base) :]
        mix = _normal(rank, len(beyond), generator=generator) @ beyond
        return _normal(len(base), rank, generator=generator) @ mix

    return change


def unrelated(rank: int) -> Shape:
    """``rank`` random directions, with random weights of the rows."""

    def change(base: Tensor, generator: torch.Generator) -> Tensor:
        directions = _normal(rank, base.shape[1], generator=generator)
        return _normal(len(base), rank, generator=generator) @ directions

    return change


def in_strongest(count: int) -> Shape:
    """Random weights on the ``count`` strongest directions of both sides."""

    def change(base: Tensor, generator: torch.Generator) -> Tensor:
        left, _, right = torch.linalg.svd(base.double(), full_matrices=False)
        core = _normal(count, count, generator=generator)
        return left[:, :count] @ core @ right[:count]

    return change


def gain_of_strongest(count: int) -> Shape:
    """The ``count`` strongest directions of a matrix longer by the same factor."""

    def change(base: Tensor, _: torch.Generator) -> Tensor:
        left, values, right = torch.linalg.svd(base.double(), full_matrices=False)
        return (left[:, :count] * values[:count]) @ right[:count]

    return change


def half_and_half(first: Shape, second: Shape) -> Shape:
    """Both at equal energy."""

    def change(base: Tensor, generator: torch.Generator) -> Tensor:
        parts = [shape(base, generator) for shape in (first, second)]
        return sum((part / part.norm() for part in parts), torch.zeros(()))

    return change


def sized(change: Tensor, size: float, base: Tensor) -> Tensor:
    """A change of ``size`` times the norm of the base weights."""
    return (change * (size * base.double().norm() / change.norm())).float()


def _normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def stream(*numbers: int) -> torch.Generator:
    """Another stream for every sequence of small numbers."""
    seed = 0
    for number in numbers:
        seed = seed * 1009 + number + 1
    return torch.Generator().manual_seed(seed)


# --- where it is planted ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Ground:
    """One layer of a trained model, and how a control fine-tune changed it.

    Attributes:
        layer: Its number.
        layout: Numbers of the model.
        base: Weights by part, float32.
        control: The control's tuning vector by part.
    """

    layer: int
    layout: object
    base: Mapping[str, Tensor]
    control: Mapping[str, Tensor]

    def component(self, part: str) -> Component:
        return Component("matrix", self.layer, None, part)

    def background(self, name: str, part: str, seed: int) -> Tensor:
        """A background of one matrix, ``RELATIVE`` times as long as its base weights."""
        base = self.base[part]
        if name == "none":
            return torch.zeros_like(base)
        drawn = noise(base, stream(7, seed, self.layer, len(part), ord(part[-1])))
        change = self.control[part].double() if name == "control" else drawn
        return sized(change, RELATIVE, base)


PARTS = ("W_Q", "W_K", "W_V", "W_O", "W_gate", "W_in", "W_out")
ALIGNED = {"W_Q": 0.73, "W_K": 0.85, "W_V": 0.79, "W_O": 0.67, "W_gate": 0.45, "W_in": 0.40}
ALIGNED["W_out"] = 0.43
"""G_self of each matrix of SmolLM2-135M on its residual side, means over its layers."""


@dataclass(frozen=True)
class MadeLayout:
    """SmolLM2-135M's numbers."""

    n_heads: int = 9
    n_kv_heads: int = 3
    d_model: int = 576
    d_head: int = 64
    d_mlp: int = 1536
    n_layers: int = 1
    qk_norm: str = ""


def made_ground(layer: int, layout: MadeLayout | None = None) -> Ground:
    """A layer of no model: matrices of SmolLM2-135M's shapes and G_self, in random directions.

    Singular values fall exponentially; the rate is what gives the alignment of a pure gain.
    """
    layout = layout or MadeLayout()
    d_model, queries = layout.d_model, layout.n_heads * layout.d_head
    shape = {"W_Q": (d_model, queries), "W_O": (queries, d_model), "W_out": (layout.d_mlp, d_model)}
    shape |= dict.fromkeys(("W_K", "W_V"), (d_model, layout.n_kv_heads * layout.d_head))
    shape |= dict.fromkeys(("W_gate", "W_in"), (d_model, layout.d_mlp))
    base = {
        part: _falling(*shape[part], ALIGNED[part], stream(8, layer, number))
        for number, part in enumerate(PARTS)
    }
    return Ground(layer, layout, base, {part: torch.zeros_like(own) for part, own in base.items()})


def _falling(rows: int, columns: int, aligned: float, generator: torch.Generator) -> Tensor:
    """A matrix whose own alignment G on d_model, its shared side, is ``aligned``."""
    drawn = _normal(rows, columns, generator=generator)
    left, _, right = torch.linalg.svd(drawn, full_matrices=False)
    rank, d_model = len(right), 576 if 576 in (rows, columns) else min(rows, columns)
    places = (torch.arange(rank, dtype=torch.float64) + 0.5) / d_model

    def own(rate: float) -> float:
        energies = torch.exp(-2 * rate * places)
        return float((energies * (1 - 2 * places)).sum() / energies.sum())

    rate = optimize.brentq(lambda x: own(x) - aligned, -50.0, 200.0)
    return ((left * torch.exp(-rate * places)) @ right).float()


def ground_of(pair: object, layer: int, parts: Sequence[str] = PARTS) -> Ground:
    """A layer of a pair of base and control fine-tune."""
    read = {part: pair.read(Component("matrix", layer, None, part)) for part in parts}
    return Ground(
        layer,
        pair.layout,
        {part: weight.base for part, weight in read.items()},
        {part: weight.dense_delta() for part, weight in read.items()},
    )


class Plant(NamedTuple):
    """A change and the label that it must get."""

    name: str
    label: str
    shape: Shape


@dataclass(frozen=True, eq=False)
class Case:
    """Planted changes in one or two matrices of a layer.

    Attributes:
        family: heads, neurons or matrices.
        ground: The layer.
        changes: What is added, by part.
        parts: All matrices that are examined.
        planted: Plants by the name of the component that carries them.
    """

    family: str
    ground: Ground
    changes: Mapping[str, Tensor]
    parts: Sequence[str]
    planted: Mapping[str, Plant]

    def pair(self, background: str, seed: int) -> FakePair:
        """The planted changes on a background, as geometry reads them."""
        weights = {}
        for part in self.parts:
            base, component = self.ground.base[part], self.ground.component(part)
            delta = self.ground.background(background, part, seed)
            delta = delta + self.changes.get(part, 0)
            floor = (base.abs() * 2.0**-24).square() / 12
            weights[component] = FakeWeight(component, base, delta, floor)
        return FakePair(weights, self.ground.layout)


# --- heads --------------------------------------------------------------------------------------

MIXED_HEAD = half_and_half(gain, outside(1))
OUTPUT_PLANTS = (
    Plant("gain", "amplified", gain),
    Plant("loss", "attenuated", loss),
    Plant("rotation", "rewired", rotation),
    Plant("new, rank 1", "new_write", outside(1)),
    Plant("new, rank 4", "new_write", outside(4)),
    Plant("gain and new", "mixed", MIXED_HEAD),
    Plant("noise", "unresolved", noise),
)
VALUE_PLANTS = (
    Plant("gain of values", "amplified", gain),
    Plant("loss of values", "attenuated", loss),
    Plant("rotation of values", "rewired", rotation),
    Plant("new read of values", "new_read", outside(1)),
)
ALL_GAIN = Plant("gain of all heads", "amplified", gain)


def head_cases(ground: Ground, size: float, seed: int) -> list[Case]:
    """Plants in W_O, one a head, and in W_V, one a kv head; some heads stay as they are."""
    heads, kv_heads = ground.layout.n_heads, ground.layout.n_kv_heads
    generator = stream(1, seed, ground.layer)
    cases = []
    for some in _dealt(OUTPUT_PLANTS, heads - 2):
        places = torch.randperm(heads, generator=generator)[: len(some)].tolist()
        cases.append(_head_case(ground, "W_O", dict(zip(places, some, strict=True)), size, seed))
    for some in _dealt(VALUE_PLANTS, kv_heads - 1):
        places = torch.randperm(kv_heads, generator=generator)[: len(some)].tolist()
        cases.append(_head_case(ground, "W_V", dict(zip(places, some, strict=True)), size, seed))
    cases.append(_head_case(ground, "W_O", dict.fromkeys(range(heads), ALL_GAIN), size, seed))
    return cases


def _dealt(plants: Sequence[Plant], at_once: int) -> Iterator[Sequence[Plant]]:
    for start in range(0, len(plants), max(1, at_once)):
        yield plants[start : start + max(1, at_once)]


def _head_case(
    ground: Ground, part: str, places: Mapping[int, Plant], size: float, seed: int
) -> Case:
    base = ground.base[part]
    rows = base if part == "W_O" else base.T
    count = ground.layout.n_heads if part == "W_O" else ground.layout.n_kv_heads
    own = rows.unflatten(0, (count, -1))
    change = torch.zeros_like(own)
    planted = {}
    for place, plant in places.items():
        generator = stream(2, seed, ground.layer, place, len(plant.name))
        change[place] = sized(plant.shape(own[place], generator), size, own[place])
        share = ground.layout.n_heads // count
        for head in range(place * share, (place + 1) * share):
            planted[f"L{ground.layer}H{head}.OV"] = plant
    flat = change.flatten(0, 1)
    changes = {part: flat if part == "W_O" else flat.T}
    return Case("heads", ground, changes, ("W_V", "W_O"), planted)


# --- neurons ------------------------------------------------------------------------------------


def neuron_plants(part: str, d_model: int) -> Sequence[Plant]:
    """What is planted in groups of neurons of one matrix."""
    new = "new_read" if part in READING_PARTS else "new_write"
    return (
        Plant("gain", "amplified", gain),
        Plant("loss", "attenuated", loss),
        Plant("new, rank 1", new, unrelated(1)),
        Plant("new, rank 4", new, unrelated(4)),
        Plant("mixture", "rewired", in_strongest(max(4, d_model // 14))),
        Plant("noise", "unresolved", noise),
    )


def neuron_cases(ground: Ground, size: float, seed: int) -> list[Case]:
    """Groups of neurons of W_out and W_gate, some 3 % of the layer each; half stay as they are.

    Every changed neuron's change is ``size`` times its own length; directions of the base are
    those of the whole matrix.
    """
    return [_neuron_case(ground, part, size, seed) for part in ("W_out", "W_gate")]


def _neuron_case(ground: Ground, part: str, size: float, seed: int) -> Case:
    rows = ground.base[part] if part == "W_out" else ground.base[part].T
    plants, count = neuron_plants(part, rows.shape[1]), max(20, len(rows) // 32)
    generator = stream(3, seed, ground.layer, len(part))
    order = torch.randperm(len(rows), generator=generator)
    change, planted = torch.zeros_like(rows), {}
    for number, plant in enumerate(plants):
        group = order[number * count : (number + 1) * count]
        new = plant.shape(rows if plant.label == "rewired" else rows[group], generator)
        new = new[group] if plant.label == "rewired" else new
        length = size * rows[group].double().norm(dim=1, keepdim=True)
        change[group] = (torch.nn.functional.normalize(new, dim=1) * length).float()
        planted |= {f"L{ground.layer}N{n}.{part}": plant for n in group.tolist()}
    changes = {part: change if part == "W_out" else change.T}
    return Case("neurons", ground, changes, (part,), planted)


# --- whole matrices -----------------------------------------------------------------------------

WHOLE = ("W_O", "W_out", "W_Q", "W_in")


def matrix_plants(part: str, d_model: int) -> Sequence[Plant]:
    """What is planted in whole matrices."""
    new, top = "new_read" if part in READING_PARTS else "new_write", max(6, d_model // 18)
    return (
        Plant("gain", "amplified", gain),
        Plant("loss", "attenuated", loss),
        Plant("gain of the top", "amplified", gain_of_strongest(top)),
        Plant("new, rank 1", new, unrelated(1)),
        Plant("new, rank 4", new, unrelated(4)),
        Plant("mixture", "rewired", in_strongest(top)),
        Plant("gain and new", "mixed", half_and_half(gain, unrelated(4))),
        Plant("noise", "unresolved", noise),
    )


def matrix_cases(ground: Ground, size: float, seed: int) -> list[Case]:
    """Each plant in each of four matrices."""
    cases = []
    for part in WHOLE:
        base = ground.base[part]
        for number, plant in enumerate(matrix_plants(part, int(ground.base["W_O"].shape[1]))):
            generator = stream(4, seed, ground.layer, number, len(part))
            change = sized(plant.shape(base, generator), size, base)
            cases.append(
                Case(
                    "matrices", ground, {part: change}, (part,), {f"L{ground.layer}.{part}": plant}
                )
            )
    return cases


FAMILIES = {"heads": head_cases, "neurons": neuron_cases, "matrices": matrix_cases}
KINDS = {"heads": "head", "neurons": "neuron", "matrices": "matrix"}


# --- what the labels say ------------------------------------------------------------------------


def evidence_of(
    family: str,
    ground: Ground,
    seed: int,
    *,
    backgrounds: Sequence[str] = BACKGROUNDS,
    sizes: Sequence[float] = SIZES,
) -> pd.DataFrame:
    """Evidence about all components of a family's kind in one layer, with what was planted.

    The base's directions are taken once for all plants.
    """
    cells = [
        (background, size, case)
        for size in sizes
        for case in FAMILIES[family](ground, size, seed)
        for background in backgrounds
    ]
    frames = []
    for parts in dict.fromkeys(tuple(case.parts) for _, _, case in cells):
        some = [cell for cell in cells if tuple(cell[2].parts) == parts]
        block = [ground.component(part) for part in parts]
        pairs = [case.pair(background, seed) for background, _, case in some]
        found = findings_of_block([Ask(pair, block, seed=seed) for pair in pairs])
        for (background, size, case), one in zip(some, found, strict=True):
            frames.append(_marked(one.evidence.frame, case, background, size))
    return pd.concat(frames, ignore_index=True)


def _marked(frame: pd.DataFrame, case: Case, background: str, size: float) -> pd.DataFrame:
    kind = KINDS[case.family]
    frame = frame[(frame["kind"] == kind) & ((kind != "head") | (frame["part"] == "OV"))]
    plants = [case.planted.get(component) for component in frame["component"]]
    return frame.assign(
        family=case.family,
        background=background,
        size=size,
        plant=[plant.name if plant else "untouched" for plant in plants],
        expected=[plant.label if plant else "" for plant in plants],
    )


def called(evidence: pd.DataFrame, classifier: Classifier = labelled) -> pd.DataFrame:
    """Evidence with labels; the false discovery rate is kept within a cell, as within a pair."""
    parts = [classifier(with_q_values(rows)) for _, rows in evidence.groupby(CELL, sort=False)]
    return pd.concat(parts, ignore_index=True)


def always_unresolved(evidence: pd.DataFrame) -> pd.DataFrame:
    """The classifier that is never wrong about noise."""
    return evidence.assign(label="unresolved")


def by_raw_cosine(evidence: pd.DataFrame) -> pd.DataFrame:
    """What a reader would do by hand: along the base a gain, across it new, else mixed."""
    cosine = evidence["kappa"].fillna(0)
    label = pd.Series("mixed", index=evidence.index).mask(cosine.abs() < 0.1, "new_write")
    label = label.mask(cosine > 0.9, "amplified").mask(cosine < -0.9, "attenuated")
    return evidence.assign(label=label.mask(evidence["delta_norm"] == 0, "unchanged"))


def recalls(calls: pd.DataFrame) -> pd.DataFrame:
    """Share of each plant that got its label: columns ``n recall`` and what the others got."""
    planted = calls[calls["expected"] != ""]
    rows = []
    for key, group in planted.groupby([*CELL, "plant", "expected"], sort=False):
        wrong = group.loc[group["label"] != group["expected"], "label"].value_counts()
        others = ", ".join(f"{count} {label}" for label, count in wrong.items())
        recall = float((group["label"] == group["expected"]).mean())
        rows.append((*key, len(group), recall, others))
    return pd.DataFrame(rows, columns=[*CELL, "plant", "expected", "n", "recall", "otherwise"])


def false_gains(calls: pd.DataFrame) -> pd.DataFrame:
    """Gains that were called where none was planted, by cell.

    ``share`` is of the components without a planted gain, ``of_calls`` of all calls of a gain.
    """
    is_gain, named = calls["expected"].isin(GAINS), calls["label"].isin(GAINS)
    wrong = named & (~is_gain | (calls["label"] != calls["expected"])) & (calls["plant"] != MIXED)
    table = calls.assign(quiet=~is_gain, named=named, wrong=wrong)
    sums = table.groupby(CELL, sort=False)[["quiet", "named", "wrong"]].sum().reset_index()
    return sums.assign(
        share=sums["wrong"] / sums["quiet"].clip(lower=1),
        of_calls=sums["wrong"] / sums["named"].clip(lower=1),
    )


MIXED = "gain and new"
"""Half of it is a gain: to call it one is a missed plant, not a false gain."""


def quiet_on_noise(calls: pd.DataFrame) -> pd.DataFrame:
    """Share of components of an isotropic background without a plant that stay unresolved."""
    rows = calls[(calls["background"] == "isotropic") & (calls["plant"] == "untouched")]
    rows = rows.assign(unresolved=rows["label"] == "unresolved")
    return rows.groupby(CELL, sort=False)["unresolved"].agg(["mean"]).reset_index()


def missed_bars(calls: pd.DataFrame, *, without: Sequence[str] = ()) -> list[str]:
    """Sentences about every bar that is not reached; empty where the suite passes.

    Args:
        calls: Labels of a suite.
        without: Plants whose recall is reported in docs and held to no bar.
    """
    table, gains, quiet = recalls(calls), false_gains(calls), quiet_on_noise(calls)
    table = table[~table["plant"].isin(without)]
    missed = [
        f"{row.family} on {row.background}, {row.size:g}, {row.plant}: {row.recall:.3f} of {row.n} "
        f"are {row.expected}, otherwise {row.otherwise}"
        for row in table[table["recall"] < RECALL].itertuples()
    ]
    missed += [
        f"{row.family} on {row.background}, {row.size:g}: {row.wrong} false gains"
        for row in gains[
            (gains["share"] > FALSE_GAINS) | (gains["of_calls"] > FALSE_GAINS)
        ].itertuples()
    ]
    return missed + [
        f"{row.family} on {row.background}, {row.size:g}: {row.mean:.3f} of noise unresolved"
        for row in quiet[quiet["mean"] < QUIET].itertuples()
    ]
