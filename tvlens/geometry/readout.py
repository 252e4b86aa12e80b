"""Readout: which tokens a direction of the residual stream promotes and suppresses.

For a direction u, the gain g of the final norm and the unembedding W_U,

    logits(u) = (g * c(u)) @ W_U,   c(u) = u - mean(u) where the final norm is a LayerNorm, else u
    z(u)      = (logits(u) - mean over the vocabulary) / deviation over the vocabulary

This is weights-only algebra, the path straight to the output. Left out are the scale of the final
norm (one positive factor for all tokens, known only from activations), its bias and that of the
unembedding (the same for every direction), a soft cap (monotone), and all that later layers make
of the direction. None of these moves a token past another except the biases, which belong to no
direction; z knows no length, so a direction of any norm has the same z.

Some token always comes first. Whether it stands out is judged against random directions, isotropic
in the residual stream: the statistic is the largest |z| over the vocabulary, its null the same of
DRAWS random directions, p = (1 + how many reach it) / (DRAWS + 1). The vocabulary is read a slab of
tokens at a time; memory is O(directions * SLAB), never directions x d_vocab.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.components import Component

from .changes import transposed
from .reading import Pair

DRAWS = 1999
"""Random directions of the null: the smallest p is 1 / 2,000, so ten directions that no random one
reaches are called at a false discovery rate of 5 % among a thousand."""
SLAB = 4096
"""Tokens read at once: 2,000 directions on 4,096 tokens are 32 MB."""
TOP = 10
"""Tokens named at each end."""
FINAL_GAIN = Component("norm", None, None, "ln_final.w")
FINAL_BIAS = Component("bias", None, None, "ln_final.b")


@dataclass(frozen=True, eq=False)
class Unembedding:
    """How a model turns the end of its residual stream into logits.

    Attributes:
        pieces: Reads W_U anew, one column a token, some tokens at a time; the transposed embedding
            where the two are tied.
        gain: Effective gain of the final norm (1 + w where w is stored).
        centred: The final norm is a LayerNorm, which takes the mean over d_model away.
        ids: Token number of every column.
    """

    pieces: Callable[[], Iterable[Float[Tensor, "d_model token"]]]
    gain: Float[Tensor, " d_model"]
    centred: bool
    ids: Int[Tensor, " d_vocab"]

    def prepared(
        self, directions: Float[Tensor, "direction d_model"]
    ) -> Float[Tensor, "direction d_model"]:
        """The directions behind the final norm, its scale left out."""
        if self.centred:
            directions = directions - reduce(directions, "direction d -> direction 1", "mean")
        return directions.float() * self.gain

    def logits(
        self, directions: Float[Tensor, "direction d_model"]
    ) -> Float[Tensor, "direction d_vocab"]:
        """Raw logits of unit or other directions, all tokens at once: for few directions."""
        return torch.cat([part for _, part in self.slabs(directions)], dim=1)

    def slabs(self, directions: Float[Tensor, "direction d_model"]) -> Iterator[tuple[int, Tensor]]:
        """Raw logits a slab of tokens at a time, with the slab's first column."""
        behind, start = self.prepared(directions), 0
        for piece in self.pieces():
            for some in piece.split(SLAB, dim=1):
                yield start, einsum(behind, some, "direction d, d token -> direction token")
                start += some.shape[1]


def unembedding_of(pair: Pair, ids: Int[Tensor, " d_vocab"] | None = None) -> Unembedding | None:
    """The base's unembedding, so that fine-tunes of one base are read alike; None if unknown.

    Args:
        pair: Base and tuned checkpoint.
        ids: Token number of every row of the pair's embedding; None where they are 0, 1, ...
    """
    known = {component for block in pair.blocks() for component in block}
    own, tied = (Component("embedding", None, None, part) for part in ("W_U", "W_E"))
    if FINAL_GAIN not in known or not {own, tied} & known:
        return None

    def pieces() -> Iterator[Float[Tensor, "d_model token"]]:
        for weight in pair.slabs(own if own in known else tied):
            yield weight.base if own in known else transposed(weight.base)

    numbers = torch.arange(sum(piece.shape[1] for piece in pieces())) if ids is None else ids
    gain = pair.read(FINAL_GAIN).base.float()
    return Unembedding(pieces, gain, centred=FINAL_BIAS in known, ids=numbers)


