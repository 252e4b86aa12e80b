"""The form of a family's table, and the rows that tables are written in.

Weights are canonical when they multiply from the right, ``x @ W``: TransformerLens's orientation.
A ``torch.nn.Linear`` stores the transpose, GPT-2's ``Conv1D`` does not. Fused tensors are cut
along their output axis: in blocks, one part after the other (GPT-2, Phi-3), or head by head
(GPT-NeoX); the parts may differ in width, as grouped queries make them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tvlens.components import Kind

Shape = tuple[int, ...]


class Place(NamedTuple):
    """Where one canonical part lies in a checkpoint.

    Attributes:
        kind: Component kind of the part.
        part: Canonical name, ``W_Q`` or ``ln1.w``.
        tensor: Checkpoint name; ``{layer}`` stands for the block number.
        transposed: The checkpoint stores [d_out, d_in].
        fused: The parts of a fused tensor in their order, empty where the tensor is one part.
        when: Name of the layout flag that must be set for the part to exist.
        centre: What the model adds to the stored number before it multiplies: 1 where gains are
            stored as their difference from 1, else 0. It cancels in a tuning vector.
        layers: The blocks that have the part, None for all.
        stored: Stored shape, None where the layout's numbers say it.
    """

    kind: Kind
    part: str
    tensor: str
    transposed: bool = False
    fused: tuple[str, ...] = ()
    when: str = ""
    centre: float = 0.0
    layers: frozenset[int] | None = None
    stored: Shape | None = None

    @property
    def per_layer(self) -> bool:
        """Whether the part belongs to a block."""
        return "{layer}" in self.tensor

    def in_layer(self, layer: int) -> bool:
        """Whether a block has the part."""
        return self.per_layer and (self.layers is None or layer in self.layers)


def linear(
    part: str, module: str, *, stored: str = "out in", bias: str | None = None
) -> tuple[Place, ...]:
    """A linear map and, unless ``bias`` is None, its bias.

    Args:
        part: Canonical name of the weight; the bias is ``b_`` with the same ending.
        module: Checkpoint name of the module.
        stored: ``out in`` for ``torch.nn.Linear``, ``in out`` for ``Conv1D``.
        bias: The layout flag that says whether there is a bias, empty where there always is.
    """
    return fused((part,), module, stored=stored, bias=bias)


def fused(
    parts: tuple[str, ...], module: str, *, stored: str = "out in", bias: str | None = None
) -> tuple[Place, ...]:
    """Several linear maps side by side in one tensor; the arguments are those of ``linear``."""
    turned = stored == "out in"
    together = parts if len(parts) > 1 else ()
    weights = [Place("matrix", p, f"{module}.weight", turned, together) for p in parts]
    if bias is None:
        return tuple(weights)
    names = tuple(part.replace("W_", "b_") for part in parts)
    together = names if len(parts) > 1 else ()
    biases = [Place("bias", n, f"{module}.bias", fused=together, when=bias) for n in names]
    return (*weights, *biases)


def norm(name: str, module: str, *, bias: bool = False, centre: float = 0.0) -> tuple[Place, ...]:
    """A norm's gain ``NAME.w`` and, for LayerNorm, its bias ``NAME.b``."""
    gain = Place("norm", f"{name}.w", f"{module}.weight", centre=centre)
    return (gain, Place("bias", f"{name}.b", f"{module}.bias")) if bias else (gain,)


def embedding(part: str, module: str) -> Place:
    """W_E, W_pos, or W_U, which is stored like a linear map."""
    return Place("embedding", part, f"{module}.weight", transposed=part == "W_U")


@dataclass(frozen=True)
class Family:
    """A model family's table.

    Attributes:
        name: The family's name.
        model_types: Values of ``model_type`` in config.json that belong to it.
        numbers: Reads the layout's numbers and flags from a config.
        places: Where each part lies.
        prefix: What checkpoints of the headless model leave out of every name.
        buffers: Regular expressions of stored tensors that are no parameters.
        aliases: Other names for a tensor.
        defaults: What transformers takes for the entries that a config may leave out.
        function: Further config entries that change what equal weights compute.
        interleaved: Fused parts alternate head by head instead of lying in blocks.
        left_out: Stored tensors that no part holds, with the reason.
        listed: False for a stand-in made from tensor names, whose orientation is unknown.
    """

    name: str
    model_types: tuple[str, ...]
    numbers: Callable[[Mapping[str, Any]], dict[str, Any]]
    places: tuple[Place, ...]
    prefix: str
    buffers: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    function: tuple[str, ...] = ()
    interleaved: bool = False
    left_out: Mapping[str, str] = field(default_factory=dict)
    listed: bool = True
