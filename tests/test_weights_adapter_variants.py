"""Every variant of LoRA that is read, against peft's own merge in float64."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_checkpoints import tiny_adapter, tiny_gpt2, tiny_llama, tiny_neox, tiny_qwen2
from tvlens.components import Component
from tvlens.errors import AdapterError, UnsupportedFormatError

pytestmark = pytest.mark.slow

TOLERANCE = 1e-6
"""Differences of order 0.1 to 1 are returned in float32."""
MAKERS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "neox": tiny_neox, "qwen2": tiny_qwen2}
TIED = {"tie_word_embeddings": True}
ALL_GPT2 = ["c_attn", "c_proj", "c_fc"]
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain, llama": ("llama", {}, {}),
    "plain, gpt2": ("gpt2", {}, {"target_modules": ALL_GPT2}),
    "plain, neox": ("neox", {}, {}),
    "plain, qwen2": ("qwen2", {}, {}),
    "rslora": ("llama", {}, {"rslora": True}),
    "rslora and patterns": (
        "llama",
        {},
        {
            "rslora": True,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "v_proj": 3},
            "alpha_pattern": {"^model.layers.0.*": 9, "down_proj": 5},
        },
    ),
    "the first pattern counts": (
        "llama",
        {},
        {"rank_pattern": {r".*\.\d\.self_attn.[qv]_proj": 2, "q_proj": 3}},
    ),
    "a pattern is no substring": ("llama", {}, {"alpha_pattern": {"proj": 99, "q_pro": 98}}),
    "some layers": ("llama", {}, {"layers_to_transform": [1], "exclude_modules": ["v_proj"]}),
    "one layer, pattern": ("gpt2", {}, {"layers_to_transform": 0, "layers_pattern": "h"}),
    "targets by expression": ("neox", {}, {"target_modules": r".*\.1\.attention\.(dense|que.*)"}),
    "all-linear": ("llama", {}, {"target_modules": "all-linear"}),
    "fan_in_fan_out is not believed": ("gpt2", {}, {"fan_in_fan_out": False}),
    "modules_to_save": ("llama", {}, {"modules_to_save": ["lm_head", "norm", "embed_tokens"]}),
    "modules_to_save, gpt2": ("gpt2", {}, {"modules_to_save": ["ln_f", "wpe"]}),
    "bias all, gpt2": ("gpt2", {}, {"bias": "all"}),
    "bias lora_only, gpt2": ("gpt2", {}, {"bias": "lora_only"}),
    "bias all, neox": ("neox", {}, {"bias": "all"}),
    "bias lora_only, qwen2": ("qwen2", {}, {"bias": "lora_only"}),
    "lora_bias, gpt2": ("gpt2", {}, {"lora_bias": True, "target_modules": ALL_GPT2}),
    "lora_bias, neox": ("neox", {}, {"lora_bias": True, "rslora": True}),
    "lora_bias and bias": (
        "qwen2",
        {},
        {"lora_bias": True, "bias": "all", "target_modules": ".*q_proj"},
    ),
    "embedding": ("llama", {}, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding and head": ("llama", {}, {"target_modules": ["embed_tokens", "lm_head"]}),
    "embedding, neox": ("neox", {}, {"target_modules": ["embed_in", "lm_head"]}),
    "positions": ("gpt2", {}, {"target_modules": ["wpe"]}),
    "token rows": ("llama", {}, {"trainable_token_indices": [3, 60, 5]}),
    "token rows of both": (
        "llama",
        {},
        {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [1]}},
    ),
    "token rows, tied": ("llama", TIED, {"trainable_token_indices": [3, 60, 5]}),
    "mica": ("llama", {}, {"init_lora_weights": "mica"}),
    "orthogonal": ("llama", {}, {"init_lora_weights": "orthogonal"}),
    "dora, llama": ("llama", {}, {"use_dora": True}),
    "dora, gpt2": ("gpt2", {}, {"use_dora": True, "target_modules": ALL_GPT2}),
    "dora, neox": ("neox", {}, {"use_dora": True}),
    "dora, rslora and patterns": (
        "llama",
        {},
        {"use_dora": True, "rslora": True, "rank_pattern": {"q_proj": 2}},
    ),
    "dora, embedding and head": (
        "llama",
        {},
        {"use_dora": True, "target_modules": ["embed_tokens", "lm_head"]},
    ),
    "dora, bias": ("gpt2", {}, {"use_dora": True, "bias": "all"}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def _base(bases: Path, family: str, config: dict[str, Any]) -> Path:
    folder = bases / f"{family} {config}"
    return folder if folder.is_dir() else MAKERS[family](folder, **config)


def _merged(base: Path, adapter: Path) -> dict[str, Tensor]:
    """Every parameter after peft's merge, in float64 where peft can set up the adapter in it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    start = json.loads((adapter / "adapter_config.json").read_text())["init_lora_weights"]
    dtype = torch.float32 if start == "mica" else torch.float64
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: value.detach() for name, value in merged.state_dict().items()}