@dataclass(frozen=True, eq=False)
class Readout:
    """What some directions say, standardised over the vocabulary.

    Attributes:
        promoted: Column of W_U of the tokens with the highest logits, highest first.
        promoted_z: Their z.
        suppressed: The same for the lowest, lowest first.
        suppressed_z: Their z.
        spread: Deviation of the logits over the vocabulary, for the directions as given.
    """

    promoted: Int[Tensor, "direction top"]
    promoted_z: Float[Tensor, "direction top"]
    suppressed: Int[Tensor, "direction top"]
    suppressed_z: Float[Tensor, "direction top"]
    spread: Float[Tensor, " direction"]

    @property
    def extreme(self) -> Float[Tensor, " direction"]:
        """The largest |z| of any token: the statistic that is held against random directions."""
        return torch.maximum(self.promoted_z[:, 0], -self.suppressed_z[:, 0])

    @property
    def leaning(self) -> Float[Tensor, " direction"]:
        """+1 where the most extreme token is promoted, -1 where it is suppressed."""
        return torch.where(self.promoted_z[:, 0] >= -self.suppressed_z[:, 0], 1.0, -1.0).double()


def readout(
    directions: Float[Tensor, "direction d_model"], unembedding: Unembedding, *, top: int = TOP
) -> Readout:
    """Read ``directions`` through the final norm and the unembedding (module docstring)."""
    count, top = len(directions), min(top, len(unembedding.ids))
    total, squares = (torch.zeros(count, dtype=torch.float64) for _ in range(2))
    ends = {largest: _Extremes.none(count) for largest in (True, False)}
    for start, logits in unembedding.slabs(directions):
        total += logits.sum(1, dtype=torch.float64)
        squares += torch.linalg.vector_norm(logits, dim=1, dtype=torch.float64).square()
        for largest, kept in ends.items():
            ends[largest] = kept.extended(logits, start, top, largest=largest)
    mean = total / len(unembedding.ids)
    variance = squares / len(unembedding.ids) - mean.square()
    spread = variance.clamp(min=0).sqrt()
    scaled = {
        largest: (kept.values.double() - rearrange(mean, "direction -> direction 1"))
        / rearrange(torch.where(spread > 0, spread, torch.nan), "direction -> direction 1")
        for largest, kept in ends.items()
    }
    return Readout(ends[True].columns, scaled[True], ends[False].columns, scaled[False], spread)


@dataclass(frozen=True, eq=False)
class _Extremes:
    """The most extreme logits seen so far and their columns."""

    values: Float[Tensor, "direction seen"]
    columns: Int[Tensor, "direction seen"]

    @classmethod
    def none(cls, count: int) -> "_Extremes":
        return cls(torch.empty(count, 0), torch.empty(count, 0, dtype=torch.long))

    def extended(
        self, logits: Float[Tensor, "direction token"], start: int, top: int, *, largest: bool
    ) -> "_Extremes":
        values, places = logits.topk(min(top, logits.shape[1]), dim=1, largest=largest)
        values = torch.cat([self.values, values], dim=1)
        columns = torch.cat([self.columns, places + start], dim=1)
        best = values.sort(dim=1, descending=largest, stable=True).indices[:, :top]
        return _Extremes(values.gather(1, best), columns.gather(1, best))


@dataclass(frozen=True, eq=False)
class RandomReadout:
    """What isotropic directions score on one unembedding.

    Attributes:
        extremes: Largest |z| of every random direction, ascending.
        spread: Mean deviation of the logits of a random unit direction.
    """

    extremes: Float[np.ndarray, " draw"]
    spread: float

    @property
    def mean(self) -> float:
        """Expected largest |z| of a random direction."""
        return float(self.extremes.mean())

    @property
    def bound(self) -> float:
        """What 99 % of random directions stay below."""
        return float(np.quantile(self.extremes, 0.99))

    @property
    def p_floor(self) -> float:
        """The smallest p that this number of draws can give."""
        return 1 / (len(self.extremes) + 1)

    def p_values(
        self, extremes: Float[np.ndarray, " direction"]
    ) -> Float[np.ndarray, " direction"]:
        """Share of random directions whose most extreme token is as extreme; NaN stays NaN."""
        reached = len(self.extremes) - np.searchsorted(self.extremes, extremes, side="left")
        return np.where(np.isnan(extremes), np.nan, (1 + reached) * self.p_floor)


def random_readout(unembedding: Unembedding, *, draws: int = DRAWS, seed: int) -> RandomReadout:
    """The null of ``readout``: directions drawn uniformly from the unit sphere."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(draws, len(unembedding.gain), generator=generator)
    found = readout(torch.nn.functional.normalize(drawn, dim=1), unembedding, top=1)
    return RandomReadout(np.sort(found.extreme.numpy()), float(found.spread.mean()))


def token_names(
    columns: Int[Tensor, " top"], ids: Int[Tensor, " d_vocab"], tokens: Sequence[str] | None
) -> list[str]:
    """The strings of some columns of W_U; ``[number]`` where a token has none.

    Args:
        columns: Columns of W_U.
        ids: Token number of every column.
        tokens: Token strings by token number, None where no tokenizer is known.
    """
    known = () if tokens is None else tokens
    numbers: list[int] = ids[columns].tolist()
    return [(known[n] if n < len(known) else "") or f"[{n}]" for n in numbers]
