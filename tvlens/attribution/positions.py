"""Scores by position on disk: ``positions/``, a safetensors file a series and an index.

    positions/index.json       what every file holds: fine-tune, direction, metric, prompts, lengths
    positions/1.safetensors    a float32 tensor [prompt, pos, layer, index] for each part, by name

A series is one direction asked of one model of one pair. Rows are the prompts of the index, in
its order; place 0 of ``pos`` is a prompt's first real token and places past its end are 0, so that
the sum over ``pos`` is the score in ``attribution``. Parts without a layer or a number have one.

Files are written a chunk of prompts at a time and read a prompt or a tensor at a time, so that
neither needs all of them in memory.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tvlens.errors import StudyError
from tvlens.files import PARTIAL

from .tables import Cut, MethodRun

FOLDER, INDEX = "positions", "index.json"
MAIN_PARTS = {"head": "z", "neuron": "post"}
"""The activation that is meant where a kind is named alone."""
MAIN_DIRECTION, MAIN_ESTIMATOR = "tuned_into_base", "first_order"
_SAME = ("base", "tuned", "method", "direction", "at", "metric", "unit")
_ALIGNED = 8
_COPIED = 1 << 22
"""Bytes that are copied at once."""


@dataclass
class PositionFile:
    """A file of scores by position that is being written, without a name.

    Nothing of it stays on the disk, however the process ends.

    Attributes:
        prompts: How many prompts it will hold.
        rows: How many it holds.
        shapes: Shape of every tensor, by part, once the first chunk has come.
        kinds: Kind of every tensor.
    """

    prompts: int
    rows: int = 0
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    _scratch: IO[bytes] = field(default_factory=partial(tempfile.TemporaryFile, buffering=0))
    _start: int = 0

    def add(self, scores: Mapping[Cut, Float[Tensor, "batch pos layer index"]]) -> None:
        """Append the next prompts' scores; the first call fixes the shapes.

        Raises:
            ValueError: More prompts, or another shape, than was said.
        """
        arrays = {cut.part or "": t.detach().float().cpu().numpy() for cut, t in scores.items()}
        if not self.shapes:
            self.kinds = {cut.part or "": cut.kind for cut in scores}
            self.shapes = {part: (self.prompts, *a.shape[1:]) for part, a in arrays.items()}
            self._begin()
        count = len(next(iter(arrays.values())))
        offset = self._start
        for part, shape in self.shapes.items():
            whole = np.memmap(self._scratch, "<f4", "r+", offset, shape)
            whole[self.rows : self.rows + count] = arrays[part]
            whole.flush()
            offset += whole.nbytes
        self.rows += count

    def entry(self, run: MethodRun) -> dict[str, Any]:
        """What the index says about it.

        Raises:
            ValueError: It is not whole.
        """
        if self.rows != self.prompts:
            raise ValueError(f"{self.prompts} prompts were to come, {self.rows} came.")
        return {
            **{name: getattr(run, name) for name in _SAME},
            "prompts": list(run.prompts),
            "lengths": list(run.n_tokens),
            "tensors": {
                part: {"kind": self.kinds[part], "shape": list(shape)}
                for part, shape in self.shapes.items()
            },
        }

    def _begin(self) -> None:
        """The header, and room for every tensor; safetensors aligns what it holds."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for part, shape in self.shapes.items():
            size = 4 * int(np.prod(shape))
            header[part] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode("ascii")
        text += b" " * (-len(text) % _ALIGNED)
        self._start = 8 + len(text)
        self._scratch.write(len(text).to_bytes(8, "little") + text)
        self._scratch.truncate(self._start + end)

    def copy_to(self, path: Path) -> None:
        """Write what there is so far into a file that has a name."""
        self._scratch.seek(0)
        with path.open("wb") as file:
            shutil.copyfileobj(self._scratch, file, _COPIED)


class PositionSeries(NamedTuple):
    """A file and what the index says about it."""

    file: PositionFile
    entry: Mapping[str, Any]


def write_positions(study: Path, made: Sequence[PositionSeries]) -> None:
    """Put files into the study folder ``study``, whole or not at all; no files remove its own."""
    folder, unfinished = study / FOLDER, study / (FOLDER + PARTIAL)
    shutil.rmtree(unfinished, ignore_errors=True)
    if made:
        unfinished.mkdir()
        series = []
        for number, (file, entry) in enumerate(made, 1):
            name = f"{number}.safetensors"
            file.copy_to(unfinished / name)
            series.append({"file": name, **entry})
        content = {"format": 1, "series": series}
        (unfinished / INDEX).write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    if folder.is_dir():
        shutil.rmtree(folder)
    if made:
        unfinished.replace(folder)


