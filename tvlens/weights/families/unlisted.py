"""A stand-in for the table of a family that has none, made from tensor names and shapes alone.

What has the same name and shape in both checkpoints is a component: two axes make a matrix, or an
embedding where exactly one axis is as long as config.json's vocabulary; fewer make a bias where
the name ends so, else a norm. The part is the tensor's own name within its block. Which axis of a
matrix is the input, and what a head or a neuron is, cannot be told from this.
"""

import re
from collections.abc import Mapping
from typing import Any

from tvlens.components import KNOWN_PARTS, Kind
from tvlens.weights.sources.folder import TensorInfo

from .table import Family, Place, Shape

BLOCK_NUMBER = re.compile(r"(?<![^.])\d{1,4}(?=\.)")
"""The first whole number between dots; expert numbers come after it."""
BUFFERS = (r"(^|\.)(inv_freq|position_ids|masked_bias|num_batches_tracked|cos_cached|sin_cached)$",)


UNCOMPARED_DTYPES = ("I64", "I32", "I16", "BOOL")
"""Numbers of things, not weights; eight bits and less are quantised weights, which are refused."""
Tensors = Mapping[str, TensorInfo]


def unlisted_family(config: Mapping[str, Any], base: Tensors, tuned: Tensors) -> Family:
    """The stand-in for the family of two checkpoints, from their headers."""
    alike = {
        name: info.shape
        for name, info in base.items()
        if name in tuned and _why_left_out(name, info, tuned[name]) is None
    }
    places = _places(alike, config)
    return Family(
        name=f"{config.get('model_type')} (no table)",
        model_types=(),
        numbers=lambda _: _numbers(places, config),
        places=tuple(places),
        prefix="",
        buffers=BUFFERS,
        left_out={
            name: reason
            for name, info in base.items()
            if name in tuned and (reason := _why_left_out(name, info, tuned[name]))
        },
        listed=False,
    )


def _why_left_out(name: str, base: TensorInfo, tuned: TensorInfo) -> str | None:
    """Why a tensor of both checkpoints is no component; empty for a buffer."""
    if any(re.search(pattern, name) for pattern in BUFFERS):
        return ""
    if base.shape != tuned.shape:
        return f"{base.shape} in the base, {tuned.shape} in the tuned model"
    if uncompared := {base.dtype, tuned.dtype} & {*UNCOMPARED_DTYPES}:
        return f"stored as {min(uncompared)}"
    if len(base.shape) not in (1, 2) or "{" in name:
        return f"its axes are {base.shape}, and without a table nothing says what they are"
    return None


def _places(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> list[Place]:
    """One place for every name, block numbers and shapes apart."""
    blocks: dict[tuple[str, Shape], set[int | None]] = {}
    for name, shape in shapes.items():
        template, layer = _template(name)
        blocks.setdefault((template, shape), set()).add(layer)
    stacks = {template.partition("{layer}")[0] for template, _ in blocks if "{" in template}
    return [
        _place(template, shape, layers, config, one_stack=len(stacks) == 1)
        for (template, shape), layers in blocks.items()
    ]


def _place(
    template: str,
    shape: Shape,
    layers: set[int | None],
    config: Mapping[str, Any],
    *,
    one_stack: bool,
) -> Place:
    part = template.replace("{layer}", "*")
    if one_stack and "{layer}." in template:
        part = template.partition("{layer}.")[2]
    if part in KNOWN_PARTS:  # a table's word for a part would claim its orientation
        part = f"{part} (as named)"
    vocabulary = [length == _vocabulary(config) for length in shape]
    kind = _kind(template, shape, vocabulary)
    return Place(
        kind,
        part,
        template,
        transposed=kind == "embedding" and vocabulary[1],
        layers=frozenset(layer for layer in layers if layer is not None),
        stored=shape,
    )


def _kind(template: str, shape: Shape, vocabulary: list[bool]) -> Kind:
    if len(shape) == 2:
        named_once = sum(vocabulary) == 1 and "{layer}" not in template
        return "embedding" if named_once else "matrix"
    return "bias" if template.endswith("bias") else "norm"


def _vocabulary(config: Mapping[str, Any]) -> int:
    """Tokens that config.json names, at its top or in the text part of a larger model."""
    text = config.get("text_config") or {}
    return config.get("vocab_size") or text.get("vocab_size") or 0


def _template(name: str) -> tuple[str, int | None]:
    """A name with its block number taken out, and the number."""
    found = BLOCK_NUMBER.search(name)
    if found is None:
        return name, None
    return f"{name[: found.start()]}{{layer}}{name[found.end() :]}", int(found[0])


def _numbers(places: list[Place], config: Mapping[str, Any]) -> dict[str, Any]:
    """The layout's numbers: those of heads and neurons are 0, which no model has."""
    layers = [layer for place in places for layer in place.layers or ()]
    embeddings = sum(place.kind == "embedding" for place in places)
    unknown = ("n_heads", "n_kv_heads", "d_head", "d_model", "d_mlp")
    return {
        **dict.fromkeys(unknown, 0),
        "n_layers": max(layers, default=-1) + 1,
        "d_vocab": _vocabulary(config),
        "gated": False,
        "tied": bool(config.get("tie_word_embeddings")) and embeddings == 1,
        "activation": "",
        "norm_eps": 0.0,
        "rotary": False,
    }
