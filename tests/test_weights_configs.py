"""A config entry that changes what equal weights compute is an error or a loud warning."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from tests.tiny_checkpoints import FAMILIES

OTHER_VALUES: dict[str, Any] = {
    "sliding_window": 3,
    "attn_logit_softcapping": 0.7,
    "final_logit_softcapping": 0.9,
    "head_dim": 6,
    "use_bidirectional_attention": True,
    "n_inner": 24,
}
"""For entries whose default is null, or where doubling would not show."""
NOT_THE_MODELS = {
    "architectures",
    "model_type",
    "transformers_version",
    "dtype",
}
"""Entries of every config, about files and outputs."""


def _ropes(rope: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "rope_theta" not in rope:  # one set for each type of layer
        for kind in rope:
            for other in _ropes(rope[kind]):
                yield {**rope, kind: other}
        return
    yield {**rope, "rope_theta": 3 * rope["rope_theta"]}
    yield {**rope, "rope_type": "linear", "factor": 4.0}
    yield {**rope, "partial_rotary_factor": 0.5 * rope.get("partial_rotary_factor", 1.0)}


def _others(name: str, value: Any) -> Iterator[Any]:
    """Other values of a config entry."""
    if name in OTHER_VALUES:
        yield OTHER_VALUES[name]
    elif name == "layer_types":
        yield value[::-1]
    elif name == "rope_parameters":
        yield from _ropes(value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield 2 * value if value else 1
    elif name in ("hidden_act", "hidden_activation", "activation_function"):
        yield "relu"


def _logits(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """What transformers computes with ``weights`` under ``config``, None if it refuses."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        entries = {k: v for k, v in config.items() if k != "model_type"}
        asked = AutoConfig.for_model(config["model_type"], **copy.deepcopy(entries))
        model = AutoModelForCausalLM.from_config(asked, attn_implementation="eager").eval()
        model.load_state_dict(weights)
        with torch.no_grad():
            return model(torch.arange(3, 15)[None]).logits
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, StrictDataclassError):
        return None


@pytest.mark.parametrize("family", FAMILIES)
def test_no_entry_that_changes_the_logits_is_silent(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tvlens.weights.configs import config_differences
    from tvlens.weights.layout import layout_of

    folder = FAMILIES[family](tmp_path / family)
    config = json.loads((folder / "config.json").read_text())
    weights = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    plain = _logits(config, weights)
    assert plain is not None
    telling = set()
    for name in config.keys() - NOT_THE_MODELS:
        for value in _others(name, config[name]):
            other = {**config, name: value}
            found = _logits(other, weights)
            if found is None or torch.allclose(found, plain, atol=1e-4):
                continue
            layouts = layout_of(config), layout_of(other)
            effects = {d.effect for d in config_differences(config, other, layouts)}
            assert effects & {"refused", "function"}, (name, value)
            telling.add(name)
    assert telling


GEMMA3 = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 2}
EQUAL = {
    "a window that is switched off": (
        "qwen2",
        {"use_sliding_window": False, "sliding_window": 32768},
        {"use_sliding_window": False, "sliding_window": 131072},
    ),
    "a default and the same value": (
        "gemma2",
        {},
        {"attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 256, "head_dim": 256},
    ),
    "the old and the new form of two ropes": (
        "gemma3_text",
        GEMMA3,
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "null and false": (
        "gemma2",
        {"use_bidirectional_attention": None},
        {"use_bidirectional_attention": False},
    ),
    "the old name of a rotary scaling": (
        "phi3",
        {"rope_scaling": {"type": "su", "long_factor": [1.0], "short_factor": [1.0]}},
        {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}},
    ),
}
LONGROPE = {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}
DIFFERENT = {
    "a cap taken off": ("gemma2", {}, {"final_logit_softcapping": None}, "final_logit_softcapping"),
    "another scale": ("gemma3_text", {}, {"query_pre_attn_scalar": 168}, "query_pre_attn_scalar"),
    "a window from Mistral's default": ("mistral", {}, {"sliding_window": None}, "sliding_window"),
    "a window in the upper blocks": (
        "qwen3",
        {},
        {"use_sliding_window": True, "max_window_layers": 1},
        "sliding_window",
    ),
    "another pattern": ("gemma3_text", {}, {"sliding_window_pattern": 2}, "sliding_window"),
    "the rope of sliding layers": (
        "gemma3_text",
        {},
        {"rope_local_base_freq": 5e4},
        "rope_theta of sliding layers",
    ),
    "the rope of sliding layers, new form": (
        "gemma3_text",
        GEMMA3,
        {
            "sliding_window_pattern": 2,
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e6},
                "sliding_attention": {"rope_theta": 2e4},
            },
        },
        "rope_theta of sliding layers",
    ),
    "the rope of the other layers, new form": (
        "gemma3_text",
        GEMMA3,
        {
            "sliding_window_pattern": 2,
            "rope_parameters": {
                "full_attention": {"rope_theta": 2e6},
                "sliding_attention": {"rope_theta": 1e4},
            },
        },
        "rope_theta",
    ),
    "the length that Phi-3 was trained at": (
        "phi3",
        {"rope_scaling": LONGROPE},
        {"rope_scaling": LONGROPE, "original_max_position_embeddings": 2048},
        "rope_scaling",
    ),
    "the longest sequence of a scaled rope": (
        "phi3",
        {"rope_scaling": LONGROPE},
        {"rope_scaling": LONGROPE, "max_position_embeddings": 131072},
        "rope_scaling",
    ),
    "a share of the head rotated": ("phi3", {}, {"partial_rotary_factor": 0.75}, "rotary_share"),
}
SIZES = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "vocab_size": 64,
}


def _differing(model_type: str, *sides: dict[str, Any]) -> list[tuple[str, str]]:
    from tvlens.weights.configs import config_differences
    from tvlens.weights.layout import layout_of

    base, tuned = ({"model_type": model_type, **SIZES, **entries} for entries in sides)
    found = config_differences(base, tuned, (layout_of(base), layout_of(tuned)))
    return [(difference.field, difference.effect) for difference in found]


@pytest.mark.parametrize("case", EQUAL)
def test_two_ways_to_say_the_same_are_no_difference(case: str) -> None:
    model_type, base, tuned = EQUAL[case]
    assert [d for d in _differing(model_type, base, tuned) if d[1] != "note"] == []


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_a_familys_own_entries_change_is_named(case: str) -> None:
    model_type, base, tuned, field = DIFFERENT[case]
    for sides in ((base, tuned), (tuned, base)):
        found = [d for d in _differing(model_type, *sides) if d[1] != "note"]
        assert found == [(field, "function")]


READ_OTHERWISE = (
    "rope_theta",
    "rope_local_base_freq",
    "rotary_emb_base",
    "rotary_pct",
    "hidden_act",
    "attention_bias",
    "sliding_window_pattern",
)
"""Defaults that transformers keeps under another name, or that not every class has."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tables_defaults_are_those_of_transformers(family: str) -> None:
    from transformers import AutoConfig

    from tvlens.weights.layout import FAMILIES as TABLES

    table = next(table for table in TABLES if table.name == family)
    config = AutoConfig.for_model(table.model_types[0])
    for name, value in table.defaults.items():
        if name in READ_OTHERWISE and not hasattr(config, name):
            continue
        if name == "sliding_window" and not table.defaults.get("use_sliding_window", True):
            continue  # transformers blanks a window that is switched off
        assert getattr(config, name) == value, name