def _configured(adapter: Path, **entries: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_what_peft_merges(variant: str, bases: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    family, config, options = VARIANTS[variant]
    base = _base(bases, family, config)
    adapter = tiny_adapter(base, tmp_path / "adapter", **options)
    pair = load_pair(base, adapter)
    merged = {pair.layout.canonical_name(n): t for n, t in _merged(base, adapter).items()}
    stored, changed = load_file(base / "model.safetensors"), set()
    for component, place in pair.layout.places.items():
        before = stored[pair._stored_name(pair.base_tensors, place)].double()
        expected = pair.layout.canonical(merged[place.tensor] - before, place)
        found = pair.read(component).dense_delta().double()
        assert (found - expected).abs().max() < TOLERANCE, component
        if bool(expected.count_nonzero()):
            changed.add(component.part)
        else:
            assert not found.count_nonzero(), component
    assert changed
    noted = {entry.tuned for entry in pair.load_report.tensors} - {None}
    assert noted == set(pair.tuned.tensors)
    assert pair.load_report.identical is False


def _dora(bases: Path, out: Path, **options: Any) -> tuple[Path, Path]:
    base = _base(bases, "llama", {})
    return base, tiny_adapter(base, out, use_dora=True, **options)


def _edited(adapter: Path, **kinds: Any) -> None:
    """Apply a function to every tensor whose name holds a keyword."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in tensors:
        for kind, edit in kinds.items():
            if kind in name:
                tensors[name] = edit(name, tensors[name])
    save_file(tensors, adapter / "adapter_model.safetensors")


def _norms(base: Path, factor: float) -> Any:
    """A function that gives ``factor`` times the norm of each of a weight's output rows."""
    stored = load_file(base / "model.safetensors")

    def norm(name: str, _: Tensor) -> Tensor:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
        return factor * torch.linalg.norm(stored[f"{module}.weight"], dim=1)

    return norm


W_Q = Component("matrix", 1, None, "W_Q")


def test_doras_parts_sum_to_the_whole_and_are_length_and_direction(
    bases: Path, tmp_path: Path
) -> None:
    from tvlens.weights.delta import Dora
    from tvlens.weights.matching import load_pair

    pair = load_pair(*_dora(bases, tmp_path / "adapter"))
    weight = pair.read(W_Q)
    delta, base = weight.delta, weight.base.double()
    assert isinstance(delta, Dora)
    assert delta.shape == tuple(base.shape)
    assert torch.equal(delta.magnitude + delta.direction, delta.dense())
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    first, second, length = (
        stored[prefix + end].double() for end in ("A.weight", "B.weight", "magnitude_vector")
    )
    for column in range(base.shape[1]):  # the paper's formula, a column at a time
        before = base[:, column]
        turned = before + 1.5 * (second[column] @ first)
        whole = length[column] * turned / turned.norm() - before
        longer = (length[column] / before.norm() - 1) * before
        assert torch.allclose(delta.dense()[:, column].double(), whole, atol=TOLERANCE)
        assert torch.allclose(delta.magnitude[:, column].double(), longer, atol=TOLERANCE)
    assert delta.norm() == pytest.approx(float(delta.dense().double().norm()))


def test_doras_longer_columns_are_all_magnitude(bases: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    base, adapter = _dora(bases, tmp_path / "adapter")
    _edited(adapter, lora_B=lambda _, t: t * 0, magnitude=_norms(base, 1.25))
    weight = load_pair(base, adapter).read(W_Q)
    assert torch.allclose(weight.delta.magnitude, 0.25 * weight.base, atol=TOLERANCE)
    assert weight.delta.direction.abs().max() < TOLERANCE


def test_doras_turned_columns_are_all_direction(bases: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    base, adapter = _dora(bases, tmp_path / "adapter")
    _edited(adapter, magnitude=_norms(base, 1.0))
    weight = load_pair(base, adapter).read(W_Q)
    assert not weight.delta.magnitude.count_nonzero()
    assert weight.delta.direction.norm() > 0.1
    tuned = weight.base + weight.dense_delta()
    assert torch.allclose(tuned.norm(dim=0), weight.base.norm(dim=0), atol=TOLERANCE)


def test_an_untrained_dora_is_identical_to_its_base(bases: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    base, adapter = _dora(bases, tmp_path / "adapter")
    _edited(adapter, lora_B=lambda _, t: t * 0, magnitude=_norms(base, 1.0))
    pair = load_pair(base, adapter)
    assert pair.load_report.identical is True
    assert all(not pair.read(c).dense_delta().count_nonzero() for c in pair.components)
    _edited(adapter, magnitude=_norms(base, 1.001))
    assert load_pair(base, adapter).load_report.identical is False


def test_doras_floor_is_what_rounding_its_lengths_costs(bases: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    base, adapter = _dora(bases, tmp_path / "adapter")
    _edited(adapter, magnitude=_norms(base, 1.1))
    exact = load_pair(base, adapter)
    before = {c: exact.read(c) for c in exact.components}
    _edited(adapter, magnitude=lambda _, t: t.bfloat16())
    rounded = load_pair(base, adapter)
    error, floor, without = 0.0, 0.0, 0.0
    for component, weight in before.items():
        after = rounded.read(component)
        if after.floor is not None and weight.floor is not None:
            error += float((after.dense_delta() - weight.dense_delta()).double().square().sum())
            floor += float(after.floor.double().sum())
            without += float(weight.floor.double().sum())
    assert 0.7 * floor < error < 1.4 * floor  # 160 columns, each a uniform draw
    assert 0 < without < 1e-8 * floor


def test_the_floor_of_token_rows_is_that_of_these_rows(bases: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair
    from tvlens.weights.precision import rounding_energy

    base = _base(bases, "llama", {})
    adapter = tiny_adapter(base, tmp_path / "adapter", trainable_token_indices=[3, 5])
    weight = load_pair(base, adapter).read(Component("embedding", None, None, "W_E"))
    expected = rounding_energy(weight.base + weight.dense_delta(), "float32")
    assert weight.floor is not None
    assert torch.allclose(weight.floor[[3, 5]], expected[[3, 5]])
    assert float(weight.floor[:3].max()) < 1e-30


def test_a_dora_column_without_length_is_refused(bases: Path, tmp_path: Path) -> None:
    from tests.tiny_checkpoints import copy_with
    from tvlens.weights.matching import load_pair

    base, adapter = _dora(bases, tmp_path / "adapter")
    _edited(adapter, lora_B=lambda _, t: t * 0)
    name = "model.layers.1.self_attn.q_proj.weight"
    holed = copy_with(base, tmp_path / "holed", lambda t: t[name][3].zero_())
    with pytest.raises(AdapterError, match="column 3 of a weight with DoRA has no length"):
        load_pair(holed, adapter).read(W_Q)


def test_doras_algebra_keeps_its_parts() -> None:
    from tvlens.weights.delta import Dense, Dora, added, inner_product, scaled

    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(5, 3, generator=generator) for _ in range(4)]
    first, second = Dora(*parts[:2]), Dora(*parts[2:])
    both, twice = added(first, second), scaled(first, 2.0)
    assert isinstance(both, Dora)
    assert torch.equal(both.magnitude, parts[0] + parts[2])
    assert torch.equal(both.direction, parts[1] + parts[3])
    assert isinstance(twice, Dora)
    assert torch.equal(twice.direction, 2 * parts[1])
    assert isinstance(added(first, Dense(parts[0])), Dense)
    expected = float((first.dense().double() * second.dense().double()).sum())
    assert inner_product(first, second) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        ({"lora_magnitude": lambda _, t: t[1:]}, "has lengths of shape"),
        ({"lora_A": lambda _, t: t.int()}, "as I32, expected one of"),
        ({"lora_A": lambda _, t: t[:2]}, "says rank 4"),
    ],
)
def test_adapter_tensors_that_do_not_fit_are_refused(
    bases: Path, tmp_path: Path, edit: dict[str, Any], sentence: str
) -> None:
    from tvlens.weights.matching import load_pair

    base, adapter = _dora(bases, tmp_path / "adapter")
    _edited(adapter, **edit)
    with pytest.raises((AdapterError, UnsupportedFormatError), match=sentence):
        load_pair(base, adapter)


def test_magnitudes_without_use_dora_are_refused(bases: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    base, adapter = _dora(bases, tmp_path / "adapter")
    _configured(adapter, use_dora=False)
    with pytest.raises(AdapterError, match=r"has a lora_magnitude_vector .* but use_dora is False"):
        load_pair(base, adapter)


@pytest.mark.parametrize("numbers", [None, [3], [3, 3], [3, -1], [3, 64], [3, True], {"x": [3, 4]}])
def test_token_numbers_that_do_not_fit_are_refused(
    bases: Path, tmp_path: Path, numbers: object
) -> None:
    from tvlens.weights.matching import load_pair

    base = _base(bases, "llama", {})
    adapter = tiny_adapter(base, tmp_path / "adapter", trainable_token_indices=[3, 5])
    _configured(adapter, trainable_token_indices=numbers)
    with pytest.raises(AdapterError, match=r"rows of|changes row 64"):
        load_pair(base, adapter)


def test_a_bias_of_b_without_lora_bias_is_refused(bases: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    base = _base(bases, "gpt2", {})
    adapter = tiny_adapter(base, tmp_path / "adapter", lora_bias=True)
    _configured(adapter, lora_bias=False)
    with pytest.raises(AdapterError, match="but lora_bias is not set"):
        load_pair(base, adapter)


def test_unknown_tensors_and_entries_are_not_passed_over(bases: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    base = _base(bases, "llama", {})
    adapter = tiny_adapter(base, tmp_path / "adapter")
    _configured(adapter, use_next_years_lora=True)
    assert "use_next_years_lora" in load_pair(base, adapter).load_report.warnings[0]
    stored = load_file(adapter / "adapter_model.safetensors")
    other = "base_model.model.model.layers.0.self_attn.q_proj.lora_diag"
    save_file(stored | {other: torch.ones(4)}, adapter / "adapter_model.safetensors")
    with pytest.raises(UnsupportedFormatError, match=r"stores .*lora_diag, which no LoRA"):
        load_pair(base, adapter)


def test_an_adapters_own_copy_of_the_embedding_is_doras_starting_point(
    bases: Path, tmp_path: Path
) -> None:
    from tvlens.weights.matching import load_pair

    base, adapter = _dora(bases, tmp_path / "adapter", target_modules=["embed_tokens"])
    _edited(adapter, base_layer=lambda _, t: t + 0.3)
    pair = load_pair(base, adapter)
    stored = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    merged = _merged(base, adapter)["model.embed_tokens.weight"] - stored.double()
    found = pair.read(Component("embedding", None, None, "W_E")).dense_delta().double()
    assert (found - merged).abs().max() < TOLERANCE


def test_dora_reads_the_same_from_a_pickle(bases: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    base, adapter = _dora(bases, tmp_path / "adapter")
    copied = shutil.copytree(adapter, tmp_path / "copy")
    torch.save(load_file(copied / "adapter_model.safetensors"), copied / "adapter_model.bin")
    (copied / "adapter_model.safetensors").unlink()
    first, second = (load_pair(base, folder).read(W_Q) for folder in (adapter, copied))
    assert torch.equal(first.dense_delta(), second.dense_delta())
