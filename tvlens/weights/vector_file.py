"""Tuning vectors on disk: one safetensors file with its provenance.

Tensors are canonical (``x @ W``), a difference ``L0.W_Q`` or its factors ``L0.W_Q.left`` and
``L0.W_Q.right``; what did not change has no tensor. The metadata entry ``tvlens_vector`` is JSON:
the format's number, names, the base's config and the sha256 of each of its components, the sha256
of every input file, selection, scale, command, dtype and what rounding to that dtype lost, and
which tensors hold which component. It holds no date: the same inputs give the same bytes.

safetensors' own writer takes all tensors at once. Here they are written as they come, behind room
left for the header, which the format allows to be padded with blanks; so a file of any size needs
the memory of the largest component a few times over. The file is written under a temporary name
and renamed when it is whole. The data have a digest of their own, so a flipped bit is found.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tvlens.components import Component, Kind
from tvlens.errors import CheckpointError, SelectionError, UnsupportedFormatError

from .contents import first_non_finite
from .delta import Absent, Delta, Dense, Dora, LowRank, combined, scaled, without_zeros
from .layout import Layout, layout_of
from .pair import Pair
from .provenance import BaseRecord, Coordinates, Input, digest
from .vector import (
    StoredDtype,
    TuningVector,
    base_record,
    inputs_of,
    kept_by,
    restricted,
)

FORMAT = 1
METADATA_KEY = "tvlens_vector"
ORIENTATION = "canonical: x @ W"
SETTLED = ("tied", "d_vocab")
"""What of a layout depends on both models of the pair, not on the base's config alone."""
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEADER_DTYPES = {"float32": "F32", "bfloat16": "BF16"}
Form = Literal["dense", "low_rank", "dora", "absent"]
Taken = Callable[[Component, Float[Tensor, "..."], Delta], Delta | None]
"""What is taken of a component's change, given its base weight; None for nothing."""
_STRICT = ConfigDict(frozen=True, extra="forbid")
_AGAIN = "Make it again with `tvlens vector`, or copy it again."


class StoredPart(BaseModel):
    """One component in the file; ``norm`` before and ``loss`` |rounding error| of storing."""

    model_config = _STRICT
    kind: Kind
    layer: int | None
    part: str
    form: Form | None
    digest: str
    norm: float
    loss: float

    @property
    def component(self) -> Component:
        """The component."""
        return Component(self.kind, self.layer, None, self.part)


class StoredInput(BaseModel):
    """A model that the vector was made from, with the sha256 of its files."""

    model_config = _STRICT
    role: str
    name: str
    sha256: dict[str, str]
    coordinates: Coordinates = "stored"


class VectorHeader(BaseModel):
    """What the file says about its vector; a part with ``form`` null lies outside a selection."""

    model_config = _STRICT
    format: int
    made_by: str
    command: str
    name: str
    base: str
    orientation: str
    dtype: StoredDtype
    scale: float | None
    selection: str | None
    inputs: tuple[StoredInput, ...]
    config: dict[str, Any]
    settled: dict[str, int]
    norm: float
    loss: float
    parts: tuple[StoredPart, ...]
    data_sha256: str


class Part(NamedTuple):
    """One component on its way into a file; ``delta`` None where the vector holds nothing."""

    component: Component
    delta: Delta | None
    digest: str


