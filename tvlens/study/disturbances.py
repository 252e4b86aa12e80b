"""What one tuning vector does to the domain of another, and whether the weights foretold it.

With f a measure of the domain of fine-tune i in the good direction, tau_j another's vector,

    fall      f(s without tau_j) - f(s)        how far the domain's measure falls when tau_j is
                                               added at its dose; positive is worse
    beyond    fall - mean over draws of the fall that a random vector as long causes

at every point of the grid at which both have a dose (``level`` whole), with the same for what
stands in tau_j's place. And part by part (``level`` part): to the base with all of tau_i comes one
matrix of tau_j, or the matrices of one layer, on tasks of kind ``loss``.

Predicted is the table ``interference`` (``compose.interference``), from the weights alone; of a
layer it is the mean over its matrices, weighed by the product of the two lengths, and of STI the
sum. Spearman's rho of predicted and measured over the parts has a 95 % interval from a bootstrap
over parts and a p-value from permutations, two-sided. ``norm_added``, the length of what was added,
stands beside the others: a measure of conflict that ranks no better than length foretells no
conflict. Parts are few and their falls have noise of their own, which pulls rho towards 0.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Float
from scipy import stats

from tvlens.attribution.series import rank_agreement, spearman
from tvlens.components import Component
from tvlens.evaluation.intervals import Sampled, summed
from tvlens.evaluation.measures import MEASURES
from tvlens.evaluation.tasks import Task
from tvlens.tables import Table

from .combination_points import RANDOM, Point
from .combination_samples import Samples, difference, ends, good, towards
from .combining import Combining, Found

if TYPE_CHECKING:
    from tvlens.compose.edits import Doses, Share
    from tvlens.evaluation.suite import Measured, Ready

FEWEST_PARTS = 8
"""Parts below which ranks are not compared: of 7 rho must exceed 0.79 to differ from chance."""
PERMUTATIONS = 2_000
PREDICTORS = (
    *("sign_conflict", "conflict_entries", "overlap_read", "overlap_write"),
    *("sti", "sti_relative", "norm_added"),
)
DISTURBANCE_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("level", "base", "tuned", "added", "by")),
        ("draw", pa.int32()),
        *((name, pa.string()) for name in ("task", "measure", "unit", "model")),
        ("scales", pa.list_(pa.float64())),
        ("component", pa.string()),
        ("layer", pa.int32()),
        ("part", pa.string()),
        *((name, pa.float64()) for name in ("fall", "ci_low", "ci_high")),
        ("n", pa.int32()),
        *((name, pa.float64()) for name in ("beyond", "beyond_low", "beyond_high")),
        *((name, pa.float64()) for name in PREDICTORS),
    ]
)
"""One row a point or part x task.

    tuned, added    whose domain is measured, whose vector is added
    by, draw        what stands in the added vector's place, null for the vector itself
"""
RANKS_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("base", "tuned", "added", "task", "measure")),
        *((name, pa.string()) for name in ("parts", "predictor")),
        ("n", pa.int32()),
        *((name, pa.float64()) for name in ("spearman", "ci_low", "ci_high", "p_value")),
        *((name, pa.string()) for name in ("verdict", "sentence")),
    ]
)


class Disturbances(NamedTuple):
    """What was found, and what can be quoted of it."""

    tables: tuple[Table, ...]
    sentences: list[str]


def disturbances(run: Combining, found: Found, tasks: Sequence[Task]) -> Disturbances:
    """Every fall, what the weights foretold of it, and whether the two rank alike.

    Args:
        run: The models.
        found: What they did on the grid.
        tasks: The tasks.
    """
    from tvlens.compose.interference import interference

    samples = Samples(tasks, run.plan.seed, found.models)
    whole = list(whole_rows(found, tasks, samples))
    vectors = [model.vector for model in run.models]
    predicted = interference(run.pairs[0].base, vectors, select=run.plan.select)
    predicted = _of_base(predicted, found.base_name)
    parts = list(_Parts(run, tasks, predicted.to_frame(), samples).rows())
    ranks = list(rank_rows(parts, run.plan.places, seed=run.plan.seed))
    tables = (
        _table("disturbance", DISTURBANCE_SCHEMA, [*whole, *parts]),
        predicted,
        _table("interference_ranks", RANKS_SCHEMA, ranks),
    )
    return Disturbances(tables, [*_whole_sentences(whole, found), *_rank_sentences(ranks)])


def _table(name: str, schema: pa.Schema, rows: Sequence[dict[str, Any]]) -> Table:
    return Table.of(name, schema, {c: [row.get(c) for row in rows] for c in schema.names})


def _of_base(table: Table, name: str) -> Table:
    """The table with the name that the study's other tables have for the base."""
    place = table.data.schema.get_field_index("base")
    names = pa.array([name] * len(table), pa.string())
    data = table.data.set_column(place, table.data.schema.field(place), names)
    return Table(table.name, data, table.order)


