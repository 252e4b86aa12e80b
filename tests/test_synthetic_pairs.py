"""The pairs that benchmarks measure are what their shapes say."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.synthetic import CHANGE, PRESETS, SLAB, SPREAD, pair_at, write_pair

TINY = PRESETS["tiny"]


def _digests(folder: Path) -> dict[str, str]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_pair_loads_with_the_change_that_was_written(
    dtype: str, shards: int, tmp_path: Path
) -> None:
    from tvlens.weights.matching import load_pair

    shape = replace(TINY, dtype=dtype, shards=shards)
    folders = write_pair(shape, tmp_path)
    assert len(list(folders.base.glob("*.safetensors"))) == shards
    pair = load_pair(*folders)
    assert {entry.status for entry in pair.load_report.tensors} <= {"compared", "tied"}
    weights = [pair.read(c) for c in pair.components]
    assert sum(weight.base.numel() for weight in weights) == shape.parameters
    matrices = [w for w in weights if w.component.kind == "matrix"]
    for weight in matrices:
        assert weight.base_dtype == dtype
        assert float(weight.base.std()) == pytest.approx(SPREAD, rel=0.05)
        relative = float(weight.dense_delta().norm() / weight.base.norm())
        assert relative == pytest.approx(CHANGE, rel=0.08)  # bfloat16 rounds it by 5 %
    assert max(sum(w.base.numel() for w in map(pair.read, b)) for b in pair.blocks()) == (
        shape.largest_block
    )


def test_a_seed_decides_the_bytes(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        write_pair(TINY, tmp_path / name, seed=seed)
    one, same, other = (_digests(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same
    changed = {name for name in one if one[name] != other[name]}
    assert changed == {name for name in one if name.endswith(".safetensors")}


@pytest.mark.slow
def test_tensors_and_slabs_are_drawn_apart(tmp_path: Path) -> None:
    from tvlens.weights.sources.opening import open_source

    rows = 2 * SLAB // TINY.d_model
    source = open_source(str(write_pair(replace(TINY, vocabulary=rows), tmp_path).base))
    embedding = source.read("model.embed_tokens.weight").flatten()
    queries, keys = (
        source.read(f"model.layers.0.self_attn.{name}.weight").flatten()[:2048]
        for name in ("q_proj", "k_proj")
    )
    for first, second in ((embedding[:SLAB], embedding[SLAB:]), (queries, keys)):
        cosine = torch.nn.functional.cosine_similarity(first, second, dim=0)
        assert abs(float(cosine)) < 5 / len(second) ** 0.5


def test_transformers_loads_the_folders(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folders = write_pair(TINY, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folders.tuned)
    assert sum(p.numel() for p in model.parameters()) == TINY.parameters
    with torch.no_grad():
        assert bool(model(torch.arange(6)[None]).logits.isfinite().all())


def test_a_pair_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    file = next(iter(pair_at(TINY, tmp_path).base.glob("*.safetensors")))
    before = file.stat().st_mtime_ns
    pair_at(TINY, tmp_path)
    assert file.stat().st_mtime_ns == before
    pair_at(TINY, tmp_path, seed=1)
    assert file.stat().st_mtime_ns > before


def test_the_quarter_has_a_quarter_of_the_bytes() -> None:
    assert PRESETS["one_billion"].file_bytes / PRESETS["quarter"].file_bytes == (
        pytest.approx(4, rel=0.001)
    )
    assert 1.4e9 < PRESETS["single"].file_bytes < 1.6e9
