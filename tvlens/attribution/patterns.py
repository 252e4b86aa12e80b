"""How attention patterns change where a query or a key is exchanged: the softmax is made anew.

A query acts on the row of its own position, a key on its column in every later row, and nothing
else in the model reads either. With p a pattern, p' the same with the query or key exchanged, and
g the gradient of a metric at p,

    score = sum over rows and columns of (p' - p) g

is exact as far as the attention and first order from there on (the QK fix of Kramar et al. 2024,
https://arxiv.org/abs/2403.00745). All queries of a block can be exchanged at once, since rows do
not meet. All keys of a head exchanged *together* are one softmax as well; a key *alone*, at one
position s of a row with scores x, moves its own share of the row from

    sigmoid(x_s - r_s)  to  sigmoid(x'_s - r_s),     r_s = log sum over j != s of exp(x_j)

and scales the others alike, so that with g_-s the mean of the others' gradients by their shares

    sum over columns of (p' - p) g = (new share - old share) (g_s - g_-s).

A key-value head is read by several query heads: its score is the sum over them. Where a family
normalises the queries of all heads together (OLMo 2), exchanging one head moves the patterns of
the others: heads are then exchanged one by one, and the score is the sum over all patterns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor

from tvlens.errors import HostError
from tvlens.models.attention import Attended, RecordedAttention, recorded

from .directions import Patch
from .nodes import NODES, Site, wide
from .patching import Edit

_SOFTMAX = 1e-3
"""Largest difference of a pattern from the softmax of its scores."""
_MEET = 1e-5
"""Least movement of a pattern, whose entries are at most 1, that is not rounding."""


@runtime_checkable
class PatternChange(Protocol):
    """What exchanging the queries or keys of a block does to its pattern."""

    def score(self, gradient: Float[Tensor, "batch head query key"]) -> Tensor:
        """[batch, index], by position [batch, pos, index], from the gradient at the pattern."""
        ...


@dataclass(frozen=True, eq=False)
class Together:
    """Queries or keys of all positions exchanged together.

    Attributes:
        site: The pattern.
        change: The pattern with them minus the pattern, 0 in rows of padding.
        share: Query heads that read one of them.
        by_position: Keep the rows apart, which for queries are their positions.
    """

    site: Site
    change: Float[Tensor, "batch head query key"]
    share: int
    by_position: bool = False

    def score(self, gradient: Float[Tensor, "batch head query key"]) -> Tensor:
        """Change times gradient, summed over the query heads that read one component."""
        by_head = self.site.product(self.change, wide(gradient), by_position=self.by_position)
        return reduce(by_head, "... (index share) -> ... index", "sum", share=self.share)


@dataclass(frozen=True, eq=False)
class OneKey:
    """Keys exchanged at one position at a time.

    Attributes:
        moved: New minus old share of the key in every row, 0 in rows of padding.
        pattern: The old shares.
        largest: Where a row's largest share is.
        others: The shares of a row without its largest.
        share: Query heads that read one key-value head.
    """

    moved: Float[Tensor, "batch head query key"]
    pattern: Float[Tensor, "batch head query key"]
    largest: Bool[Tensor, "batch head query key"]
    others: Float[Tensor, "batch head query key"]
    share: int

    def score(self, gradient: Float[Tensor, "batch head query key"]) -> Tensor:
        """What each key's own share gains over the others', summed over the rows that read it."""
        g = wide(gradient)
        mean = reduce(self.pattern * g, "batch head query key -> batch head query 1", "sum")
        # without the largest share itself at most half of a row is taken away
        left = (1.0 - self.pattern).masked_fill(self.largest, 1.0)
        without = reduce(self.others * g, "batch head query key -> batch head query 1", "sum")
        rest = torch.where(self.largest, without, (mean - self.pattern * g) / left)
        by_head = einsum(
            self.moved, g - rest, "batch head query key, batch head query key -> batch key head"
        )
        return reduce(
            by_head, "batch key (index share) -> batch key index", "sum", share=self.share
        )


@dataclass(frozen=True, eq=False)
class Apart:
    """Heads that are exchanged one by one, because the patterns of all depend on each.

    Attributes:
        changes: Of every head; each sums over all patterns of the block.
    """

    changes: Sequence[PatternChange]

    def score(self, gradient: Float[Tensor, "batch head query key"]) -> Tensor:
        """The scores of all heads beside each other."""
        return torch.cat([change.score(gradient) for change in self.changes], dim=-1)


def pattern_changes(
    patch: Patch, sites: Sequence[Site], given: Mapping[str, Tensor], *, by_position: bool = False
) -> dict[str, PatternChange]:
    """The change of the pattern for every site of queries or keys, by the site's hook.

    Memory: O(batch * head * pos^2) a site, by position four times that for keys; what the
    backward pass keeps of a block is as large. Heads that are exchanged one by one need as many
    times that.

    Args:
        patch: The run that is patched.
        sites: Queries and keys of some blocks.
        given: What is put in, by hook.
        by_position: One position at a time.

    Raises:
        HostError: The attention of this family cannot be run alone, or is no softmax.
    """
    model = patch.receiver
    blocks = sorted({site.layer for site in sites if site.layer is not None})
    calls = recorded(model, patch.receiver_ids, patch.batch.mask, blocks)
    real = patch.batch.mask.bool().to(model.device)
    changes: dict[str, PatternChange] = {}
    for layer in blocks:
        block = _Block(calls, layer, calls.again(layer), real, by_position)
        for site in (site for site in sites if site.layer == layer):
            changes[site.hook] = block.change(site, given[site.hook])
    return changes


@dataclass(frozen=True, eq=False)
class _Block:
    """The attention of one block as it is, and what it becomes.

    Attributes:
        calls: What runs it again.
        layer: Its number.
        own: What it attends to.
        real: Real tokens.
        by_position: One position at a time.
    """

    calls: RecordedAttention
    layer: int
    own: Attended
    real: Bool[Tensor, "batch pos"]
    by_position: bool

    @property
    def padding(self) -> Bool[Tensor, "batch 1 query 1"]:
        """Rows that belong to no token."""
        return ~rearrange(self.real, "batch query -> batch 1 query 1")

    def change(self, site: Site, given: Tensor) -> PatternChange:
        """The change of the patterns where ``given`` is put in."""
        model = self.calls.model
        count = model.n_kv_heads if site.part == "k" else model.n_heads
        share = model.n_heads // count
        if not self._heads_meet(site, share):
            return self._exchanged(site, given, None, share)
        heads = [self._exchanged(site, given, index, model.n_heads) for index in range(count)]
        return Apart(heads)

    def _heads_meet(self, site: Site, share: int) -> bool:
        """Whether the last head's patterns move when the activations of all others do."""

        def others(activation: Tensor, hook: object) -> Tensor:
            moved = 2.0 * activation + 1.0
            moved[:, :, -1] = activation[:, :, -1]
            return moved

        moved = self.calls.again(self.layer, [(site.hook, others)]).pattern - self.own.pattern
        moved = moved.masked_fill(self.padding, 0.0)[:, -share:]
        return bool(moved.abs().max() > _MEET)

    def _exchanged(self, site: Site, given: Tensor, index: int | None, share: int) -> PatternChange:
        """The change where one head's, or with None every head's, are exchanged."""
        edit = Edit(site, index, self.real, given).hook(slice(None))
        other = self.calls.again(self.layer, [edit])
        if self.by_position and site.part == "k":
            return _one_key(self.own, other, self.padding, share)
        cut, name = NODES["pattern"]
        change = wide(other.pattern) - wide(self.own.pattern)
        pattern = Site(cut, self.layer, name.format(self.layer))
        return Together(pattern, change.masked_fill(self.padding, 0.0), share, self.by_position)


