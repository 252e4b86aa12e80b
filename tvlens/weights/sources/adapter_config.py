"""What adapter_config.json says: the kind of adapter, ranks, scales, targets and token numbers.

Names are matched as peft 0.21 matches them on loading, since that decides which numbers act:
patterns of rank and alpha are regular expressions against the end of a module's name, and the
first that fits counts; entries of ``target_modules`` are whole names or endings, a string is a
regular expression for the whole name.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tvlens.errors import AdapterError, UnsupportedFormatError

Config = Mapping[str, Any]

REBASING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that also change the base weights: the factors alone are not the delta."""
MORE_THAN_FACTORS = (
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "alora_invocation_tokens",
    "target_parameters",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
"""Entries under which the change is not that of LoRA or DoRA on whole modules."""
WITHOUT_WEIGHTS = (
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
)
"""Types that add virtual tokens or cached keys and change no weight."""
WITHOUT_MERGE = ("POLY", "XLORA")
"""Types that choose among several changes for each input."""
READ = (
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
)
WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
LARGEST_NUMBER = 1e9
MERGE = "Merge it with peft's merge_and_unload() and compare the merged model."
COPY = "Copy the adapter_config.json that belongs to these weights."


def refuse_other_forms(name: str, config: Config) -> None:
    """Refuse an adapter that is neither LoRA nor DoRA.

    Raises:
        UnsupportedFormatError: It is of another type, or of a variant with another formula.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedFormatError(
            f"adapter {name} is an adapter of type {kind!r} which tvlens does not read.",
            hint=_way_out(kind),
        )
    for entry in MORE_THAN_FACTORS:
        if config.get(entry):
            raise UnsupportedFormatError(
                f"adapter {name} is an adapter with {entry} which tvlens does not read.", hint=MERGE
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(REBASING):
        raise UnsupportedFormatError(
            f"adapter {name} was initialised by {start!r}, which also changes the base weights.",
            hint=f"{MERGE} Or save it with path_initial_model_for_weight_conversion.",
        )


def unknown_entries(name: str, config: Config) -> tuple[str, ...]:
    """A sentence on entries that no version of peft known here writes, none if there are none."""
    known = {*READ, *WITHOUT_EFFECT, *MORE_THAN_FACTORS}
    found = sorted(entry for entry, value in config.items() if value and entry not in known)
    if not found:
        return ()
    return (
        f"adapter {name} has entries that tvlens does not know ({', '.join(found)}); they are "
        "taken to leave the weights as its factors say.",
    )


def rank_of(name: str, config: Config, module: str) -> int:
    """The rank of a module's factors.

    Raises:
        AdapterError: The config has none, or one that is no whole number from 1.
    """
    rank = _of_module(name, config, module, "rank_pattern", "r")
    if rank != int(rank) or rank < 1:
        raise AdapterError(f"adapter {name} says rank {rank} for {module}.", hint=COPY)
    return int(rank)


def scaling_of(name: str, config: Config, module: str, rank: int) -> float:
    """What the product of a module's factors is multiplied by: alpha / r, rsLoRA alpha / sqrt(r).

    Raises:
        AdapterError: The config has no alpha, or one that is no number.
    """
    alpha = _of_module(name, config, module, "alpha_pattern", "lora_alpha")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def refuse_untargeted(name: str, config: Config, modules: Iterable[str]) -> None:
    """Refuse factors of modules that the config does not target: peft would leave them out.

    Raises:
        AdapterError: There are such factors.
    """
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear" or config.get("ensure_weight_tying"):
        return
    for module in modules:
        if not _named(name, targets, module) or not _layer_is_named(name, config, module):
            raise AdapterError(
                f"adapter {name} holds factors for {module}, which its target_modules and "
                "layers_to_transform leave out, so peft would not load them.",
                hint=COPY,
            )
        if _named(name, config.get("exclude_modules") or (), module):
            raise AdapterError(
                f"adapter {name} holds factors for {module}, which its exclude_modules names, so "
                "peft would not load them.",
                hint=COPY,
            )


def token_numbers(name: str, config: Config, module: str) -> tuple[int, ...]:
    """The embedding rows that an adapter stores for a module.

    Raises:
        AdapterError: The config does not say which, or not as distinct whole numbers.
    """
    found = config.get("trainable_token_indices")
    if isinstance(found, dict):
        found = next((n for key, n in found.items() if _ends_with(module, key)), None)
    if (
        not isinstance(found, list)
        or not all(type(number) is int and number >= 0 for number in found)
        or len(set(found)) < len(found)
    ):
        raise AdapterError(
            f"adapter {name} stores rows of {module}, but trainable_token_indices does not say "
            "which, as distinct whole numbers.",
            hint=COPY,
        )
    return tuple(found)


def _way_out(kind: Any) -> str:
    if kind in WITHOUT_WEIGHTS:
        return "It adds virtual tokens and changes no weight, so there is no tuning vector."
    if kind in WITHOUT_MERGE:
        return "It chooses among several changes for each input, so no single one can be compared."
    return MERGE


def _of_module(name: str, config: Config, module: str, pattern: str, default: str) -> int | float:
    """The value for a module: peft matches the keys of a pattern against the end of its name."""
    patterns = config.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"adapter {name} has no object under {pattern!r}.", hint=COPY)
    key = next((k for k in patterns if _matches(name, rf"(.*\.)?({k})$", module)), None)
    if key is None and default not in config:
        raise AdapterError(f"adapter_config.json has no {default!r}.", hint="Copy it again.")
    value = config[default] if key is None else patterns[key]
    if type(value) not in (int, float) or not abs(value) <= LARGEST_NUMBER:
        raise AdapterError(
            f"adapter {name} gives {str(value)[:40]!r} for {default} of {module}, expected a "
            "number.",
            hint=COPY,
        )
    return value


def _named(name: str, names: Any, module: str) -> bool:
    if isinstance(names, str):
        return _matches(name, f"(?:{names})\\Z", module)
    if not isinstance(names, list | tuple):
        raise AdapterError(f"adapter {name} has no list of target modules.", hint=COPY)
    return any(_ends_with(module, key) for key in names)


def _layer_is_named(name: str, config: Config, module: str) -> bool:
    targets, layers = config["target_modules"], config.get("layers_to_transform")
    if layers is None or layers == [] or isinstance(targets, str) or module in targets:
        return True
    layers = [layers] if type(layers) is int else layers
    patterns = config.get("layers_pattern") or r"[^.]*"
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(layers, list) or not isinstance(patterns, list):
        raise AdapterError(f"adapter {name} has no list under layers_to_transform.", hint=COPY)
    for pattern in patterns:
        before = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
        if found := _match(name, rf"{before}{pattern}\.(?P<idx>\d+)\.", module):
            return int(found["idx"]) in layers
    return False


def _matches(name: str, pattern: str, module: str) -> bool:
    return _match(name, pattern, module) is not None


def _match(name: str, pattern: str, module: str) -> re.Match[str] | None:
    try:
        return re.match(pattern, module)
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(
            f"adapter {name} has a pattern of modules that is no regular expression: {error}.",
            hint=COPY,
        ) from error


def _ends_with(module: str, key: Any) -> bool:
    return module == key or module.endswith(f".{key}")