def of_domains(tasks: Sequence[Task], names: Sequence[str]) -> Iterator[tuple[int, Task]]:
    """Tasks with a good direction, with the place of the fine-tune whose domain they are of."""
    for task in tasks:
        if task.spec.domain in names and good(task.spec.primary):
            yield list(names).index(str(task.spec.domain)), task


def whole_rows(found: Found, tasks: Sequence[Task], samples: Samples) -> Iterator[dict[str, Any]]:
    """The falls on the grid.

    Args:
        found: What every model did.
        tasks: The tasks.
        samples: The draws.
    """
    for place, task in of_domains(tasks, found.names):
        if not len(samples.of(found.base, task, task.spec.primary).items):
            continue
        for point in found.points:
            for added in added_at(point, place):
                row = _fall(found, samples, task, point, added)
                yield {"level": "whole", "base": found.base_name, "tuned": task.spec.domain, **row}


def added_at(point: Point, place: int) -> list[int]:
    """The vectors whose addition to that at ``place`` is measured at a point.

    Not where something stands in for another vector than the one that is added.
    """
    if not point.scales[place]:
        return []
    stand = point.stand_in
    return [a for a in point.acting if a != place and (stand is None or stand.which == a)]


def _fall(found: Found, samples: Samples, task: Task, point: Point, added: int) -> dict[str, Any]:
    sign, stand = good(task.spec.primary), point.stand_in
    value = partial(_value, found, samples, task)
    fall = summed([(sign, value(point.without(added))), (-sign, value(point))])
    row = {
        "added": found.names[added],
        "by": None if stand is None else stand.by,
        "draw": None if stand is None else stand.draw,
        "model": found.points[point].variant.model,
        "scales": list(point.scales),
        **_measured(task, fall),
    }
    random = [
        p
        for p in found.stood_in(point)
        if p.stand_in is not None and p.stand_in.which == added and p.stand_in.by == RANDOM
    ]
    if stand is None and random:
        share = sign / len(random)
        beyond = summed([*((share, value(p)) for p in random), (-sign, value(point))])
        row |= ends(beyond, "beyond")
    return row


def _value(found: Found, samples: Samples, task: Task, point: Point) -> Sampled:
    return samples.of(found.points[point], task, task.spec.primary)


def _measured(task: Task, fall: Sampled) -> dict[str, Any]:
    measure = task.spec.primary
    named = {"task": task.spec.name, "measure": measure, "unit": MEASURES[measure].unit}
    return {**named, **ends(fall, "ci", value="fall"), "n": len(fall.items)}


class Part(NamedTuple):
    """A part of a vector that is added by itself.

    Attributes:
        components: Its matrices.
        name: What tables call it.
        layer: Its layer.
        part: Which matrix, None for all of a layer.
        predicted: What the weights foretell of it.
    """

    components: tuple[Component, ...]
    name: str
    layer: int
    part: str | None
    predicted: dict[str, float]


def parts_of(predicted: pd.DataFrame, tuned: str, added: str, places: str) -> list[Part]:
    """The parts of one vector that another one's domain is measured with.

    Args:
        predicted: The table ``interference``.
        tuned: Whose domain is measured.
        added: Whose vector is added.
        places: ``matrix``, ``layer`` or ``none``.
    """
    pair = [tuned, added]
    both = predicted["tuned"].isin(pair) & predicted["other"].isin(pair)
    rows = predicted[both & (predicted["kind"] == "matrix")].dropna(subset=["sti"])
    if places == "none" or rows.empty:
        return []
    own = np.where(rows["tuned"] == added, rows["norm_a"], rows["norm_b"])
    rows = rows.assign(norm_added=own)
    if places == "layer":
        return [_layer(of) for _, of in rows.groupby("layer", sort=True)]
    return [
        Part(
            (_component(row),),
            row["component"],
            int(row["layer"]),
            row["part"],
            {name: float(row[name]) for name in PREDICTORS},
        )
        for row in rows.to_dict("records")
    ]


