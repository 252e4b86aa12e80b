"""Checkpoints with something wrong: what a seed makes of a good folder, to fuzz the readers.

``templates`` makes the good folders; ``break_folder`` damages a copy of one and says how.
"""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.gguf_files import write_gguf
from tests.tiny_checkpoints import add_noise, copy_with, tiny_adapter, tiny_gpt2, tiny_llama

TINY = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 12, "vocab_size": 16}
BLOCKS = {**TINY, "hidden_size": 32, "intermediate_size": 32}
"""Rows of whole blocks of 32."""
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
SMALL_GPT2 = {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_inner": 12, "vocab_size": 16}
NUMBERS: list[Any] = [
    0, -1, 1, 2, 3, 7, 2**31, 2**32, 2**62, 2**63, 2**64, 10**400, 0.5, -0.0, 1e-320, 1e308,
    float("inf"), float("nan"), True, None,
]  # fmt: skip
WORDS: list[Any] = [
    "", "0", "F32", "F64", "I8", "F8_E4M3", "../x", "/etc/passwd", "a/../../b", "..\\x", "\0", ".",
    "x" * 5000, "llama", "gpt2", "gpt_neox", "LORA", "IA3", "é\u202e", "(", "(a{9}){9}", ".*",
    "model.safetensors", "config.json", "q_proj", "lm_head", "gptq",
]  # fmt: skip
NESTED: list[Any] = [[], {}, [1], [[]], {"a": {}}, [2**62, 2], [-1, 4], ["x"], {"": ""}]


def templates(root: Path) -> dict[str, Path]:
    """Good folders by name; ``base``, ``gpt2`` and ``wide`` are the bases of the others."""
    base = tiny_llama(root / "base", **TINY, **HEADS)
    gpt2 = tiny_gpt2(root / "gpt2", **SMALL_GPT2)
    made = {"base": base, "gpt2": gpt2}
    made["single"] = copy_with(base, root / "single", add_noise())
    made["shards"] = _shards(made["single"], root / "shards", "model", ".safetensors")
    made["bin"] = _shards(made["single"], root / "bin", "pytorch_model", ".bin")
    made["one bin"] = _one_bin(made["single"], root / "one bin")
    (made["single"] / "tvlens_storage.json").write_text(
        '{"rounding": {"dtype": "float16", "step": {"model.norm.weight": 0.1}}}'
    )
    modules = {"modules_to_save": ["norm"], "rank_pattern": {"v_proj": 2}}
    made["lora"] = tiny_adapter(base, root / "lora", **modules)
    made["dora"] = tiny_adapter(base, root / "dora", use_dora=True, trainable_token_indices=[1, 3])
    made["gpt2 lora"] = tiny_adapter(gpt2, root / "gpt2 lora", lora_bias=True, bias="all")
    made["lora bin"] = _one_bin(made["lora"], root / "lora bin")
    made["wide"] = tiny_llama(root / "wide", **BLOCKS, **HEADS)
    tokens = [f"word{i}" for i in range(16)]
    made["gguf"] = write_gguf(made["wide"], root / "gguf" / "a.gguf", "q4_0", tokens=tokens).parent
    for folder in made.values():
        for name in ("generation_config.json", "README.md"):
            (folder / name).unlink(missing_ok=True)
    return made


def break_folder(good: Path, out: Path, rng: random.Random) -> str:
    """A damaged copy of a folder in ``out``, which is made anew; what was done to it."""
    if out.exists():
        shutil.rmtree(out)
    shutil.copytree(good, out)
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        files = sorted(p for p in out.iterdir() if p.is_file() and not p.is_symlink())
        if not files:
            break
        path = rng.choice(files)
        kinds = _KINDS[path.suffix] * 3 + [_bytes, _bytes, _place]
        kind = rng.choice(kinds)
        done.append(f"{kind.__name__.lstrip('_')} {path.name}")
        kind(path, rng)
    return ", ".join(done)


def _json_values(path: Path, rng: random.Random) -> None:
    """Other values, types and keys somewhere in the JSON."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError):
        return _bytes(path, rng)
    for _ in range(rng.choice([1, 1, 2, 4])):
        content = _changed(content, rng)
    path.write_text(json.dumps(content))


def _json_text(path: Path, rng: random.Random) -> None:
    """What no JSON library writes."""
    text = path.read_bytes()
    start = text[: max(1, text.rfind(b"}"))]
    key = rng.choice(["model_type", "weight_map", "r", "hidden_size", "rounding", "vocab_size"])
    depth = rng.choice([10, 900, 5000, 200_000])
    path.write_bytes(
        rng.choice(
            [
                start + f', "{key}": 1, "{key}": 2}}'.encode(),
                start + f', "{key}": 1{"0" * rng.choice([10, 400, 4000])}}}'.encode(),
                start + b', "deep": ' + b"[" * depth + b"]" * depth + b"}",
                b'{"a":' * depth,
                b"\xef\xbb\xbf" + text,
                text.replace(b"e", b"\xff", 1),
                text.decode("latin-1").encode("utf-16"),
                start + b', "\\ud800": "\\ud800"}',
                b"[]",
                b"null",
                b"7",
            ]
        )
    )


def _header(path: Path, rng: random.Random) -> None:
    """A lying header of a safetensors file."""
    raw = path.read_bytes()
    try:
        length = struct.unpack("<Q", raw[:8])[0]
        header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    except (struct.error, ValueError, RecursionError):
        return _bytes(path, rng)
    for _ in range(rng.choice([1, 1, 2])):
        if not isinstance(header, dict) or not header:
            break
        name = rng.choice(sorted(header))
        if not isinstance(header[name], dict) or rng.random() < 0.2:
            header = _changed(header, rng)
        elif rng.random() < 0.3 and "data_offsets" in header[name]:
            first, second = rng.choice([(0, 8), (8, 0), (4, 2**62), (2**63, 2**64 - 1), (-4, 4)])
            header[name]["data_offsets"] = [first, second]
        else:
            header[name] = _changed(header[name], rng)
    text = json.dumps(header)
    if rng.random() < 0.2:
        text = text[:-1] + ', "a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}' * 2 + "}"
    encoded = text.encode()
    claimed = rng.choice([len(encoded)] * 5 + [0, 1, len(encoded) - 1, 2**31, 2**62, 2**64 - 1])
    path.write_bytes(struct.pack("<Q", claimed) + encoded + data)


def _pickle(path: Path, rng: random.Random) -> None:
    """A PyTorch file of other things than a state dict, or of a wrong one."""
    tensor = torch.ones(3)
    names = ["model.norm.weight", "a", "base_model.model.model.norm.lora_A.weight"]
    values: list[Any] = [
        tensor, tensor.to_sparse(), tensor.int(), tensor.to(torch.float8_e4m3fn), tensor / 0,
        torch.ones(1).expand(2**40, 2**20), torch.ones(8, device="meta"), torch.tensor(1.0),
        torch.empty(0), torch.ones(2, dtype=torch.complex64), 1, None, "x", {"a": tensor}, [tensor],
        torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    ]  # fmt: skip
    content: Any = {rng.choice(names): rng.choice(values) for _ in range(2)}
    if rng.random() < 0.4:
        content |= {3: tensor} if rng.random() < 0.3 else {"model.embed_tokens.weight": tensor}
    if rng.random() < 0.2:
        content = rng.choice([[tensor], tensor, {}, None, 7, {"state_dict": content}])
    torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.9)


def _settings(path: Path, rng: random.Random) -> None:
    """Other numbers in the header of a GGUF file: settings, types, shapes, offsets."""
    raw = bytearray(path.read_bytes())
    keys = [b"general.architecture", b"llama.", b"head_count", b"block_count", b"_length",
            b"tokenizer.ggml.tokens", b"token_type", b"rope.", b"blk.0.", b"output", b"token_embd",
            b".weight"]  # fmt: skip
    key = rng.choice(keys)
    places = [i for i in range(len(raw)) if raw.startswith(key, i)]
    if not places:
        return _bytes(path, rng)
    place = rng.choice(places) + rng.randrange(len(key) + 24)
    number = int(rng.choice(NUMBERS[:10])) % 2**64
    form, bits = rng.choice([("<B", 8), ("<I", 32), ("<Q", 64)])
    patch = struct.pack(form, number % 2**bits)
    raw[place : place + len(patch)] = patch
    path.write_bytes(raw)


def _bytes(path: Path, rng: random.Random) -> None:
    """Truncated, flipped, cut, doubled or foreign bytes."""
    raw = bytearray(path.read_bytes())
    where = (
        rng.randrange(len(raw) + 1) if rng.random() < 0.5 else rng.randrange(min(len(raw), 300) + 1)
    )
    if rng.random() < 0.25:
        where = max(0, len(raw) - rng.randrange(300))
    kind = rng.randrange(7)
    if kind == 0:
        del raw[where:]
    elif kind == 1:
        raw[where : where + 1] = rng.randbytes(1)
    elif kind == 2:
        raw[where : where + 8] = struct.pack("<Q", rng.choice([2**62, 2**64 - 1, 2**40, 0]))
    elif kind == 3:
        del raw[where : where + rng.randrange(1, 60)]
    elif kind == 4:
        raw[where:where] = raw[:where] or rng.randbytes(20)
    elif kind == 5:
        raw = bytearray(rng.randbytes(rng.choice([0, 1, 7, 8, 9, 100])))
    else:
        other = rng.choice(sorted(p for p in path.parent.iterdir() if p.is_file()))
        raw = bytearray(other.read_bytes())
    path.write_bytes(raw)


def _place(path: Path, rng: random.Random) -> None:
    """Something else than the file where the file should be, or another file beside it."""
    kind = rng.randrange(6)
    if kind == 5:
        beside = rng.choice(["adapter_config.json", "pytorch_model.bin", "model.safetensors",
                             "model-1.safetensors", "quantize_config.json", "tvlens_storage.json",
                             "model.safetensors.index.json", "config.json"])  # fmt: skip
        if os.path.lexists(path.parent / beside):
            return path.unlink()
        return _copied(path, path.parent / beside)
    outside = path.parent.parent / "outside"
    outside.write_bytes(path.read_bytes())
    path.unlink()
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(path.name)
    elif kind == 3:
        path.symlink_to(outside)
    elif kind == 4:
        path.symlink_to("/dev/zero") if rng.random() < 0.5 else os.mkfifo(path)


def _copied(path: Path, target: Path) -> None:
    target.write_bytes(path.read_bytes())


_KINDS: dict[str, list[Callable[[Path, random.Random], None]]] = {
    ".json": [_json_values, _json_values, _json_text],
    ".safetensors": [_header],
    ".bin": [_pickle],
    ".gguf": [_settings],
}


def _changed(content: Any, rng: random.Random) -> Any:
    """One value, key or entry of a JSON value replaced, doubled or taken out."""
    if isinstance(content, dict) and content and rng.random() < 0.9:
        key = rng.choice(sorted(content))
        if rng.random() < 0.12:
            return {k: v for k, v in content.items() if k != key}
        if rng.random() < 0.08:
            return content | {str(rng.choice(WORDS)): content[key]}
        return content | {key: _changed(content[key], rng)}
    if isinstance(content, list) and content and rng.random() < 0.7:
        index = rng.randrange(len(content))
        return [*content[:index], _changed(content[index], rng), *content[index + 1 :]]
    return rng.choice([rng.choice(NUMBERS), rng.choice(WORDS), rng.choice(NESTED)])


def _shards(good: Path, out: Path, stem: str, suffix: str) -> Path:
    from safetensors.torch import save_file

    shutil.copytree(good, out)
    (out / "model.safetensors").unlink()
    tensors = load_file(good / "model.safetensors")
    files = {
        name: f"{stem}-{i % 2 + 1:05}-of-00002{suffix}" for i, name in enumerate(sorted(tensors))
    }
    for file in set(files.values()):
        part = {name: tensors[name] for name in tensors if files[name] == file}
        save_file(part, out / file) if suffix == ".safetensors" else torch.save(part, out / file)
    (out / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": files}))
    return out


def _one_bin(good: Path, out: Path) -> Path:
    shutil.copytree(good, out)
    (weights,) = out.glob("*.safetensors")
    stem = "adapter_model" if weights.stem.startswith("adapter") else "pytorch_model"
    torch.save(load_file(weights), out / f"{stem}.bin")
    weights.unlink()
    return out
