"""Writes a Llama-shaped pair of any size as two Hugging Face folders, quickly and in little memory.

    python benchmarks/synthetic.py smol FOLDER       # FOLDER/base and FOLDER/tuned

Base weights are Gaussian; the tuned model is base + a Gaussian of 1 % of its spread, rounded to
the dtype that both are stored in. A seed and a tensor's name decide its numbers, so a pair can be
made again; a further fine-tune of its base (``further_at``) has a Gaussian of its own. A Gaussian
matrix has a spectrum without gaps or clusters, the slowest kind for an eigensolver that deflates.
No tokenizer is written, and the models say nothing.

Slabs of rows go straight into the files (safetensors: eight bytes of length, a JSON header, the
tensors one after the other), so memory is a few hundred MB whatever the size of the pair.
"""

import argparse
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil, prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

Slabs = Callable[[str, tuple[int, ...], str], Iterator[tuple[Tensor, ...]]]
"""From a tensor's name, shape and dtype to its flat numbers in each of some models, in slabs."""
SPREAD, CHANGE = 0.02, 0.01
"""Standard deviation of a base weight, and that of the tuning vector relative to it."""
SLAB = 1 << 22
"""Numbers drawn at once: 16 MiB in float32, so that base, noise and sum stay in a few of them."""
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""How safetensors calls them."""


@dataclass(frozen=True)
class Shape:
    """The numbers of a Llama-shaped model and how it is stored.

    Attributes:
        layers: Blocks.
        d_model: Width of the residual stream.
        d_mlp: Neurons of a block.
        heads: Query heads of a block.
        kv_heads: Key and value heads of a block.
        d_head: Width of a head.
        vocabulary: Rows of the embedding, which is tied.
        dtype: Of the stored weights.
        shards: Number of weight files.
    """

    layers: int
    d_model: int
    d_mlp: int
    heads: int
    kv_heads: int
    d_head: int
    vocabulary: int
    dtype: str = "float32"
    shards: int = 1

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Stored shape by name, in the order of the file."""
        found: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.d_model)
        }
        for layer in range(self.layers):
            found |= {f"model.layers.{layer}.{n}.weight": s for n, s in self._block.items()}
        return {**found, "model.norm.weight": (self.d_model,)}

    @property
    def _block(self) -> dict[str, tuple[int, ...]]:
        queries, keys = self.heads * self.d_head, self.kv_heads * self.d_head
        return {
            "input_layernorm": (self.d_model,),
            "self_attn.q_proj": (queries, self.d_model),
            "self_attn.k_proj": (keys, self.d_model),
            "self_attn.v_proj": (keys, self.d_model),
            "self_attn.o_proj": (self.d_model, queries),
            "post_attention_layernorm": (self.d_model,),
            "mlp.gate_proj": (self.d_mlp, self.d_model),
            "mlp.up_proj": (self.d_mlp, self.d_model),
            "mlp.down_proj": (self.d_model, self.d_mlp),
        }

    @property
    def parameters(self) -> int:
        """Numbers in one model."""
        return sum(map(prod, self.tensors.values()))

    @property
    def file_bytes(self) -> int:
        """Bytes of the weights of one model as stored."""
        return self.parameters * self._itemsize

    @property
    def largest_block(self) -> int:
        """Numbers in the largest block: one layer, or the embedding with the final norm."""
        block = sum(map(prod, self._block.values()))
        return max(block, self.vocabulary * self.d_model + self.d_model)

    @property
    def _itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize

    def config(self) -> dict[str, object]:
        """config.json, complete: transformers loads the folder."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "dtype": self.dtype,
            "eos_token_id": 2,
            "head_dim": self.d_head,
            "hidden_act": "silu",
            "hidden_size": self.d_model,
            "initializer_range": SPREAD,
            "intermediate_size": self.d_mlp,
            "max_position_embeddings": 2048,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "tie_word_embeddings": True,
            "use_cache": True,
            "vocab_size": self.vocabulary,
        }


PRESETS = {
    "tiny": Shape(4, 64, 160, 4, 2, 16, 512, shards=2),
    "smol": Shape(30, 576, 1536, 9, 3, 64, 49152),  # SmolLM2-135M
    "single": Shape(32, 960, 2560, 15, 5, 64, 49152),  # SmolLM2-360M: 1.45 GB in one file
    "one_billion": Shape(16, 2048, 8192, 32, 8, 64, 128256, "bfloat16", 3),  # Llama-3.2-1B
    "quarter": Shape(4, 2048, 8192, 32, 8, 64, 32064, "bfloat16", 2),  # of one_billion
}
"""Shapes of known models. ``quarter`` has a quarter of the layers of ``one_billion`` and of its
vocabulary, so that it is a quarter of its bytes."""


class PairFolders(NamedTuple):
    """Where the two models of a pair lie."""

    base: Path
    tuned: Path


def write_pair(shape: Shape, folder: Path, *, seed: int = 0) -> PairFolders:
    """Write the base and the tuned model of a shape into ``folder``."""
    folders = PairFolders(folder / "base", folder / "tuned")
    for path in folders:
        path.mkdir(parents=True, exist_ok=True)
    _write_models(shape, folders, partial(_slabs, seed=seed))
    return folders


def _write_models(shape: Shape, folders: Sequence[Path], slabs: Slabs) -> None:
    """Config, shards and index of the models whose numbers ``slabs`` gives, one a folder."""
    for path in folders:
        (path / "config.json").write_text(json.dumps(shape.config(), indent=2))
    shards = _shards(shape)
    for number, names in enumerate(shards, start=1):
        _write_shard(shape, folders, _file_name(number, len(shards)), names, slabs)
    if len(shards) > 1:
        for path in folders:
            (path / "model.safetensors.index.json").write_text(_index(shape, shards))


def is_written(shape: Shape, folder: Path, *, seed: int = 0) -> bool:
    """Whether ``folder`` holds the pair of this shape and seed already."""
    note = folder / "synthetic.json"
    return note.is_file() and json.loads(note.read_text()) == _note(shape, seed)


def pair_at(shape: Shape, folder: Path, *, seed: int = 0) -> PairFolders:
    """The pair in ``folder``, written there unless it is already."""
    if not is_written(shape, folder, seed=seed):
        write_pair(shape, folder, seed=seed)
        (folder / "synthetic.json").write_text(json.dumps(_note(shape, seed)))
    return PairFolders(folder / "base", folder / "tuned")


def further_at(shape: Shape, folder: Path, *, seed: int = 0) -> Path:
    """A second fine-tune of the base of the pair in ``folder``, written there unless it is."""
    path, note = folder / "further", folder / "further.json"
    if not note.is_file() or json.loads(note.read_text()) != _note(shape, seed):
        path.mkdir(parents=True, exist_ok=True)
        _write_models(shape, [path], partial(_further_slabs, seed=seed))
        note.write_text(json.dumps(_note(shape, seed)))
    return path


def _note(shape: Shape, seed: int) -> dict[str, object]:
    return {**asdict(shape), "seed": seed}


def _shards(shape: Shape) -> list[list[str]]:
    """Names by file, in order, cut where a file has its share of the numbers."""
    share = ceil(shape.parameters / shape.shards)
    shards: list[list[str]] = [[] for _ in range(shape.shards)]
    before = 0
    for name, size in shape.tensors.items():
        shards[min(before // share, shape.shards - 1)].append(name)
        before += prod(size)
    return [names for names in shards if names]


def _file_name(number: int, count: int) -> str:
    return f"model-{number:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"


def _index(shape: Shape, shards: list[list[str]]) -> str:
    places = {
        name: _file_name(number, len(shards))
        for number, names in enumerate(shards, start=1)
        for name in names
    }
    return json.dumps({"metadata": {"total_size": shape.file_bytes}, "weight_map": places})


def _write_shard(
    shape: Shape, folders: Sequence[Path], file_name: str, names: list[str], slabs: Slabs
) -> None:
    header = _header(shape, names)
    with ExitStack() as stack:
        files = [stack.enter_context((path / file_name).open("wb")) for path in folders]
        for file in files:
            file.write(header)
        for name in names:
            for numbers in slabs(name, shape.tensors[name], shape.dtype):
                for file, slab in zip(files, numbers, strict=True):
                    _append(file, slab)


def _header(shape: Shape, names: list[str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        size = shape.tensors[name]
        stop = start + prod(size) * shape.file_bytes // shape.parameters
        entries[name] = {
            "dtype": DTYPES[shape.dtype],
            "shape": size,
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _slabs(
    name: str, size: tuple[int, ...], dtype: str, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Base and tuned numbers of a tensor, flat, a slab at a time."""
    generator = torch.Generator().manual_seed(
        zlib.crc32(f"{seed} {name}".encode())
    )  # 32 bits count
    centre = 1.0 if len(size) == 1 else 0.0  # gains of norms
    stored = getattr(torch, dtype)
    for start in range(0, prod(size), SLAB):
        count = min(SLAB, prod(size) - start)
        base = torch.randn(count, generator=generator).mul_(SPREAD).add_(centre).to(stored)
        tuned = torch.randn(count, generator=generator).mul_(SPREAD * CHANGE).add_(base)
        yield base, tuned.to(stored)