@dataclass(frozen=True, eq=False)
class PositionScores:
    """Scores by position of the components of one activation.

    Attributes:
        scores: In the metric's unit. Place 0 is a prompt's first token; what lies past its end
            is 0.
        kind: What ``index`` numbers: head, kv_head, neuron, or nothing for a node.
        part: The activation.
        tuned: The fine-tune.
        direction: What was put where.
        at: The model that ran.
        metric: Name of the metric.
        unit: Its unit.
        prompts: Number of every row's prompt.
        lengths: Tokens of every row.
        tokens: The tokens of every row; empty where the study does not say.
        corrupt_tokens: Those of its corrupt prompt, which take the same places.
    """

    scores: Float[Tensor, "prompt pos layer index"]
    kind: str
    part: str
    tuned: str
    direction: str
    at: str
    metric: str
    unit: str
    prompts: tuple[int, ...]
    lengths: tuple[int, ...]
    tokens: tuple[tuple[str, ...], ...] = ()
    corrupt_tokens: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class PositionIndex:
    """What a study folder holds by position.

    Attributes:
        folder: ``positions/``.
        series: The entries of the index; ``file`` is a file's name.
    """

    folder: Path
    series: tuple[Mapping[str, Any], ...]

    @classmethod
    def read(cls, study: Path) -> "PositionIndex":
        """The index of the study folder ``study``; empty where it has none.

        Raises:
            StudyError: It cannot be read.
        """
        path = study / FOLDER / INDEX
        if not path.is_file():
            return cls(path.parent, ())
        try:
            return cls(path.parent, tuple(json.loads(path.read_text("utf-8"))["series"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StudyError(f"cannot read {path}: {error}") from error

    def tensors(self) -> Iterator[tuple[Mapping[str, Any], str, str]]:
        """Every series with a part and its kind."""
        for series in self.series:
            for part, tensor in series["tensors"].items():
                yield series, part, str(tensor["kind"])

    def chosen(
        self, kind: str, part: str | None, *, estimator: str | None = None, **asked: str | None
    ) -> tuple[Mapping[str, Any], str]:
        """The one series and part that is meant.

        Args:
            kind: Kind of the components.
            part: The activation; None for that of ``MAIN_PARTS``, or the only one.
            estimator: None for any; of several, ``first_order`` is meant.
            asked: ``direction``, ``at``, ``tuned``; None for any. Of several directions,
                ``tuned_into_base`` is meant.

        Raises:
            StudyError: None or several fit.
        """
        wanted = {name: value for name, value in asked.items() if value is not None}
        fit = [
            (series, each)
            for series, each, of_kind in self.tensors()
            if of_kind == kind
            and part in (None, each)
            and (estimator is None or _estimator(series, estimator))
            and all(series[name] == value for name, value in wanted.items())
        ]
        for preferred in (
            lambda series, each: each == MAIN_PARTS.get(kind),
            lambda series, each: series["direction"] == MAIN_DIRECTION,
            lambda series, each: _estimator(series, MAIN_ESTIMATOR),
        ):
            fit = [one for one in fit if preferred(*one)] or fit
        if len(fit) != 1:
            raise StudyError(self._said(kind, [self._named(*one) for one in fit]))
        return fit[0]

    def _said(self, kind: str, fit: Sequence[str]) -> str:
        if fit:
            return (
                f"several scores by position of kind {kind!r} fit: {'; '.join(fit)}. "
                "Name the part, the direction, the model or the fine-tune."
            )
        there = [self._named(series, part) for series, part, _ in self.tensors()]
        return (
            f"this study has no such scores by position of kind {kind!r}; it has "
            f"{'; '.join(there) or 'none (run it with --position)'}."
        )

    @staticmethod
    def _named(series: Mapping[str, Any], part: str) -> str:
        kind = series["tensors"][part]["kind"]
        where = f"{series['direction']} at {series['at']}, {series['tuned']}"
        return f"{kind} {part}, {where}, {series['method']}"

    def scores(
        self, series: Mapping[str, Any], part: str
    ) -> Float[Tensor, "prompt pos layer index"]:
        """A whole tensor, read from its file as it is used.

        Raises:
            StudyError: The file is missing or broken.
        """
        with self._opened(series, "pt") as file:
            return file.get_tensor(part)

    def of_prompt(
        self, series: Mapping[str, Any], part: str, row: int
    ) -> Float[np.ndarray, "pos layer index"]:
        """One prompt's scores, up to its last token.

        Raises:
            StudyError: The file is missing or broken.
        """
        with self._opened(series, "np") as file:
            return file.get_slice(part)[row][: series["lengths"][row]]

    def _opened(self, series: Mapping[str, Any], framework: str) -> Any:
        from safetensors import SafetensorError, safe_open

        path = self.folder / series["file"]
        try:
            return safe_open(path, framework=framework)
        except (OSError, SafetensorError) as error:
            raise StudyError(f"cannot read {path}: {error}") from error


def read_positions(
    study: Path,
    kind: str,
    *,
    part: str | None = None,
    direction: str | None = None,
    at: str | None = None,
    estimator: str | None = None,
    tuned: str | None = None,
) -> PositionScores:
    """Scores by position from the study folder ``study``.

    Args:
        study: The folder.
        kind: ``head``, ``kv_head``, ``neuron`` or ``node``.
        part: The activation; ``z`` of heads and ``post`` of neurons unless named.
        direction: What was put where; ``tuned_into_base`` of several unless named.
        at: The model that ran.
        estimator: How they were estimated; ``first_order`` of several unless named.
        tuned: The fine-tune, where there are several.

    Raises:
        StudyError: None or several fit, or a file is broken.
    """
    index = PositionIndex.read(study)
    asked = {"direction": direction, "at": at, "tuned": tuned}
    series, found = index.chosen(kind, part, estimator=estimator, **asked)
    return PositionScores(
        index.scores(series, found),
        kind,
        found,
        prompts=tuple(series["prompts"]),
        lengths=tuple(series["lengths"]),
        **{name: series[name] for name in ("tuned", "direction", "at", "metric", "unit")},
    )


def _estimator(series: Mapping[str, Any], estimator: str) -> bool:
    """Whether a series was estimated so, which its method's label ends with."""
    return str(series["method"]).endswith(f"_{estimator}")