@dataclass(frozen=True)
class SavedVector:
    """What was written.

    Attributes:
        path: The file.
        header: Its metadata.
        relative_loss: |what storing rounded away| / |the vector|, 0.0 in float32.
        whole_norm: Length of the whole vector that was selected from, before scaling.
        selected_norm: Length of what was selected, before scaling.
    """

    path: Path
    header: VectorHeader = field(repr=False)
    whole_norm: float
    selected_norm: float

    @property
    def relative_loss(self) -> float:
        """The share of the vector's length that storing rounded away."""
        return self.header.loss / self.header.norm if self.header.norm else 0.0

    @property
    def summary(self) -> dict[str, Any]:
        """What was written, in a few JSON values."""
        forms = [part.form for part in self.header.parts if part.form is not None]
        return {
            "file": str(self.path),
            "bytes": self.path.stat().st_size,
            "name": self.header.name,
            "base": self.header.base,
            "components": {form: forms.count(form) for form in dict.fromkeys(forms)},
            "norm": self.header.norm,
            "share_of_squared_norm": (self.selected_norm / self.whole_norm) ** 2
            if self.whole_norm
            else None,
            "dtype": self.header.dtype,
            "relative_rounding_loss": self.relative_loss,
        }

    @property
    def sentence(self) -> str:
        """The same for people."""
        found = self.summary
        if not self.whole_norm:
            return f"{self.path}: {found['name']} equals {found['base']}; the vector is zero."
        forms = ", ".join(
            f"{n} {form.replace('_', ' ')}" for form, n in found["components"].items()
        )
        lines = [f"{self.path}: {found['name']} minus {found['base']}, {found['bytes']:,} bytes."]
        lines.append(f"components: {forms}; length {found['norm']:.6g}.")
        if self.header.selection or self.selected_norm < self.whole_norm:
            share = found["share_of_squared_norm"]
            lines.append(f"the selection holds {share:.2%} of the whole vector's squared length.")
        if self.header.dtype != "float32":
            loss = found["relative_rounding_loss"]
            lines.append(f"{self.header.dtype} lost {loss:.2g} of the vector's length by rounding.")
        return "\n".join(lines)


def save_vector(
    vector: TuningVector, path: Path | str, *, dtype: StoredDtype = "float32", command: str = ""
) -> SavedVector:
    """Write a vector and its provenance; the inputs' files are hashed now.

    Raises:
        CheckpointError: The file cannot be written, or an entry does not fit the dtype.
    """
    about = {
        "name": vector.name,
        "command": command,
        "scale": vector.scale,
        "selection": vector.selection,
        "inputs": _stored_inputs(vector.inputs),
    }
    digests = vector.base.digests
    parts = (Part(c, vector.get(c), digests[c]) for c in vector.base.layout.components())
    header = _written(Path(path), vector.base, about, parts, dtype)
    return SavedVector(Path(path), header, vector.norm(), vector.norm())


def save_pair_vector(
    pair: Pair,
    path: Path | str,
    *,
    select: str | Taken = "",
    name: str = "",
    scale: float = 1.0,
    dtype: StoredDtype = "float32",
    command: str = "",
) -> SavedVector:
    """Write the tuning vector of a pair, reading one component at a time.

    Args:
        pair: The two models.
        path: The file to write; a file that is there is replaced when the new one is whole.
        select: Keep only this part; see ``tvlens.selection``. Or what is taken of each change.
        name: What to call the part where a function gives it.
        scale: Multiply by this number.
        dtype: How numbers are stored.
        command: What to record as the way the file was made.

    Raises:
        SelectionError: The selection cannot be read or selects nothing.
        CheckpointError: A file cannot be read or written, or holds NaN or Inf.
    """
    if not math.isfinite(scale):
        raise CheckpointError(f"a vector can be scaled by a finite number, got {scale!r}.")
    base = base_record(pair, {})
    taken = _selected(select, base, pair.tuned_name) if isinstance(select, str) else select
    lengths: dict[str, list[float]] = {"whole": [], "selected": []}

    def parts() -> Iterator[Part]:
        for component in pair.components:
            weight, delta = pair.change(component)
            delta = without_zeros(delta)
            lengths["whole"].append(delta.norm())
            found = taken(component, weight, delta)
            if found is None:
                yield Part(component, None, digest(weight))
                continue
            lengths["selected"].append(found.norm())
            yield Part(component, scaled(found, scale), digest(weight))
        if not lengths["selected"]:
            raise SelectionError(f"{pair.tuned_name} has nothing of {name or select}.")

    about = {
        "name": _name(pair.tuned_name, select if isinstance(select, str) else name, scale),
        "command": command,
        "scale": scale,
        "selection": select if isinstance(select, str) else None,
        "inputs": _stored_inputs(inputs_of(pair)),
    }
    header = _written(Path(path), base, about, parts(), dtype)
    return SavedVector(
        Path(path), header, math.hypot(*lengths["whole"]), math.hypot(*lengths["selected"])
    )


