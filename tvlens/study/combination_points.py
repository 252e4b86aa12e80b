"""The points of a grid of doses of several tuning vectors, and what can stand in for one of them.

A point is one dose for each vector. At a point where vector j has a dose, something as long can
stand in its place: a random vector (one of some draws) or a control fine-tune's vector.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

RANDOM = "random"


class StandIn(NamedTuple):
    """What stands in place of a vector.

    Attributes:
        which: Place of the vector that it stands for.
        by: ``random``, or the name of a control fine-tune.
        draw: Which of several random draws.
    """

    which: int
    by: str
    draw: int | None = None

    @property
    def words(self) -> str:
        """What a model's name calls it."""
        return self.by if self.draw is None else f"{self.by} {self.draw + 1}"


class Point(NamedTuple):
    """A dose for each vector.

    Attributes:
        scales: The doses, in the order of the vectors.
        stand_in: What stands in place of one of them, which then has a dose other than 0.
    """

    scales: tuple[float, ...]
    stand_in: StandIn | None = None

    @property
    def acting(self) -> tuple[int, ...]:
        """Places of the vectors that have a dose."""
        return tuple(place for place, scale in enumerate(self.scales) if scale)

    def only(self, kept: Sequence[int]) -> "Point":
        """The point with all other doses 0; a stand-in without a dose is gone too."""
        scales = tuple(scale if place in kept else 0.0 for place, scale in enumerate(self.scales))
        stands = self.stand_in is not None and scales[self.stand_in.which] != 0
        return Point(scales, self.stand_in if stands else None)

    def without(self, which: int) -> "Point":
        """The point with the dose of one vector 0."""
        return self.only([place for place in self.acting if place != which])

    def name(self, names: Sequence[str], *, base: str = "base", method: str = "task") -> str:
        """What tables call the model at this point, such as ``0.5 med + 1 math``."""
        terms = []
        for place in self.acting:
            what, stand = names[place], self.stand_in
            if stand is not None and stand.which == place:
                what = f"{stand.words} (for {what})"
            terms.append(f"{self.scales[place]:g} {what}")
        formula = " + ".join(terms)
        if not terms:
            return base
        return formula if method == "task" else f"{method}({formula})"


def grid(scales: Sequence[float], vectors: int) -> list[Point]:
    """Every combination of doses, the base (all 0) among them, the last vector's dose fastest."""
    doses = sorted({0.0, *scales})
    return [Point(point) for point in itertools.product(doses, repeat=vectors)]


def stand_ins(vectors: int, draws: int, controls: Sequence[str]) -> Iterator[StandIn]:
    """Everything that stands in, vector by vector."""
    for which in range(vectors):
        for draw in range(draws):
            yield StandIn(which, RANDOM, draw)
        for control in controls:
            yield StandIn(which, control)


def points_with(points: Sequence[Point], stand_in: StandIn) -> list[Point]:
    """The points at which it can stand: where the vector that it stands for has a dose."""
    return [Point(p.scales, stand_in) for p in points if p.scales[stand_in.which]]
