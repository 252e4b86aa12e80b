"""Several fine-tunes of a base, or several threads, give what each gives alone."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from tests.geometry_pairs import FakeLayout, FakePair, FakeWeight, fake_pair, isotropic
from tvlens.components import Component
from tvlens.geometry import Geometry, classify, decompose, decompose_and_classify
from tvlens.geometry.matrices import spectral_basis
from tvlens.geometry.measures import Tokens, vocabularies

pytestmark = pytest.mark.slow


class Pieces(FakePair):
    """A pair that gives an embedding 90 tokens at a time."""

    def slabs(self, component: Component) -> list[FakeWeight]:
        whole = self.weights[component]
        sides = (whole.base, whole.delta, whole.floor)
        return [
            FakeWeight(component, *piece)
            for piece in zip(*(side.split(90) for side in sides), strict=True)
        ]


layouts = st.builds(
    lambda kv, mates, d_head, d_model, d_mlp: FakeLayout(
        n_heads=kv * mates, n_kv_heads=kv, d_head=d_head, d_model=d_model, d_mlp=d_mlp, n_layers=1
    ),
    *(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(2, 20)),
    st.integers(1, 30),
)


def _tuned(layout: FakeLayout, seed: int, *, base_seed: int = 0) -> FakePair:
    """Noise and one shared direction in every matrix, embedding and norm of one base."""
    weights, generator = {}, torch.Generator().manual_seed(seed)
    for component, weight in fake_pair(layout, seed=base_seed).weights.items():
        delta = isotropic(weight.base, 0.01, generator)
        if weight.base.dim() == 2:
            delta += 0.02 * torch.outer(weight.base.norm(dim=1), delta[0] / delta[0].norm())
        weights[component] = FakeWeight(component, weight.base, delta, weight.floor)
    return Pieces(weights, layout, tuned_name=f"tuned-{seed}")


def _is_same(one: Geometry, other: Geometry) -> bool:
    pairs = zip(
        (one.weights, one.labels.labels, one.labels.tests, one.labels.contrasts),
        (other.weights, other.labels.labels, other.labels.tests, other.labels.contrasts),
        strict=True,
    )
    return all(mine.data.equals(theirs.data) for mine, theirs in pairs)


@settings(max_examples=2, phases=[Phase.generate])  # to shrink a failure takes minutes
@given(layouts, st.integers(0, 99))
def test_fine_tunes_of_one_base_at_once_are_each_what_they_are_alone(
    layout: FakeLayout, seed: int
) -> None:
    pairs = [_tuned(layout, seed), _tuned(layout, seed + 1), _tuned(layout, 3, base_seed=1)]
    for pair, found in zip(pairs, decompose_and_classify(pairs), strict=True):
        (alone,) = decompose_and_classify([pair])
        assert _is_same(found, alone)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with threadpool_limits(2, user_api="blas"):
        yield
    torch.set_num_threads(before)


def test_two_threads_find_what_one_finds(two_threads: None) -> None:
    layout = FakeLayout(n_heads=4, n_kv_heads=2, d_model=24, d_head=6, d_mlp=20)
    pairs = [_tuned(layout, seed) for seed in (0, 1)]
    blocks: list[tuple[int, int]] = []
    found = decompose_and_classify(pairs, progress=lambda *counts: blocks.append(counts))
    assert blocks == [(1, 3), (2, 3), (3, 3)]
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    alone = decompose_and_classify(pairs)
    assert all(_is_same(one, other) for one, other in zip(found, alone, strict=True))
    torch.set_num_threads(2)
    weights = decompose(pairs[0])
    assert weights.data.equals(alone[0].weights.data)
    labels = classify(pairs[0], weights)
    assert labels.labels.data.equals(alone[0].labels.labels.data)


def test_what_goes_wrong_on_a_thread_is_raised(two_threads: None) -> None:
    class Broken(FakePair):
        def read(self, component: Component) -> FakeWeight:
            if component.part == "W_in":
                raise OSError("no such page")
            return super().read(component)

    layout = FakeLayout()
    with pytest.raises(OSError, match="no such page"):
        decompose(Broken(fake_pair(layout).weights, layout))
    assert torch.get_num_threads() == 2


def test_a_base_is_factorised_once_for_all_its_fine_tunes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Size] = []

    def counted(matrix: torch.Tensor) -> object:
        made.append(matrix.shape)
        return spectral_basis(matrix)

    monkeypatch.setattr("tvlens.geometry.blocks.spectral_basis", counted)
    layout = FakeLayout(n_heads=2, n_kv_heads=2, d_model=16, d_head=4, d_mlp=12, n_layers=1)
    decompose_and_classify([_tuned(layout, 0)])
    once = len(made)
    decompose_and_classify([_tuned(layout, seed) for seed in (0, 1, 2)])
    assert len(made) == 2 * once
    decompose_and_classify([_tuned(layout, 0), _tuned(layout, 0, base_seed=1)])
    assert len(made) == 4 * once


def test_products_of_an_embedding_are_shared_where_the_base_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    component, layout = Component("embedding", None, None, "W_E"), FakeLayout()
    pairs = [_tuned(layout, 0), _tuned(layout, 1), _tuned(layout, 2, base_seed=1)]
    alone = [vocabularies([Tokens(p.slabs(component), "both", 5)], "W_E")[0] for p in pairs]
    known: list[int] = []
    from tvlens.geometry.changes import gram

    def counted(matrix: torch.Tensor) -> torch.Tensor:
        known.append(len(matrix))
        return gram(matrix)

    monkeypatch.setattr("tvlens.geometry.measures.gram", counted)
    together = vocabularies([Tokens(p.slabs(component), "both", 5) for p in pairs], "W_E")
    pieces = len(pairs[0].slabs(component))
    assert len(known) == (3 + 2) * pieces  # a change each, and two bases
    for one, other in zip(together, alone, strict=True):
        assert all(torch.equal(*both) for both in zip(one.grams, other.grams, strict=True))
        assert all(torch.equal(one.columns[name], other.columns[name]) for name in ("gain", "snr"))
