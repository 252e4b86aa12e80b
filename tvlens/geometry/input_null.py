"""The covariance-matched null: reads that follow nothing but what a matrix is given to read.

The gradient of ``x @ W`` is a sum of outer products x_t' g_t, so the reads of a change lie where
the inputs have their second moment S = mean x' x, whatever was learned, and trained weights lie
there too. With any root S = C C' the null turns the whitened change of the input side:

    D* = C Q C^-1 D,      Q uniform over rotations

The test is conditional on D' S^-1 D: nothing is assumed of what the change writes, and its
spectrum is kept. C times independent Gaussian entries is one draw of it. Nothing is drawn here.
In d input dimensions, with A = C^-1 D and K the rotation-invariant part left of A A' after its
mean is taken off,

    <D*, W>                 mean 0, variance |A W' C|^2 / d
    <D*, (M - t) D*>,       t = tr(S M) / tr(S), has mean 0,
                            variance      2 tr(B^2) tr(K^2) / ((d - 1) (d + 2)) and
                            third moment  8 d tr(B^3) tr(K^3) / ((d - 2) (d - 1) (d + 2) (d + 4)),
                            B = C' (M - t) C

exactly: traceless symmetric matrices are one irreducible representation of the rotations, with one
cubic invariant. A Pearson III law with these three moments gives p. The first says whether a gain
exceeds what its inputs explain, the second whether reads lie more (or less) where W reads, a
projection or an alignment M, than inputs alone would put them. A single vector of reads has the
direction of C g, g Gaussian (angular central Gaussian); with S = V diag(l) V' the covariance of
that direction is V diag(c) V',

    c_i = integral over t > 0 of  l_i / (1 + 2 t l_i) / prod_j sqrt(1 + 2 t l_j).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float64
from scipy import stats
from torch import Tensor

from tvlens.errors import StudyError

from .changes import Change, Factored, energy, gram, product, slabs, transposed
from .matrices import Basis, Seen, self_alignment

NODES = 600
"""Nodes of the integral over log t; its weights sum to 1 within 1e-9."""
DECADES = 14.0
"""Log10 of how far the integral goes on either side of one over the mean eigenvalue's sum."""


@dataclass(frozen=True, eq=False)
class InputMoment:
    """The second moment of what a matrix reads, with what its null needs.

    Attributes:
        moment: S.
        root: C, lower triangular.
    """

    moment: Float64[Tensor, "d d"]
    root: Float64[Tensor, "d d"]

    @classmethod
    def of(cls, moment: Float[Tensor, "d d"]) -> "InputMoment":
        """The moment and its root.

        Raises:
            StudyError: It has directions without any energy.
        """
        moment = moment.double()
        root, failed = torch.linalg.cholesky_ex(moment)
        if int(failed) or not bool(root.isfinite().all()):
            raise StudyError(
                "a second moment of inputs is not positive definite, so nothing can be whitened.",
                hint="Give one that is shrunk, as tvlens.covariances does.",
            )
        return cls(moment, root)

    @property
    def size(self) -> int:
        """Input dimensions."""
        return len(self.moment)

    @cached_property
    def traces(self) -> tuple[float, float, float]:
        """tr S, tr S^2, tr S^3."""
        square = self.moment @ self.moment
        return float(self.moment.trace()), float(square.trace()), _inner(square, self.moment)

    @cached_property
    def direction_covariance(self) -> Float64[Tensor, "d d"]:
        """Covariance of the direction of a vector with this second moment."""
        values, vectors = torch.linalg.eigh(self.moment)
        shares = torch.from_numpy(direction_shares(values.clamp(min=0).numpy()))
        return (vectors * shares) @ transposed(vectors)

    def whitened(self, change: Change) -> Change:
        """C^-1 D; a change in factors stays in factors."""
        if isinstance(change, Factored):
            return Factored(self._solved(change.left), change.right.double())
        return self._solved(change)

    def _solved(self, matrix: Float[Tensor, "*component d n"]) -> Float64[Tensor, "*component d n"]:
        return torch.linalg.solve_triangular(self.root, matrix.double(), upper=False)