def _selected(select: str, base: BaseRecord, tuned: str) -> Taken:
    """What a selection takes of each change."""
    kept = kept_by(select, base, tuned) if select else None

    def taken(component: Component, weight: Float[Tensor, "..."], delta: Delta) -> Delta | None:
        if kept is None:
            return delta
        return restricted(delta, kept[component]) if component in kept else None

    return taken


def load_vector(path: Path | str) -> TuningVector:
    """Read a vector, all of it, and check the file; numbers come back in float32.

    Raises:
        CheckpointError: The file is missing, truncated, changed, or does not hold together.
        UnsupportedFormatError: It is no tuning vector, or one of another format.
    """
    opened = open_vector(path)
    return replace(opened, deltas=dict(opened.deltas))


def open_vector(path: Path | str) -> TuningVector:
    """A vector whose differences are read from the file when they are asked for.

    The file's sha256 and names are checked now, in one pass that keeps nothing.

    Raises:
        CheckpointError: The file is missing, truncated, changed, or does not hold together.
        UnsupportedFormatError: It is no tuning vector, or one of another format.
    """
    path = Path(path).expanduser()
    header, layout = _header(path)
    _check_data(path, header)
    digests = {part.component: part.digest for part in header.parts}
    return TuningVector(
        BaseRecord(header.base, header.config, layout, digests),
        header.name,
        _FileDeltas(path, header, layout),
        tuple(Input(i.role, i.name, i.sha256.copy, i.coordinates) for i in header.inputs),
        header.selection,
        header.scale,
        header.dtype,
    )


def read_header(path: Path | str) -> VectorHeader:
    """The provenance of a vector file, without its data.

    Raises:
        CheckpointError: The file is missing or truncated.
        UnsupportedFormatError: It is no tuning vector, or one of another format.
    """
    return _header(Path(path).expanduser())[0]


def _name(tuned: str, select: str, scale: float) -> str:
    selected = f"{tuned}[{select}]" if select else tuned
    return selected if scale == 1 else f"{scale:g} * {selected}"


def _stored_inputs(inputs: Iterable[Input]) -> tuple[StoredInput, ...]:
    """Every input once: two objects of one model hold the same digests."""
    stored = [
        StoredInput(role=i.role, name=i.name, sha256=i.sha256(), coordinates=i.coordinates)
        for i in inputs
    ]
    return tuple({entry.model_dump_json(): entry for entry in stored}.values())


def _written(
    path: Path,
    base: BaseRecord,
    about: Mapping[str, Any],
    parts: Iterable[Part],
    dtype: StoredDtype,
) -> VectorHeader:
    entries: list[StoredPart] = []
    fixed = {
        **about,
        "format": FORMAT,
        "made_by": f"tvlens {_own_version()}",
        "base": base.name,
        "orientation": ORIENTATION,
        "dtype": dtype,
        "config": dict(base.config),
        "settled": {name: int(getattr(base.layout, name)) for name in SETTLED},
    }
    size = 2 * len(json.dumps({**fixed, "inputs": [i.model_dump() for i in about["inputs"]]}))
    with _replaced(path) as file:
        data = _Data(file, dtype, room=size + 1500 * len(base.layout.components()) + 4096)
        for part in parts:
            entries.append(_stored(data, part, path))
        header = VectorHeader(
            **fixed,
            norm=math.hypot(*(entry.norm for entry in entries)),
            loss=math.hypot(*(entry.loss for entry in entries)),
            parts=tuple(entries),
            data_sha256=data.digest.hexdigest(),
        )
        data.close(header)
    return header


