"""A hooked pair of models in memory computes with their weights and leaves them as they were."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import attribution_pairs
from tests.tiny_checkpoints import (
    add_noise,
    copy_with,
    tiny_adapter,
    tiny_gpt2,
    tiny_llama,
    tiny_neox,
)
from tvlens.errors import HostError

pytestmark = pytest.mark.slow

MAKERS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "neox": tiny_neox}
IDS = torch.arange(12).reshape(2, 6)
MASK = torch.ones_like(IDS)


@pytest.fixture(scope="module", params=MAKERS)
def folders(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    tmp_path = tmp_path_factory.mktemp("pair")
    base = MAKERS[request.param](tmp_path / "base")
    return {
        "base": base,
        "tuned": copy_with(base, tmp_path / "tuned", add_noise(1)),
        "adapter": tiny_adapter(base, tmp_path / "adapter"),
    }


def _model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def _peft(folders: dict[str, Path]) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(_model(folders["base"]), folders["adapter"]).eval()


def _hooked(base: Any, tuned: Any):
    from tvlens.models.pair import HookedPair
    from tvlens.weights.matching import load_pair

    return HookedPair(load_pair(base, tuned))


def _state(model: Any) -> dict[str, Any]:
    return {
        "bits": {n: t.clone() for n, t in model.state_dict().items()},
        "flags": [p.requires_grad for p in model.parameters()],
        "classes": [(n, type(m)) for n, m in model.named_modules()],
        "config": model.config.to_json_string(),
        "attention": model.config._attn_implementation,
        "training": [m.training for m in model.modules()],
    }


def _assert_as_found(model: Any, before: dict[str, Any]) -> None:
    after = _state(model)
    bits, old = after.pop("bits"), before["bits"]
    assert bits.keys() == old.keys()
    assert all(torch.equal(bits[n], old[n]) for n in old)
    assert after == {key: value for key, value in before.items() if key != "bits"}


def test_models_in_memory_give_the_logits_of_their_folders(folders: dict[str, Path]) -> None:
    models = _model(folders["base"]), _model(folders["tuned"]).train()
    before = [_state(model) for model in models]
    hooked, expected = _hooked(*models), _hooked(folders["base"], folders["tuned"])
    for side in ("base", "tuned"):
        ours, theirs = (getattr(pair, side)(IDS, MASK) for pair in (hooked, expected))
        assert torch.equal(ours, theirs)
    for model, state in zip(models, before, strict=True):
        _assert_as_found(model, state)


def test_the_very_weights_are_used_and_put_back_by_a_path(folders: dict[str, Path]) -> None:
    from tvlens.attribution.sites import weight_path

    models = _model(folders["base"]), _model(folders["tuned"])
    before = [_state(model) for model in models]
    hooked = _hooked(*models)
    weight = models[0].get_input_embeddings().weight
    embedding = hooked.base.model.embed.original_component.weight
    assert embedding.data_ptr() == weight.data_ptr()
    with weight_path(hooked) as path:
        path.move(1.0)
        assert not torch.equal(weight, before[0]["bits"][_name(models[0])])
        assert torch.allclose(hooked.base(IDS, MASK), hooked.tuned(IDS, MASK), atol=1e-6)
    for model, state in zip(models, before, strict=True):
        _assert_as_found(model, state)


def _name(model: Any) -> str:
    weight = model.get_input_embeddings().weight
    return next(n for n, p in model.named_parameters() if p is weight)


def test_another_dtype_is_a_copy(folders: dict[str, Path]) -> None:
    model = _model(folders["base"], torch.bfloat16)
    before = _state(model)
    hooked = _hooked(model, folders["tuned"])
    assert hooked.base.dtype == torch.float32
    _assert_as_found(model, before)


@pytest.mark.parametrize("base", ["folder", "model", "beneath"])
def test_a_peft_model_is_merged_in_a_copy(folders: dict[str, Path], base: str) -> None:
    tuned = _peft(folders)
    given = {
        "folder": folders["base"],
        "model": _model(folders["base"]),
        "beneath": tuned.get_base_model(),
    }[base]
    before = _state(tuned)
    hooked, expected = _hooked(given, tuned), _hooked(folders["base"], folders["adapter"])
    for side in ("base", "tuned"):
        ours, theirs = (getattr(pair, side)(IDS, MASK) for pair in (hooked, expected))
        assert torch.equal(ours, theirs), side
    assert torch.allclose(hooked.tuned(IDS, MASK), tuned(IDS).logits, atol=1e-5)
    assert not torch.allclose(hooked.tuned(IDS, MASK), hooked.base(IDS, MASK), atol=1e-3)
    _assert_as_found(tuned, before)


def test_an_adapter_on_disk_is_merged_into_a_copy_of_the_base(folders: dict[str, Path]) -> None:
    model = _model(folders["base"])
    before = _state(model)
    hooked = _hooked(model, folders["adapter"])
    expected = _hooked(folders["base"], folders["adapter"])
    assert torch.equal(hooked.tuned(IDS, MASK), expected.tuned(IDS, MASK))
    assert torch.equal(hooked.base(IDS, MASK), expected.base(IDS, MASK))
    _assert_as_found(model, before)


def test_bridges_are_used_as_they_are(folders: dict[str, Path]) -> None:
    from tvlens.models.lens import LensModel
    from tvlens.models.pair import HookedPair
    from tvlens.weights.matching import load_pair

    base, tuned = (LensModel.load(folders[name]) for name in ("base", "tuned"))
    pair = load_pair(base, tuned.model)
    hooked = HookedPair(pair)
    assert hooked.base.model is base.model
    assert hooked.tuned.model is tuned.model
    with pytest.raises(
        HostError, match=r"this TransformerBridge is torch\.float32 on cpu; torch\.float64"
    ):
        HookedPair(pair, dtype=torch.float64)


@pytest.mark.slow
def test_attribution_from_memory_is_that_of_the_folders(folders: dict[str, Path]) -> None:
    from tvlens.attribution.weights import weight_scores
    from tvlens.models.metrics import SHIPPED

    models = _model(folders["base"]), _model(folders["tuned"])
    before = [_state(model) for model in models]
    found = [
        weight_scores(
            hooked,
            attribution_pairs.batch(),
            SHIPPED["logprob"],
            estimator="first_order",
            at="base",
        )
        for hooked in (_hooked(*models), _hooked(folders["base"], folders["tuned"]))
    ]
    assert found[0].components == found[1].components
    assert torch.equal(torch.as_tensor(found[0].values), torch.as_tensor(found[1].values))
    for model, state in zip(models, before, strict=True):
        _assert_as_found(model, state)
