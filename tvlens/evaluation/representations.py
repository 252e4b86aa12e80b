"""Activations of a base and of another model on the same documents: likeness and where they differ.

Both models read a few documents at a time; of every activation (``PARTS``) sums over real tokens
are kept in float64, of x, of d = y - x and of their products, from which ``similarity`` makes its
measures. Tokens themselves are never kept. The cosine is taken token by token,

    cosine    mean over tokens of <x_t, y_t> / (|x_t| |y_t|); 1 where both are zero, 0 where one is

with a 95 % interval by a bootstrap over documents. What one model's heads give (``z``) is measured
head by head, in the head's own d_head dimensions.

The first token of a document is an attention sink: in most models its activations are many times
as long as any other's and lie in a few dimensions. Every measure is therefore given for two sets of
``tokens``, ``without_first`` and ``all``; what is said in one sentence is about the former.

Memory: 48 bytes for each of width x width and head (``bytes_needed``), no more than ``MEMORY`` at a
time: where all activations take more, the documents are read again for the next ones. Beside it the
base's activations of one pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvlens.attribution.nodes import Site, activation_sites
from tvlens.components import Component
from tvlens.errors import IncomparableModelsError, PromptError
from tvlens.models.lens import LensModel
from tvlens.models.prompts import Batch

from .intervals import Interval, Values, interval
from .similarity import Moments, Similarity, similarity

Tokens = Literal["without_first", "all"]
TOKENS: tuple[Tokens, ...] = ("without_first", "all")
PARTS = ("embed", "resid_post", "attn_out", "mlp_out", "z")
"""The activations, part by part (``attribution.nodes``)."""
MEMORY = 2**31
"""Bytes of the sums of one pass: SmolLM2-135M takes 1.5 GB in all, an 8B 0.8 GB an activation."""
ROWS_AT_ONCE, TOKENS_AT_ONCE = 16, 1024
"""Documents, and places with padding, of one forward pass."""


@dataclass(frozen=True, eq=False)
class Compared:
    """The measures of one activation on one set of tokens.

    Attributes:
        site: Which activation.
        tokens: Which tokens.
        count: How many.
        documents: Of how many documents.
        width: Dimensions of the activation, or of a head's.
        cosines: One interval for each head, or one.
        similarity: The other measures.
    """

    site: Site
    tokens: Tokens
    count: int
    documents: int
    width: int
    cosines: tuple[Interval, ...]
    similarity: Similarity = field(repr=False)

    @property
    def components(self) -> list[Component]:
        """What the values are of, in order."""
        cut, layer = self.site.cut, self.site.layer
        numbered = cut.kind == "head"
        return [
            Component(cut.kind, layer, index if numbered else None, cut.part)
            for index in range(len(self.cosines))
        ]


def compared(
    base: LensModel,
    other: LensModel,
    batch: Batch,
    *,
    parts: Sequence[str] = PARTS,
    memory: int = MEMORY,
    seed: int = 0,
) -> list[Compared]:
    """The measures of every activation of ``parts``, in their order, on each of ``TOKENS``.

    Args:
        base: One model.
        other: Another of the same shape; a difference is this one minus ``base``.
        batch: Tokenised documents of two tokens and more; padding on either side does not count.
        parts: Which activations.
        memory: Bytes that the sums of one pass over the documents may take.
        seed: Seed of the bootstrap.

    Raises:
        HostError: A model lacks such an activation, or is in training mode.
        IncomparableModelsError: The two have other shapes.
        PromptError: No document has a second token.
    """
    _refuse(base, other, batch)
    found = []
    for sites in _groups(base, activation_sites(base, parts), memory):
        reader = _Reader(sites, len(batch))
        for part in _passes(batch):
            reader.read(base, other, part)
        for site in sites:
            sums = reader.sums.pop(site)
            found += [_measured(site, tokens, sums, seed) for tokens in TOKENS]
    return found


def bytes_needed(model: LensModel, sites: Sequence[Site]) -> int:
    """Memory of the sums of some activations of ``model``."""
    return sum(_site_bytes(model, site) for site in sites)


def _site_bytes(model: LensModel, site: Site) -> int:
    if site.part == "z":
        return site_bytes(model.n_heads, model.d_head)
    return site_bytes(1, model.d_model)


def site_bytes(count: int, width: int) -> int:
    """Memory of the sums of one activation of so many heads and dimensions each."""
    return 8 * 2 * 3 * count * width**2


def _groups(model: LensModel, sites: Sequence[Site], memory: int) -> Iterator[list[Site]]:
    """The sites in order, as many together as fit; one alone whatever it takes."""
    group: list[Site] = []
    for site in sites:
        if group and bytes_needed(model, [*group, site]) > memory:
            yield group
            group = []
        group.append(site)
    if group:
        yield group


def _refuse(base: LensModel, other: LensModel, batch: Batch) -> None:
    for lens in (base, other):
        lens.require_eval()
    for name in ("n_layers", "n_heads", "d_head", "d_model"):
        mine, theirs = getattr(base, name), getattr(other, name)
        if mine != theirs:
            raise IncomparableModelsError(f"{name} is {mine} in the base, {theirs} in the other.")
    if not len(batch) or int(batch.lengths.max()) < 2:
        raise PromptError("representations need a document of two tokens or more.")


class _Places(NamedTuple):
    """The real tokens of a pass.

    Attributes:
        mask: 1 at real tokens.
        first: Whether a token is the first of its document; one a real token, row by row.
        document: The number of its document.
    """

    mask: Bool[Tensor, "batch pos"]
    first: Bool[Tensor, " token"]
    document: Int[Tensor, " token"]


class _Part(NamedTuple):
    """Documents of one pass and the number of the first."""

    batch: Batch
    start: int

    @property
    def places(self) -> _Places:
        """Where the real tokens are."""
        mask = self.batch.mask.bool()
        place = torch.arange(mask.shape[1])[None]
        first = (place == self.batch.starts[:, None])[mask]
        document = self.start + torch.arange(len(mask)).repeat_interleave(self.batch.lengths)
        return _Places(mask, first, document)


def _passes(batch: Batch) -> Iterator[_Part]:
    width = max(1, batch.ids.shape[1])
    rows = max(1, min(ROWS_AT_ONCE, TOKENS_AT_ONCE // width))
    for start in range(0, len(batch), rows):
        yield _Part(batch.rows(range(start, min(start + rows, len(batch)))), start)


class _Sums:
    """Sums over tokens of x, d and their products, head by head."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}

    def add(
        self,
        base: Float[Tensor, "token index width"],
        change: Float[Tensor, "token index width"],
    ) -> None:
        """Take some tokens in."""
        self.count += len(base)
        pattern = "token index width, token index other -> index width other"
        self._add("mean_base", base.sum(0))
        self._add("mean_change", change.sum(0))
        self._add("base", einsum(base, base, pattern))
        self._add("change", einsum(change, change, pattern))
        self._add("cross", einsum(change, base, pattern))

    def _add(self, name: str, found: Tensor) -> None:
        self.sums[name] = self.sums[name].add_(found) if name in self.sums else found

    def plus(self, other: "_Sums") -> "_Sums":
        """The sums over both sets of tokens."""
        both = _Sums()
        both.count = self.count + other.count
        both.sums = {
            name: sum_ + other.sums[name] if other.count else sum_
            for name, sum_ in self.sums.items()
        }
        return both

    def moments(self) -> Moments:
        """Means, and covariances about them."""
        means = {name: total.cpu().double() / self.count for name, total in self.sums.items()}
        base, change = means["mean_base"], means["mean_change"]
        pattern = "index width, index other -> index width other"
        own = {
            name: means[name] - einsum(mean, mean, pattern)
            for name, mean in (("base", base), ("change", change))
        }
        symmetric = {name: (matrix + matrix.mT) / 2 for name, matrix in own.items()}
        cross = means["cross"] - einsum(change, base, pattern)
        return Moments(self.count, base, change, cross=cross, **symmetric)