def _further_slabs(
    name: str, size: tuple[int, ...], dtype: str, seed: int
) -> Iterator[tuple[Tensor]]:
    """Numbers of another model tuned from the same base, flat, a slab at a time."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name} further".encode()))
    for base, _ in _slabs(name, size, dtype, seed):
        noise = torch.randn(len(base), generator=generator).mul_(SPREAD * CHANGE)
        yield (noise.add_(base).to(base.dtype),)


def _append(file: BinaryIO, slab: Tensor) -> None:
    file.write(memoryview(slab.view(torch.uint8).numpy()))


def main() -> None:
    """Write the pair that the command line names."""
    parser = argparse.ArgumentParser(description="Write a synthetic pair of checkpoints.")
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    for name in ("layers", "d-model", "d-mlp", "heads", "kv-heads", "d-head", "vocabulary"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--shards", type=int)
    asked = vars(parser.parse_args())
    preset, folder, seed = (asked.pop(name) for name in ("preset", "folder", "seed"))
    given = {name: value for name, value in asked.items() if value is not None}
    shape = replace(PRESETS[preset], **given)
    write_pair(shape, folder, seed=seed)
    print(f"{shape.parameters / 1e6:,.0f} M numbers, {shape.file_bytes / 1e9:.2f} GB a model")


if __name__ == "__main__":
    main()