def _stored(data: "_Data", part: Part, path: Path) -> StoredPart:
    """Write one component's tensors and say what became of them."""
    delta, loss = part.delta, 0.0
    tensors = _tensors(part.component, delta) if delta is not None else {}
    stored = {name: tensor.to(data.dtype) for name, tensor in tensors.items()}
    for name, tensor in stored.items():
        if first_non_finite(tensor) is not None:
            raise CheckpointError(
                f"{path}: {name} holds NaN or Inf as {data.dtype}.", hint="Store it as float32."
            )
        data.add(name, tensor)
    if delta is not None and any(
        not torch.equal(stored[n].to(t.dtype), t) for n, t in tensors.items()
    ):
        again = _delta(part.component, _form(delta), delta.shape, stored)
        loss = combined([(1.0, delta), (-1.0, again)]).norm()
    return StoredPart(
        kind=part.component.kind,
        layer=part.component.layer,
        part=str(part.component.part),
        form=_form(delta) if delta is not None else None,
        digest=part.digest,
        norm=delta.norm() if delta is not None else 0.0,
        loss=loss,
    )


def _form(delta: Delta) -> Form:
    match delta:
        case Dense():
            return "dense"
        case LowRank():
            return "low_rank"
        case Dora():
            return "dora"
        case Absent():
            return "absent"


def _tensors(component: Component, delta: Delta) -> dict[str, Float[Tensor, "..."]]:
    match delta:
        case Dense():
            return {str(component): delta.tensor}
        case LowRank():
            return {f"{component}.left": delta.left, f"{component}.right": delta.right}
        case Dora():
            parts = {"magnitude": delta.magnitude, "direction": delta.direction}
            return {f"{component}.{name}": part for name, part in parts.items()}
        case Absent():
            return {}


def _delta(
    component: Component,
    form: Form,
    shape: tuple[int, ...],
    tensors: Mapping[str, Float[Tensor, "..."]],
) -> Delta:
    """A component's difference from its tensors, in float32 at least."""
    match form:
        case "dense":
            return Dense(tensors[str(component)].float())
        case "low_rank":
            left, right = (tensors[f"{component}.{side}"].float() for side in ("left", "right"))
            return LowRank(left, right)
        case "dora":
            parts = (tensors[f"{component}.{name}"].float() for name in ("magnitude", "direction"))
            return Dora(*parts)
        case "absent":
            return Absent(shape)


class _Data:
    """The tensors of a safetensors file that is being written, and room for its header."""

    def __init__(self, file: BinaryIO, dtype: StoredDtype, room: int) -> None:
        self.file, self.name, self.dtype = file, HEADER_DTYPES[dtype], TORCH_DTYPES[dtype]
        self.room = room + -room % 8
        self.digest, self.length = hashlib.sha256(), 0
        self.entries: dict[str, dict[str, Any]] = {}
        file.seek(8 + self.room)

    def add(self, name: str, tensor: Float[Tensor, "..."]) -> None:
        """Append one tensor, little-endian, row by row."""
        content = tensor.contiguous().flatten().view(torch.uint8).numpy().data
        self.file.write(content)
        self.digest.update(content)
        offsets = [self.length, self.length + content.nbytes]
        self.entries[name] = {
            "dtype": self.name,
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        self.length = offsets[1]

    def close(self, header: VectorHeader) -> None:
        """Write the header into its room, padded with blanks."""
        metadata = {"format": "pt", METADATA_KEY: header.model_dump_json()}
        text = json.dumps({"__metadata__": metadata, **self.entries}).encode("ascii")
        if len(text) > self.room:
            raise RuntimeError(f"a header of {len(text)} bytes got room for {self.room}.")
        self.file.seek(0)
        self.file.write(self.room.to_bytes(8, "little") + text.ljust(self.room))


@contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the block ends well, and is gone if not."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder.", hint="Name a file, such as V.safetensors.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        partial.chmod(0o644)
        partial.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _header(path: Path) -> tuple[VectorHeader, Layout]:
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}.", hint="Give a file of `tvlens vector`.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    if METADATA_KEY not in metadata:
        raise UnsupportedFormatError(
            f"{path} is a safetensors file, but no tuning vector: it has no {METADATA_KEY} entry.",
            hint="Make one with `tvlens vector BASE TUNED --out V.safetensors`.",
        )
    try:
        content = json.loads(metadata[METADATA_KEY])
        if isinstance(content, dict) and content.get("format") != FORMAT:
            raise UnsupportedFormatError(
                f"{path} is a tuning vector of format {content.get('format')!r}; this tvlens reads "
                f"format {FORMAT}.",
                hint="Read it with the tvlens that made it, or make it again.",
            )
        header = VectorHeader.model_validate(content)
        tied, d_vocab = bool(header.settled["tied"]), header.settled["d_vocab"]
    except (ValueError, KeyError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} does not hold together: {reason}", hint=_AGAIN) from error
    return header, replace(layout_of(header.config), tied=tied, d_vocab=d_vocab)


