"""Checkpoints and adapters that a merge writes: byte for byte, loadable, whole or not at all."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_checkpoints import (
    add_noise,
    copy_with,
    tiny_adapter,
    tiny_gpt2,
    tiny_llama,
)
from tvlens.errors import CheckpointError, StudyError

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INDEX = "model.safetensors.index.json"


def _merge(base, vectors, **options):
    from tvlens.compose.combining import merge

    return merge(base, vectors, **options)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def _tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def _same(first: Tensor, second: Tensor) -> bool:
    pair = (x.contiguous().flatten().view(torch.uint8) for x in (first, second))
    return first.dtype == second.dtype and torch.equal(*pair)


def _logits(folder: Path, **options) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", **{"dtype": torch.float32, **options}
    ).eval()
    with torch.no_grad():
        return model(torch.arange(12).reshape(2, 6)).logits


def _sharded(folder: Path, out: Path, shards: int = 3) -> Path:
    """The same checkpoint in shards, with an index."""
    copy_with(folder, out, lambda tensors: None)
    tensors = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({n: tensors[n] for n in part}, out / file, {"format": "pt", "shard": str(number)})
        places |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (out / INDEX).write_text(json.dumps(index))
    return out


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("llama")
    base = tiny_llama(root / "base")
    for name, text in {
        "tokenizer_config.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "LICENSE": "free",
        "README.md": "the base's own",
        "tvlens_storage.json": '{"rounding": {"dtype": "float16"}}',
        "optimizer.pt": "no",
    }.items():
        (base / name).write_text(text)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("tools")

    def narrow(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    tuned = copy_with(base, root / "a", add_noise(1))
    return {
        "base": base,
        "a": tuned,
        "b": copy_with(base, root / "b", add_noise(2)),
        "lora": tiny_adapter(base, root / "lora"),
        "short": copy_with(base, root / "short", narrow),
        "short_a": copy_with(tuned, root / "short_a", narrow),
        "sharded": _sharded(base, root / "sharded"),
    }


def test_the_folder_has_the_bases_files_and_says_where_it_comes_from(
    llama: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    saved = _merge(llama["base"], [llama["a"], llama["b"]], scales=[0.5, 0.25]).save(
        out, command=f"tvlens apply org/model {tmp_path}/x"
    )
    base, found = _bytes(llama["base"]), _bytes(out)
    copied = {"config.json", "generation_config.json", "tokenizer_config.json", "LICENSE"}
    copied |= {"chat_template.jinja", "additional_chat_templates/tool.jinja"}
    assert {name for name in found if found[name] == base.get(name)} == copied
    assert found.keys() - copied == {"model.safetensors", "README.md", "tvlens_manifest.json"}
    card = found["README.md"].decode()
    assert "base + 0.5 * a + 0.25 * b" in card
    assert "tvlens apply org/model x\n" in card
    assert str(tmp_path) not in card
    manifest = json.loads(found["tvlens_manifest.json"])
    assert [t["scale"] for t in manifest["terms"]] == [0.5, 0.25]
    assert manifest["files"].keys() == found.keys() - {"tvlens_manifest.json"}
    assert len(manifest["changed"]) == len(_tensors(llama["base"]))
    assert 0 < saved.summary["relative_rounding_loss"] < 1e-4
    assert saved.summary["share_of_entries_lost"] == 0
    assert oct(out.stat().st_mode)[-3:] == "755"
    assert [*tmp_path.iterdir()] == [out]


@pytest.mark.slow
def test_twice_the_same_merge_gives_the_same_bytes(llama: dict[str, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        _merge(llama["base"], [llama["a"], llama["lora"]], method="dare", seed=3).save(
            tmp_path / name / "m"
        )
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")


@pytest.mark.parametrize("select", ["L1H2", "L0N3,L0N7", "layer == 1 and part == 'ln2.w'"])
def test_a_scoped_edit_leaves_every_other_tensor_byte_identical(
    llama: dict[str, Path], tmp_path: Path, select: str
) -> None:
    out = tmp_path / "m"
    saved = _merge(llama["sharded"], [llama["a"]], select=select).save(out)
    before, after = _tensors(llama["sharded"]), _tensors(out)
    assert before.keys() == after.keys()
    differ = {name for name in before if not _same(before[name], after[name])}
    assert differ == set(saved.manifest.changed)
    assert 0 < len(differ) < 4
    files = {p.name: p.read_bytes() for p in llama["sharded"].glob("model*")}
    places = json.loads(files[INDEX])["weight_map"]
    touched = {places[name] for name in differ}
    assert set(saved.manifest.untouched_files) == set(places.values()) - touched
    for name, content in files.items():
        assert ((out / name).read_bytes() == content) == (name not in touched), name
        assert len((out / name).read_bytes()) == len(content)


def test_a_vector_that_does_nothing_gives_the_base(llama: dict[str, Path], tmp_path: Path) -> None:
    saved = _merge(llama["base"], [llama["base"]]).save(tmp_path / "m")
    assert saved.manifest.changed == ()
    assert _bytes(tmp_path / "m")["model.safetensors"] == _bytes(llama["base"])["model.safetensors"]
    assert saved.manifest.untouched_files == ("model.safetensors",)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["task", "ties", "mergekit:ties"])
def test_what_transformers_loads_computes_like_the_edit_in_memory(
    llama: dict[str, Path], tmp_path: Path, method: str
) -> None:
    from transformers import AutoModelForCausalLM

    found = _merge(llama["base"], [llama["a"], llama["lora"]], scales=[0.7, 0.5], method=method)
    found.save(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(
        llama["base"], dtype=torch.float32, attn_implementation="eager"
    ).eval()
    before = _logits(llama["base"])
    with found.vector().apply_to(model), torch.no_grad():
        expected = model(torch.arange(12).reshape(2, 6)).logits
    logits = _logits(tmp_path / "m")
    assert float((logits - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert float((logits - before).abs().max()) > 1e-3


@pytest.mark.slow
def test_what_transformer_lens_loads_computes_like_the_gates(
    llama: dict[str, Path], tmp_path: Path
) -> None:
    from tvlens.models.lens import LensModel

    found = _merge(llama["base"], [llama["a"], llama["b"]], method="ties")
    found.save(tmp_path / "m")
    lens, merged = LensModel.load(llama["base"]), LensModel.load(tmp_path / "m")
    ids = torch.arange(12).reshape(2, 6)
    mask = torch.ones_like(ids)
    with found.vector().apply_to(lens):
        expected = lens(ids, mask)
    assert float((merged(ids, mask) - expected).abs().max()) <= 1e-5
    assert float((lens(ids, mask) - expected).abs().max()) > 1e-3


def test_short_dtypes_stay_and_what_rounding_lost_is_said(
    llama: dict[str, Path], tmp_path: Path
) -> None:
    saved = _merge(llama["short"], [llama["a"]], scales=0.03).save(tmp_path / "m")
    base, tuned, new = _tensors(llama["short"]), _tensors(llama["a"]), _tensors(tmp_path / "m")
    lost = total = entries = unchanged = 0.0
    for name, tensor in base.items():
        change = 0.03 * (tuned[name] - tensor.float()).double()
        assert new[name].dtype == torch.bfloat16
        wanted = (tensor.double() + change).bfloat16()
        assert torch.equal(new[name], wanted), name
        lost += float((new[name].double() - tensor.double() - change).square().sum())
        total += float(change.square().sum())
        entries += int((change != 0).sum())
        unchanged += int(((change != 0) & (new[name] == tensor)).sum())
    assert saved.manifest.rounding.relative == pytest.approx((lost / total) ** 0.5, rel=1e-9)
    assert saved.manifest.rounding.share_of_entries_lost == pytest.approx(unchanged / entries)
    assert saved.manifest.rounding.share_of_entries_lost > 0.05
    assert "rounding lost" in saved.sentence
    logits = _logits(tmp_path / "m", dtype=torch.bfloat16)
    assert bool(logits.isfinite().all())


def test_another_dtype_may_be_asked_for(llama: dict[str, Path], tmp_path: Path) -> None:
    _merge(llama["short"], [llama["short_a"]], scales=0.5).save(tmp_path / "m", dtype="float32")
    base, tuned, new = (_tensors(f) for f in (llama["short"], llama["short_a"], tmp_path / "m"))
    for name, tensor in base.items():
        wanted = tensor.double() + 0.5 * (tuned[name].double() - tensor.double())
        assert torch.equal(new[name], wanted.float()), name
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["dtype"] == "float32"
    with pytest.raises(StudyError, match="rank 1 or more, got 0"):
        _merge(llama["short"], [llama["short_a"]]).save(tmp_path / "n", as_lora=0)


def test_what_does_not_fit_the_dtype_is_refused_and_leaves_nothing(
    llama: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="overflows float16"):
        _merge(llama["base"], [llama["a"]], scales=1e9).save(tmp_path / "m", dtype="float16")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_pickles_become_safetensors_shard_by_shard(llama: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((llama["base"] / "config.json").read_bytes())
    tensors = _tensors(llama["base"])
    names, places = sorted(tensors), {}
    for number in (1, 2):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        part = names[number - 1 :: 2]
        torch.save({n: tensors[n] for n in part}, base / file)
        places |= dict.fromkeys(part, file)
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    out = tmp_path / "m"
    _merge(base, [llama["a"]], scales=0.5).save(out)
    wanted = dict(_merge(llama["base"], [llama["a"]], scales=0.5).tensors())
    assert all(_same(tensor, _tensors(out)[name]) for name, tensor in wanted.items())
    assert {p.name for p in out.glob("*model*")} == {
        INDEX,
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert bool(_logits(out).isfinite().all())


def test_a_base_that_ties_gets_an_unembedding_where_one_is_trained(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    adapter = tiny_adapter(base, tmp_path / "lora", target_modules=["q_proj", "lm_head"])
    out = tmp_path / "m"
    _merge(base, [adapter]).save(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    new = _tensors(out)
    assert _same(new[EMBED], _tensors(base)[EMBED])
    factors = load_file(adapter / "adapter_model.safetensors")
    stem = "base_model.model.lm_head.lora_"
    change = 1.5 * (factors[f"{stem}B.weight"].double() @ factors[f"{stem}A.weight"].double())
    wanted = (_tensors(base)[EMBED].double() + change).float()
    assert float((new[HEAD] - wanted).abs().max()) <= 2e-7
    assert bool(_logits(out).isfinite().all())


@pytest.mark.parametrize("maker", [tiny_llama, tiny_gpt2])
def test_an_adapter_of_full_rank_is_the_merge(maker, tmp_path: Path) -> None:
    """Loaded by peft on the base, it computes what the merged matrices do."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = maker(tmp_path / "base")
    tuned = copy_with(base, tmp_path / "a", add_noise(1))
    found = _merge(base, [tuned], select='kind == "matrix"')
    saved = found.save(tmp_path / "lora", as_lora=64)
    assert saved.manifest.adapter is not None
    assert saved.manifest.adapter.relative_error < 1e-9
    assert saved.manifest.adapter.left_out == {}
    found.save(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    adapted = PeftModel.from_pretrained(model, tmp_path / "lora").eval()
    with torch.no_grad():
        logits = adapted(torch.arange(12).reshape(2, 6)).logits
    expected = _logits(tmp_path / "m")
    assert float((logits - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


def test_a_truncated_adapter_says_what_it_lost(llama: dict[str, Path], tmp_path: Path) -> None:
    saved = _merge(llama["base"], [llama["a"]], scales=0.5).save(tmp_path / "lora", as_lora=3)
    about = saved.manifest.adapter
    assert about is not None
    assert {"L0.ln1.w", "L1.ln2.w", "ln_final.w"} <= about.left_out.keys()
    factors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    base, tuned = _tensors(llama["base"]), _tensors(llama["a"])
    for tensor, stated in about.by_tensor.items():
        change = 0.5 * (tuned[tensor] - base[tensor]).double()
        stem = f"base_model.model.{tensor.removesuffix('.weight')}.lora_"
        if tensor == EMBED:
            a, b = (factors[f"{stem}embedding_{side}"].double() for side in "AB")
            product = (b @ a).T
        else:
            a, b = (factors[f"{stem}{side}.weight"].double() for side in "AB")
            product = b @ a
        assert a.shape[0] == 3
        values = torch.linalg.svdvals(change)
        best = float(values[3:].norm() / values.norm())
        error = float((product - change).norm() / change.norm())
        assert error == pytest.approx(stated, abs=1e-6)
        assert error == pytest.approx(best, abs=1e-6)
    whole = sum(float((0.5 * (tuned[n] - base[n])).double().square().sum()) for n in base)
    out = sum(norm**2 for norm in about.left_out.values())
    assert about.left_out_share_of_squared_norm == pytest.approx(out / whole, rel=1e-5)
    assert "cannot hold" in saved.sentence


@pytest.mark.slow
def test_a_sum_of_adapters_becomes_an_adapter_without_loss(
    llama: dict[str, Path], tmp_path: Path
) -> None:
    second = tiny_adapter(llama["base"], tmp_path / "lora2", seed=5, target_modules=["q_proj"])
    saved = _merge(llama["base"], [llama["lora"], second], scales=[1.0, -1.0]).save(
        tmp_path / "sum", as_lora=8
    )
    assert saved.manifest.adapter is not None
    assert saved.manifest.adapter.relative_error < 1e-6
    again = dict(_merge(llama["base"], [tmp_path / "sum"]).tensors())
    wanted = dict(_merge(llama["base"], [llama["lora"], second], scales=[1.0, -1.0]).tensors())
    assert again.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-6)


def test_an_adapter_needs_a_matrix(llama: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no matrix of base changes"):
        _merge(llama["base"], [llama["a"]], select='kind == "norm"').save(tmp_path / "m", as_lora=2)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_what_is_there_is_not_written_over(llama: dict[str, Path], tmp_path: Path) -> None:
    out, found = tmp_path / "m", _merge(llama["base"], [llama["a"]])
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(StudyError, match="is there already"):
        found.save(out)
    with pytest.raises(StudyError, match="was not written by tvlens"):
        found.save(out, force=True)
    assert _bytes(out) == {"mine.txt": b"mine"}
    for place in (llama["base"], llama["base"] / "inside", llama["base"].parent, llama["a"]):
        with pytest.raises(StudyError, match="overlap"):
            found.save(place, force=True)
    found.save(tmp_path / "own")
    first = _bytes(tmp_path / "own")
    _merge(llama["base"], [llama["b"]]).save(tmp_path / "own", force=True)
    second = _bytes(tmp_path / "own")
    assert first["model.safetensors"] != second["model.safetensors"]
    assert {path.name for path in tmp_path.iterdir()} == {"m", "own"}


def test_a_model_in_memory_has_no_files_to_keep(llama: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama["base"], dtype=torch.float32)
    with pytest.raises(StudyError, match="is in memory"):
        _merge(model, [llama["a"]]).save(tmp_path / "m")


KILLED = """
import hashlib, json, os, random, signal, sys, time
from pathlib import Path
from tvlens.compose.combining import merge

base, a, b, place = sys.argv[1:]
merges, out = [merge(base, [vector]) for vector in (a, b)], Path(place) / "m"
begun = time.perf_counter()
merges[0].save(Path(place) / "timed")
seconds, delays = time.perf_counter() - begun, random.Random(0)
for turn in range(20):
    child = os.fork()
    if child == 0:
        for number in range(10_000):
            merges[number % 2].save(out, force=True)
    time.sleep(delays.random() * 3 * seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    files = [path for path in out.rglob("*") if path.is_file()]
    state = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    print(json.dumps({"state": state, "leftovers": len(list(out.parent.glob(".m-*")))}))
"""
"""One process makes the merges; each of twenty forks writes them in turn until it is killed."""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_old_state_or_the_new_one(
    llama: dict[str, Path], tmp_path: Path
) -> None:
    whole = []
    for name in ("a", "b"):
        _merge(str(llama["base"]), [str(llama[name])]).save(tmp_path / name / "m")
        files = [path for path in (tmp_path / name / "m").rglob("*") if path.is_file()]
        whole.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files})
    place = tmp_path / "place"
    words = [sys.executable, "-c", KILLED, llama["base"], llama["a"], llama["b"], place]
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    states = [turn["state"] for turn in found]
    assert len(states) == 20
    first = next(number for number, state in enumerate(states) if state)
    assert all(state in whole for state in states[first:])
    assert sum(turn["leftovers"] for turn in found) > 5  # the kills did hit the writing
    _merge(llama["base"], [llama["a"]]).save(place / "m", force=True)
    assert {path.name for path in place.iterdir()} == {"m", "timed"}
