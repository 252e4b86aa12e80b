"""A component's change in parts that sum to it, and what of a gradient each part takes up.

The parts are the matrices whose energies are the columns ``e_*`` (``matrices``). With W = U S V'
the base, D its change, C = U' D V, gain g = <D, W> / |W|^2, E = D - U diag(C_ii) V' the change
without the gains of single directions, R the projection on the top k_read directions of U and T
that on the top k_write of V:

    global      g W                           one gain for everything that is there
    scale       U diag(C_ii - g S_i) V'       gains of single directions
    within      R E T                         existing read to existing write
    reroute     (1 - R) E T                   of a matrix that writes the residual stream: new read
                                              to existing write; of one that reads it: R E (1 - T)
    new_write   R E (1 - T)                   existing read to new write (W_O, W_out)
    new_read    (1 - R) E T                   new read to existing write (the others)
    new_both    (1 - R) E (1 - T)             the rest

They sum to D exactly. Of a score <G, D>, G the gradient by the weight, a part takes <G, part>; G
is never formed: with x and g the gradient's factors at every position, <G, u v'> is
sum over positions of (x . u)(g . v), so a few coordinates of x and g hold all parts. The last part
is what the others leave of the score, whose own rounding it therefore takes: the sum is exact.

A neuron has one vector in the residual stream, so its change d has other parts: its own gain, and
what lies across, e = d - g w, within the matrix's top k directions or outside of them [1]. With Q
these directions and P the projection on their span less w (so that P e keeps off w):

    global    g w
    within    P e = Q c - w (q . c) / |w|,  with z = Q' e, q = Q' w / |w|,
              c = z + q (q . z) / (1 - |q|^2)
    new_write (of W_out; new_read of W_in and W_gate)    the rest

Signs and units are the score's.

[1] The closed form of P is Sherman and Morrison's, for (Q' (1 - w w' / |w|^2) Q)^-1.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float, Float64
from torch import Tensor

from tvlens.components import WRITING_PARTS

from .changes import Change, product, transposed, turned, written_rows
from .matrices import Basis, kept_directions, seen, spectral_basis
from .neurons import change_of_neurons, ratio, rows_of_neurons, sums_of_rows

GEOMETRIC_PARTS = ("global", "scale", "within", "reroute", "new_read", "new_write", "new_both")
"""The parts, in the order of the columns ``e_*`` that have their names."""
NEURON_PARTS_OF_CHANGE = ("global", "within", "new_read", "new_write")
"""Those that a neuron has; which of the last two depends on the matrix."""
ALONE = 1e-9
"""Share of a neuron's vector outside the top directions below which it lies within them."""
_SHARED = "batch pos width, component width direction -> batch pos component direction"
_OWN = "batch pos component width, component width direction -> batch pos component direction"

Shares = dict[str, Float64[Tensor, "batch component"]]
"""What each part takes of the scores of some components."""


def new_part(part: str) -> str:
    """What is new in a matrix: what it writes, or for one that reads, what it reads."""
    return "new_write" if part in WRITING_PARTS else "new_read"


