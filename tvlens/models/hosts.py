"""The two kinds of TransformerLens model, in one vocabulary.

A *host* is the object of TransformerLens that runs: a ``TransformerBridge`` (3.9 and 4.x) or a
``HookedTransformer`` (3.9). tvlens speaks of sites by the bridge's names of 4.x, ``embed``,
``blocks.0.attn.q``, ``ln_final``, each with its input at ``.hook_in`` and its output at
``.hook_out``. A ``Host`` says how the object at hand is called and where it keeps a site's
parameters and activations under another name; the rest of tvlens asks it and never forks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from tvlens.errors import HostError

from .passages import Passage

CANONICAL = {
    "d_out d_in": "d_out d_in -> d_in d_out",
    "head d_in d_head": "head d_in d_head -> d_in (head d_head)",
    "head d_head d_out": "head d_head d_out -> (head d_head) d_out",
    "head d_head": "head d_head -> (head d_head)",
}
"""How a stored tensor becomes one that multiplies as ``x @ W``; any other form is one already."""


@dataclass(frozen=True)
class Kept:
    """A parameter that the forward pass reads.

    Attributes:
        module: The module that owns it.
        name: Its name there.
        form: Names of its axes: ``d_out d_in`` for a torch Linear, ``d_in d_out`` for Conv1D,
            ``head d_in d_head`` for HookedTransformer's queries; empty where nothing cuts them.
    """

    module: nn.Module
    name: str
    form: str = ""

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is now.

        Raises:
            HostError: It has been taken away.
        """
        found = self.module._parameters.get(self.name)
        if found is None:
            raise HostError(f"{type(self.module).__name__} has no parameter {self.name}.")
        return found

    def canonical(self, stored: Tensor) -> Tensor:
        """``stored``, of the parameter's shape, as [d_in, d_out] or flat; a view if it can be."""
        pattern = CANONICAL.get(self.form)
        return stored if pattern is None else rearrange(stored, pattern)

    def in_order(self, stored: Tensor) -> Tensor:
        """A view of ``stored`` with the canonical entries in order; heads may be an axis apart."""
        if self.form == "head d_in d_head":
            return rearrange(stored, "head d_in d_head -> d_in head d_head")
        return self.canonical(stored)

    def axis_of(self, side: str) -> int | None:
        """The stored axis of heads, or else of the map's ``in`` or ``out``; None without one."""
        axes = self.form.split()
        name = "head" if "head" in axes else f"d_{side}"
        return axes.index(name) if name in axes else None


@dataclass(frozen=True)
class Norm:
    """What a norm does to its input before it multiplies by the gain.

    Attributes:
        epsilon: What it adds to the mean square.
        centred: It takes the mean off first (LayerNorm).
    """

    epsilon: float
    centred: bool


@dataclass(frozen=True)
class Host:
    """How one object of TransformerLens is called and read.

    Attributes:
        logits: Its logits on right-padded ids and their mask.
        kept: The parameters of a site, by ``weight`` and ``bias``; empty where it has none.
        module: The module that a site's forward pass runs, None where it has none.
        passages: Where activations pass that its own hooks have no such name for: the name of
            one of its own hooks, or the edge of a module.
        not_raw: Why its weights are not those of a checkpoint, empty where they are.
        reload: How to load it so that they are.
        training_differs: It computes something else in training mode (dropout).
    """

    logits: Callable[[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]], Tensor]
    kept: Callable[[str], Mapping[str, Kept]]
    module: Callable[[str], nn.Module | None]
    passages: Mapping[str, str | Passage] = field(default_factory=dict)
    not_raw: str = ""
    reload: str = ""
    training_differs: bool = True

    def norm(self, site: str) -> Norm:
        """What the norm of a site does.

        Raises:
            HostError: It has no epsilon.
        """
        return norm_of(self.module(site), site)

    def require_raw(self) -> None:
        """Refuse weights that were changed while they were loaded.

        Raises:
            HostError: Saying what was changed and how to load the model without.
        """
        if self.not_raw:
            raise HostError(
                f"the weights of this model are not a checkpoint's: {self.not_raw}. They can be "
                "neither subtracted nor attributed to; attribution to activations works.",
                hint=self.reload,
            )


def submodule(model: nn.Module, name: str) -> nn.Module | None:
    """The module of a dotted name, None where there is none."""
    owner: Any = model
    for step in name.split("."):
        owner = owner._modules.get(step) if isinstance(owner, nn.Module) else None
    return owner


def norm_of(module: nn.Module | None, name: str) -> Norm:
    """What a norm's module does, told by its epsilon and its class's name.

    Raises:
        HostError: It has no epsilon.
    """
    epsilon = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    if epsilon is None:
        raise HostError(
            f"{name} ({type(module).__name__}) has no epsilon, so its input cannot be normalised."
        )
    return Norm(float(epsilon), type(module).__name__ == "LayerNorm")


def row_means(weight: Float[Tensor, "row column"]) -> float:
    """The largest mean of a row, relative to the entries' root mean square."""
    scale = float(weight.float().pow(2).mean().sqrt())
    return float(weight.float().mean(-1).abs().max()) / max(scale, torch.finfo(torch.float32).tiny)
