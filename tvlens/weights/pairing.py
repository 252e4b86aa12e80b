"""Which neuron and which head of a tuned block is which of the base's.

Likeness is taken in what no change of coordinates touches, and 1 for a copy:

    gated neuron      (cos of gate columns + cos of in columns * cos of out rows) / 2
    other neuron      (cos of in columns + cos of out rows) / 2
    head              (cos of W_V W_O + cos of W_Q W_K') / 2, the products never written out

A fine-tune's neurons and heads are most like themselves (0.9 and more), so that is looked at
first and is all that happens as a rule. The others are paired with the unit that they are most
like if that is mutual, and the rest by ``scipy.optimize.linear_sum_assignment``, which
maximises the summed likeness. Heads move within their kv group, and kv groups as a whole.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ALIKE = 0.5
"""Likeness from which a unit counts as the same unit. Strangers have 0 +- 1 / sqrt(d_model)."""
ITSELF = 0.9
"""Likeness from which a neuron is not compared with others. In the shipped fine-tunes, whose change
is 0.18 of the base's length, the median neuron has 0.97."""
AT_ONCE = 1024
"""Neurons that are compared with all others at once."""
MOST_ASSIGNED = 2048
"""Beyond this many neurons without a likeness the models are strangers and no order is sought."""
Parts = Mapping[str, Float[Tensor, "..."]]
Term = tuple[Float[Tensor, "neuron d_model"], ...]
"""Unit vectors of all neurons; the cosines of a term's members are multiplied."""


class HeadOrder(NamedTuple):
    """The former numbers of heads.

    Attributes:
        query: Of the query heads.
        kv: Of the kv heads.
    """

    query: Int[Tensor, " head"]
    kv: Int[Tensor, " kv_head"]


class Sizes(NamedTuple):
    """Numbers of heads, and their width."""

    n_heads: int
    n_kv_heads: int
    d_head: int


def neuron_order(base: Parts, tuned: Parts) -> Int[Tensor, " neuron"]:
    """For each neuron of the base the number of its counterpart in the tuned block.

    Args:
        base: W_in and W_out, W_gate where the MLP is gated; reading parts times the norm's gain.
        tuned: The same of the tuned model.
    """
    terms = _terms(base), _terms(tuned)
    every = torch.arange(len(terms[0][0][0]))
    own = sum(
        _product([(b * t).sum(1) for b, t in zip(*members, strict=True)])
        for members in zip(*terms, strict=True)
    ) / len(terms[0])
    return _assigned(terms, every[own < ITSELF], every.clone())


def head_order(base: Parts, tuned: Parts, sizes: Sizes) -> HeadOrder:
    """For each head of the base the number of its counterpart in the tuned block.

    Args:
        base: W_Q, W_K, W_V and W_O; reading parts times the norm's gain.
        tuned: The same of the tuned model.
        sizes: Numbers and width of heads.
    """
    heads, groups = torch.arange(sizes.n_heads), torch.arange(sizes.n_kv_heads)
    own = _head_likeness(base, tuned, sizes, own=True)
    if bool((own >= ALIKE).all()):
        return HeadOrder(heads, groups)
    likeness = _head_likeness(base, tuned, sizes, own=False)
    blocks = rearrange(likeness, "(g i) (k j) -> g k i j", g=len(groups), k=len(groups))
    within = [[linear_sum_assignment(pair, maximize=True) for pair in row] for row in blocks]
    totals = torch.tensor(
        [[float(blocks[g, k][w].sum()) for k, w in enumerate(row)] for g, row in enumerate(within)]
    )
    kv = linear_sum_assignment(totals, maximize=True)[1]
    share = sizes.n_heads // sizes.n_kv_heads
    query = [torch.from_numpy(within[g][k][1]) + k * share for g, k in enumerate(kv)]
    return HeadOrder(torch.cat(query), torch.from_numpy(kv))


def _terms(parts: Parts) -> list[Term]:
    reads = [_units(rearrange(parts[p], "d n -> n d")) for p in ("W_gate", "W_in") if p in parts]
    writes = _units(parts["W_out"])
    return [(reads[0],), (reads[1], writes)] if len(reads) == 2 else [(reads[0],), (writes,)]


def _units(vectors: Float[Tensor, "neuron d_model"]) -> Float[Tensor, "neuron d_model"]:
    return torch.nn.functional.normalize(vectors.float(), dim=1)


