"""Decompose needs the memory of a few blocks, however many a checkpoint has.

Anonymous memory of a fresh interpreter, over one that only imports; pages of the mapped files do
not count. A block is the largest of the pair's, its numbers once in float32.
"""

import os
import sys
from pathlib import Path

import pytest

from benchmarks.memory import is_measurable, peak_memory
from benchmarks.synthetic import PRESETS, Shape, write_pair

BLOCKS = 8
"""Base, delta and rounding floors are three; the other five are one step's temporaries."""
ALLOCATOR = 250e6
"""What the C library keeps of freed arrays under 32 MB, and torch's and Arrow's own buffers."""
MANY_LAYERS = Shape(24, 512, 1408, 8, 2, 64, 5632, shards=2)
"""A layer is as large as the embedding and 1 / 25 of the whole: what leaks per layer shows."""
ROOT = Path(__file__).parent.parent
IMPORTS = """
import sys, torch
from tvlens.geometry import decompose
from tvlens.weights.matching import load_pair
torch.set_num_threads(1)
"""
DECOMPOSES = f"{IMPORTS}print(len(decompose(load_pair(*sys.argv[1:]))))"
KEEPS_ALL = f"""{IMPORTS}
pair = load_pair(*sys.argv[1:])
kept = [[pair.read(component) for component in block] for block in pair.blocks()]
for weights in kept:
    for weight in weights:
        weight.base.sum(), weight.dense_delta().sum()
print(sum(map(len, kept)))
"""

pytestmark = pytest.mark.skipif(not is_measurable(), reason="no /proc with RssAnon here")


def _peak(program: str, *arguments: object) -> int:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    pinned = {**os.environ, **dict.fromkeys(names, "1"), "PYTHONPATH": str(ROOT)}
    peak = peak_memory([sys.executable, "-c", program, *map(str, arguments)], pinned)
    assert peak.samples > 20, "over too soon to be seen"
    return peak.anonymous


def _growth(program: str, shape: Shape, folder: Path) -> float:
    """Bytes over an interpreter that only imports."""
    folders = write_pair(shape, folder)
    try:
        growth = _peak(program, *folders) - _peak(IMPORTS)
    finally:
        for path in folders:
            for file in path.glob("*.safetensors"):
                file.unlink()
    block = 4 * shape.largest_block
    print(f"{growth / 1e6:,.0f} MB over the imports; a block is {block / 1e6:,.0f} MB")
    return growth


def _bound(shape: Shape) -> float:
    return BLOCKS * 4 * shape.largest_block + ALLOCATOR


@pytest.mark.slow
def test_many_layers_need_no_more_than_a_few_blocks(tmp_path: Path) -> None:
    assert _growth(DECOMPOSES, MANY_LAYERS, tmp_path) <= _bound(MANY_LAYERS)


@pytest.mark.slow
def test_a_program_that_keeps_all_blocks_is_over_the_bound(tmp_path: Path) -> None:
    assert _growth(KEEPS_ALL, MANY_LAYERS, tmp_path) > _bound(MANY_LAYERS)


@pytest.mark.deep
@pytest.mark.parametrize("name", ["single", "quarter"])
def test_a_large_pair_needs_a_few_blocks(name: str, tmp_path: Path) -> None:
    shape = PRESETS[name]
    assert (shape.shards > 1) == (name == "quarter")
    assert _growth(DECOMPOSES, shape, tmp_path) <= _bound(shape)
