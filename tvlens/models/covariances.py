"""Second moments of what every linear map of a model reads, streamed over prompts.

Of the inputs x_t (rows, as in ``x @ W``) of the n tokens that are no padding:

    raw       sum_t x_t' x_t / n
    centred   raw - mean' mean,          mean = sum_t x_t / n
    of        (1 - g) raw + g tr(raw) / d,   what a null model is given

The raw moment is what a null needs: the gradient of ``x @ W`` is sum_t x_t' g_t, so a change's
reads lie where x itself lies, its mean included. ``g`` is Ledoit and Wolf's shrinkage [1] about
zero, (mean |x|^4 - |raw|^2) / n over |raw - tr(raw) / d|^2, at most 1: with few tokens the small
eigenvalues of a moment are too small. It takes tokens for independent, so it errs to little.

Four inputs a block (``INPUTS``): the residual stream as attention reads it (after its norm, where
there is one) and as the MLP does, the heads' outputs z, and the neurons' activations.

Memory: 8 (2 d_model^2 + (n_heads d_head)^2 + d_mlp^2) bytes a block while it runs and in the
value (``bytes_needed``), 27 MB for a block of SmolLM2-135M; beside it one batch of activations.

[1] Ledoit and Wolf 2004, doi:10.1016/S0047-259X(03)00096-4.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tvlens.components import Component
from tvlens.errors import CheckpointError, PromptError, UnsupportedFormatError

from .lens import LensModel
from .pair import HookedPair
from .prompts import Batch

Input = Literal["attention", "z", "mlp", "post"]
INPUTS: tuple[Input, ...] = get_args(Input)
"""What is read in a block, in the order of the forward pass."""
SITES: dict[Input, str] = {"attention": "attn.q", "z": "attn.o", "mlp": "mlp.in", "post": "mlp.out"}
"""A map that reads each."""
READ_BY: dict[str, Input] = {
    **dict.fromkeys(("W_Q", "W_K", "W_V"), "attention"),
    "W_O": "z",
    **dict.fromkeys(("W_gate", "W_in"), "mlp"),
    "W_out": "post",
}
"""The input of each matrix."""
LEAST_SHRINKAGE = 1e-4
"""Eigenvalues below this share of their mean are rounding: activations are float32, and the file
keeps moments in float32."""
ROWS_AT_ONCE = 16
"""Prompts of one forward pass."""
FORMAT = 1
METADATA_KEY = "tvlens_covariances"
Key = tuple[int, Input]
"""A block and an input of it."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of one input over tokens.

    Attributes:
        raw: Mean of x' x.
        mean: Mean of x.
        fourth: Mean of |x|^4.
    """

    raw: Float[Tensor, "d d"]
    mean: Float[Tensor, " d"]
    fourth: float


@dataclass(frozen=True, eq=False)
class Covariances:
    """What the linear maps of a model read, over the tokens of some prompts.

    Attributes:
        moments: By block and input; what was not asked for is not there.
        tokens: Tokens that were read.
        model: What ran.
    """

    moments: Mapping[Key, Moments] = field(repr=False)
    tokens: int
    model: str = ""

    def moments_of(self, component: Component) -> Moments | None:
        """The moments of what a matrix reads; None where they are unknown."""
        read = READ_BY.get(component.part or "")
        if component.kind != "matrix" or component.layer is None or read is None:
            return None
        return self.moments.get((component.layer, read))

    def of(self, component: Component) -> Float[Tensor, "d_in d_in"] | None:
        """The raw second moment of what a matrix reads, shrunk; None where it is unknown."""
        found = self.moments_of(component)
        if found is None:
            return None
        share, size = shrinkage(found, self.tokens), len(found.raw)
        level = share * found.raw.trace() / size
        return (1 - share) * found.raw + level * torch.eye(size, dtype=found.raw.dtype)

    def centred(self, component: Component) -> Float[Tensor, "d_in d_in"] | None:
        """The covariance about the mean, not shrunk; None where it is unknown."""
        found = self.moments_of(component)
        return None if found is None else found.raw - torch.outer(found.mean, found.mean)

    def shrinkages(self) -> dict[Input, float]:
        """The largest shrinkage of each input over the blocks."""
        found: dict[Input, float] = {}
        for (_, name), moments in self.moments.items():
            found[name] = max(found.get(name, 0.0), shrinkage(moments, self.tokens))
        return found

    def save(self, path: Path | str) -> Path:
        """Write one safetensors file, moments in float32; the same value gives the same bytes.

        Raises:
            CheckpointError: The file cannot be written.
        """
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for (layer, name), moments in self.moments.items():
            tensors[f"L{layer}.{name}.raw"] = moments.raw.float().contiguous()
            tensors[f"L{layer}.{name}.mean"] = moments.mean.float().contiguous()
        about = {
            "format": FORMAT,
            "model": self.model,
            "tokens": self.tokens,
            "inputs": [
                {"layer": layer, "input": name, "fourth": moments.fourth}
                for (layer, name), moments in self.moments.items()
            ],
        }
        try:
            save_file(tensors, Path(path), metadata={METADATA_KEY: json.dumps(about)})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot write the covariances {path}: {error}") from error
        return Path(path)

    @classmethod
    def load(cls, path: Path | str) -> "Covariances":
        """Read what ``save`` wrote.

        Raises:
            CheckpointError: The file is missing, damaged or of another kind.
            UnsupportedFormatError: It is of a later format.
        """
        try:
            with safe_open(Path(path), framework="pt") as opened:
                about = json.loads((opened.metadata() or {})[METADATA_KEY])
                _require_format(about, path)
                moments = {
                    (int(entry["layer"]), entry["input"]): _loaded(opened, entry)
                    for entry in about["inputs"]
                }
                return cls(moments, int(about["tokens"]), str(about["model"]))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path} holds no covariances that can be read: {error}.",
                hint="tvlens.covariances(model, batch).save(FILE) writes such a file.",
            ) from error


def _require_format(about: Mapping[str, Any], path: Path | str) -> None:
    if about["format"] != FORMAT:
        raise UnsupportedFormatError(
            f"{path} is of format {about['format']!r}; this tvlens reads format {FORMAT}."
        )


def _loaded(opened: Any, entry: Mapping[str, Any]) -> Moments:
    if entry["input"] not in INPUTS:
        raise ValueError(f"there is no input {entry['input']!r}")
    name = f"L{entry['layer']}.{entry['input']}"
    raw, mean = (opened.get_tensor(f"{name}.{which}").double() for which in ("raw", "mean"))
    return Moments(raw, mean, float(entry["fourth"]))


def shrinkage(moments: Moments, tokens: int) -> float:
    """Ledoit and Wolf's share of the identity, about zero; at least ``LEAST_SHRINKAGE``."""
    square, size = float(moments.raw.square().sum()), len(moments.raw)
    spread = square - float(moments.raw.trace()) ** 2 / size
    if spread <= 0:  # a multiple of the identity already
        return 1.0
    error = (moments.fourth - square) / max(1, tokens)
    return min(1.0, max(LEAST_SHRINKAGE, error / spread))