def _product(factors: Sequence[Tensor]) -> Tensor:
    result = factors[0]
    for factor in factors[1:]:
        result = result * factor
    return result


def _assigned(
    terms: tuple[list[Term], list[Term]], left: Int[Tensor, " left"], order: Int[Tensor, " neuron"]
) -> Int[Tensor, " neuron"]:
    """``order`` with the neurons ``left`` exchanged among each other."""
    if len(left) < 2:
        return order
    best, value = _most_alike(terms, left, left)
    back, _ = _most_alike((terms[1], terms[0]), left, left)
    mutual = (back[best] == torch.arange(len(left))) & (value >= ALIKE)
    order[left[mutual]] = left[best[mutual]]
    rows, columns = left[~mutual], left[_complement(len(left), best[mutual])]
    if len(rows) > MOST_ASSIGNED:  # as many strangers: in the order that they have
        order[rows] = columns
        return order
    likeness = _likeness(terms, rows, columns)
    order[rows] = columns[torch.from_numpy(linear_sum_assignment(likeness, maximize=True)[1])]
    return order


def _complement(count: int, taken: Int[Tensor, " taken"]) -> Bool[Tensor, " left"]:
    free = torch.ones(count, dtype=torch.bool)
    free[taken] = False
    return free


def _most_alike(
    terms: tuple[list[Term], list[Term]], rows: Int[Tensor, " row"], columns: Int[Tensor, " column"]
) -> tuple[Int[Tensor, " row"], Float[Tensor, " row"]]:
    """For each row the position of the column it is most like, and the likeness."""
    found = [_likeness(terms, part, columns).max(1) for part in rows.split(AT_ONCE)]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


def _likeness(
    terms: tuple[list[Term], list[Term]], rows: Int[Tensor, " row"], columns: Int[Tensor, " column"]
) -> Float[Tensor, "row column"]:
    total = torch.zeros(len(rows), len(columns))
    for base, tuned in zip(*terms, strict=True):
        cosines = [
            einsum(b[rows], t[columns], "row d, column d -> row column")
            for b, t in zip(base, tuned, strict=True)
        ]
        total += _product(cosines)
    return total / len(terms[0])


def _head_likeness(
    base: Parts, tuned: Parts, sizes: Sizes, *, own: bool
) -> Float[Tensor, "head other"] | Float[Tensor, " head"]:
    """Of every head of the base with every tuned head, or with that of its own number."""
    total = torch.zeros(())
    for circuit in (_value_output, _query_key):
        first, second = circuit(base, sizes), circuit(tuned, sizes)
        lengths = [_products(x, x, own=True).clamp(min=0).sqrt() for x in (first, second)]
        scale = lengths[0] * lengths[1] if own else lengths[0][:, None] * lengths[1]
        products = _products(first, second, own=own)
        total = total + torch.where(scale > 0, products / scale, 0.0) / 2
    return total


Circuit = tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "head d_model d_head"]]


def _value_output(parts: Parts, sizes: Sizes) -> Circuit:
    """Read and write side of W_V W_O of every query head."""
    write = rearrange(parts["W_O"].float(), "(head a) d -> head d a", a=sizes.d_head)
    return _shared(parts["W_V"], sizes), write


def _query_key(parts: Parts, sizes: Sizes) -> Circuit:
    """Both sides of W_Q W_K' of every query head; with rotation, that of equal positions."""
    read = rearrange(parts["W_Q"].float(), "d (head a) -> head d a", a=sizes.d_head)
    return read, _shared(parts["W_K"], sizes)


def _shared(weight: Tensor, sizes: Sizes) -> Float[Tensor, "head d_model d_head"]:
    kv = rearrange(weight.float(), "d (kv a) -> kv d a", a=sizes.d_head)
    return kv.repeat_interleave(sizes.n_heads // sizes.n_kv_heads, dim=0)


def _products(first: Circuit, second: Circuit, *, own: bool) -> Tensor:
    """<A B', C D'> = <A' C, B' D> of the circuits of two models, by head."""
    pattern = "head d a, head d b -> head a b"
    if own:
        sides = (einsum(x, y, pattern) for x, y in zip(first, second, strict=True))
        return _product([*sides]).sum((1, 2))
    rows = []
    for head in range(len(first[0])):
        sides = (
            einsum(x[head], y, "d a, other d b -> other a b")
            for x, y in zip(first, second, strict=True)
        )
        rows.append(_product([*sides]).sum((1, 2)))
    return torch.stack(rows)
