"""A merge taken home: a checkpoint that transformers loads, under the base's file names.

Weight files in which no tensor changes come out byte by byte as they were, and so does every
unchanged tensor of the others. Config, tokenizer, chat template, generation config, licence and
code files are copied; the README is a model card of the merge. The folder appears whole or not at
all (``folders``), and ``tvlens verify`` can check it against its inputs (``manifest``).

A base in PyTorch's own format is written as safetensors, shard by shard.
"""

import fnmatch
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import file_digest
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from tvlens.errors import CheckpointError, StudyError
from tvlens.memory import release_freed
from tvlens.weights.sources.files import ADAPTER_CONFIG, model_files
from tvlens.weights.sources.folder import STORAGE, Source
from tvlens.weights.sources.gguf import GgufSource
from tvlens.weights.sources.json_file import read_json
from tvlens.weights.sources.memory import MemorySource

from .card import model_card
from .combining import Merge, Rounding
from .folders import refuse_existing, whole_folder
from .manifest import MANIFEST, AdapterRecord, InputRecord, Manifest, RoundingRecord, versions
from .shards import CODES, Content, Entry, Header, bytes_of, copied, read_header, write_file
from .terms import Term
from .weighting import save_shares

StoredAs = Literal["stored", "float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPANIONS = (
    *("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)
"""What is copied from beside the weights."""
TEMPLATES = "additional_chat_templates"
LARGE = 2**25
"""Bytes of a tensor from which glibc takes memory of its own for it, beside what it keeps."""
NOT_COPIED = (
    *("*.index.json", STORAGE, ADAPTER_CONFIG, MANIFEST),
    *("trainer_state.json", "*_results.json"),
)
"""Indices are written anew; a rounding note, an adapter and a training run are not the merge's."""
CARD = "README.md"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class SavedMerge:
    """What was written.

    Attributes:
        folder: Where.
        manifest: What ``tvlens_manifest.json`` says.
        notes: What a reader should know of the inputs, in sentences.
    """

    folder: Path
    manifest: Manifest = field(repr=False)
    notes: tuple[str, ...] = field(repr=False)

    @property
    def summary(self) -> dict[str, Any]:
        """What was written, in a few JSON values."""
        found = self.manifest
        summary: dict[str, Any] = {
            "folder": str(self.folder),
            "kind": found.kind,
            "name": found.name,
            "method": found.method,
            "scales": {term.name: term.scale for term in found.terms},
            "selection": found.selection,
            "changed_tensors": len(found.changed),
            "untouched_files": list(found.untouched_files),
            "dtype": found.dtype,
            "relative_rounding_loss": found.rounding.relative,
            "share_of_entries_lost": found.rounding.share_of_entries_lost,
        }
        if found.adapter is not None:
            about = found.adapter.model_dump(exclude={"by_tensor"})
            worst = max(found.adapter.by_tensor.values(), default=0.0)
            summary["adapter"] = {**about, "worst_relative_error": worst}
        return summary

    @property
    def sentence(self) -> str:
        """The same for people."""
        found = self.manifest
        lines = [f"{self.folder}: {found.name}, {len(found.changed)} tensors changed."]
        if found.adapter is not None:
            return "\n".join([*lines, *_adapter_lines(found.adapter)])
        loss = found.rounding
        lines.append(
            f"stored {found.stored_as}: rounding lost {loss.relative:.2g} of the change's length "
            f"and {loss.share_of_entries_lost:.2%} of its {loss.entries:,} entries."
        )
        if found.untouched_files:
            lines.append(f"untouched, byte by byte: {', '.join(found.untouched_files)}.")
        return "\n".join(lines)


def _adapter_lines(adapter: AdapterRecord) -> Iterator[str]:
    worst = max(adapter.by_tensor, key=lambda name: adapter.by_tensor[name], default="")
    yield (
        f"adapter of rank {adapter.rank}: {adapter.relative_error:.2g} of the change's length is "
        f"lost; most in {worst}, {adapter.by_tensor.get(worst, 0.0):.2g}."
    )
    if adapter.left_out:
        yield (
            f"an adapter cannot hold {len(adapter.left_out)} changed components, such as "
            f"{next(iter(adapter.left_out))}: {adapter.left_out_share_of_squared_norm:.2g} of the "
            "change's squared length is left out."
        )


def save_merge(
    merge: Merge,
    out: Path | str,
    *,
    dtype: StoredAs = "stored",
    as_lora: int | None = None,
    force: bool = False,
    command: str = "",
    progress: Progress = lambda text: None,
) -> SavedMerge:
    """Write a merge as a checkpoint, or as a LoRA adapter of its base.

    Args:
        merge: What to write.
        out: The folder to write; it appears when it is whole.
        dtype: How weights are stored; the base's own dtypes by default.
        as_lora: Write an adapter of this rank instead.
        force: Replace a folder that tvlens wrote.
        command: What to record as the way it was made.
        progress: Called with each file that begins.

    Raises:
        StudyError: Something is at ``out``, it cannot be written, or a number does not fit.
        CheckpointError: A file cannot be read, holds NaN or Inf, or a new value does not fit its
            dtype.
    """
    out = Path(out).expanduser()
    _refuse_options(dtype, as_lora)
    source = _on_disk(merge)
    _refuse_overlap(out, merge)
    refuse_existing(out, force=force, own=MANIFEST)
    if as_lora is not None:
        from .adapters import write_adapter

        with whole_folder(out, force=force, own=MANIFEST) as folder:
            about = write_adapter(merge, folder, as_lora, progress)
            manifest = _finished(merge, folder, out.name, command, about)
    else:
        with whole_folder(out, force=force, own=MANIFEST) as folder:
            about = _write_checkpoint(merge, source, folder, dtype, progress)
            manifest = _finished(merge, folder, out.name, command, about)
    return SavedMerge(out, manifest, tuple(merge.notes))


def _refuse_options(dtype: str, as_lora: int | None) -> None:
    if dtype not in get_args(StoredAs):
        raise StudyError(f"there is no dtype {dtype!r}; there are {', '.join(get_args(StoredAs))}.")
    if as_lora is not None and as_lora < 1:
        raise StudyError(f"an adapter has rank 1 or more, got {as_lora}.")
    if as_lora is not None and dtype not in ("stored", "float32"):
        raise StudyError("an adapter is stored as float32.", hint="Leave --dtype out.")


def _on_disk(merge: Merge) -> Source:
    source = merge.base.base
    if isinstance(source, MemorySource):
        raise StudyError(
            f"{source.name} is in memory, and a checkpoint keeps its base's files.",
            hint="Save it with save_pretrained() and give the folder.",
        )
    if isinstance(source, GgufSource):
        raise StudyError(
            f"{source.name} is a GGUF file, and a checkpoint keeps the files and dtypes of its "
            "base.",
            hint="Dequantise it into a folder with transformers and give that.",
        )
    return source


def _refuse_overlap(out: Path, merge: Merge) -> None:
    """A merge never writes into, over or around one of its inputs."""
    place = out.resolve()
    given = [merge.base.base.folder, *(Path(t.spec).expanduser() for t in merge.terms if t.spec)]
    for path in given:
        other = path.resolve()
        if path.exists() and (place == other or place in other.parents or other in place.parents):
            raise StudyError(f"{out} and the input {path} overlap.", hint="Choose another --out.")


@dataclass
class Made:
    """What a writer has to say of a folder.

    Attributes:
        kind: Checkpoint or adapter.
        dtype: How weights are stored.
        rounding: What storing lost, by changed tensor.
        files: sha256 of files that were hashed while they were written.
        untouched: Weight files that came out as they were.
        adapter: What an adapter lost.
    """

    kind: Literal["checkpoint", "adapter"]
    dtype: str
    rounding: dict[str, Rounding] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    untouched: list[str] = field(default_factory=list)
    adapter: AdapterRecord | None = None


def _write_checkpoint(
    merge: Merge, source: Source, folder: Path, dtype: str, progress: Progress
) -> Made:
    made = Made("checkpoint", dtype)
    _copy_companions(source.folder, folder)
    _change_config(merge, folder, dtype)
    places: dict[str, str] = {}
    size = 0
    for file in source.files:
        new = _safetensors_name(file)
        progress(f"writing {new}")
        contents, header = _contents(merge, source, file, DTYPES.get(dtype), made)
        metadata = header.metadata if header else {"format": "pt"}
        written = write_file(folder / new, contents, metadata, like=header)
        made.files[new] = written.sha256
        places |= {content.name: new for content in contents}
        size += sum(content.size for content in contents)
    _write_index(source, folder, places, size)
    return made


def _contents(
    merge: Merge, source: Source, file: str, dtype: torch.dtype | None, made: Made
) -> tuple[list[Content], Header | None]:
    """The tensors of a weight file in their order, with an unembedding that the merge adds."""
    header = None if file.endswith(".bin") else read_header(source.folder / file)
    if header is not None:
        names = [entry.name for entry in header.entries]
    else:
        names = [name for name, info in source.tensors.items() if info.file == file]
    own = merge.base.base_tensors.get(merge.base.layout.embedding_tensor)
    added = [merge.untied_name] if merge.untied_name and own in names else []
    old = {entry.name: entry for entry in header.entries} if header else {}
    writer = _Writer(merge, source, header, made, dtype)
    found = [writer.content(name, old.get(name)) for name in names]
    return [*found, *(writer.content(name, None, like=own) for name in added)], header


@dataclass(frozen=True)
class _Writer:
    """Makes the contents of one weight file; what rounding lost is entered in ``made``."""

    merge: Merge
    source: Source
    header: Header | None
    made: Made
    dtype: torch.dtype | None

    def content(self, name: str, old: Entry | None, *, like: str | None = None) -> Content:
        """One tensor: its dtype and shape now, its bytes when it is written."""
        info = self.source.tensors[like or name]
        stored = getattr(torch, info.dtype, None)
        floats = stored is not None and stored.is_floating_point
        wanted = self.dtype if self.dtype is not None and floats else stored
        known = CODES.get(wanted) if wanted is not None else None
        code = known or (old.code if old else "")
        if not code:
            raise CheckpointError(f"{self.source.name} stores {name} as {info.dtype}.")
        size = old.size if old and wanted == stored else _size(info.shape, wanted)
        return Content(name, code, info.shape, size, lambda: self._chunks(name, old))

    def _chunks(self, name: str, old: Entry | None) -> Iterator[Any]:
        if old is not None and old.size > LARGE:
            release_freed()  # what smaller tensors left behind would come on top of the largest
        new = self.merge.rounded(name, self.dtype)
        if new is not None:
            if new.rounding.entries or name == self.merge.untied_name:
                self.made.rounding[name] = new.rounding
            return bytes_of(new.tensor)
        if old is None or self.header is None:
            return bytes_of(self.source.read(name))
        return copied(self.source.folder / self.source.tensors[name].file, self.header, old)


def _size(shape: tuple[int, ...], dtype: torch.dtype | None) -> int:
    return torch.Size(shape).numel() * (dtype.itemsize if dtype else 0)


def _safetensors_name(file: str) -> str:
    """What a weight file is called in the copy: PyTorch's own format becomes safetensors."""
    if not file.endswith(".bin"):
        return file
    return file.removesuffix(".bin").replace("pytorch_model", "model") + ".safetensors"


def _write_index(source: Source, folder: Path, places: Mapping[str, str], size: int) -> None:
    """The index of shards: the base's own where it still says the same."""
    index = model_files(source.folder).index
    if not index:
        return
    about = read_json(source.folder / index)
    metadata = dict(about.get("metadata") or {})
    if places == about["weight_map"] and metadata.get("total_size") in (size, None):
        shutil.copyfile(source.folder / index, folder / index)
        return
    new = {"metadata": {**metadata, "total_size": size}, "weight_map": dict(places)}
    _write_json(folder / index.replace("pytorch_model.bin", "model.safetensors"), new)


def _copy_companions(source: Path, folder: Path) -> None:
    for path in sorted(source.iterdir()):
        wanted = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in COMPANIONS)
        left_out = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in NOT_COPIED)
        if path.is_file() and wanted and not left_out:
            shutil.copyfile(path, folder / path.name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, folder / TEMPLATES)