def _component(row: Mapping[Any, Any]) -> Component:
    return Component("matrix", int(row["layer"]), None, row["part"])


def _layer(rows: pd.DataFrame) -> Part:
    """The matrices of a layer together; see the module for how predictions are pooled."""
    layer = int(rows["layer"].iloc[0])
    weights = rows["norm_a"] * rows["norm_b"]
    total = float(weights.sum())
    pooled = {
        name: float((rows[name] * weights).sum() / total) if total else float("nan")
        for name in PREDICTORS
    }
    pooled["sti"] = float(rows["sti"].sum())
    pooled["norm_added"] = float(np.sqrt((rows["norm_added"] ** 2).sum()))
    components = tuple(_component(row) for row in rows.to_dict("records"))
    return Part(components, f"L{layer}", layer, None, pooled)


@dataclass(frozen=True)
class _Parts:
    """The falls part by part."""

    run: Combining
    tasks: Sequence[Task]
    predicted: pd.DataFrame
    samples: Samples

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every domain's losses with every part of every other vector added."""
        losses = [t for t in self.tasks if t.spec.kind == "loss"]
        names = self.run.names
        for place, name in enumerate(names):
            own = [task for at, task in of_domains(losses, names) if at == place]
            for added in range(len(names)) if own else ():
                if added != place:
                    yield from self._with_parts(name, place, added, own)

    def _with_parts(
        self, name: str, place: int, added: int, tasks: Sequence[Task]
    ) -> Iterator[dict[str, Any]]:
        from tvlens.compose.edits import written

        run, other = self.run, self.run.names[added]
        parts = parts_of(self.predicted, name, other, run.plan.places)
        wanted = [one for one in run.tasks if one.task in tasks]
        if not parts:
            return
        run.say(f"tasks of {name} with {len(parts)} parts of {other}, one by one")
        with written(run.lens, [run.stack.shares[place]]) as lens:
            before = self._losses(f"{name} before parts", lens, wanted)
            for part in parts:
                with written(run.lens, [self._share(added, part)]) as moved:
                    after = self._losses(f"{name} with {other} {part.name}", moved, wanted)
                for task in tasks:
                    yield self._row(name, other, part, task, before, after)

    def _losses(self, name: str, lens: Any, tasks: "Sequence[Ready]") -> "Measured":
        from tvlens.evaluation.suite import Variant, measured

        return measured(Variant(name), lens, tasks)

    def _share(self, added: int, part: Part) -> "Share":
        """A part of the vector, as far as it is selected."""
        from tvlens.compose.edits import Edit, Share, Term

        model = self.run.models[added]
        selected: Doses = self.run.selected(model)
        mask = model.doses(Edit(0.0, (Term(part.components, 1.0),)))
        return Share(model.gated, {key: dose * selected[key] for key, dose in mask.items()})

    def _row(
        self, name: str, other: str, part: Part, task: Task, before: "Measured", after: "Measured"
    ) -> dict[str, Any]:
        measure = task.spec.primary
        sides = (self.samples.of(one, task, measure) for one in (before, after))
        fall = towards(difference(*sides), good(measure))
        return {
            **{"level": "part", "base": self.run.pairs[0].base_name},
            **{"tuned": name, "added": other, "component": part.name},
            **{"layer": part.layer, "part": part.part},
            **_measured(task, fall),
            **part.predicted,
        }


