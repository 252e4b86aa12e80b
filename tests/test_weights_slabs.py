"""A vocabulary read in pieces is the vocabulary: whatever form its change has."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_checkpoints import add_noise, copy_with, tiny_adapter, tiny_llama
from tvlens.components import Component

CHANGES: dict[str, dict[str, Any]] = {
    "factors": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "dora": {"target_modules": ["lm_head", "q_proj"], "use_dora": True},
    "stored whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 40, 63]},
    "nothing": {"target_modules": ["q_proj"]},
}


def _equal_to_whole(base: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tvlens.weights.matching import load_pair

    monkeypatch.setattr("tvlens.weights.pair.SLAB", 7 * 32)  # seven tokens at once
    pair = load_pair(base, tuned)
    for part, axis in (("W_E", 0), ("W_U", 1)):
        component = Component("embedding", None, None, part)
        whole, slabs = pair.read(component), list(pair.slabs(component))
        assert len(slabs) > 5
        assert torch.equal(torch.cat([s.base for s in slabs], axis), whole.base)
        written = torch.cat([s.dense_delta() for s in slabs], axis)
        torch.testing.assert_close(written, whole.dense_delta(), rtol=1e-5, atol=1e-7)
        if whole.floor is not None:
            floors = [s.floor for s in slabs]
            assert torch.equal(torch.cat([f for f in floors if f is not None], axis), whole.floor)


@pytest.mark.parametrize("change", list(CHANGES))
def test_an_adapter_in_pieces(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / change.replace(" ", "_"), **CHANGES[change])
    _equal_to_whole(base, adapter, monkeypatch)


def test_a_full_fine_tune_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama(tmp_path / "base")
    _equal_to_whole(base, copy_with(base, tmp_path / "tuned", add_noise()), monkeypatch)


@pytest.mark.slow
def test_dora_on_an_embedding_has_lengths_over_all_tokens_and_comes_whole(tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    base = tiny_llama(tmp_path / "base")
    options = {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}
    pair = load_pair(base, tiny_adapter(base, tmp_path / "dora", **options))
    assert len(list(pair.slabs(Component("embedding", None, None, "W_E")))) == 1


@pytest.mark.slow
def test_an_embedding_in_pieces_has_the_measures_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tvlens.geometry import decompose
    from tvlens.weights.matching import load_pair

    base = tiny_llama(tmp_path / "base")
    pair = load_pair(base, copy_with(base, tmp_path / "tuned", add_noise()))
    whole = decompose(pair).to_frame().set_index("component")
    monkeypatch.setattr("tvlens.weights.pair.SLAB", 7 * 32)
    pieces = decompose(pair).to_frame().set_index("component")
    for label in ("embed.W_E", "unembed.W_U"):
        for name in whole.columns:
            one, other = whole.loc[label, name], pieces.loc[label, name]
            if isinstance(one, float):
                assert other == pytest.approx(one, rel=1e-9, nan_ok=True), name
            elif one is not None:
                assert one == other, name


def test_a_sum_that_overflows_does_not_make_finite_numbers_infinite() -> None:
    from tvlens.weights.contents import first_non_finite

    large = torch.full((3, 4), 2e38)
    assert first_non_finite(large) is None
    for bad in (float("nan"), float("inf"), -float("inf")):
        spoiled = large.clone()
        spoiled[2, 1] = bad
        assert first_non_finite(spoiled) == (2, 1)
    assert first_non_finite(torch.tensor([float("inf"), -float("inf")])) == (0,)
