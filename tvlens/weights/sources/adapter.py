"""LoRA and DoRA adapters, kept in their factors.

peft adds ``scaling * B @ A`` to a [d_out, d_in] weight. In the canonical orientation that is
``left @ right`` with ``left = A.T`` and ``right = scaling * B.T``, whichever way round the base
stores the weight, so ``fan_in_fan_out`` changes nothing here; an embedding's factors
[rank, d_vocab] and [d_model, rank] read the same way.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tvlens.errors import AdapterError, UnsupportedFormatError
from tvlens.weights.delta import LowRank

from .adapter_config import (
    COPY,
    rank_of,
    refuse_other_forms,
    refuse_untargeted,
    scaling_of,
    token_numbers,
    unknown_entries,
)
from .folder import DTYPES, Source

PREFIX = "base_model.model."
END = r"(\.default)?"
FACTOR = re.compile(
    rf"^(?P<module>.+)\.(lora_(embedding_)?(?P<side>[AB])|lora_(?P<magnitude>magnitude_vector))"
    rf"{END}(\.weight)?$"
)
BIAS = re.compile(rf"^(?P<module>.+)\.lora_B{END}\.bias$")
TOKENS = re.compile(rf"^(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta{END}$")
OTHER = re.compile(r"\.(lora_\w+|trainable_tokens_\w+|original_module)\b")
SAVED_WHOLE = re.compile(r"\.(modules_to_save(\.default)?|base_layer)\.")
"""Marks a weight that the adapter stores beside or instead of factors."""
MAGNITUDE = "magnitude_vector"
Change = TypeVar("Change")


class Factors(NamedTuple):
    """The two factors of one adapted weight.

    Attributes:
        first: Stored name of A.
        second: Stored name of B.
        rank: Their inner dimension.
        scaling: What their product is multiplied by.
        magnitude: Stored name of DoRA's length of each output column, None for LoRA.
    """

    first: str
    second: str
    rank: int
    scaling: float
    magnitude: str | None = None


class Shift(NamedTuple):
    """What ``lora_bias`` adds to a bias.

    Attributes:
        stored: Stored name of the bias of B.
        scaling: What it is multiplied by.
    """

    stored: str
    scaling: float


class Rows(NamedTuple):
    """Embedding rows that are stored whole.

    Attributes:
        stored: Their stored name.
        numbers: Which rows they replace.
    """

    stored: str
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Adapter:
    """What an adapter folder changes, by the checkpoint name of the weight or bias.

    Attributes:
        factors: Low-rank changes.
        replaced: What it stores whole.
        shifts: What it adds to biases.
        rows: Rows of embeddings that it stores whole.
        base_model: The base it says it was trained on, empty where it does not say.
        notes: Sentences for the report.
    """

    factors: dict[str, Factors] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    shifts: dict[str, Shift] = field(default_factory=dict)
    rows: dict[str, Rows] = field(default_factory=dict)
    base_model: str = ""
    notes: tuple[str, ...] = ()

    @property
    def changed(self) -> set[str]:
        """Names of everything it changes."""
        return {*self.factors, *self.replaced, *self.shifts, *self.rows}

    def renamed(self, name: Callable[[str], str]) -> "Adapter":
        """The same changes under other names."""
        return Adapter(
            {name(n): found for n, found in self.factors.items()},
            {name(n): found for n, found in self.replaced.items()},
            {name(n): found for n, found in self.shifts.items()},
            {name(n): found for n, found in self.rows.items()},
            self.base_model,
            self.notes,
        )


def adapter_of(source: Source) -> Adapter:
    """The changes that an adapter source holds.

    Raises:
        AdapterError: Factors are missing, have another rank than the config says, or the config
            leaves them out.
        UnsupportedFormatError: An adapter that is more than LoRA or DoRA.
    """
    refuse_other_forms(source.name, source.config)
    _refuse_other_numbers(source)
    sides: dict[str, dict[str, str]] = {}
    found = Adapter(
        base_model=str(source.config.get("base_model_name_or_path") or ""),
        notes=unknown_entries(source.name, source.config),
    )
    for stored in source.tensors:
        name = stored.removeprefix(PREFIX)
        if match := FACTOR.match(name):
            side = sides.setdefault(match["module"], {})
            _enter(source, side, match["side"] or MAGNITUDE, stored)
        elif match := BIAS.match(name):
            _enter(source, found.shifts, f"{match['module']}.bias", _shift(source, match, stored))
        elif match := TOKENS.match(name):
            rows = _rows(source, match["module"], stored)
            _enter(source, found.rows, f"{match['module']}.weight", rows)
        elif OTHER.search(name):
            raise UnsupportedFormatError(
                f"adapter {source.name} stores {stored}, which no LoRA or DoRA adapter has.",
                hint="Merge it with peft's merge_and_unload() and compare the merged model.",
            )
        else:
            _enter(source, found.replaced, SAVED_WHOLE.sub(".", name), stored)
    refuse_untargeted(source.name, source.config, sides)
    for module, pair in sides.items():
        found.factors[f"{module}.weight"] = _factors(source, module, pair)
    return found


def low_rank(source: Source, factors: Factors) -> LowRank:
    """The change in float32, canonical orientation, before any fused weight is cut."""
    left = rearrange(source.read(factors.first).float(), "rank d_in -> d_in rank")
    right = rearrange(source.read(factors.second).float(), "d_out rank -> rank d_out")
    return LowRank(left, right * factors.scaling)


def shift(source: Source, change: Shift) -> Float[Tensor, " d_out"]:
    """What is added to a bias, in float32, before any fused bias is cut."""
    return source.read(change.stored).float() * change.scaling


def _enter(source: Source, found: dict[str, Change], name: str, change: Change) -> None:
    if name in found:
        raise AdapterError(
            f"adapter {source.name} stores its change of {name} twice.", hint="Save it again."
        )
    found[name] = change


def _refuse_other_numbers(source: Source) -> None:
    for name, info in source.tensors.items():
        if info.dtype not in DTYPES.values():
            raise UnsupportedFormatError(
                f"adapter {source.name} stores {name} as {info.dtype}, expected one of "
                f"{', '.join(DTYPES.values())}.",
                hint="Save the adapter in float32, float16 or bfloat16.",
            )


def _factors(source: Source, module: str, sides: Mapping[str, str]) -> Factors:
    if missing := {"A", "B"} - sides.keys():
        raise AdapterError(
            f"adapter {source.name} has no lora_{min(missing)} for {module}.",
            hint="Copy the adapter again.",
        )
    first, second = source.tensors[sides["A"]].shape, source.tensors[sides["B"]].shape
    rank = rank_of(source.name, source.config, module)
    if len(first) != 2 or len(second) != 2 or not first[0] == second[1] == rank:
        raise AdapterError(
            f"adapter {source.name} says rank {rank} for {module}, but its factors are "
            f"{first} and {second}.",
            hint="adapter_config.json belongs to another adapter.",
        )
    scaling = scaling_of(source.name, source.config, module, rank)
    magnitude = _magnitude(source, module, sides.get(MAGNITUDE), second[0])
    return Factors(sides["A"], sides["B"], rank, scaling, magnitude)


def _magnitude(source: Source, module: str, stored: str | None, d_out: int) -> str | None:
    if bool(source.config.get("use_dora")) != (stored is not None):
        which = "has no" if stored is None else "has a"
        raise AdapterError(
            f"adapter {source.name} {which} lora_{MAGNITUDE} for {module}, but use_dora is "
            f"{bool(source.config.get('use_dora'))} in adapter_config.json.",
            hint=COPY,
        )
    if stored is not None and source.tensors[stored].shape != (d_out,):
        raise AdapterError(
            f"adapter {source.name} has lengths of shape {source.tensors[stored].shape} for "
            f"{module}, expected {(d_out,)}.",
            hint="Copy the adapter again.",
        )
    return stored


def _shift(source: Source, match: re.Match[str], stored: str) -> Shift:
    if not source.config.get("lora_bias"):
        raise AdapterError(
            f"adapter {source.name} stores {stored}, but lora_bias is not set in "
            "adapter_config.json.",
            hint=COPY,
        )
    rank = rank_of(source.name, source.config, match["module"])
    return Shift(stored, scaling_of(source.name, source.config, match["module"], rank))


def _rows(source: Source, module: str, stored: str) -> Rows:
    numbers = token_numbers(source.name, source.config, module)
    shape = source.tensors[stored].shape
    if len(shape) != 2 or shape[0] != len(numbers):
        raise AdapterError(
            f"adapter {source.name} stores {shape} for {len(numbers)} rows of {module}.", hint=COPY
        )
    return Rows(stored, numbers)