def _one_key(
    own: Attended, other: Attended, padding: Bool[Tensor, "batch 1 query 1"], share: int
) -> OneKey:
    """The shares of single keys, from scores in which each column has its own key exchanged.

    Raises:
        HostError: The pattern is not the softmax of the scores.
    """
    x, pattern = wide(own.scores), wide(own.pattern).masked_fill(padding, 0.0)
    error = (x.softmax(-1).masked_fill(padding, 0.0) - pattern).abs().max()
    if not float(error) <= _SOFTMAX:
        raise HostError(
            f"a pattern differs from the softmax of its scores by {float(error):.3g}.",
            hint="This family adds something to the softmax, so single keys cannot be exchanged "
            "in closed form; ask for all positions together.",
        )
    largest = torch.zeros_like(pattern, dtype=torch.bool)
    largest.scatter_(-1, pattern.argmax(-1, keepdim=True), value=True)
    lower = x.masked_fill(largest, -torch.inf)
    # log1p is exact where a share is at most a half, which all but the largest are
    small = pattern.masked_fill(largest, 0.0).clamp(max=0.5)
    rest = x.logsumexp(-1, keepdim=True) + torch.log1p(-small)
    rest = torch.where(largest, lower.logsumexp(-1, keepdim=True), rest)
    moved = torch.sigmoid(wide(other.scores) - rest) - torch.sigmoid(x - rest)
    masked = padding | (x <= torch.finfo(own.scores.dtype).min / 2)
    others = lower.softmax(-1).nan_to_num(0.0)
    return OneKey(moved.masked_fill(masked, 0.0), pattern, largest, others, share)