class _SiteSums:
    """What is kept of one activation: sums of first and of later tokens, cosines by document."""

    def __init__(self, documents: int) -> None:
        self.first, self.later = _Sums(), _Sums()
        self.cosines: dict[str, Tensor] = {}
        self.tokens = {name: torch.zeros(documents, dtype=torch.float64) for name in TOKENS}
        self.documents = documents

    def add(
        self,
        base: Float[Tensor, "token index width"],
        other: Float[Tensor, "token index width"],
        places: _Places,
    ) -> None:
        """Take the tokens of one pass in."""
        change, first = other - base, places.first.to(base.device)
        cosines = _cosines(base, other).cpu().double()
        for sums, chosen in ((self.first, first), (self.later, ~first)):
            if bool(chosen.any()):
                sums.add(base[chosen], change[chosen])
        everywhere = torch.ones_like(places.first)
        for name, chosen in (("without_first", ~places.first), ("all", everywhere)):
            document = places.document[chosen]
            empty = torch.zeros(self.documents, cosines.shape[1], dtype=torch.float64)
            self.cosines.setdefault(name, empty).index_add_(0, document, cosines[chosen])
            ones = torch.ones(len(document), dtype=torch.float64)
            self.tokens[name].index_add_(0, document, ones)

    def of(self, tokens: Tokens) -> _Sums:
        """The sums over a set of tokens."""
        return self.later if tokens == "without_first" else self.later.plus(self.first)

    def intervals(self, tokens: Tokens, seed: int) -> tuple[Interval, ...]:
        """The mean cosine of every head, or the one, over tokens."""
        weights, sums = self.tokens[tokens].numpy(), self.cosines[tokens].numpy()
        there = np.flatnonzero(weights)
        means = sums[there] / weights[there, None]
        found = (Values(there, column, weights[there]) for column in means.T)
        return tuple(interval(values, seed=seed) for values in found)