def _change_config(merge: Merge, folder: Path, dtype: str) -> None:
    """config.json stays byte by byte unless ties or dtype change."""
    changes = dict(merge.config_changes)
    config = read_json(folder / "config.json")
    if dtype != "stored":
        named = [key for key in ("dtype", "torch_dtype") if key in config]
        changes |= dict.fromkeys(named or ["dtype"], dtype)
    if changes:
        _write_json(folder / "config.json", {**config, **changes})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _finished(merge: Merge, folder: Path, name: str, command: str, made: Made) -> Manifest:
    """Factors, card and manifest, the last files of a folder."""
    base = merge.base.base
    if any(term.shares is not None for term in merge.terms):
        save_shares(folder, [term.shares for term in merge.terms])
    own = InputRecord(
        name=merge.base.base_name,
        given=merge.base_spec,
        kind="checkpoint",
        revision=base.revision,
        sha256=base.sha256(),
    )
    untouched = [f for f, digest in made.files.items() if own.sha256.get(f) == digest]
    about: dict[str, Any] = {
        "made_by": f"tvlens {versions()['tvlens']}",
        "versions": versions(),
        "command": command,
        "kind": made.kind,
        "name": merge.name,
        "base": own,
        "terms": tuple(input_record(term) for term in merge.terms),
        "method": merge.method.name,
        "density": merge.density,
        "seed": merge.seed,
        "selection": merge.selection,
        "dtype": made.dtype,
        "config_changes": merge.config_changes if made.kind == "checkpoint" else {},
        "changed": tuple(made.rounding),
        "rounding": _record(sum(made.rounding.values(), Rounding())),
        "rounding_by_tensor": {n: _record(found) for n, found in made.rounding.items()},
        "adapter": made.adapter,
        "untouched_files": tuple(untouched),
    }
    card = model_card(Manifest(files={}, **about), name, merge.method.text)
    (folder / CARD).write_text(card, encoding="utf-8")
    manifest = Manifest(files=_digests(folder, made.files), **about)
    manifest.save(folder)
    return manifest


def _record(rounding: Rounding) -> RoundingRecord:
    return RoundingRecord(
        relative=rounding.relative,
        share_of_entries_lost=rounding.share_lost,
        entries=rounding.entries,
    )


def input_record(term: Term) -> InputRecord:
    """The files of a vector's inputs; of a vector file the file itself."""
    tuned = [entry for entry in term.vector.inputs if entry.role == "tuned"] or term.vector.inputs
    digests = {f"{i.name}/{file}": d for i in tuned for file, d in i.sha256().items()}
    if term.kind == "vector" and term.spec:
        with Path(term.spec).expanduser().open("rb") as file:
            digests = {Path(term.spec).name: file_digest(file, "sha256").hexdigest()}
    return InputRecord(
        name=term.name,
        given=term.spec,
        kind=term.kind,
        scale=term.scale,
        weighted=term.shares is not None,
        sha256=digests,
    )


def _digests(folder: Path, known: Mapping[str, str]) -> dict[str, str]:
    """sha256 of every file of a folder; those in ``known`` are not read again."""
    found: dict[str, str] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in known:
            with path.open("rb") as file:
                found[name] = file_digest(file, "sha256").hexdigest()
        else:
            found[name] = known[name]
    return found