def direction_shares(values: Float[np.ndarray, " d"]) -> Float[np.ndarray, " d"]:
    """Share of a unit vector in each principal direction of an angular central Gaussian.

    Args:
        values: Its eigenvalues, of any scale.
    """
    values = values / values.sum()
    places = np.linspace(-DECADES * np.log(10), DECADES * np.log(10), NODES)
    terms = 2 * np.exp(places)[:, None] * values[None, :]
    logs = places[:, None] + np.log(np.maximum(values, 1e-300)) - np.log1p(terms)
    logs = logs - np.log1p(terms).sum(1, keepdims=True) / 2
    return np.exp(logs).sum(0) * (places[1] - places[0])


def _inner(one: Float64[Tensor, "a b"], other: Float64[Tensor, "a b"]) -> float:
    return float((one * other).sum())


@dataclass(frozen=True, eq=False)
class Form:
    """A symmetric matrix M on the input side: ``weights`` on orthonormal directions, and a rest.

    Attributes:
        directions: Orthonormal columns; zero ones count for nothing.
        weights: What each has beyond ``rest``.
        rest: What every direction has.
    """

    directions: Float64[Tensor, "*component d r"]
    weights: Float64[Tensor, " r"]
    rest: float = 0.0


@dataclass(frozen=True, eq=False)
class FormMoments:
    """What inputs alone make of <D, M D> / |D|^2, and the moments of B = C' (M - t) C.

    Attributes:
        expected: t.
        square: tr(B^2).
        cube: tr(B^3).
    """

    expected: Float64[Tensor, "*component"]
    square: Float64[Tensor, "*component"]
    cube: Float64[Tensor, "*component"]


def form_moments(inputs: InputMoment, form: Form) -> FormMoments:
    """The moments of a form, through products as small as its number of directions."""
    onto, (first, second, third) = form.directions, inputs.traces
    through = inputs.moment @ onto
    weights = rearrange(form.weights, "r -> r 1")
    once = weights * (transposed(onto) @ through)
    twice = weights * (transposed(through) @ through)
    thrice = weights * (transposed(through) @ (inputs.moment @ through))
    expected = (_trace(once) + form.rest * first) / first
    rest = form.rest - expected
    squared = once @ once
    return FormMoments(
        expected,
        square=_trace(squared) + 2 * rest * _trace(twice) + rest**2 * second,
        cube=_trace_of(squared, once)
        + 3 * rest * _trace_of(once, twice)
        + 3 * rest**2 * _trace(thrice)
        + rest**3 * third,
    )


def _trace(matrix: Float64[Tensor, "*component a a"]) -> Float64[Tensor, "*component"]:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def _trace_of(
    one: Float64[Tensor, "*component a a"], other: Float64[Tensor, "*component a a"]
) -> Float64[Tensor, "*component"]:
    """The trace of a product."""
    return (one * transposed(other)).sum((-2, -1))


@dataclass(frozen=True, eq=False)
class InputTest:
    """A statistic against the covariance-matched null, one entry a component.

    Attributes:
        effect: Value less what inputs alone explain, in units of the value.
        spread: Its standard deviation under the null.
        p_value: Two-sided.
    """

    effect: Float[np.ndarray, " component"]
    spread: Float[np.ndarray, " component"]
    p_value: Float[np.ndarray, " component"]


def tested_form(
    value: Float64[Tensor, " component"],
    total: Float64[Tensor, " component"],
    moments: FormMoments,
    whitened: Change,
) -> InputTest:
    """Whether <D, M D> / |D|^2 exceeds what the inputs alone make of it.

    Args:
        value: <D, M D> / |D|^2.
        total: |D|^2.
        moments: Of the form M.
        whitened: C^-1 D, the input side first.
    """
    size = whitened.shape[-2]
    square, cube = _power_sums(whitened)
    variance = 2 * moments.square * square / ((size - 1) * (size + 2))
    third = 8 * size * moments.cube * cube
    third = third / (max(1, size - 2) * (size - 1) * (size + 2) * (size + 4))
    spread = variance.clamp(min=0).sqrt()
    effect = value - moments.expected
    z, skew = effect * total / spread, third / spread**3
    sides = [
        stats.pearson3.cdf(z.numpy(), skew.numpy()),
        stats.pearson3.sf(z.numpy(), skew.numpy()),
    ]
    p_value = np.minimum(1.0, 2 * np.minimum(*sides))
    return InputTest(effect.numpy(), (spread / total).numpy(), p_value)


