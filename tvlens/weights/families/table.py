"""The form of a family's table.

Weights are canonical when they multiply from the right, ``x @ W``: TransformerLens's orientation.
A ``torch.nn.Linear`` stores the transpose, GPT-2's ``Conv1D`` does not. Fused query-key-value
tensors are cut into thirds along their output axis, in blocks (GPT-2) or per head (GPT-NeoX).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from tvlens.components import Kind

Thirds = Literal["contiguous", "interleaved"]


class Place(NamedTuple):
    """Where one canonical part lies in a checkpoint.

    Attributes:
        kind: Component kind of the part.
        part: Canonical name, ``W_Q`` or ``ln1.w``.
        tensor: Checkpoint name; ``{layer}`` stands for the block number.
        transposed: The checkpoint stores [d_out, d_in].
        third: 0, 1, 2 for query, key, value of a fused tensor.
        when: Name of the layout flag that must be set for the part to exist.
    """

    kind: Kind
    part: str
    tensor: str
    transposed: bool = False
    third: int | None = None
    when: str = ""

    @property
    def per_layer(self) -> bool:
        """Whether every block has this part."""
        return "{layer}" in self.tensor


@dataclass(frozen=True)
class Family:
    """A model family's table.

    Attributes:
        name: The family's name.
        model_types: Values of ``model_type`` in config.json that belong to it.
        numbers: Reads the layout's numbers and flags from a config.
        places: Where each part lies.
        prefix: What checkpoints of the headless model leave out of every name.
        aliases: Other names for a tensor.
        buffers: Regular expressions of stored tensors that are no parameters.
        thirds: How a fused query-key-value tensor is cut.
    """

    name: str
    model_types: tuple[str, ...]
    numbers: Callable[[Mapping[str, Any]], dict[str, Any]]
    places: tuple[Place, ...]
    prefix: str
    aliases: Mapping[str, str]
    buffers: tuple[str, ...]
    thirds: Thirds = "contiguous"
