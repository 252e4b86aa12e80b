"""What a config says about a checkpoint: its numbers, its components and where they lie."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tvlens.components import Component
from tvlens.errors import CheckpointError, UnsupportedFormatError

from .families import gpt2, llama, neox
from .families.table import Family, Place

FAMILIES: tuple[Family, ...] = (llama.FAMILY, gpt2.FAMILY, neox.FAMILY)
WRAPPERS = ("_orig_mod.", "module.")
"""What ``torch.compile`` and data-parallel training put before every name."""
SIZES = ("n_layers", "n_heads", "n_kv_heads", "d_head", "d_model", "d_mlp", "d_vocab")
LARGEST_SIZE = 1 << 24
MOST_LAYERS = 10_000
"""Far beyond any model; a garbled config must not make tvlens list a billion tensors."""
_CONFIG_HINT = "Copy the config.json that belongs to these weights."
HEADLESS_PARTS = ("W_E", "W_pos")


@dataclass(frozen=True)
class Layout:
    """The numbers of a model and the places of its parameters.

    Attributes:
        family: ``llama``, ``gpt2`` or ``neox``.
        n_layers: Number of blocks.
        n_heads: Query heads per block.
        n_kv_heads: Key and value heads per block.
        d_head: Width of a head.
        d_model: Width of the residual stream.
        d_mlp: Neurons per block.
        d_vocab: Rows of the embedding that both models of a pair have.
        gated: The MLP has W_gate.
        tied: W_U is the transpose of W_E and no component of its own.
        activation: Name of the MLP's activation function.
        norm_eps: The norms' epsilon.
        rotary: Positions enter by rotation, not by W_pos.
        parallel: Attention and MLP read the same residual stream.
        qkv_bias: Query, key and value have biases.
        output_bias: The attention output has a bias.
        mlp_bias: The MLP has biases.
        n_ctx: Rows of W_pos, 0 where there is none.
    """

    family: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int
    d_vocab: int
    gated: bool
    tied: bool
    activation: str
    norm_eps: float
    rotary: bool
    parallel: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    n_ctx: int = 0
    _table: Family = field(kw_only=True, repr=False, compare=False)

    @cached_property
    def places(self) -> dict[Component, Place]:
        """Every component with its place, the tensor's name filled in, in model order.

        A tied W_U is left out.
        """
        rows = [p for p in self._table.places if not p.when or getattr(self, p.when)]
        rows = [p for p in rows if not (self.tied and p.part == "W_U")]
        first = [_placed(p) for p in rows if p.part in HEADLESS_PARTS]
        last = [_placed(p) for p in rows if not p.per_layer and p.part not in HEADLESS_PARTS]
        blocks = [_placed(p, layer) for layer in range(self.n_layers) for p in rows if p.per_layer]
        return dict([*first, *blocks, *last])

    def components(self) -> list[Component]:
        """The disjoint pieces of the parameters: matrices, norms, biases, embeddings."""
        return list(self.places)

    def blocks(self) -> list[list[Component]]:
        """Components by block; the last list holds embeddings and the final norm."""
        found = self.components()
        layers = [[c for c in found if c.layer == layer] for layer in range(self.n_layers)]
        return [*layers, [c for c in found if c.layer is None]]

    def shape(self, component: Component) -> tuple[int, ...]:
        """The canonical shape of a component.

        Raises:
            KeyError: The layout has no such component.
        """
        heads, kv_heads = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        shapes: dict[str, tuple[int, ...]] = {
            "W_E": (self.d_vocab, self.d_model),
            "W_pos": (self.n_ctx, self.d_model),
            "W_U": (self.d_model, self.d_vocab),
            "W_Q": (self.d_model, heads),
            "W_K": (self.d_model, kv_heads),
            "W_V": (self.d_model, kv_heads),
            "W_O": (heads, self.d_model),
            "W_gate": (self.d_model, self.d_mlp),
            "W_in": (self.d_model, self.d_mlp),
            "W_out": (self.d_mlp, self.d_model),
            "b_Q": (heads,),
            "b_K": (kv_heads,),
            "b_V": (kv_heads,),
            "b_gate": (self.d_mlp,),
            "b_in": (self.d_mlp,),
        }
        return shapes.get(str(component.part), (self.d_model,))

    @cached_property
    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape that each checkpoint tensor must have."""
        shapes: dict[str, tuple[int, ...]] = {}
        for component, place in self.places.items():
            shape = self.shape(component)
            if place.third is not None:
                shape = (*shape[:-1], 3 * shape[-1])
            shapes[place.tensor] = shape[::-1] if place.transposed else shape
        return shapes

    @cached_property
    def in_and_out(self) -> dict[str, tuple[int, ...]]:
        """The shape of each checkpoint tensor oriented as ``x @ W``, nothing cut."""
        shapes = self.stored_shapes
        turned = {place.tensor for place in self.places.values() if place.transposed}
        return {name: s[::-1] if name in turned else s for name, s in shapes.items()}

    @property
    def embedding_tensor(self) -> str:
        """Checkpoint name of W_E."""
        return next(p.tensor for p in self._table.places if p.part == "W_E")

    @property
    def unembedding_tensor(self) -> str:
        """Checkpoint name of W_U where it is stored."""
        return next(p.tensor for p in self._table.places if p.part == "W_U")

    def canonical_name(self, stored: str) -> str:
        """The family's own name for a stored tensor, the stored name itself if it has none."""
        name = stored
        while wrapper := next((w for w in WRAPPERS if name.startswith(w)), ""):
            name = name[len(wrapper) :]
        name = self._table.aliases.get(name, name)
        prefix = self._table.prefix
        if name in self._known or name.startswith(prefix):
            return name
        known = prefix + name in self._known or self.is_buffer("." + name)
        return prefix + name if known else name

    @cached_property
    def _known(self) -> set[str]:
        return {*self.stored_shapes, self.unembedding_tensor}

    def is_buffer(self, name: str) -> bool:
        """Whether a stored tensor is no parameter (rotary frequencies, causal masks)."""
        return any(re.search(pattern, name) for pattern in self._table.buffers)

    def canonical(self, stored: Float[Tensor, "..."], place: Place) -> Float[Tensor, "..."]:
        """The part at ``place`` of a stored tensor, oriented as ``x @ W``."""
        matrix = rearrange(stored, "d_out d_in -> d_in d_out") if place.transposed else stored
        return self.output_part(matrix, place)

    def output_part(self, matrix: Float[Tensor, "..."], place: Place) -> Float[Tensor, "..."]:
        """The part's own third of the last axis, everything where nothing is fused."""
        if place.third is None:
            return matrix
        if self._table.thirds == "interleaved":
            cut = rearrange(
                matrix,
                "... (head three d_head) -> three ... (head d_head)",
                head=self.n_heads,
                three=3,
            )
            return cut[place.third]
        return rearrange(matrix, "... (three width) -> three ... width", three=3)[place.third]


