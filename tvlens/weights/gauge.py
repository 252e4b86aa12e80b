"""Same function, other weights: is a tuned model a copy of its base in other coordinates?

Neurons and heads can be renumbered, gated neurons and norm gains rescaled, and the bases of heads
changed without changing what a model computes (``moves`` has the list). ``same_function`` looks for
the move that brings each block of the tuned model into the base's coordinates (``alignment``) and
judges what is left by the rounding of the stored dtypes:

* where no new basis was needed, nothing may be left: renumbering does not round. Only a copy in a
  coarser dtype may differ, by half a spacing an entry;
* where one was needed, the copy was rounded once more when it was stored. The residual's energy may
  be ``SLACK`` times what that rounding has after the move, plus the error of the arithmetic that
  made the copy. Rows and columns are judged one by one, so that one neuron shows in a large matrix.

``True`` is thus up to rounding: in bfloat16 a real change of some 0.3 % that comes with a new basis
of the same part cannot be told from it. ``False`` says that none of these moves does it. Not looked
for are rotations and permutations of the residual stream, LayerNorm's centring and bias folding,
signs of post norms, and dead units. A positive factor before a norm within heads or after a
sub-layer is no exact symmetry, because of the norm's epsilon.

``canonical`` reads any full fine-tune in the base's coordinates. Its deltas then belong to a model
that computes what the tuned model does, for every move is undone by its dual. A fine-tune that was
never moved is changed a little as well: what its training did along such moves has no effect, and
which of two parts did it cannot be said (``alignment`` has the choices).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tvlens.components import Component
from tvlens.errors import UnsupportedFormatError

from .alignment import Freedom, block_moves
from .configs import rotary_entries
from .contents import row_ranges
from .moves import AXES, Moves
from .pair import Pair
from .pairing import Sizes
from .precision import PRECISIONS, coarsest_dtype, is_block_type, rounding_energy
from .report import SameFunction
from .slices import NEURON_PARTS

SLACK = 4.0
"""Ratio of energies up to which a residual is rounding; the same as ``snr`` of labels."""
ARITHMETIC = 64 * 2.0**-24
"""Relative error of a copy made in float32: products over a d_model of 4096 are sums of as many
terms, whose roundings of 2**-24 add up to sqrt(4096) of one."""
HALF_SPACING = 3.01
"""(spacing / 2)**2 over the mean square, spacing**2 / 12, and what float32 makes of the two."""
MLP_PARTS = ("ln2.w", "ln2.b", *NEURON_PARTS)
POSITIVE_ACTIVATIONS = ("relu",)
"""f(c x) = c f(x) for positive c."""
NAMED = 8.0, 1e-3
"""A new basis is named from so many roundoffs, and from this, away from the old one: fitting a
basis to rounded weights gives some of the first even where only the gain was changed."""


class Residual(NamedTuple):
    """What is left of one component after alignment.

    Attributes:
        component: Which one.
        left: |aligned tuned - base|^2.
        base: |base|^2.
        rounding: Whether it is small enough for rounding.
    """

    component: Component
    left: float
    base: float
    rounding: bool

    @property
    def relative(self) -> float:
        """|aligned tuned - base| / |base|."""
        return math.sqrt(self.left / self.base) if self.base else math.inf


@dataclass
class _Found:
    """What the blocks so far have shown.

    Attributes:
        clear: Names of moves that are well beyond rounding.
        slight: Names of all moves beyond rounding.
        residuals: Of the components so far.
    """

    clear: set[str] = field(default_factory=set)
    slight: set[str] = field(default_factory=set)
    residuals: list[Residual] = field(default_factory=list)

    @property
    def by(self) -> tuple[str, ...]:
        return tuple(sorted(self.clear or self.slight))

    @property
    def residual(self) -> float:
        base = sum(r.base for r in self.residuals)
        return math.sqrt(sum(r.left for r in self.residuals) / base) if base else 0.0


def same_function(pair: Pair) -> SameFunction:
    """Whether the models of a pair compute the same, as far as their weights tell.

    The first block that shows a difference ends the search; tensors that the load report knows to
    be equal are not read again. A true copy is read once more, a block at a time.

    Raises:
        CheckpointError: A file cannot be read.
    """
    if pair.load_report.identical:
        return SameFunction(True, residual=0.0)
    if reason := _obstacle(pair):
        return SameFunction(None, reason=reason)
    found = _Found()
    for residual in _every_residual(pair, found):
        found.residuals.append(residual)
        if not residual.rounding:
            reason = f"{residual.component} differs by {residual.relative:.2g} of its length"
            return SameFunction(False, found.by, found.residual, reason)
    return SameFunction(True, found.by, found.residual)


def same_function_warning(pair: Pair) -> str:
    """A sentence where two different checkpoints compute the same, else empty."""
    found = pair.load_report.same_function
    if not found.value or pair.load_report.identical:
        return ""
    names = f"{pair.base_name} and {pair.tuned_name} compute the same function"
    left = f"(residual {found.residual:.1g} of the weights' length)"
    if not found.by:
        return f"{names}: their weights differ by rounding alone {left}."
    return (
        f"{names}: their weights differ by {' and '.join(found.by)} alone {left}. --canonical "
        "measures them in the same coordinates."
    )


def canonical(pair: Pair) -> Pair:
    """The pair with its tuned side read in the base's coordinates.

    Both checkpoints are read once, a block at a time; kept are the moves, d_head**2 numbers a kv
    head and three a neuron. Models that are run are not touched by it. An adapter is stored as a
    change of its base, so it has the base's coordinates already and is returned as it is.

    Raises:
        UnsupportedFormatError: The family has no table, or a model is block-quantised.
    """
    refuse_canonical(pair)
    if pair.adapter is not None:
        return pair
    freedom = freedom_of(pair)
    moves = {
        block[0].layer: block_moves(*_block(pair, block), freedom)
        for block in pair.blocks()
        if block
    }
    return replace(pair, moves=moves)


def refuse_canonical(pair: Pair) -> None:
    """Raise where a pair cannot be read in the base's coordinates.

    Raises:
        UnsupportedFormatError: The family has no table, or a model is block-quantised.
    """
    if pair.adapter is None and _has_blocks(pair):
        raise UnsupportedFormatError(
            f"{pair.base_name} or {pair.tuned_name} is block-quantised, and its rounding would be "
            "taken for other coordinates by --canonical.",
            hint="Leave --canonical out.",
        )
    if not pair.layout.listed:
        raise UnsupportedFormatError(
            f"tvlens has no table for the family of {pair.base_name}, so it does not know its "
            "heads, neurons and norms, whose coordinates --canonical would settle.",
            hint="Leave --canonical out.",
        )


class Removed(NamedTuple):
    """What ``canonical`` has done to a pair.

    Attributes:
        neurons: Neurons that got another number.
        heads: Query heads that got another number.
        sentence: The whole in words.
    """

    neurons: int
    heads: int
    sentence: str


def removed(pair: Pair) -> Removed:
    """What was removed from a canonical pair."""
    if pair.adapter is not None:
        return Removed(
            0,
            0,
            f"--canonical: {pair.tuned_name} is an adapter, stored as a change of its base, so it "
            "has the base's coordinates already; it is measured as it is.",
        )
    axes = [moves.axes for moves in (pair.moves or {}).values()]
    neurons, heads = (
        sum(_renumbered(found[name].order) for found in axes if name in found)
        for name in ("neuron", "query")
    )
    sentence = (
        f"--canonical: the weights of {pair.tuned_name} are measured in the coordinates of "
        f"{pair.base_name} ({neurons:,} neurons and {heads:,} heads renumbered; lengths of "
        "neurons, bases of heads and shares of norm gains settled). What runs the models uses them "
        "as they are stored."
    )
    return Removed(neurons, heads, sentence)


def freedom_of(pair: Pair) -> Freedom:
    """What may move in a pair's family."""
    layout = pair.layout
    share = rotary_entries(layout.filled(pair.base.config))["rotary_share"] if layout.rotary else 0
    rectified = layout.activation in POSITIVE_ACTIVATIONS
    return Freedom(
        Sizes(layout.n_heads, layout.n_kv_heads, layout.d_head),
        int(layout.d_head * share),
        layout.qk_norm,
        "any" if layout.gated else "positive" if rectified else "none",
        max(_roundoff(pair, c) for c in pair.components if c.kind == "matrix"),
    )