def bytes_needed(
    widths: Mapping[Input, int], inputs: Sequence[Input] = INPUTS, *, layers: int
) -> int:
    """Memory of the moments of some inputs.

    Args:
        widths: Dimensions of each input.
        inputs: Those that are kept.
        layers: Blocks.
    """
    return sum(8 * layers * (widths[name] ** 2 + widths[name]) for name in inputs)


class _Place(NamedTuple):
    """Where an activation is read."""

    key: Key
    hook: str


class _Sums:
    """Sums of one input over the tokens so far."""

    def __init__(self) -> None:
        self.raw = self.mean = torch.zeros(())
        self.fourth = 0.0

    def add(self, tokens: Float[Tensor, "token d"]) -> None:
        """Take some tokens' inputs in."""
        raw, mean = einsum(tokens, tokens, "token d, token other -> d other"), tokens.sum(0)
        self.raw = self.raw.add_(raw) if self.raw.ndim else raw
        self.mean = self.mean.add_(mean) if self.mean.ndim else mean
        self.fourth += float(tokens.square().sum(1).square().sum())

    def moments(self, count: int) -> Moments:
        """Means over ``count`` tokens."""
        raw, mean = (each.cpu().double() / count for each in (self.raw, self.mean))
        return Moments((raw + raw.mT) / 2, mean, self.fourth / count)


def covariances(
    model: Any,
    batch: Batch,
    *,
    inputs: Sequence[str] = INPUTS,
    rows: int = ROWS_AT_ONCE,
) -> Covariances:
    """Second moments of what every linear map of ``model`` reads on some prompts.

    Give it the base of a pair, and texts like those that the fine-tune was made on: they say what
    a gradient could have read there.

    Args:
        model: A ``HookedPair`` (its base is run), ``LensModel``, TransformerBridge or
            HookedTransformer; it is left as it was found.
        batch: Tokenised prompts; padding does not count.
        inputs: Which of ``INPUTS`` of every block.
        rows: Prompts of one forward pass.

    Raises:
        HostError: The model is in training mode, or its weights were folded: what a folded matrix
            reads is not what the checkpoint's does.
        PromptError: There is no token, or one that the model has no row for.
        ValueError: There is no such input.
    """
    if unknown := [name for name in inputs if name not in INPUTS]:
        raise ValueError(f"there is no input {unknown[0]!r}; there are {', '.join(INPUTS)}.")
    count = int(batch.mask.sum())
    if not count:
        raise PromptError("covariances need at least one token.")
    lens = _lens_of(model)
    lens.require_eval()
    lens.host.require_raw()
    places = [
        _Place((layer, name), f"blocks.{layer}.{SITES[name]}.hook_in")
        for layer in range(lens.n_layers)
        for name in INPUTS
        if name in inputs
    ]
    sums = {place.key: _Sums() for place in places}
    for part in batch.chunks(rows):
        hooks = [(place.hook, partial(_read, sums[place.key], part.mask)) for place in places]
        nowhere = torch.zeros(len(part), 1, dtype=torch.long)
        with torch.no_grad(), lens.hooks(fwd=hooks):
            lens.logits_at(part.ids, part.mask, nowhere)
    found = {key: each.moments(count) for key, each in sums.items()}
    return Covariances(found, count, str(getattr(lens.model.cfg, "model_name", "") or ""))


def _lens_of(model: Any) -> LensModel:
    if isinstance(model, HookedPair):
        return model.base
    return model if isinstance(model, LensModel) else LensModel.wrap(model)


def _read(sums: _Sums, mask: Int[Tensor, "batch pos"], activation: Tensor, hook: Any) -> None:
    """A forward hook that adds the real tokens' inputs; heads and their entries are one axis."""
    tokens = activation.detach()[mask.bool().to(activation.device)]
    flat = rearrange(tokens, "token ... -> token (...)")
    sums.add(flat.float() if flat.device.type == "mps" else flat.double())