def _placed(place: Place, layer: int | None = None) -> tuple[Component, Place]:
    filled = place._replace(tensor=place.tensor.format(layer=layer))
    return Component(place.kind, layer, None, place.part), filled


def layout_of(config: Mapping[str, Any]) -> Layout:
    """The layout that a config.json describes.

    Raises:
        UnsupportedFormatError: No family's table knows the model type.
        CheckpointError: The config lacks a number.
    """
    model_type = config.get("model_type")
    table = next((f for f in FAMILIES if model_type in f.model_types), None)
    if table is None:
        known = ", ".join(name for family in FAMILIES for name in family.model_types)
        raise UnsupportedFormatError(
            f"config.json says model_type {model_type!r}; tvlens has tables for {known}.",
            hint="A model family is one table in tvlens/weights/families.",
        )
    try:
        numbers = table.numbers(config)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"config.json of a {model_type} model lacks or garbles a number: {error}.",
            hint=_CONFIG_HINT,
        ) from error
    _refuse_impossible(numbers)
    _refuse_other_types(numbers)
    return Layout(family=table.name, _table=table, **numbers)


def _refuse_impossible(numbers: Mapping[str, Any]) -> None:
    for name in SIZES:
        size = numbers[name]
        if not isinstance(size, int) or not 0 < size <= LARGEST_SIZE:
            raise CheckpointError(
                f"config.json gives {name} as {size!r}, expected a whole number from 1 to "
                f"{LARGEST_SIZE}.",
                hint=_CONFIG_HINT,
            )
    n_layers, n_heads, n_kv_heads = (numbers[k] for k in ("n_layers", "n_heads", "n_kv_heads"))
    if n_layers > MOST_LAYERS or n_heads % n_kv_heads:
        raise CheckpointError(
            f"config.json gives {n_layers} layers and {n_heads} query heads over {n_kv_heads} "
            "kv heads, which no model has.",
            hint=_CONFIG_HINT,
        )


def _refuse_other_types(numbers: Mapping[str, Any]) -> None:
    fits = {
        "activation": isinstance(numbers["activation"], str),
        "norm_eps": 0 <= numbers["norm_eps"] < 1,
        "n_ctx": type(n_ctx := numbers.get("n_ctx", 0)) is int and 0 <= n_ctx <= LARGEST_SIZE,
    }
    for name, right in fits.items():
        if not right:
            raise CheckpointError(
                f"config.json gives {str(numbers[name])[:40]!r} as {name}.", hint=_CONFIG_HINT
            )
