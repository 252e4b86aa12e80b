"""Changes in factors: every measure and label equals that of the product written out."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from tests.geometry_pairs import FakeLayout, FakePair, FakeWeight, base_weights, fake_pair
from tests.tiny_checkpoints import tiny_adapter, tiny_llama
from tvlens.components import Component
from tvlens.geometry import classify, decompose, decompose_and_classify
from tvlens.geometry.changes import (
    Factored,
    Remainder,
    cross,
    energy,
    gram,
    product,
    singular_energies,
    transposed,
    turned,
    written_rows,
)
from tvlens.geometry.head_evidence import head_spikes
from tvlens.geometry.heads import Factor, changes_of_heads, circuit_cores, slices_of_heads
from tvlens.geometry.matrices import seen, spectral_basis
from tvlens.geometry.measures import Spectra
from tvlens.geometry.neurons import sums_of_rows
from tvlens.geometry.nulls import (
    Signs,
    inner_of_heads,
    neuron_gain,
    noise_edge,
    peers_of,
    share_in_spans,
    spans_of,
)
from tvlens.geometry.spikes import spikes_above_edge
from tvlens.weights.delta import LowRank

pytestmark = pytest.mark.slow

LAYOUT = FakeLayout(n_kv_heads=4, n_layers=2)
RANK = 3


def _normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _factored(rows: int, columns: int, rank: int = RANK, seed: int = 0) -> Factored:
    return Factored(_normal(rows, rank, seed=seed), _normal(rank, columns, seed=seed + 1))


def _dense(change: Factored) -> Tensor:
    return change.left @ change.right


@pytest.mark.parametrize("shape", [(20, 9), (9, 20)])
def test_products_energies_and_spectra_equal_those_of_the_matrix(shape: tuple[int, int]) -> None:
    change, base, vectors = _factored(*shape), _normal(*shape, seed=5), _normal(shape[1], 2, seed=6)
    dense = _dense(change)
    assert change.shape == tuple(dense.shape)
    torch.testing.assert_close(gram(change), dense.T @ dense)
    torch.testing.assert_close(cross(base, change), base.T @ dense)
    torch.testing.assert_close(product(change, vectors), dense @ vectors)
    torch.testing.assert_close(product(turned(change), base), dense.T @ base)
    torch.testing.assert_close(energy(change), dense.square().sum())
    torch.testing.assert_close(written_rows(change, 2, 5), dense[2:5])
    torch.testing.assert_close(singular_energies(change), singular_energies(dense)[:RANK])


def test_slabs_of_a_few_rows_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    base, change, vectors = _normal(30, 7), _normal(30, 7, seed=1), _normal(7, 2, seed=2)
    monkeypatch.setattr("tvlens.geometry.changes.ENTRIES_AT_ONCE", 15)
    torch.testing.assert_close(cross(base, change), base.T @ change)
    torch.testing.assert_close(gram(base), base.T @ base)
    torch.testing.assert_close(product(change, vectors), change @ vectors)


@pytest.mark.parametrize("shape", [(20, 9), (9, 20)])
def test_a_change_seen_in_its_base_is_the_same_in_factors(shape: tuple[int, int]) -> None:
    change, basis = _factored(*shape), spectral_basis(_normal(*shape, seed=5))
    whole, ours = seen(basis, _dense(change)), seen(basis, change)
    core = basis.read.T @ _dense(change) @ basis.write
    for found in (whole, ours):
        torch.testing.assert_close(found.corner(9, 9), core)
        torch.testing.assert_close(found.corner(2, 5), core[:2, :5])
        torch.testing.assert_close(found.channels, core.diagonal())
    for name in ("read", "write", "total"):
        torch.testing.assert_close(getattr(ours, name), getattr(whole, name))


def test_sums_of_rows_are_the_same_in_factors() -> None:
    base, change = _normal(12, 30, seed=5), _factored(12, 30)
    change.left[4] = 0
    dense, ours = sums_of_rows(base, _dense(change)), sums_of_rows(base, change)
    for name in ("base", "delta", "inner", "residual"):
        torch.testing.assert_close(getattr(ours, name), getattr(dense, name))
    assert ours.equal[4] == 30
    assert ours.equal.isnan().sum() == 11


def test_sums_of_pieces_add_up_to_those_of_the_whole_even_for_a_pure_gain() -> None:
    base, change = _normal(12, 30, seed=5), _normal(12, 30, seed=6)
    for delta in (change, 0.01 * base):
        flat = sums_of_rows(base.reshape(3, -1), delta.reshape(3, -1)).measures()
        grouped = sums_of_rows(base, delta).grouped(3).measures()
        torch.testing.assert_close(grouped.residual, flat.residual, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(grouped.gain, flat.gain)
        torch.testing.assert_close(grouped.kappa, flat.kappa)


@pytest.mark.parametrize("part", ["W_V", "W_O"])
def test_heads_cut_one_side_of_the_factors(part: str) -> None:
    change = _factored(24, 16) if part == "W_V" else _factored(16, 24)
    heads = changes_of_heads(change, part, 4)
    dense = slices_of_heads(_dense(change), part, 4)
    torch.testing.assert_close(written_rows(heads, 0, heads.shape[-2]), dense)
    torch.testing.assert_close(energy(heads), dense.square().sum((1, 2)))
    others = _normal(*dense.shape, seed=7)
    torch.testing.assert_close(inner_of_heads(heads, others), inner_of_heads(dense, others))
    torch.testing.assert_close(noise_edge(heads, seed=3), noise_edge(dense, seed=3))


def test_circuits_and_their_evidence_are_the_same_in_factors() -> None:
    value, output = _factored(24, 16), _factored(16, 24, seed=9)
    left, right = (
        Factor(_normal(4, *shape, seed=3), changes_of_heads(change, part, 4))
        for shape, change, part in (((24, 4), value, "W_V"), ((4, 24), output, "W_O"))
    )
    written = [Factor(f.base, written_rows(f.delta, 0, f.delta.shape[-2])) for f in (left, right)]
    ours, dense = circuit_cores(left, right), circuit_cores(*written)
    for name in ("base", "delta"):
        one, other = getattr(ours, name), getattr(dense, name)
        torch.testing.assert_close(singular_energies(one)[:, :4], singular_energies(other)[:, :4])
    inner = [(cores.base * cores.delta).sum((1, 2)) for cores in (ours, dense)]
    torch.testing.assert_close(*inner)
    spans = spans_of(right.base)
    shares = (share_in_spans(f.delta, spans) for f in (right, written[1]))
    torch.testing.assert_close(*shares)
    found = [head_spikes(f.delta, spans, seed=1) for f in (right, written[1])]
    torch.testing.assert_close(found[0].share, found[1].share)
    torch.testing.assert_close(found[0].outside, found[1].outside)


def test_neurons_are_compared_with_their_peers_the_same_in_factors() -> None:
    base, change = _normal(30, 12, seed=5), _factored(30, 12)
    cosine = torch.zeros(30).double()
    ours, dense = (neuron_gain(peers_of(base), c, cosine) for c in (change, _dense(change)))
    torch.testing.assert_close(ours.effect, dense.effect)
    torch.testing.assert_close(ours.spread, dense.spread)


@pytest.mark.parametrize("shape", [(40, 15), (15, 40)])
@pytest.mark.parametrize("gain_of", ["whole", "rows", "columns"])
def test_spikes_of_a_remainder_are_those_of_the_matrix_above_the_edge(
    shape: tuple[int, int], gain_of: str
) -> None:
    base, change = _normal(*shape, seed=5), _factored(*shape, rank=2)
    rows, columns = {"whole": (1, 1), "rows": (shape[0], 1), "columns": (1, shape[1])}[gain_of]
    gain = 0.05 * _normal(rows, columns, seed=6)
    rest = _dense(change) - gain * base
    values = torch.linalg.svdvals(rest)
    above = values > noise_edge(rest, seed=2)
    total = float(rest.square().sum())
    for form in (change, _dense(change)):
        found = spikes_above_edge(Remainder(base, form, gain), total, signs=Signs(2))
        assert 0 < int(above.sum()) == len(found.values)
        torch.testing.assert_close(found.values.sort().values, values[above].sort().values)
        along = transposed(found.read) @ rest @ found.write
        torch.testing.assert_close(along, torch.diag(found.values), atol=1e-9, rtol=1e-9)


def _planted() -> dict[Component, LowRank]:
    """Factors on every matrix but W_gate of layer 1, which is not adapted."""
    planted = {}
    for number, (component, base) in enumerate(base_weights(LAYOUT).items()):
        if component.kind == "matrix" and component != Component("matrix", 1, None, "W_gate"):
            change = _factored(*base.shape, seed=2 * number)
            size = 0.01 * float(base.norm()) / float(_dense(change).norm())
            planted[component] = LowRank(change.left, size * change.right)
    return planted


def _pair(written: bool) -> FakePair:
    """The planted adapter, in factors or written out in float64."""
    weights, planted = dict(fake_pair(LAYOUT).weights), _planted()
    for component, delta in planted.items():
        form = delta.written_out() if written else delta
        weights[component] = FakeWeight(component, weights[component].base.double(), form)
    return FakePair(weights, LAYOUT)


def test_a_table_from_factors_is_the_table_of_the_written_out_changes() -> None:
    ours, dense = (decompose_and_classify([_pair(w)])[0] for w in (False, True))
    one, other = ours.weights.to_frame(), dense.weights.to_frame()
    measures = [name for name in one.columns if one[name].dtype == float]
    for name in measures:
        if name != "equal_fraction":  # null where the product is not written out
            expected = other[name].to_numpy()
            assert one[name].to_numpy() == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True)
    pd.testing.assert_frame_equal(
        ours.labels.labels.to_frame()[["component", "label"]],
        dense.labels.labels.to_frame()[["component", "label"]],
    )
    assert len(set(ours.labels.labels.to_frame()["label"])) > 1


def test_nothing_of_an_adapter_is_written_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tvlens.weights.matching import load_pair

    base = tiny_llama(tmp_path / "base")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    pair = load_pair(base, tiny_adapter(base, tmp_path / "lora", target_modules=targets))

    def refuse(self: LowRank) -> Tensor:
        raise AssertionError(f"a change of shape {self.shape} was written out")

    monkeypatch.setattr(LowRank, "dense", refuse)
    monkeypatch.setattr(LowRank, "written_out", refuse)
    weights = decompose(pair)
    labels = classify(pair, weights).labels.to_frame().set_index("component")["label"]
    assert labels["L0.W_in"] == "unchanged"
    assert labels["L0.W_gate"] != "unchanged"
    with pytest.raises(AssertionError, match="was written out"):
        pair.read(Component("matrix", 0, None, "W_Q")).dense_delta()


def test_several_fine_tunes_in_one_pass_are_each_what_they_are_alone() -> None:
    pairs = [fake_pair(LAYOUT, background=size) for size in (0.01, 0.1)]
    pairs.append(fake_pair(LAYOUT, background=0.01, seed=3))  # another base among them
    control = fake_pair(LAYOUT, background=0.02, seed=0)
    together = decompose_and_classify(pairs, controls=[control])
    for pair, found in zip(pairs, together, strict=True):
        weights = decompose(pair)
        alone = classify(pair, weights, controls=[control])
        assert found.weights.data.equals(weights.data)
        assert found.labels.labels.data.equals(alone.labels.data)
        assert found.labels.tests.data.equals(alone.tests.data)
        assert found.labels.contrasts.data.equals(alone.contrasts.data)


@pytest.mark.parametrize("spectra", ["none", "delta"])
def test_less_spectra_leave_columns_null_and_the_others_as_they_are(spectra: Spectra) -> None:
    pair = fake_pair(LAYOUT, background=0.01)
    whole, less = decompose(pair).to_frame(), decompose(pair, spectra=spectra).to_frame()
    null = [name for name in whole if less[name].isna().all() and not whole[name].isna().all()]
    pd.testing.assert_frame_equal(less.drop(columns=null), whole.drop(columns=null))
    ranks = {"effective_rank_delta", "stable_rank_delta"}
    assert {"g_write", "e_scale", "effective_rank_base"} <= set(null)
    assert ranks.isdisjoint(null) if spectra == "delta" else ranks <= set(null)
    assert {"gain", "kappa", "residual", "snr", "equal_fraction"}.isdisjoint(null)
