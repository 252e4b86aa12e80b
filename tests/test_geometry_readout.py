"""Readout of directions against the host's own final norm and unembedding, and its null."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from tests.tiny_checkpoints import (
    add_noise,
    copy_with,
    tiny_gemma2,
    tiny_gpt2,
    tiny_llama,
    tiny_neox,
    tiny_olmo2,
)
from tvlens.geometry import readout as module
from tvlens.geometry.readout import (
    Unembedding,
    random_readout,
    readout,
    token_names,
    unembedding_of,
)
from tvlens.weights.matching import load_pair

LAYOUTS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "untied": (tiny_llama, {}),
    "tied": (tiny_llama, {"tie_word_embeddings": True}),
    "layer_norm_tied": (tiny_gpt2, {}),
    "layer_norm_untied": (tiny_neox, {}),
    "zero_centred_gain": (tiny_gemma2, {"final_logit_softcapping": None}),
    "post_norms": (tiny_olmo2, {}),
}


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


W_U = _normal(24, 90, seed=2)


def _unembedding(*, centred: bool = False, piece: int = 90) -> Unembedding:
    gain = 1 + 0.3 * _normal(24, seed=1)
    return Unembedding(lambda: W_U.split(piece, dim=1), gain, centred, torch.arange(90))


def _host_logits(folder: Path, vectors: Tensor) -> Tensor:
    """The host's own modules; a norm takes [batch, pos, d_model]."""
    from tvlens.models.lens import LensModel

    model = LensModel.load(folder).model
    with torch.no_grad():
        return model.unembed(model.ln_final(vectors[None]))[0]


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_logits_are_those_of_the_hosts_final_norm_and_unembedding_up_to_scale_and_bias(
    tmp_path: Path, layout: str
) -> None:
    family, config = LAYOUTS[layout]
    base = family(tmp_path / "base", **config)
    tuned = copy_with(base, tmp_path / "tuned", add_noise())
    unembedding = unembedding_of(load_pair(str(base), str(tuned)))
    assert unembedding is not None
    assert unembedding.centred == layout.startswith("layer_norm")
    vectors = 100 * _normal(5, 32)  # long, so that the norms' epsilon is nothing
    # biases are the even part of the host's logits; its scale is one over the (centred) rms
    host = (_host_logits(base, vectors) - _host_logits(base, -vectors)) / 2
    seen = vectors - vectors.mean(1, keepdim=True) if unembedding.centred else vectors
    ours = unembedding.logits(vectors) / seen.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(ours, host, rtol=1e-4, atol=1e-4)


def test_tokens_are_in_the_order_of_the_hosts_logit_readout(tmp_path: Path) -> None:
    lens = pytest.importorskip(
        "transformer_lens.tools.analysis.logit_lens", reason="TransformerLens 4 has logit_readout"
    )
    from tvlens.models.lens import LensModel

    base = tiny_llama(tmp_path / "base")
    tuned = copy_with(base, tmp_path / "tuned", add_noise())
    unembedding = unembedding_of(load_pair(str(base), str(tuned)))
    assert unembedding is not None
    vectors = _normal(6, 32)
    said = readout(vectors, unembedding, top=8)
    model = LensModel.load(base).model
    for ours, signed in ((said.promoted, vectors), (said.suppressed, -vectors)):
        assert lens.logit_readout(model, signed, top_k=8).top_ids.tolist() == ours.tolist()


@pytest.mark.parametrize(("slab", "piece"), [(7, 90), (4096, 90), (7, 16)])
def test_z_and_order_equal_dense_numpy_however_the_vocabulary_is_cut(
    monkeypatch: pytest.MonkeyPatch, slab: int, piece: int
) -> None:
    monkeypatch.setattr(module, "SLAB", slab)
    unembedding, directions = _unembedding(centred=True, piece=piece), _normal(5, 24, seed=3)
    said = readout(directions, unembedding, top=6)
    rows = directions.numpy() - directions.numpy().mean(1, keepdims=True)
    logits = (rows * unembedding.gain.numpy()) @ W_U.numpy()
    z = (logits - logits.mean(1, keepdims=True)) / logits.std(1, keepdims=True)
    order = np.argsort(-z, axis=1)
    np.testing.assert_array_equal(said.promoted, order[:, :6])
    np.testing.assert_array_equal(said.suppressed, order[:, ::-1][:, :6])
    np.testing.assert_allclose(said.promoted_z, np.take_along_axis(z, order[:, :6], 1), rtol=1e-4)
    np.testing.assert_allclose(said.suppressed_z[:, 0], z.min(1), rtol=1e-4)
    np.testing.assert_allclose(said.extreme, np.abs(z).max(1), rtol=1e-4)
    np.testing.assert_allclose(said.spread, logits.std(1), rtol=1e-4)


def test_a_direction_along_a_column_of_w_u_promotes_its_token_and_its_negative_suppresses_it() -> (
    None
):
    unembedding = _unembedding()
    along = W_U[:, 17] / unembedding.gain
    said = readout(torch.stack([along, -along]), unembedding)
    assert said.promoted[0, 0] == 17
    assert said.suppressed[1, 0] == 17
    assert said.leaning.tolist() == [1.0, -1.0]


def test_z_knows_no_length_and_a_layer_norm_no_mean() -> None:
    direction = _normal(1, 24, seed=4)
    shifted = torch.cat([direction, 50 * direction, direction + 3.0])
    centred = readout(shifted, _unembedding(centred=True)).promoted_z
    plain = readout(shifted, _unembedding()).promoted_z
    torch.testing.assert_close(centred[1], centred[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(centred[2], centred[0], rtol=1e-4, atol=1e-4)
    assert float((plain[2] - plain[0]).abs().max()) > 0.1


def test_p_values_of_random_directions_are_uniform_and_never_below_their_floor() -> None:
    unembedding = _unembedding()
    chance = random_readout(unembedding, draws=999, seed=0)
    fresh = readout(_normal(800, 24, seed=9), unembedding, top=1)
    p_values = chance.p_values(fresh.extreme.numpy())
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    assert p_values.min() >= chance.p_floor == 0.001
    assert 0.003 < (fresh.extreme.numpy() > chance.bound).mean() < 0.025
    assert chance.mean == pytest.approx(fresh.extreme.mean().item(), rel=0.02)


def test_a_direction_that_no_random_one_reaches_has_the_smallest_p_and_one_below_all_has_one() -> (
    None
):
    chance = random_readout(_unembedding(), draws=99, seed=0)
    found = chance.p_values(np.array([chance.extremes[-1] + 1, 0.0, chance.extremes[-1], np.nan]))
    np.testing.assert_allclose(found, [0.01, 1.0, 0.02, np.nan])


def test_names_follow_the_ids_of_the_rows_and_unnamed_tokens_show_their_number() -> None:
    names = token_names(torch.tensor([2, 0, 1]), torch.tensor([5, 1, 9]), ["a", "b", "c"])
    assert names == ["[9]", "[5]", "b"]
    assert token_names(torch.tensor([0]), torch.tensor([5]), None) == ["[5]"]


def test_a_family_without_a_table_has_no_readout() -> None:
    from tests.geometry_pairs import FakeLayout, fake_pair
    from tvlens.components import Component

    pair = fake_pair(FakeLayout())
    assert unembedding_of(pair) is not None
    gain = Component("norm", None, None, "ln_final.w")
    bare = type(pair)({c: w for c, w in pair.weights.items() if c != gain}, pair.layout)
    assert unembedding_of(bare) is None