def _check_data(path: Path, header: VectorHeader) -> None:
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != header.data_sha256:
        raise CheckpointError(
            f"{path} was changed after it was written: its data have another sha256.", hint=_AGAIN
        )


class _FileDeltas(Mapping[Component, Delta]):
    """The differences in a file, each read when it is asked for.

    Opening checks that the file lists what its header says; reading, that shapes agree.
    """

    def __init__(self, path: Path, header: VectorHeader, layout: Layout) -> None:
        components = [part.component for part in header.parts]
        if components != layout.components():
            raise CheckpointError(f"{path} lists other components than its config.", hint=_AGAIN)
        self.path, self.layout = path, layout
        self.forms: dict[Component, Form] = {
            part.component: part.form for part in header.parts if part.form is not None
        }
        try:
            self.file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error
        self._require_names()

    def _require_names(self) -> None:
        left = set(self.file.keys())
        for component, form in self.forms.items():
            wanted = _names(component, form)
            if not left >= wanted:
                raise CheckpointError(f"{self.path} lacks {min(wanted - left)}.", hint=_AGAIN)
            left -= wanted
        if left:
            raise CheckpointError(
                f"{self.path} holds {min(left)}, which no component is.", hint=_AGAIN
            )

    def __getitem__(self, component: Component) -> Delta:
        """The difference at a component."""
        form, shape = self.forms[component], self.layout.shape(component)
        try:
            tensors = {name: self.file.get_tensor(name) for name in _names(component, form)}
        except (SafetensorError, OSError) as error:
            raise _unreadable(self.path, error) from error
        delta = _delta(component, form, shape, tensors)
        if delta.shape != shape:
            raise CheckpointError(
                f"{self.path}: {component} is {delta.shape}, expected {shape}.", hint=_AGAIN
            )
        return delta

    def __contains__(self, component: object) -> bool:
        """Whether the file holds a component; nothing is read."""
        return component in self.forms

    def __iter__(self) -> Iterator[Component]:
        """The components, in model order."""
        return iter(self.forms)

    def __len__(self) -> int:
        """Number of components."""
        return len(self.forms)


def _names(component: Component, form: Form) -> set[str]:
    match form:
        case "dense":
            return {str(component)}
        case "low_rank":
            return {f"{component}.left", f"{component}.right"}
        case "dora":
            return {f"{component}.magnitude", f"{component}.direction"}
        case "absent":
            return set()


def _own_version() -> str:
    try:
        return version("tvlens")
    except PackageNotFoundError:
        return "from source"


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read as safetensors: {error}.", hint=_AGAIN)


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be written: {error.strerror or error}.", hint="Choose another --out."
    )
