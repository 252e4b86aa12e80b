"""Labels of QK: planted heads, kv mates, rotary pairs; and its gain over all offsets."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from tests.geometry_pairs import FakeLayout, FakePair, base_weights, fake_pair, within_matrix
from tests.tiny_checkpoints import FAMILIES
from tvlens.components import Component
from tvlens.geometry import decompose_and_classify
from tvlens.geometry.classify import Classifier
from tvlens.geometry.heads import Factor, coordinates
from tvlens.geometry.nulls import factor_swap
from tvlens.geometry.offsets import mean_change, over_offsets
from tvlens.weights.matching import load_pair

pytestmark = pytest.mark.slow

LAYOUT = FakeLayout(n_layers=1)
W_Q, W_K = (Component("matrix", 0, None, part) for part in ("W_Q", "W_K"))
BACKGROUNDS = (0.0, 0.002)
PARTNER = torch.tensor([3, 4, 5, 0, 1, 2, 6, 7])  # three pairs rotate, two entries do not


class Rotary(FakePair):
    @property
    def rotary_partners(self) -> list[int]:
        half = self.layout.d_head // 2
        return [*range(half, 2 * half), *range(half)]


def _qk(pair: FakePair, classifier: Classifier | None = None) -> list[str]:
    (found,) = decompose_and_classify([pair], classifier=classifier)
    return found.labels.where(kind="head", part="QK").to_frame()["label"].tolist()


def _head(component: Component, head: int, seed: int = 0) -> Tensor:
    width = LAYOUT.d_head
    return base_weights(LAYOUT, seed)[component][:, head * width : (head + 1) * width]


def _new_read(base: Tensor, generator: torch.Generator) -> Tensor:
    outside = torch.linalg.svd(base).U[:, base.shape[1] :]
    mix = torch.randn(outside.shape[1], generator=generator)
    return torch.outer(outside @ mix, torch.randn(base.shape[1], generator=generator))


def _wrong(size: float, background: float, classifier: Classifier | None = None) -> list[str]:
    wrong = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        mixer = torch.randn(LAYOUT.d_head, LAYOUT.d_head, generator=generator)
        queries = {
            1: (_head(W_Q, 1, seed), "amplified"),
            2: (-_head(W_Q, 2, seed), "attenuated"),
            3: (_new_read(_head(W_Q, 3, seed), generator), "new_read"),
            4: (_head(W_Q, 4, seed) @ (mixer - mixer.T), "rewired"),
        }
        keys = {
            6: (_head(W_K, 6, seed), "amplified"),
            7: (_new_read(_head(W_K, 7, seed), generator), "new_read"),
        }
        planted, expected = {}, ["unresolved" if background else "unchanged"] * 8
        for component, changes in ((W_Q, queries), (W_K, keys)):
            for head, (change, label) in changes.items():
                like = _head(component, head, seed)
                part = within_matrix(
                    LAYOUT, component, head, change * (size * like.norm() / change.norm())
                )
                planted[component] = planted.get(component, 0) + part
                expected[head] = label
        pair = fake_pair(LAYOUT, planted, background=background, seed=seed)
        for kind in (FakePair, Rotary):
            found = _qk(kind(pair.weights, LAYOUT), classifier)
            pairs = enumerate(zip(found, expected, strict=True))
            wrong += [f"{h}: {label} is {got}" for h, (got, label) in pairs if got != label]
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("size", [0.02, 0.05])
def test_planted_qk_circuits_get_their_label_and_the_others_none(
    size: float, background: float
) -> None:
    assert _wrong(size, background) == []


def test_a_classifier_that_never_says_anything_fails_the_planted_qk_circuits() -> None:
    def silent(evidence: pd.DataFrame) -> pd.DataFrame:
        return evidence.assign(label="unresolved")

    assert len(_wrong(0.05, 0.002, silent)) == 24


@pytest.mark.slow
@pytest.mark.parametrize("size", [0.002, 0.1, 0.5])
def test_noise_in_both_factors_is_no_verdict_on_qk(size: float) -> None:
    found = [
        label
        for seed in range(4)
        for label in _qk(Rotary(fake_pair(LAYOUT, background=size, seed=seed).weights, LAYOUT))
    ]
    assert found.count("unresolved") >= 0.95 * len(found)


def test_a_gain_of_shared_keys_amplifies_all_their_query_heads() -> None:
    layout = FakeLayout(n_kv_heads=4, n_layers=1)
    base, columns = base_weights(layout)[W_K], slice(12, 24)
    planted = {W_K: within_matrix(layout, W_K, 1, 0.05 * base[:, columns])}
    found = _qk(fake_pair(layout, planted, background=0.002))
    assert found == ["unresolved"] * 2 + ["amplified"] * 2 + ["unresolved"] * 4


def test_normalised_queries_and_keys_have_no_qk_label() -> None:
    assert _qk(fake_pair(FakeLayout(qk_norm="head", n_layers=1), background=0.01)) == []


def _turn(offset: int) -> Tensor:
    """R_m of ``PARTNER``, each pair with its own angle."""
    turn = torch.eye(8, dtype=torch.float64)
    for pair, angle in enumerate((1.0, 0.37, 2.1)):
        a = torch.tensor(offset * angle).double()
        i, j = pair, pair + 3
        turn[i, i] = turn[j, j] = a.cos()
        turn[i, j], turn[j, i] = -a.sin(), a.sin()
    return turn


def _normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_the_closed_mean_over_offsets_is_the_mean_of_many() -> None:
    products = _normal(8, 8, seed=0)
    mean = sum(_turn(m) @ products @ _turn(m).T for m in range(20_000)) / 20_000
    torch.testing.assert_close(over_offsets(products, PARTNER), mean, rtol=0, atol=2e-3)
    torch.testing.assert_close(over_offsets(products, torch.arange(8)), products)


def test_the_gain_of_a_rotary_circuit_is_that_of_its_forms_over_many_offsets() -> None:
    query, d_query, key, d_key = (_normal(1, 20, 8, seed=s) for s in range(4))
    sides = Factor(query, 0.3 * d_query), Factor(key, 0.2 * d_key)
    found = mean_change(*(coordinates(side) for side in sides), PARTNER)
    turns = torch.stack([_turn(m) for m in range(4_000)])
    base = query @ turns @ key.mT
    change = (query + 0.3 * d_query) @ turns @ (key + 0.2 * d_key).mT - base
    gain = (change * base).sum() / base.square().sum()
    kappa = (change * base).sum() / (change.norm() * base.norm())
    assert float(found.gain) == pytest.approx(float(gain), abs=2e-3)
    assert float(found.kappa) == pytest.approx(float(kappa), abs=2e-3)


def test_one_complex_number_a_pair_may_move_between_queries_and_keys() -> None:
    query, d_query, key, d_key = (_normal(3, 20, 8, seed=s) for s in range(4))
    scale = torch.tensor([2.0, 0.5, 3.0, 2.0, 0.5, 3.0, 1.0, 1.0]).double()
    turn = _turn(1)
    move = turn * scale  # on queries; keys get its inverse, transposed
    back = torch.linalg.inv(move).T

    def factors(on_query: Tensor, on_key: Tensor) -> tuple[Factor, Factor]:
        return Factor(query @ on_query, d_query @ on_query), Factor(key @ on_key, d_key @ on_key)

    plain, moved = factors(torch.eye(8).double(), torch.eye(8).double()), factors(move, back)
    for own, other in ((plain, moved),):
        first, second = (mean_change(*(coordinates(f) for f in x), PARTNER) for x in (own, other))
        torch.testing.assert_close(first.kappa, second.kappa)
        torch.testing.assert_close(first.gain, second.gain)
        torch.testing.assert_close(first.from_right, second.from_right)


def test_own_swaps_over_offsets_are_first_order_gains() -> None:
    query, key = _normal(2, 20, 8, seed=0), _normal(2, 20, 8, seed=1)
    still = Factor(key.mT, torch.zeros_like(key.mT))
    up = factor_swap(Factor(query, 0.01 * query), still, PARTNER).z
    down = factor_swap(
        Factor(query, torch.zeros_like(query)), Factor(key.mT, -0.01 * key.mT), PARTNER
    ).z
    assert (up.diagonal() > 5).all()
    assert (down.diagonal() < -5).all()


@pytest.mark.parametrize("part", ["kappa", "from_right"])
def test_without_rotation_the_mean_over_offsets_is_the_circuit_itself(part: str) -> None:
    query, d_query, key, d_key = (_normal(3, 20, 8, seed=s) for s in range(4))
    left, right = Factor(query, 0.3 * d_query), Factor(key, 0.2 * d_key)
    found = mean_change(coordinates(left), coordinates(right), torch.arange(8))
    base = query @ key.mT
    on_left = 0.3 * d_query @ (key + 0.1 * d_key).mT
    on_right = (query + 0.15 * d_query) @ (0.2 * d_key).mT
    change = on_left + on_right
    kappa = (change * base).sum((1, 2)) / change.norm(dim=(1, 2)) / base.norm(dim=(1, 2))
    sizes = [side.square().sum((1, 2)) for side in (on_right, on_left)]
    expected = {"kappa": kappa, "from_right": sizes[0] / (sizes[0] + sizes[1])}[part]
    torch.testing.assert_close(getattr(found, part), expected)


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_the_partners_of_a_checkpoint_are_those_that_transformers_turns(
    family: str, tmp_path: Path
) -> None:
    from transformers.models.gpt_neox import modeling_gpt_neox
    from transformers.models.llama import modeling_llama

    base = FAMILIES[family](tmp_path / "base")
    pair = load_pair(base, base)
    width = pair.layout.d_head
    turned = width if family == "llama" else width // 4
    module = modeling_llama if family == "llama" else modeling_gpt_neox
    entries = torch.eye(width)[None, None]
    sine = torch.full((1, width, turned), 0.6)
    one, _ = module.apply_rotary_pos_emb(entries, entries, torch.full_like(sine, 0.8), sine)
    moved = (one[0, 0] - torch.diag(one[0, 0].diagonal())).abs()
    still = moved.sum(1) == 0
    expected = torch.where(still, torch.arange(width), moved.argmax(1))
    assert pair.rotary_partners == expected.tolist()
    assert int(still.sum()) == width - turned