def _power_sums(
    whitened: Change,
) -> tuple[Float64[Tensor, "*component"], Float64[Tensor, "*component"]]:
    """tr(K^2) and tr(K^3) of K = A A' less its mean."""
    size = whitened.shape[-2]
    wide = whitened.shape[-1] > size and not isinstance(whitened, Factored)
    own = gram(transposed(whitened) if wide else whitened)  # type: ignore[arg-type]
    square = own @ own
    first, second, third = _trace(own), _trace(square), _trace_of(square, own)
    mean = first / size
    centred = third - 3 * mean * second + 3 * mean**2 * first - size * mean**3
    return (second - mean * first).clamp(min=0), centred


def share_in_spans_of_reads(
    change: Change, spans: Float64[Tensor, "head d r"]
) -> Float64[Tensor, " head"]:
    """Share of each head's reads, changes [d, d_head], in orthonormal directions of its own."""
    if isinstance(change, Factored):
        onto = transposed(spans) @ change.left.double() @ change.right.double()
    else:
        onto = transposed(spans) @ change.double()
    return onto.square().sum((1, 2)) / energy(change)


def gain_test(
    pushed: Float64[Tensor, "d n"], whitened: Change, cosine: float, *, lengths: float
) -> InputTest:
    """Whether a matrix's change lies along its base more than its inputs explain.

    Args:
        pushed: C' W.
        whitened: C^-1 D.
        cosine: Of D and W.
        lengths: |D| |W|.
    """
    size, width = pushed.shape
    if width <= size:
        square = _inner(gram(whitened), gram(pushed))
    else:
        square = float(product(whitened, transposed(pushed)).square().sum())
    spread = (square / size) ** 0.5 / lengths
    p_value = 2 * stats.norm.sf(abs(cosine) / spread)
    return InputTest(np.array([cosine]), np.array([spread]), np.array([p_value]))


def neuron_gain_test(
    inputs: InputMoment, base: Float[Tensor, "neuron d"], cosine: Float64[Tensor, " neuron"]
) -> InputTest:
    """Whether the change of each reading neuron lies along its own weights more than inputs do.

    Args:
        inputs: What the neurons read.
        base: Their weights, one row each.
        cosine: Of each one's change with them.
    """
    parts = []
    for start, stop in slabs(base.shape):
        unit = torch.nn.functional.normalize(base[start:stop].double(), dim=1, eps=1e-300)
        parts.append(((unit @ inputs.direction_covariance) * unit).sum(1).clamp(min=0).sqrt())
    spread, effect = torch.cat(parts).numpy(), cosine.numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        return InputTest(effect, spread, 2 * stats.norm.sf(np.abs(effect) / spread))


@dataclass(frozen=True, eq=False)
class MatrixInputs:
    """What the null of one base matrix needs, the same for all of its fine-tunes.

    Attributes:
        inputs: What it reads.
        base: W.
        basis: ``spectral_basis(base)``.
    """

    inputs: InputMoment
    base: Float[Tensor, "d n"]
    basis: Basis

    @cached_property
    def pushed(self) -> Float64[Tensor, "d n"]:
        """C' W."""
        return transposed(self.inputs.root) @ self.base.double()

    @cached_property
    def alignment(self) -> FormMoments:
        """Of the alignment G of reads with the base's (``matrices.alignment``)."""
        size, rank = self.inputs.size, float(self.basis.rank)
        directions = self.basis.read
        order = torch.arange(1, directions.shape[1] + 1, dtype=torch.float64)
        rest = -rank / size
        weights = 1 - (2 * order - 1) / size - rest
        return form_moments(self.inputs, Form(directions, weights, rest))

    def alignment_test(
        self, found: Seen, g_read: Float64[Tensor, ""], whitened: Change
    ) -> InputTest:
        """G_rel of the reads against that of reads as the inputs alone make them.

        Args:
            found: The change in the base's directions.
            g_read: Its G_rel on the read side.
            whitened: C^-1 D.
        """
        own = self_alignment(self.basis, self.inputs.size)
        value, total = (rearrange(x, " -> 1") for x in (g_read * own, found.total))
        test = tested_form(value, total, self.alignment, whitened)
        scale = float(own)
        return InputTest(test.effect / scale, abs(test.spread / scale), test.p_value)
