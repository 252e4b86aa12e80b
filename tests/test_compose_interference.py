"""Predicted interference: planted conflicts and subspaces, and the formulas written otherwise."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny_checkpoints import add_noise, copy_with, tiny_adapter, tiny_llama
from tvlens.errors import StudyError
from tvlens.weights.delta import Dense, LowRank

NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("interference")
    base = tiny_llama(root / "base")
    start = load_file(base / "model.safetensors")
    a = copy_with(base, root / "a", add_noise(1))

    def opposite(tensors: dict[str, Tensor]) -> None:
        for name, tensor in load_file(a / "model.safetensors").items():
            tensors[name] = start[name] - (tensor - start[name])

    return {
        "base": base,
        "a": a,
        "b": copy_with(base, root / "b", add_noise(2)),
        "opposite": copy_with(base, root / "opposite", opposite),
        "lora": tiny_adapter(base, root / "lora"),
    }


def _table(folders: dict[str, Path], *names: str, **options):
    from tvlens.compose.interference import interference

    return interference(folders["base"], [folders[name] for name in names], **options)


def _change(folders: dict[str, Path], name: str, tensor: str = NAME) -> Tensor:
    base, tuned = (load_file(folders[n] / "model.safetensors") for n in ("base", name))
    return (tuned[tensor] - base[tensor]).double()


@pytest.mark.slow
def test_every_component_of_every_pair_has_a_row(folders: dict[str, Path]) -> None:
    frame = _table(folders, "a", "b", "lora").to_frame()
    pairs = frame.groupby(["tuned", "other"]).size().to_dict()
    assert pairs == {("a", "b"): 21, ("a", "lora"): 6, ("b", "lora"): 6}
    matrices = frame[frame["kind"] == "matrix"]
    assert matrices["sti"].notna().all()
    assert frame[frame["kind"] == "norm"]["sti"].isna().all()
    assert (frame["sign_conflict"].between(0, 1)).all()


def test_conflict_is_the_share_of_magnitude_that_cancels(folders: dict[str, Path]) -> None:
    row = _table(folders, "a", "b", scales=[0.5, -2.0]).to_frame().set_index("component")
    row = row.loc["L0.W_out"]
    a, b = 0.5 * _change(folders, "a"), -2.0 * _change(folders, "b")
    whole = cancelled = chance = 0.0
    for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True):
        whole += abs(x) + abs(y)
        cancelled += 2 * min(abs(x), abs(y)) if x * y < 0 else 0.0
        chance += min(abs(x), abs(y))
    assert row["sign_conflict"] == pytest.approx(cancelled / whole, rel=1e-6)
    assert row["sign_conflict_chance"] == pytest.approx(chance / whole, rel=1e-6)
    opposed = float((a * b < 0).double().mean())
    assert row["conflict_entries"] == pytest.approx(opposed, rel=1e-6)
    assert row["cosine"] == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), rel=1e-5)
    assert (row["norm_a"], row["norm_b"]) == pytest.approx((float(a.norm()), float(b.norm())))


def test_opposite_vectors_cancel_and_equal_ones_do_not(folders: dict[str, Path]) -> None:
    frame = _table(folders, "a", "opposite").to_frame()
    assert frame["sign_conflict"].to_numpy() == pytest.approx(1, abs=1e-5)
    assert frame["cosine"].to_numpy() == pytest.approx(-1, abs=1e-5)
    frame = _table(folders, "a", "a", scales=[1.0, 0.5]).to_frame()
    assert (frame["sign_conflict"] == 0).all()
    matrices = frame[frame["kind"] == "matrix"]
    assert matrices[["overlap_read", "overlap_write"]].to_numpy() == pytest.approx(1, abs=1e-6)


def test_task_interference_is_the_papers_formula(folders: dict[str, Path]) -> None:
    """By blocks: U'U - I of two orthonormal sets has only the block across."""
    row = _table(folders, "a", "b", rank=5).to_frame().set_index("component").loc["L0.W_out"]
    u, s, v = zip(
        *(torch.linalg.svd(_change(folders, n).T, full_matrices=False) for n in ("a", "b")),
        strict=True,
    )
    across = u[0][:, :5].T @ u[1][:, :5]
    right = v[0][:5] @ v[1][:5].T
    first = across @ torch.diag(s[1][:5]) @ right.T
    second = across.T @ torch.diag(s[0][:5]) @ right
    sti = float(first.abs().sum() + second.abs().sum())
    assert row["sti"] == pytest.approx(sti, rel=1e-6)
    assert row["sti_relative"] == pytest.approx(
        sti / float(s[0][:5].sum() + s[1][:5].sum()), rel=1e-6
    )
    assert row["overlap_read"] == pytest.approx(float(across.square().sum()) / 5, rel=1e-6)
    assert row["overlap_write"] == pytest.approx(float(right.square().sum()) / 5, rel=1e-6)
    assert row["overlap_read_chance"] == pytest.approx(5 / 48)
    assert row["overlap_write_chance"] == pytest.approx(5 / 32)
    assert (row["rank_a"], row["rank_b"]) == (5, 5)


@pytest.mark.parametrize("shape", [(48, 12), (12, 48)])
def test_leading_directions_are_those_of_the_svd(shape: tuple[int, int]) -> None:
    from tvlens.compose.interference import leading

    low = LowRank(torch.randn(shape[0], 4), torch.randn(4, shape[1]))
    for delta in (low, Dense(low.dense())):
        found = leading(delta, 3)
        assert found is not None
        u, s, v = torch.linalg.svd(low.written_out(), full_matrices=False)
        torch.testing.assert_close(found.values, s[:3], rtol=1e-6, atol=0)
        again = found.left @ torch.diag(found.values) @ found.right
        best = u[:, :3] @ torch.diag(s[:3]) @ v[:3]
        torch.testing.assert_close(again, best, rtol=0, atol=1e-5)
        whole = leading(delta, 100)
        assert whole is not None
        assert len(whole.values) in (4, 12)  # in float32 the product has a little more rank
    assert leading(Dense(torch.randn(5)), 3) is None


def test_planted_subspaces_are_orthogonal_or_shared() -> None:
    from tvlens.compose.interference import leading, subspaces_between

    def of(rows: slice, columns: slice) -> Dense:
        matrix = torch.zeros(20, 30)
        block = torch.randn(matrix[rows, columns].shape)
        matrix[rows, columns] = block
        return Dense(matrix)

    apart = [leading(d, 4) for d in (of(slice(0, 4), slice(0, 9)), of(slice(4, 8), slice(9, 20)))]
    row = subspaces_between(*apart)
    assert row["sti"] == pytest.approx(0, abs=1e-9)
    assert (row["overlap_read"], row["overlap_write"]) == pytest.approx((0, 0), abs=1e-12)
    reads = [leading(d, 4) for d in (of(slice(0, 4), slice(0, 9)), of(slice(0, 4), slice(9, 20)))]
    row = subspaces_between(*reads)
    assert (row["overlap_read"], row["overlap_write"]) == pytest.approx((1, 0), abs=1e-9)
    assert row["sti"] == pytest.approx(0, abs=1e-6)  # one orthogonal side is enough


def test_it_is_saved_like_other_tables_and_refuses_one_vector(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    from tvlens.tables import Table

    table = _table(folders, "a", "b", select="L0.mlp")
    assert len(table) == 3
    path = table.save(tmp_path)
    assert path.name == "interference.parquet"
    assert Table.load(path).data.equals(table.data)
    with pytest.raises(StudyError, match="needs two vectors"):
        _table(folders, "a")
