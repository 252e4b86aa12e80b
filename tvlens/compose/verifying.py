"""``tvlens verify``: is a merged folder what its manifest says?

Every file must have the digest it was written with. Then the merge is made again from its inputs,
whose digests must be those of the day: each changed entry must lie within one rounding step of
base + combination in float64, and every other entry must have the base's bits. Of an adapter the
distance of its factors from the combination must be the stated truncation error.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from tvlens.errors import CheckpointError, StudyError
from tvlens.weights.delta import combined
from tvlens.weights.matching import load_pair
from tvlens.weights.sources.folder import Source
from tvlens.weights.sources.opening import open_source

from .combining import Merge, merge
from .export import DTYPES, input_record
from .manifest import MANIFEST, InputRecord, Manifest, load_manifest
from .weighting import SHARES, load_shares

NAMED = 3
"""Tensors and files that a sentence names."""
STEPS = 1.0
"""Rounding steps of the stored dtype that an entry may be off; its own rounding is half of one."""
CHANGE_ERROR = 2.0**-22
"""Relative error allowed in the change itself: other versions of torch add in other orders."""
TRUNCATION_ERROR = 1e-5
"""How much an adapter's relative error may differ from the stated one."""


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        folder: What was checked.
        files: Files whose content is not what was written, or that are missing or new.
        tensors: Tensors that are not base + combination, and why.
        checked: How many tensors were compared.
        manifest: What the folder says of itself.
    """

    folder: Path
    files: Mapping[str, str]
    tensors: Mapping[str, str]
    checked: int
    manifest: Manifest = field(repr=False)

    @property
    def holds(self) -> bool:
        """Whether everything is as it should be."""
        return not self.files and not self.tensors

    @property
    def summary(self) -> dict[str, Any]:
        """The verdict in a few JSON values."""
        return {
            "folder": str(self.folder),
            "holds": self.holds,
            "name": self.manifest.name,
            "tensors_checked": self.checked,
            "files": dict(self.files),
            "tensors": dict(self.tensors),
        }

    @property
    def sentence(self) -> str:
        """The same for people."""
        name = self.manifest.name
        if self.holds:
            within = "stored rounding"
            if self.manifest.adapter is not None:
                within = f"the stated error of rank {self.manifest.adapter.rank}"
            return f"{self.folder}: {self.checked} tensors are {name}, within {within}."
        lines = []
        if self.tensors:
            lines.append(f"{self.folder} is not {name}: {_first(self.tensors, 'tensors')}.")
        if self.files:
            lines.append(f"{self.folder}: {_first(self.files, 'files')}.")
        return "\n".join(lines)


def _first(found: Mapping[str, str], noun: str) -> str:
    named = "; ".join(f"{name} {why}" for name, why in [*found.items()][:NAMED])
    more = len(found) - NAMED
    return f"{named}; and {more} more {noun}" if more > 0 else named


def verify(
    folder: Path | str, *, base: Any = None, vectors: Sequence[Any] | None = None
) -> Verdict:
    """Check a folder that ``tvlens apply`` wrote against its manifest and its inputs.

    Args:
        folder: The folder.
        base: Where the base is now, if not where it was.
        vectors: Where the vectors are now, in order, if not where they were.

    Raises:
        CheckpointError: The manifest or an input cannot be read, or an input is not what it was.
        StudyError: An input cannot be found by what the manifest says.
    """
    folder = Path(folder).expanduser()
    manifest = load_manifest(folder)
    again = _again(folder, manifest, base, vectors)
    _require_same_inputs(manifest, again)
    files = _changed_files(folder, manifest)
    if manifest.kind == "adapter":
        tensors, checked = _adapter_problems(folder, manifest, again)
    else:
        tensors, checked = _checkpoint_problems(folder, manifest, again)
    return Verdict(folder, files, tensors, checked, manifest)


def _again(folder: Path, manifest: Manifest, base: Any, vectors: Sequence[Any] | None) -> Merge:
    given = [_place(term) for term in manifest.terms] if vectors is None else list(vectors)
    if len(given) != len(manifest.terms):
        raise StudyError(f"got {len(given)} vectors; {folder} was made from {len(manifest.terms)}.")
    found = merge(
        _place(manifest.base) if base is None else base,
        given,
        scales=[term.scale or 0.0 for term in manifest.terms],
        method=manifest.method,
        density=manifest.density,
        select=manifest.selection,
        seed=manifest.seed,
        any_base=True,
    )
    if not any(term.weighted for term in manifest.terms):
        return found
    shares = load_shares(folder, [term.layout for term in found.terms])
    terms = [replace(t, shares=own) for t, own in zip(found.terms, shares, strict=True)]
    return replace(found, terms=tuple(terms))


def _place(record: InputRecord) -> str:
    if not record.given:
        raise StudyError(
            f"{record.name} was given as an object in memory, so it cannot be read again.",
            hint="Save it, and say where it is: --base FOLDER or --vector FILE.",
        )
    return record.given


def _require_same_inputs(manifest: Manifest, again: Merge) -> None:
    """Inputs must have the digests of the day, whatever their names are now."""
    found = [again.base.base.sha256(), *(input_record(term).sha256 for term in again.terms)]
    for record, digests in zip((manifest.base, *manifest.terms), found, strict=True):
        ours, theirs = (sorted(d.values()) for d in (record.sha256, digests))
        if ours != theirs:
            raise CheckpointError(
                f"{record.given or record.name} is not the {record.kind} that was merged: it has "
                "another sha256.",
                hint="Say where the right one is: --base FOLDER, or --vector for each vector.",
            )


def _changed_files(folder: Path, manifest: Manifest) -> dict[str, str]:
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    problems = {name: "is missing" for name in manifest.files if name not in found}
    for name, digest in manifest.files.items():
        if name in found:
            with (folder / name).open("rb") as file:
                if file_digest(file, "sha256").hexdigest() != digest:
                    problems[name] = "was changed after it was written"
    new = sorted(found - {*manifest.files, MANIFEST, SHARES})
    return problems | {n: "was not written by tvlens" for n in new if n.endswith(".safetensors")}


def _checkpoint_problems(
    folder: Path, manifest: Manifest, again: Merge
) -> tuple[dict[str, str], int]:
    merged = open_source(folder)
    names = [*again.base.base.tensors, *filter(None, [again.untied_name])]
    problems = {n: "is no tensor of the base" for n in merged.tensors if n not in names}
    for name in names:
        if name not in merged.tensors:
            problems[name] = "is missing"
        elif why := _tensor_problem(again, merged, name, DTYPES.get(manifest.dtype)):
            problems[name] = why
    return problems, len(names)


def _tensor_problem(again: Merge, merged: Source, name: str, dtype: torch.dtype | None) -> str:
    """Why a tensor is not what it should be, empty where it is."""
    stored, found = again.base_tensor(name), merged.read(name)
    floats = stored.is_floating_point()
    start = stored.to(dtype) if dtype is not None and floats else stored
    if start.shape != found.shape or start.dtype != found.dtype:
        return f"is {found.dtype} {tuple(found.shape)}, not {start.dtype} {tuple(start.shape)}"
    flat = start.reshape(-1), found.reshape(-1)
    wrong = ~_same_bits(*flat)
    wanted = flat[0].double() if floats else None
    for span, change in again.pieces_of(name):
        exact = stored.reshape(-1)[span].double() + change
        acting = change != 0
        error = (flat[1][span].double() - exact).abs()
        near = error <= STEPS * _step(exact, found.dtype) + CHANGE_ERROR * change.abs()
        wrong[span] = torch.where(acting, ~near, wrong[span])
        if wanted is not None:
            wanted[span] = torch.where(acting, exact, wanted[span])
    if not bool(wrong.any()):
        return ""
    return _described(wrong, flat[1], wanted)


def _described(wrong: Tensor, found: Tensor, wanted: Float64[Tensor, " entry"] | None) -> str:
    share = float(wrong.double().mean())
    text = f"differs in {int(wrong.sum()):,} entries ({share:.2g} of them"
    if wanted is None:
        return f"{text})"
    largest = float((found.double() - wanted).abs().nan_to_num(nan=math.inf).max())
    return f"{text}, by up to {largest:.3g})"


def _same_bits(first: Tensor, second: Tensor) -> Tensor:
    """Entries that are equal bit for bit."""
    width = first.element_size()
    pair = (x.contiguous().view(torch.uint8).reshape(-1, width) for x in (first, second))
    one, other = pair
    return (one == other).all(1)


def _step(values: Float64[Tensor, " entry"], dtype: torch.dtype) -> Float64[Tensor, " entry"]:
    """The distance of neighbouring numbers of a dtype at each value."""
    about = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=about.tiny)).exponent
    return about.eps * torch.pow(torch.tensor(2.0, dtype=torch.float64), exponent.double() - 1)


def _adapter_problems(folder: Path, manifest: Manifest, again: Merge) -> tuple[dict[str, str], int]:
    stated = manifest.adapter
    if stated is None:
        raise CheckpointError(f"{folder / MANIFEST} does not say what the adapter lost.")
    pair = load_pair(again.base.base, str(folder), scan=False)
    problems: dict[str, str] = {}
    for tensor, limit in stated.by_tensor.items():
        parts = [c for c, p in again.layout.places.items() if p.tensor == tensor]
        wanted = [again.delta(c) for c in parts]
        found = [pair.change(c)[1] for c in parts]
        apart = [combined([(1.0, w), (-1.0, f)]) for w, f in zip(wanted, found, strict=True)]
        error = _length(apart) / (_length(wanted) or math.inf)
        if not abs(error - limit) <= TRUNCATION_ERROR:
            problems[tensor] = f"is off by {error:.3g} of its change, stated {limit:.3g}"
    return problems, len(stated.by_tensor)


def _length(deltas: Sequence[Any]) -> float:
    return math.hypot(*(delta.norm() for delta in deltas))
