"""Every weight of a model with one owner, so that a set of components is a vector of gates.

The candidates are query heads (W_Q, W_O), kv heads (W_K, W_V), neurons, and the tensors that
none of these cut: norms, embeddings, output biases. Together they hold each weight once, so that
grafting all of them is the tuned model.
"""

from dataclasses import dataclass, field

import torch
from einops import einsum, rearrange, reduce, repeat
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.components import Component
from tvlens.weights.delta import Absent, Delta, Dense, Dora, LowRank

from .gates import GatedModel, Gates, Key
from .sites import LINEAR, Site, gate_count


@dataclass(frozen=True)
class Partition:
    """The candidates of a gated model.

    Attributes:
        components: The candidates, in the order of the forward pass.
        owners: For every gate of every tensor the number of the candidate it belongs to.
        norms: Length of each candidate's tuning vector; a tied embedding counts at both uses.
        squares: For every gate of every tensor the squared length of what it lets in, float64.
    """

    components: list[Component]
    owners: dict[Key, Int[Tensor, " index"]] = field(repr=False)
    norms: Float[Tensor, " candidate"] = field(repr=False)
    squares: dict[Key, Float[Tensor, " index"]] = field(repr=False)

    def gates(self, values: Float[Tensor, " candidate"], rows: int) -> Gates:
        """The gates of ``rows`` prompts where every candidate has its value."""
        return {
            key: repeat(values.to(owner.device)[owner], "index -> row index", row=rows)
            for key, owner in self.owners.items()
        }

    def norm(self, chosen: Int[Tensor, " k"]) -> float:
        """Length of the tuning vector of a set of candidates."""
        return float(self.norms[chosen].pow(2).sum().sqrt())


def partition(gated: GatedModel) -> Partition:
    """The candidates of ``gated``, with the lengths of their tuning vectors in float64."""
    numbers: dict[Component, int] = {}
    owners: dict[Key, Tensor] = {}
    squares: dict[Key, Tensor] = {}
    for site in gated.sites:
        for tensor in site.tensors:
            key, count = (site.name, tensor), gate_count(site, tensor, gated.lens)
            mine = _candidates(site, tensor, count)
            owned = [numbers.setdefault(component, len(numbers)) for component in mine]
            owners[key] = torch.tensor(owned, device=gated.lens.device)
            squares[key] = _squares(gated.deltas[key], site, tensor, count)
    total = torch.zeros(len(numbers), dtype=torch.float64)
    for key, owner in owners.items():
        total.index_add_(0, owner.cpu(), squares[key])
    return Partition(list(numbers), owners, total.sqrt(), squares)


def _candidates(site: Site, tensor: str, count: int) -> list[Component]:
    if site.cut_axis(tensor) is None:
        return [site.component(tensor)]
    kind = LINEAR[site.role].kind
    return [Component(kind, site.layer, index) for index in range(count)]


def _squares(delta: Delta, site: Site, tensor: str, count: int) -> Float[Tensor, " index"]:
    """Squared length of each owner's share of a difference, float64; factors stay factors."""
    if tensor == "bias" or site.role not in LINEAR:
        entries = torch.tensor([delta.norm() ** 2], dtype=torch.float64)
        if tensor == "bias" and count > 1:
            entries = delta.dense().double().pow(2)
        return _by_owner(entries.cpu(), count)
    inner = LINEAR[site.role].side == "in"
    match delta:
        case Absent():
            return torch.zeros(count, dtype=torch.float64)
        case Dense() | Dora():
            entries = delta.dense().double().pow(2).sum(int(inner))
        case LowRank():
            left, right = delta.left.double(), delta.right.double()
            if inner:
                gram = einsum(right, right, "a d_out, b d_out -> a b")
                entries = einsum(left, left, gram, "d_in a, d_in b, a b -> d_in")
            else:
                gram = einsum(left, left, "d_in a, d_in b -> a b")
                entries = einsum(right, right, gram, "a d_out, b d_out, a b -> d_out")
    return _by_owner(entries.cpu(), count)


def _by_owner(entries: Float[Tensor, " entry"], count: int) -> Float[Tensor, " index"]:
    shaped = rearrange(entries, "(index width) -> index width", index=count)
    return reduce(shaped, "index width -> index", "sum")