@dataclass(frozen=True, eq=False)
class Split:
    """The coordinates in which the change of some matrices falls into parts.

    Attributes:
        part: What they are, ``W_O`` ...; it says which side is the residual stream.
        read: U.
        write: V.
        channels: C_ii.
        whole: g S_i, the part of the channels that is one gain.
        core: C among the kept directions.
        from_read: R D in its own coordinates: U_k' D.
        onto_write: D T likewise: D V_k.
    """

    part: str
    read: Float[Tensor, "component d_in direction"]
    write: Float[Tensor, "component d_out direction"]
    channels: Float[Tensor, "component direction"]
    whole: Float[Tensor, "component direction"]
    core: Float[Tensor, "component k_read k_write"]
    from_read: Float[Tensor, "component k_read d_out"]
    onto_write: Float[Tensor, "component d_in k_write"]

    def shares(
        self,
        x: Float[Tensor, "batch pos ... d_in"],
        g: Float[Tensor, "batch pos ... d_out"],
        total: Float64[Tensor, "batch component"],
    ) -> Shares:
        """What each part takes of ``total``, the scores <G, D>.

        Args:
            x: What the matrices read; with an axis before the last if each has its own.
            g: The gradient at what they write, likewise.
            total: The scores.
        """
        few, many = sorted(self.core.shape[1:])
        read, write = _along(x, self.read), _along(g, self.write)
        along = einsum(
            read,
            write,
            "batch pos component direction, batch pos component direction "
            "-> batch component direction",
        ).double()
        own = along * self.channels.double()
        gain = (along * self.whole.double()).sum(-1)
        both, from_read, onto_write = self._kept(x, g, read, write)
        between = own[..., few:many].sum(-1)
        wider_read = self.core.shape[1] > self.core.shape[2]
        sides = {
            "within": both - own[..., :few].sum(-1),
            "write": from_read - both - (between if wider_read else 0.0),
            "read": onto_write - both - (0.0 if wider_read else between),
        }
        rest = total - own.sum(-1) - sides["within"] - sides["write"] - sides["read"]
        named = {"new_write": sides["write"], "reroute": sides["read"]}
        if new_part(self.part) == "new_read":
            named = {"new_read": sides["read"], "reroute": sides["write"]}
        return {
            "global": gain,
            "scale": own.sum(-1) - gain,
            "within": sides["within"],
            **named,
            "new_both": rest,
        }

    def _kept(
        self, x: Tensor, g: Tensor, read: Tensor, write: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """<G, R D T>, <G, R D> and <G, D T>, float64."""
        k_read, k_write = self.core.shape[1:]
        read, write = read[..., :k_read], write[..., :k_write]
        core = einsum(
            read,
            self.core,
            "batch pos component k_read, component k_read k_write -> batch pos component k_write",
        )
        onto_g = _along(g, transposed(self.from_read))
        from_x = _along(x, self.onto_write)
        return _summed(core, write), _summed(read, onto_g), _summed(from_x, write)


@dataclass(frozen=True, eq=False)
class NeuronSplit:
    """The coordinates in which the changes of one matrix's neurons fall into parts.

    Attributes:
        part: W_gate, W_in or W_out.
        vectors: w, one row a neuron; a view of the base.
        gains: g.
        kept: Q, the matrix's top directions on the side of the residual stream.
        within: c, the coordinates of P e along them.
        back: (q . c) / |w|, what P e takes off along w.
    """

    part: str
    vectors: Float[Tensor, "neuron d_model"]
    gains: Float[Tensor, " neuron"]
    kept: Float[Tensor, "d_model k"]
    within: Float[Tensor, "neuron k"]
    back: Float[Tensor, " neuron"]

    def shares(
        self,
        own: Float[Tensor, "batch pos neuron"],
        stream: Float[Tensor, "batch pos d_model"],
        total: Float64[Tensor, "batch neuron"],
    ) -> Shares:
        """What each part takes of ``total``.

        Args:
            own: At the neurons' side: their activation (W_out), or the gradient there.
            stream: At the residual stream's side: the gradient (W_out), or what is read.
            total: The scores.
        """
        onto = einsum(stream, self.vectors, "batch pos d_model, neuron d_model -> batch pos neuron")
        kept = einsum(stream, self.kept, "batch pos d_model, d_model k -> batch pos k")
        near = einsum(kept, self.within, "batch pos k, neuron k -> batch pos neuron")
        along = reduce(own * onto, "batch pos neuron -> batch neuron", "sum").double()
        inside = reduce(own * near, "batch pos neuron -> batch neuron", "sum").double()
        gain = along * self.gains.double()
        within = inside - along * self.back.double()
        return {"global": gain, "within": within, new_part(self.part): total - gain - within}


def matrix_split(
    base: Float[Tensor, "component d_in d_out"],
    change: Change,
    part: str,
    *,
    basis: Basis | None = None,
) -> Split:
    """The split of some matrices in the coordinates of each one's own base.

    The parts are exactly those whose energies ``placed_columns`` gives. Worked out in float64 on
    the CPU, held in the base's dtype on its device.

    Args:
        base: Base weights; tensors elsewhere than on the CPU are copied there.
        change: Their changes, factors or dense.
        part: What they are.
        basis: The singular directions, if they are known.
    """
    basis = spectral_basis(base.cpu()) if basis is None else basis
    found = seen(basis, change)
    k_read, k_write = kept_directions(basis, (base.shape[-2], base.shape[-1]))
    read, write = basis.read, basis.write
    energy = basis.values.square().sum(-1)
    gain = ratio((found.channels * basis.values).sum(-1), energy).nan_to_num()
    own = product(turned(change), read[..., :k_read])
    exact = {
        "read": read,
        "write": write,
        "channels": found.channels,
        "whole": rearrange(gain, "component -> component 1") * basis.values,
        "core": found.corner(k_read, k_write),
        "from_read": transposed(own),
        "onto_write": product(change, write[..., :k_write]),
    }
    return Split(part, **{name: _held(tensor, base) for name, tensor in exact.items()})


def parts_of_change(
    base: Float[Tensor, "d_in d_out"], change: Change, part: str, *, basis: Basis | None = None
) -> Iterator[tuple[str, Float64[Tensor, "d_in d_out"]]]:
    """The parts of one matrix's change themselves, which sum to it; each is made when asked for.

    They are what ``matrix_split`` divides scores by, written out: of ``global`` and ``scale`` the
    base is U S V', which leaves out directions below ``RANK_TOLERANCE``.

    Args:
        base: The base weight.
        change: Its change, factors or dense.
        part: What it is.
        basis: The singular directions, if they are known.
    """
    basis = spectral_basis(base) if basis is None else basis
    k_read, k_write = kept_directions(basis, (base.shape[0], base.shape[1]))
    read, write, channels = basis.read, basis.write, seen(basis, change).channels
    gains = ratio((channels * basis.values).sum(-1), basis.values.square().sum(-1)).nan_to_num()
    whole = gains * basis.values
    yield "global", (read * whole) @ transposed(write)
    yield "scale", (read * (channels - whole)) @ transposed(write)
    rest = written_rows(change, 0, base.shape[0]) - (read * channels) @ transposed(write)
    of_read, onto_write = read[:, :k_read], write[:, :k_write]
    from_read = of_read @ (transposed(of_read) @ rest)
    into_write = (rest @ onto_write) @ transposed(onto_write)
    within = (from_read @ onto_write) @ transposed(onto_write)
    yield "within", within
    writes = new_part(part) == "new_write"
    yield "new_write" if writes else "reroute", from_read - within
    yield "reroute" if writes else "new_read", into_write - within
    yield "new_both", rest - from_read - into_write + within


def neuron_split(
    base: Float[Tensor, "d_in d_out"], change: Change, part: str, *, basis: Basis | None = None
) -> NeuronSplit:
    """The split of one matrix's neurons; see ``matrix_split``."""
    here = base.cpu()
    basis = spectral_basis(here) if basis is None else basis
    k_read, k_write = kept_directions(basis, (base.shape[0], base.shape[1]))
    kept = basis.write[:, :k_write] if part in WRITING_PARTS else basis.read[:, :k_read]
    vectors, changes = rows_of_neurons(here, part), change_of_neurons(change, part)
    sums = sums_of_rows(vectors, changes)
    gains, length = sums.gain.nan_to_num(), sums.base.sqrt()
    along = product(vectors, kept)
    across = product(changes, kept) - _rows(gains) * along
    toward = (along / _rows(length)).nan_to_num()
    left = 1 - toward.square().sum(-1)
    pulled = torch.where(left > ALONE, (toward * across).sum(-1) / left, 0.0)
    within = across + toward * _rows(pulled)
    exact = {
        "gains": gains,
        "kept": kept,
        "within": within,
        "back": ((toward * within).sum(-1) / length).nan_to_num(),
    }
    named = {name: _held(tensor, base) for name, tensor in exact.items()}
    return NeuronSplit(part, rows_of_neurons(base, part), **named)


def _rows(values: Float[Tensor, " neuron"]) -> Float[Tensor, "neuron 1"]:
    return rearrange(values, "neuron -> neuron 1")


def _held(exact: Float[Tensor, "..."], base: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """In the base's dtype and where it is."""
    return exact.to(base.dtype).to(base.device)


def _along(
    x: Float[Tensor, "batch pos ... width"], directions: Float[Tensor, "component width direction"]
) -> Float[Tensor, "batch pos component direction"]:
    """Coordinates of what all components share, or of what each has of its own."""
    return einsum(x, directions, _OWN if x.ndim == 4 else _SHARED)


def _summed(
    a: Float[Tensor, "batch pos component direction"],
    b: Float[Tensor, "batch pos component direction"],
) -> Float64[Tensor, "batch component"]:
    pattern = "batch pos component direction, batch pos component direction -> batch component"
    return einsum(a, b, pattern).double()