def rank_rows(
    rows: Sequence[dict[str, Any]], places: str, *, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Whether each prediction ranks the parts like what was measured.

    Args:
        rows: Rows of ``disturbance`` of the level ``part``.
        places: What the parts are: ``matrix`` or ``layer``.
        seed: Of bootstrap and permutations.
    """
    if not rows:
        return
    frame = pd.DataFrame(rows)
    keys = ["base", "tuned", "added", "task", "measure"]
    for key, of in frame.groupby(keys, sort=False):
        named = dict(zip(keys, key, strict=True))
        for predictor in PREDICTORS:
            known = of.dropna(subset=[predictor, "fall"])
            found = _ranked(known[predictor].to_numpy(), known["fall"].to_numpy(), seed)
            row = {**named, "parts": places, "predictor": predictor, "n": len(known), **found}
            yield {**row, "sentence": _rank_sentence(row)}


def _ranked(predicted: np.ndarray, fall: np.ndarray, seed: int) -> dict[str, Any]:
    if len(fall) < FEWEST_PARTS or spearman(predicted, fall) is None:
        return {"verdict": "cannot tell"}
    rho, low, high = rank_agreement(predicted, fall, seed=seed)
    known = {"spearman": rho, "ci_low": low, "ci_high": high, "verdict": _verdict(low, high)}
    return {**known, "p_value": permuted_p(predicted, fall, seed=seed)}


def permuted_p(
    x: Float[np.ndarray, " part"], y: Float[np.ndarray, " part"], *, seed: int = 0
) -> float:
    """Two-sided p-value of Spearman's rho: how often a random order is as far from 0."""
    first, second = (stats.rankdata(side) for side in (x, y))
    first = first - first.mean()
    orders = np.tile(second - second.mean(), (PERMUTATIONS, 1))
    drawn = np.random.default_rng(seed).permuted(orders, axis=1) @ first
    beyond = int((np.abs(drawn) >= abs(float(orders[0] @ first)) - 1e-9).sum())
    return (1 + beyond) / (1 + PERMUTATIONS)


def _verdict(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "cannot tell"
    if low > 0:
        return "ranks alike"
    return "ranks the other way round" if high < 0 else "cannot tell"


def _rank_sentence(row: dict[str, Any]) -> str:
    what = f"{row['predictor']} against the fall of {row['task']} when {row['added']} is added"
    words = {"matrix": "matrices", "layer": "layers"}.get(row["parts"], "parts")
    if row.get("spearman") is None:
        return f"{what}: cannot tell: {row['n']} {words}."
    ends = f"[{row['ci_low']:.2f}, {row['ci_high']:.2f}]"
    return (
        f"{what}: {row['verdict']}, Spearman {row['spearman']:.2f} {ends} over {row['n']} {words}, "
        f"p = {row['p_value']:.2g}."
    )


def _rank_sentences(ranks: Sequence[dict[str, Any]]) -> list[str]:
    """The sign conflict and the length that stands beside it, a task each."""
    quoted = ("sign_conflict", "sti", "norm_added")
    return [row["sentence"] for row in ranks if row["predictor"] in quoted]


def _whole_sentences(rows: Sequence[dict[str, Any]], found: Found) -> list[str]:
    """The fall at the largest doses, beside what stood in the added vector's place."""
    top = tuple(
        max(point.scales[place] for point in found.grid) for place in range(len(found.names))
    )
    at = [row for row in rows if _among(row["scales"], top)]
    sentences = []
    for row in (one for one in at if one["by"] is None):
        same = [one for one in at if _same_place(row, one)]
        text = (
            f"Adding {row['added']} to {row['tuned']} ({row['model']}) costs {row['task']} "
            f"{_ended(row['fall'], row['ci_low'], row['ci_high'])} {row['unit']}".rstrip()
        )
        beside = "; ".join(_stood(same))
        sentences.append(f"{text}{'; ' + beside if beside else ''}.")
    return sentences


def _among(scales: Sequence[float], top: Sequence[float]) -> bool:
    """Whether just two vectors have a dose, both the largest."""
    acting = [place for place, scale in enumerate(scales) if scale]
    return len(acting) == 2 and all(scales[place] == top[place] for place in acting)


def _same_place(row: dict[str, Any], other: dict[str, Any]) -> bool:
    keys = ("tuned", "added", "task", "scales")
    return other["by"] is not None and all(row[key] == other[key] for key in keys)


def _stood(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    by: dict[str, list[float]] = {}
    for row in rows:
        by.setdefault(row["by"], []).append(row["fall"])
    for name, falls in by.items():
        what = "random vectors as long" if name == RANDOM else f"{name} as long"
        least, most = min(falls), max(falls)
        yield f"{what} {least:.3g}" + (f" to {most:.3g}" if len(falls) > 1 else "")


def _ended(value: float, low: float, high: float) -> str:
    known = np.isfinite(low) and np.isfinite(high)
    return f"{value:.3g}" + (f" [{low:.3g}, {high:.3g}]" if known else "")
