"""The readers of checkpoints and adapters against 20,000 broken folders.

Only a ``TvlensError`` of one sentence with a hint may come out, memory stays bounded, and nothing
is written. The number of inputs is ``TVLENS_FUZZ``, its seed ``TVLENS_FUZZ_SEED``:

    TVLENS_FUZZ=20000 python -m pytest -m deep -s tests/test_weights_fuzz.py
"""

import os
import random
import resource
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.broken_checkpoints import break_folder, templates
from tvlens.errors import TvlensError

BASES = {"gpt2 lora": "gpt2", "gguf": "wide"}
INPUTS, MEBIBYTE = 20_000, 1 << 20
MOST_MEMORY = 300 * MEBIBYTE
"""More than a run began with; a header may claim 2**62 bytes."""
LONGEST_SENTENCE = 6_000
"""Characters; a broken index may hold a file name of five thousand."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return templates(tmp_path_factory.mktemp("good"))


def _read_everything(good: dict[str, Path], name: str, folder: Path) -> None:
    """What tvlens does with a checkpoint: open it, pair it with a good one, read all of it."""
    from tvlens.weights.matching import load_pair
    from tvlens.weights.sources.opening import open_source

    source = open_source(folder)
    for stored in source.tensors:
        source.read(stored)
    source.sha256()
    base = good[BASES.get(name, "base")]
    pair = load_pair(folder, good["single"]) if name == "base" else load_pair(base, folder)
    for component in pair.components:
        pair.read(component).dense_delta()


def _state(folder: Path) -> list[tuple[str, int, int]]:
    return [(str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in sorted(folder.iterdir())]


def _fuzz(good: dict[str, Path], root: Path, inputs: int, seed: int) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    memory = _peak()
    for number in range(inputs):
        rng = random.Random(f"{seed} {number}")
        name = rng.choice(sorted(set(good) - {*BASES.values()}))
        damage = break_folder(good[name], root / "broken", rng)
        before = _state(root / "broken")
        case = f"seed {seed}, input {number}: {name}: {damage}"
        outcomes[_outcome(good, name, root / "broken", case)] += 1
        assert _state(root / "broken") == before, f"{case}: something was written"
        assert _peak() - memory < MOST_MEMORY, f"{case}: {(_peak() - memory) / MEBIBYTE:.0f} MiB"
    return outcomes


def _outcome(good: dict[str, Path], name: str, folder: Path, case: str) -> str:
    """What came of a folder: ``read`` or the kind of error, whose form is checked."""
    try:
        _read_everything(good, name, folder)
    except TvlensError as error:
        refused = error
    except Exception as error:
        pytest.fail(f"{case}: {type(error).__name__}: {error}")
    else:
        return "read"
    sentence = str(refused)
    assert "\n" not in sentence, f"{case}: more than a sentence: {sentence}"
    assert len(sentence) < LONGEST_SENTENCE, f"{case}: {len(sentence)} characters"
    assert refused.hint, f"{case}: no hint: {sentence}"
    return type(refused).__name__


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.slow
def test_a_slice_of_broken_folders_gives_sentences_only(
    good: dict[str, Path], tmp_path: Path
) -> None:
    outcomes = _fuzz(good, tmp_path, 500, seed=1)
    assert len(outcomes) >= 4
    assert outcomes["read"] < 250


@pytest.mark.deep
def test_twenty_thousand_broken_folders_give_sentences_only(
    good: dict[str, Path], tmp_path: Path
) -> None:
    inputs = int(os.environ.get("TVLENS_FUZZ", INPUTS))
    seed = int(os.environ.get("TVLENS_FUZZ_SEED", 2))
    memory, start = _peak(), time.perf_counter()
    outcomes = _fuzz(good, tmp_path, inputs, seed)
    seconds = time.perf_counter() - start
    grown = (_peak() - memory) / MEBIBYTE
    print(f"{inputs} inputs in {seconds:.0f} s, peak + {grown:.0f} MiB: {dict(outcomes)}")
