"""Where a tuning vector comes from: which base it belongs to, and which files it was made from.

Two vectors may be combined only where their bases hold the same weights. Names do not show that
and file digests show too much (shards, dtype and metadata change them), so a base is known by the
sha256 of each component's canonical float32 bytes: the same for a folder, its bfloat16 twin with
equal values, other shards and the model in memory. Digests are taken while the difference is read.
Vectors are compared on the components that both hold.
"""

import hashlib
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from jaxtyping import Float32
from torch import Tensor

from tvlens.components import Component
from tvlens.errors import IncomparableModelsError

from .layout import Layout

Coordinates = Literal["stored", "base"]


@dataclass(frozen=True, eq=False)
class BaseRecord:
    """What a vector knows of its base.

    Attributes:
        name: What reports call it.
        config: Its config.json.
        layout: Its numbers and places, with vocabulary and ties as the pair settled them.
        digests: sha256 of each component's canonical float32 bytes.
    """

    name: str
    config: Mapping[str, Any] = field(repr=False)
    layout: Layout
    digests: Mapping[Component, str] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Input:
    """A model that a vector was made from.

    Attributes:
        role: ``base`` or ``tuned``.
        name: Its name.
        sha256: Gives the digest of each of its files, read when it is called.
        coordinates: ``stored``, or ``base``'s where it was read in those (``gauge.canonical``).
    """

    role: str
    name: str
    sha256: Callable[[], dict[str, str]] = field(repr=False)
    coordinates: Coordinates = "stored"


def digest(weight: Float32[Tensor, "..."]) -> str:
    """The sha256 of a canonical float32 weight's bytes, little-endian, row by row."""
    return hashlib.sha256(weight.detach().contiguous().numpy().data).hexdigest()


def require_same_base(
    first: BaseRecord, second: BaseRecord, components: Collection[Component]
) -> None:
    """Refuse vectors whose bases differ in shape or in the weights of ``components``.

    Bases that hold the same weights under different names are only warned of.

    Raises:
        IncomparableModelsError: The bases differ.
    """
    for name in [f.name for f in fields(Layout) if f.compare]:
        ours, theirs = getattr(first.layout, name), getattr(second.layout, name)
        if ours != theirs:
            raise IncomparableModelsError(
                f"the tuning vectors' bases differ in {name}: {ours!r} in {first.name}, "
                f"{theirs!r} in {second.name}.",
                hint=_tie_hint(name),
            )
    for component in components:
        if first.digests[component] != second.digests[component]:
            raise IncomparableModelsError(
                f"the tuning vectors belong to different bases: {component} of {first.name} "
                f"differs from that of {second.name}.",
                hint="Take both vectors from one base model, in one precision.",
            )
    if first.name != second.name:
        warnings.warn(
            f"the bases {first.name!r} and {second.name!r} of two tuning vectors have other "
            "names but the same weights; they are taken as one.",
            stacklevel=4,
        )


def _tie_hint(name: str) -> str:
    if name == "tied":
        return "One fine-tune has an unembedding of its own, the other shares the embedding."
    return "A sum or product needs vectors of one base model."
