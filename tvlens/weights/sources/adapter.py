"""LoRA adapters, kept in their factors.

peft adds ``scaling * B @ A`` to a [d_out, d_in] weight. In the canonical orientation that is
``left @ right`` with ``left = A.T`` and ``right = scaling * B.T``, whichever way round the base
stores the weight, so ``fan_in_fan_out`` changes nothing here.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from einops import rearrange

from tvlens.errors import AdapterError, UnsupportedFormatError
from tvlens.weights.delta import LowRank

from .folder import Source

FACTOR = re.compile(r"^(?P<module>.+)\.lora_(embedding_)?(?P<side>[AB])(\.default)?(\.weight)?$")
PREFIX = "base_model.model."
REBASING = ("pissa", "olora", "corda", "loftq")
"""Initialisations that also change the base weights: the factors alone are not the delta."""
MORE_THAN_FACTORS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
)
"""Entries of adapter_config.json under which the change is not ``scaling * B @ A`` everywhere."""
SAVED_WHOLE = re.compile(r"\.(modules_to_save(\.default)?|base_layer)\.")
"""Marks a weight that the adapter stores beside or instead of factors."""


class Factors(NamedTuple):
    """The two factors of one adapted weight.

    Attributes:
        first: Stored name of A.
        second: Stored name of B.
        rank: Their inner dimension.
        scaling: What their product is multiplied by.
    """

    first: str
    second: str
    rank: int
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """What an adapter folder changes.

    Attributes:
        factors: Low-rank changes, by the checkpoint name of the weight.
        replaced: Weights and biases that it stores whole, by checkpoint name.
        base_model: The base it says it was trained on, empty where it does not say.
    """

    factors: dict[str, Factors]
    replaced: dict[str, str]
    base_model: str


def adapter_of(source: Source) -> Adapter:
    """The changes that an adapter source holds.

    Raises:
        AdapterError: Factors are missing or have another rank than the config says.
        UnsupportedFormatError: An adapter that is more than low-rank factors.
    """
    _refuse_other_forms(source)
    sides: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    for stored in source.tensors:
        name = stored.removeprefix(PREFIX)
        if match := FACTOR.match(name):
            sides.setdefault(match["module"], {})[match["side"]] = stored
        else:
            replaced[SAVED_WHOLE.sub(".", name)] = stored
    return Adapter(
        {f"{module}.weight": _factors(source, module, pair) for module, pair in sides.items()},
        replaced,
        str(source.config.get("base_model_name_or_path") or ""),
    )


def low_rank(source: Source, factors: Factors) -> LowRank:
    """The change in float32, canonical orientation, before any fused weight is cut."""
    left = rearrange(source.read(factors.first).float(), "rank d_in -> d_in rank")
    right = rearrange(source.read(factors.second).float(), "d_out rank -> rank d_out")
    return LowRank(left, right * factors.scaling)


def _factors(source: Source, module: str, sides: Mapping[str, str]) -> Factors:
    if missing := {"A", "B"} - sides.keys():
        raise AdapterError(
            f"adapter {source.name} has no lora_{missing.pop()} for {module}.",
            hint="Copy the adapter again.",
        )
    first, second = source.tensors[sides["A"]].shape, source.tensors[sides["B"]].shape
    rank = int(_of_module(source.config, module, "rank_pattern", "r"))
    if len(first) != 2 or len(second) != 2 or not first[0] == second[1] == rank:
        raise AdapterError(
            f"adapter {source.name} says rank {rank} for {module}, but its factors are "
            f"{first} and {second}.",
            hint="adapter_config.json belongs to another adapter.",
        )
    alpha = float(_of_module(source.config, module, "alpha_pattern", "lora_alpha"))
    divisor = math.sqrt(rank) if source.config.get("use_rslora") else rank
    return Factors(sides["A"], sides["B"], rank, alpha / divisor)


def _of_module(config: Mapping[str, Any], module: str, pattern: str, default: str) -> int | float:
    """The value for a module: peft matches the keys of a pattern against the end of its name."""
    for key, value in (config.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    if default not in config:
        raise AdapterError(f"adapter_config.json has no {default!r}.", hint="Copy it again.")
    return config[default]


def _refuse_other_forms(source: Source) -> None:
    config = source.config
    start = config.get("init_lora_weights")
    reasons = {f"with {flag}": bool(config.get(flag)) for flag in MORE_THAN_FACTORS}
    reasons[f"of type {config.get('peft_type')!r}"] = config.get("peft_type") != "LORA"
    rebased = isinstance(start, str) and start.lower().startswith(REBASING)
    reasons[f"initialised by {start!r}, which also changes the base weights,"] = rebased
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedFormatError(
                f"adapter {source.name} is an adapter {reason} which tvlens does not read.",
                hint="Merge it with peft's merge_and_unload() and compare the merged model.",
            )
