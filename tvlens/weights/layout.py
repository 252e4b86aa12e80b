"""What a config says about a checkpoint: its numbers, its components and where they lie."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tvlens.components import Component
from tvlens.errors import CheckpointError, UnsupportedFormatError

from .families import (
    gemma,
    gpt2,
    hooked_transformer,
    llama,
    mistral,
    neox,
    olmo2,
    phi3,
    qwen2,
    qwen3,
)
from .families.table import Family, Place, Shape
from .families.unlisted import Tensors, unlisted_family
from .families.windows import Windows

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    gemma.GEMMA2,
    gemma.GEMMA3,
    phi3.FAMILY,
    olmo2.FAMILY,
    gpt2.FAMILY,
    neox.FAMILY,
)
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
        family: Name of the family's table.
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
        qk_norm: What queries and keys are normalised over before they meet, empty where they
            are not: then QK is no bilinear form of the residual stream.
        windows: Width of each block's attention window, empty where no block has one.
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
    qk_norm: Literal["", "head", "projection"] = ""
    windows: Windows = ()
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
        layers = range(self.n_layers)
        blocks = [_placed(p, layer) for layer in layers for p in rows if p.in_layer(layer)]
        return dict([*first, *blocks, *last])

    def components(self) -> list[Component]:
        """The disjoint pieces of the parameters: matrices, norms, biases, embeddings."""
        return list(self.places)

    def blocks(self) -> list[list[Component]]:
        """Components by block; the last list holds embeddings and the final norm."""
        found = self.components()
        layers = [[c for c in found if c.layer == layer] for layer in range(self.n_layers)]
        return [*layers, [c for c in found if c.layer is None]]

    def shape(self, component: Component) -> Shape:
        """The canonical shape of a component.

        Raises:
            KeyError: The layout has no such component.
        """
        place = self.places[component]
        if place.stored is not None:
            return place.stored[::-1] if place.transposed else place.stored
        return self._shapes.get(place.part, (self.d_model,))

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        """Canonical shapes by part; what is not here is as wide as the residual stream."""
        heads, kv_heads = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        per_head = self.qk_norm == "head"
        return {
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
            "b_U": (self.d_vocab,),
            "q_norm.w": (self.d_head if per_head else heads,),
            "k_norm.w": (self.d_head if per_head else kv_heads,),
        }

    def _fused_widths(self, place: Place) -> list[int]:
        """Output widths of the parts of a fused tensor, in their order."""
        return [self._shapes[part][-1] for part in place.fused]

    @cached_property
    def stored_shapes(self) -> dict[str, Shape]:
        """The shape that each checkpoint tensor must have."""
        shapes: dict[str, Shape] = {}
        for component, place in self.places.items():
            shape = self.shape(component)
            if place.fused:
                shape = (*shape[:-1], sum(self._fused_widths(place)))
            shapes[place.tensor] = shape[::-1] if place.transposed else shape
        return shapes

    @cached_property
    def in_and_out(self) -> dict[str, Shape]:
        """The shape of each checkpoint tensor oriented as ``x @ W``, nothing cut."""
        shapes = self.stored_shapes
        turned = {place.tensor for place in self.places.values() if place.transposed}
        return {name: s[::-1] if name in turned else s for name, s in shapes.items()}

    @property
    def listed(self) -> bool:
        """Whether the family has a table: otherwise heads, neurons and orientation are unknown."""
        return self._table.listed

    def filled(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config with what transformers takes for the entries it leaves out."""
        return {**self._table.defaults, **config}

    @property
    def function_entries(self) -> tuple[str, ...]:
        """Further config entries of the family that change what equal weights compute."""
        return self._table.function

    @property
    def embedding_tensor(self) -> str:
        """Checkpoint name of W_E, or of the first embedding where there is no table."""
        return next((p.tensor for p in self._table.places if p.kind == "embedding"), "")

    @property
    def unembedding_tensor(self) -> str:
        """Checkpoint name of W_U where it is stored, empty where there is no table."""
        return next((p.tensor for p in self._table.places if p.part == "W_U"), "")

    @property
    def left_out(self) -> Mapping[str, str]:
        """Tensors of both checkpoints that no component holds, and why; empty with a table."""
        return self._table.left_out

    def is_shared(self, component: Component) -> bool:
        """Whether a component's tensor is also the unembedding."""
        return self.tied and component.kind == "embedding" and component.part != "W_pos"

    def canonical_name(self, stored: str) -> str:
        """The family's own name for a stored tensor, the stored name itself if it has none."""
        name = unwrapped(stored)
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
        """The part at ``place`` of a stored tensor, oriented as ``x @ W``, ``centre`` not added."""
        matrix = rearrange(stored, "d_out d_in -> d_in d_out") if place.transposed else stored
        return self.output_part(matrix, place)

    def output_part(self, matrix: Float[Tensor, "..."], place: Place) -> Float[Tensor, "..."]:
        """The part's own share of the last axis, everything where nothing is fused."""
        if not place.fused:
            return matrix
        groups = self.n_kv_heads if self._table.interleaved else 1
        widths = [width // groups for width in self._fused_widths(place)]
        own = place.fused.index(place.part)
        grouped = rearrange(matrix, "... (group width) -> ... group width", group=groups)
        cut = grouped.split(widths, dim=-1)[own]
        return rearrange(cut, "... group width -> ... (group width)")


def _placed(place: Place, layer: int | None = None) -> tuple[Component, Place]:
    filled = place._replace(tensor=place.tensor.replace("{layer}", str(layer)))
    return Component(place.kind, layer, None, place.part), filled


def unwrapped(stored: str) -> str:
    """A stored name without what training put before it."""
    while wrapper := next((w for w in WRAPPERS if stored.startswith(w)), ""):
        stored = stored[len(wrapper) :]
    return stored


def has_table(config: Mapping[str, Any]) -> bool:
    """Whether a table knows the model type of a config."""
    return _table_of(config) is not None


def _table_of(config: Mapping[str, Any]) -> Family | None:
    """The table of a config's model type; a HookedTransformer's depends on its settings."""
    model_type = config.get("model_type")
    if model_type == hooked_transformer.MODEL_TYPE:
        return hooked_transformer.family(config)
    return next((f for f in FAMILIES if model_type in f.model_types), None)


def unlisted_layout(config: Mapping[str, Any], base: Tensors, tuned: Tensors) -> Layout:
    """The layout of two checkpoints of a family without a table, from names and shapes alone."""
    table = unlisted_family(
        config, *({unwrapped(n): t for n, t in x.items()} for x in (base, tuned))
    )
    return Layout(family=table.name, _table=table, **table.numbers(config))


def layout_of(config: Mapping[str, Any]) -> Layout:
    """The layout that a config.json describes.

    Raises:
        UnsupportedFormatError: No family's table knows the model type.
        CheckpointError: The config lacks a number.
    """
    model_type = config.get("model_type")
    table = _table_of(config)
    if table is None:
        known = ", ".join(name for family in FAMILIES for name in family.model_types)
        raise UnsupportedFormatError(
            f"config.json says model_type {model_type!r}; tvlens has tables for {known}.",
            hint="A model family is one table in tvlens/weights/families.",
        )
    try:
        numbers = table.numbers({**table.defaults, **config})
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
