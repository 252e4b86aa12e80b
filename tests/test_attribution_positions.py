"""Scores by position: the file against safetensors, the sums against the tables."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tvlens.attribution.activations import activation_scores
from tvlens.attribution.directions import question
from tvlens.attribution.nodes import all_parts
from tvlens.attribution.positions import (
    PositionFile,
    PositionIndex,
    PositionSeries,
    read_positions,
    write_positions,
)
from tvlens.attribution.tables import Cut, MethodRun
from tvlens.errors import StudyError
from tvlens.models import SHIPPED

from . import attribution_pairs as pairs

HEADS, STREAM = Cut("head", "z"), Cut("node", "resid_pre")


def planted(count: int, *, start: int = 0) -> dict[Cut, torch.Tensor]:
    """Scores that say where they are: prompt, place, layer and number are their digits."""
    prompt, place, layer = torch.meshgrid(
        torch.arange(start, start + count), torch.arange(6), torch.arange(2), indexing="ij"
    )
    stream = (1000 * prompt + 100 * place + 10 * layer)[..., None].float()
    return {HEADS: stream + torch.arange(4.0), STREAM: stream + 0.5}


def entry(**changed: object) -> dict[str, object]:
    tensors = {"z": {"kind": "head", "shape": [5, 6, 2, 4]}}
    tensors["resid_pre"] = {"kind": "node", "shape": [5, 6, 2, 1]}
    same = {"base": "b", "tuned": "t", "method": "m", "metric": "loss", "unit": "nats"}
    place = {"direction": "tuned_into_base", "at": "base"}
    rows = {"prompts": [0, 2, 3, 5, 9], "lengths": [6, 2, 4, 6, 1]}
    return {**same, **place, **rows, "tensors": tensors, **changed}


def written(*, prompts: int = 5, chunk: int = 2) -> PositionFile:
    file = PositionFile(prompts)
    for start in range(0, prompts, chunk):
        file.add(planted(min(chunk, prompts - start), start=start))
    return file


def test_a_file_written_in_chunks_is_read_whole_by_safetensors(tmp_path: Path) -> None:
    file = written()
    file.copy_to(tmp_path / "copied")
    found = load_file(tmp_path / "copied")
    assert {name: t.dtype for name, t in found.items()} == dict.fromkeys(found, torch.float32)
    for cut, scores in planted(5).items():
        assert torch.equal(found[cut.part], scores)
    assert file.kinds == {"z": "head", "resid_pre": "node"}


def test_a_file_that_is_not_whole_is_not_entered() -> None:
    file = PositionFile(5)
    file.add(planted(2))
    same = ("method", "space", "estimator", "direction", "at", "metric", "unit", "base", "tuned")
    run = MethodRun(**dict.fromkeys(same, ""), prompts=range(5))
    with pytest.raises(ValueError, match="5 prompts were to come, 2 came"):
        file.entry(run)


def test_a_file_that_is_being_written_has_no_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    file = written()
    assert file.rows == 5
    assert [*tmp_path.iterdir()] == []


def test_scores_are_read_back_by_kind_and_prompt(tmp_path: Path) -> None:
    write_positions(tmp_path, [PositionSeries(written(), entry())])
    heads = read_positions(tmp_path, "head")
    assert torch.equal(heads.scores, planted(5)[HEADS])
    assert (heads.part, heads.direction, heads.at, heads.unit) == (
        "z", "tuned_into_base", "base", "nats",
    )  # fmt: skip
    assert (heads.prompts, heads.lengths) == ((0, 2, 3, 5, 9), (6, 2, 4, 6, 1))
    index = PositionIndex.read(tmp_path)
    one = index.of_prompt(index.series[0], "resid_pre", 2)
    np.testing.assert_array_equal(one, planted(5)[STREAM][2, :4].numpy())


def test_the_folder_is_replaced_whole_and_goes_with_the_last_file(tmp_path: Path) -> None:
    write_positions(tmp_path, [PositionSeries(written(), entry())] * 1)
    write_positions(tmp_path, [PositionSeries(written(prompts=1), entry(tuned="u"))])
    assert {path.name for path in (tmp_path / "positions").iterdir()} == {
        "1.safetensors", "index.json",
    }  # fmt: skip
    assert read_positions(tmp_path, "node").tuned == "u"
    write_positions(tmp_path, [])
    assert list(tmp_path.iterdir()) == []


def test_what_is_meant_must_be_one_tensor(tmp_path: Path) -> None:
    def series(**changed: object) -> PositionSeries:
        return PositionSeries(written(), entry(**changed))

    noised = {"direction": "corrupt_into_clean"}
    write_positions(tmp_path, [series(), series(**noised, at="base"), series(**noised, at="tuned")])
    assert read_positions(tmp_path, "head").direction == "tuned_into_base"
    assert read_positions(tmp_path, "head", at="tuned").direction == "corrupt_into_clean"
    with pytest.raises(StudyError, match=r"several.*corrupt_into_clean at base.*at tuned.*Name"):
        read_positions(tmp_path, "head", direction="corrupt_into_clean")
    with pytest.raises(StudyError, match=r"no such scores .* 'neuron'; it has head z, tuned_into"):
        read_positions(tmp_path, "neuron")
    with pytest.raises(StudyError, match="--position"):
        read_positions(tmp_path / "elsewhere", "head")


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["tuned_into_base", "clean_into_corrupt", "zero_ablation"])
def test_scores_by_position_sum_exactly_to_the_tables_in_chunks_as_at_once(
    direction: str, tmp_path: Path
) -> None:
    from .test_attribution_nodes import batch

    hooked, rows = pairs.hooked_pair("llama"), batch()
    asked = question(hooked, SHIPPED["logit_diff"], direction)
    parts = all_parts(hooked.base)
    file = PositionFile(len(rows))
    found = activation_scores(asked, rows, parts=parts, keep=file.add, rows_at_once=2)
    assert found.positions is None
    file.copy_to(tmp_path / "copied")
    kept = load_file(tmp_path / "copied")
    table = found.table(neurons=None).to_frame().dropna(subset=["prompt"])
    scores = {(r.component, r.prompt): r.score for r in table.itertuples()}
    plain = activation_scores(asked, rows, parts=parts, rows_at_once=2)
    apart = activation_scores(asked, rows, parts=parts, by_position=True, rows_at_once=2)
    assert apart.positions is not None
    for cut, values in found.values.items():
        by_position = kept[cut.part or ""]
        assert torch.equal(by_position, apart.positions[cut])
        assert torch.equal(by_position.double().sum(1), values)
        largest = float(values.abs().max())
        torch.testing.assert_close(
            values.float(), plain.values[cut], rtol=0, atol=2e-6 * largest
        )  # float32 sums over positions in another order
        for row, number in enumerate(rows.lengths.tolist()):
            assert not by_position[row, number:].any()
            assert by_position[row, number - 1].shape == (2 if cut.layered else 1, values.shape[2])
    heads = kept["z"].double().sum(1)
    for prompt in range(len(rows)):
        for layer in range(2):
            for head in range(4):
                label = f"L{layer}H{head}.z"
                assert scores[label, prompt] == float(heads[prompt, layer, head]), label