def _cosines(
    base: Float[Tensor, "token index width"], other: Float[Tensor, "token index width"]
) -> Float[Tensor, "token index"]:
    inner = (base * other).sum(-1)
    lengths = base.norm(dim=-1), other.norm(dim=-1)
    product = lengths[0] * lengths[1]
    neither = (lengths[0] + lengths[1] == 0).to(inner.dtype)
    return torch.where(product > 0, inner / torch.where(product > 0, product, 1.0), neither)


class _Reader:
    """Reads the same documents with both models and keeps sums of what passes."""

    def __init__(self, sites: Sequence[Site], documents: int) -> None:
        self.sums = {site: _SiteSums(documents) for site in sites}
        self.kept: dict[Site, Tensor] = {}

    def read(self, base: LensModel, other: LensModel, part: _Part) -> None:
        """One pass of each model."""
        places, batch = part.places, part.batch
        nowhere = torch.zeros(len(batch), 1, dtype=torch.long)
        for lens, take in ((base, self._keep), (other, self._add)):
            hooks = [(site.hook, partial(take, site, places)) for site in self.sums]
            with torch.no_grad(), lens.hooks(fwd=hooks):
                lens.logits_at(batch.ids, batch.mask, nowhere)
        self.kept.clear()

    def _keep(self, site: Site, places: _Places, activation: Tensor, hook: Any) -> None:
        """A forward hook of the base."""
        self.kept[site] = _real(activation, places)

    def _add(self, site: Site, places: _Places, activation: Tensor, hook: Any) -> None:
        """A forward hook of the other model."""
        other = _real(activation, places)
        base = self.kept.pop(site).to(other.device)
        self.sums[site].add(_wide(base), _wide(other), places)


def _real(activation: Tensor, places: _Places) -> Float[Tensor, "token index width"]:
    """The real tokens of an activation, with an axis of heads; a copy."""
    tokens = activation.detach()[places.mask.to(activation.device)]
    return rearrange(tokens, "token width -> token 1 width") if tokens.ndim == 2 else tokens


def _wide(tokens: Float[Tensor, "token index width"]) -> Float[Tensor, "token index width"]:
    return tokens.float() if tokens.device.type == "mps" else tokens.double()


def _measured(site: Site, tokens: Tokens, sums: _SiteSums, seed: int) -> Compared:
    moments = sums.of(tokens).moments()
    cosines = sums.intervals(tokens, seed)
    documents, width = cosines[0].n, moments.base.shape[-1]
    return Compared(
        site, tokens, moments.count, documents, width, cosines, similarity(moments)
    )  # fmt: skip