def _renumbered(order: Tensor) -> int:
    return int((order != torch.arange(len(order))).sum())


def _obstacle(pair: Pair) -> str:
    """Why the models cannot be judged by their weights, empty where they can."""
    report = pair.load_report
    function = [d.field for d in report.config_differences if d.effect == "function"]
    function = [name for name in function if name != "tie_word_embeddings"]
    unmatched = [t for t in report.tensors if t.status in ("only_in_base", "only_in_tuned")]
    reasons = {
        "an adapter is stored as a change of its base": pair.adapter is not None,
        "the family has no table": not pair.layout.listed,
        f"config.json differs in {', '.join(function)}": bool(function),
        "the vocabularies differ": not pair.rows.whole,
        "tensors are in one of the two alone": bool(unmatched),
        "the rounding of quantised blocks hides it": _has_blocks(pair),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _has_blocks(pair: Pair) -> bool:
    sources = (pair.base, pair.tuned)
    return any(is_block_type(info.dtype) for s in sources for info in s.tensors.values())


def _equal_tensors(pair: Pair) -> set[str]:
    """Checkpoint tensors that the load report knows to be equal in both."""
    canonical_name = pair.layout.canonical_name
    return {
        canonical_name(match.base)
        for match in pair.load_report.tensors
        if match.base and match.equal_fraction == 1.0
    }


def _steps(pair: Pair, equal: set[str]) -> Iterator[list[Component]]:
    """Components that are aligned together and not all equal, the cheapest first."""
    for block in pair.blocks():
        parts = [c for c in block if c.layer is not None or str(c.part) in AXES]
        mlp = [c for c in parts if str(c.part) in MLP_PARTS]
        for together in (mlp, [c for c in parts if c not in mlp]):
            if any(pair.layout.places[c].tensor not in equal for c in together):
                yield together


def _fixed(pair: Pair, equal: set[str]) -> Iterator[Residual]:
    """What is left of the embeddings, which have no other coordinates, a few rows at a time."""
    for component in pair.components:
        place = pair.layout.places[component]
        if component.layer is not None or str(component.part) in AXES or place.tensor in equal:
            continue
        names = pair.base_tensors[place.tensor], pair.tuned_tensors[place.tensor]
        dtypes = _dtypes(pair, component)
        for rows in row_ranges(pair.base.tensors[names[0]].shape):
            base, tuned = (
                source.read_rows(name, *rows).float()
                for source, name in zip((pair.base, pair.tuned), names, strict=True)
            )
            left = (tuned - base).square()
            floor = rounding_energy(tuned, coarsest_dtype(*dtypes))
            allowed = HALF_SPACING * floor * float(dtypes[0] != dtypes[1])
            rounding = bool((left <= allowed).all())
            energy, length = (float(x.sum(dtype=torch.float64)) for x in (left, base.square()))
            yield Residual(component, energy, length, rounding)


def _block(
    pair: Pair, block: list[Component]
) -> tuple[dict[str, Float[Tensor, "..."]], dict[str, Float[Tensor, "..."]]]:
    """Effective weights of both models by part, those that can move."""
    movable = [c for c in block if str(c.part) in AXES]
    base = {str(c.part): pair.base_weight(c) for c in movable}
    return base, {str(c.part): pair.tuned_weight(c) for c in movable}


def _every_residual(pair: Pair, found: _Found) -> Iterator[Residual]:
    equal, freedom = _equal_tensors(pair), freedom_of(pair)
    yield from _fixed(pair, equal)
    for together in _steps(pair, equal):
        yield from _residuals(pair, together, freedom, found)


def _residuals(
    pair: Pair, block: list[Component], freedom: Freedom, found: _Found
) -> Iterator[Residual]:
    """What is left of each component of a block; ``found`` learns what moves it needed."""
    base, tuned = _block(pair, block)
    moves = block_moves(base, tuned, freedom)
    roundoff = max(_roundoff(pair, c) for c in block)
    found.slight |= moves.names(roundoff)
    found.clear |= moves.names(max(NAMED[0] * roundoff, NAMED[1]))
    for component in block:
        part = str(component.part)
        known = part in base
        own = base[part] if known else pair.base_weight(component)
        theirs = tuned[part] if known else pair.tuned_weight(component)
        yield _residual(pair, component, moves, own, theirs, roundoff)


def _residual(
    pair: Pair,
    component: Component,
    moves: Moves,
    base: Float[Tensor, "..."],
    tuned: Float[Tensor, "..."],
    roundoff: float,
) -> Residual:
    part, floor = str(component.part), pair.rounding(component, base, tuned)
    if moves.touches(part, roundoff):
        left = (moves.moved(part, tuned) - base).square()
        before = SLACK * floor + ARITHMETIC**2 * tuned.double().square()
        allowed = moves.energy(part, before) + SLACK * pair.rounding(component, base, base)
        rounding = _within(left, allowed)
    else:
        orders = moves.orders()
        left = (orders.moved(part, tuned) - base).square()
        dtypes = _dtypes(pair, component)
        allowed = orders.energy(part, HALF_SPACING * floor) * float(dtypes[0] != dtypes[1])
        rounding = bool((left <= allowed).all())
    return Residual(component, float(left.sum()), float(base.double().square().sum()), rounding)


def _within(left: Float64[Tensor, "..."], allowed: Float64[Tensor, "..."]) -> bool:
    """Whether the energy in every row, every column, or the whole of a vector is allowed."""
    axes = (0, 1) if left.dim() == 2 else (0,)
    return all(bool((left.sum(axis) <= allowed.sum(axis)).all()) for axis in axes)


def _dtypes(pair: Pair, component: Component) -> tuple[str, str]:
    """The dtypes that base and tuned model store a component in."""
    tensor, embedding = pair.layout.places[component].tensor, pair.layout.embedding_tensor
    sides = (pair.base, pair.base_tensors), (pair.tuned, pair.tuned_tensors)
    first, second = (
        source.tensors[names.get(tensor) or names[embedding]].dtype for source, names in sides
    )
    return first, second


def _roundoff(pair: Pair, component: Component) -> float:
    """Half the relative spacing of the coarser dtype."""
    dtype = coarsest_dtype(*_dtypes(pair, component))
    return 2.0 ** -(PRECISIONS[dtype].mantissa_bits + 1)
