"""A study folder: its files, whose pair it holds, and a view of it for notebooks."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from tvlens.errors import StudyError
from tvlens.files import PARTIAL, write_whole
from tvlens.tables import Table

from .plan import StudyPlan

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from torch import Tensor

    from tvlens.attribution.positions import PositionScores

ORDERS = {
    "weights": "relative_delta",
    "attribution": "score",
    "labels": "structured_share",
    "tests": "effect",
    "directions": "strength",
    "readings": "corrected",
    "measures": "value",
    "overlap": "cosine",
    "interference": "sign_conflict",
    "shares": "effect",
    "combinations": "interaction",
    "disturbance": "fall",
    "interference_ranks": "spearman",
}
"""The column that ``Table.top`` ranks by, per table."""

SCORED_WHOLE = ("head", "kv_head", "neuron")
"""Kinds whose weight-space scores sum over parts, so that the score is the site's."""
MANIFEST = "manifest.json"
TABLES = (
    "weights",
    "tests",
    "labels",
    "contrasts",
    "measures",
    "directions",
    "readings",
    "lineage",
    "overlap",
    "interference",
    "prompts",
    "attribution",
    "fidelity",
    "findings",
    "roles",
    "joins",
    "circuits",
    "edge_circuits",
    "shares",
    "curves",
    "grafts",
    "evaluation",
    "evaluation_items",
    "representations",
    "combinations",
    "combination_items",
    "combination_gains",
    "disturbance",
    "interference_ranks",
    "verdicts",
)
STUDY_FILES = (
    MANIFEST,
    "study.yaml",
    "load_report.json",
    "report.html",
    "directions.safetensors",
    "anchor.safetensors",
    *(f"{name}.parquet" for name in TABLES),
)
"""What a study writes beside ``positions/``, and so all that ``--force`` may remove.

The manifest first: without it what is left is no study, so that nothing of it is taken for one.
"""
PARTIALS = tuple(name + PARTIAL for name in (*STUDY_FILES, "positions"))
"""What a study that was killed may have left beside them."""


@dataclass(frozen=True)
class Study:
    """A finished or growing study folder.

    Attributes:
        folder: Where the files are.
    """

    folder: Path

    @cached_property
    def plan(self) -> StudyPlan:
        """What was asked."""
        return StudyPlan.load(self.folder / "study.yaml")

    @property
    def manifest(self) -> dict[str, Any]:
        """Versions, inputs with hashes, seconds and memory per stage."""
        return read_json(self.folder / MANIFEST)

    @property
    def load_report(self) -> dict[str, Any]:
        """What was compared, tensor by tensor, and what was not and why."""
        return read_json(self.folder / "load_report.json")

    def table(self, name: str) -> Table:
        """The table ``name``.

        Raises:
            StudyError: The stage that makes it has not run.
        """
        path = self.folder / f"{name}.parquet"
        if not path.is_file():
            raise StudyError(f"this study has no table {name!r}; it has {self.tables}.")
        return Table.load(path, order=ORDERS.get(name, ""))

    @property
    def tables(self) -> list[str]:
        """Names of the tables that exist."""
        return sorted(path.stem for path in self.folder.glob("*.parquet"))

    @property
    def weights(self) -> Table:
        """Measures of every component's tuning vector."""
        return self.table("weights")

    @property
    def labels(self) -> Table:
        """One label a component."""
        return self.table("labels")

    @property
    def contrasts(self) -> Table:
        """MLP against attention: raw, minus controls, weighted by effect; with verdicts."""
        return self.table("contrasts")

    @property
    def directions(self) -> Table:
        """What each tuning vector writes, direction by direction, with its tokens."""
        return self.table("directions")

    @property
    def direction_vectors(self) -> dict[str, "Tensor"]:
        """Unit vectors by ``NAME.write`` and ``NAME.read``, NAME from ``directions.vector``.

        Raises:
            StudyError: The stage that makes them has not run.
        """
        return self._tensors("directions.safetensors")

    @property
    def anchors(self) -> dict[str, "Tensor"]:
        """With ``--metric anchor``: each fine-tune's unit direction in the residual stream.

        Raises:
            StudyError: The study has no anchor.
        """
        return self._tensors("anchor.safetensors")

    def _tensors(self, name: str) -> dict[str, "Tensor"]:
        from safetensors.torch import load_file

        path = self.folder / name
        if not path.is_file():
            raise StudyError(f"{self.folder} holds no {name}.")
        return load_file(path)

    @property
    def attribution(self) -> Table:
        """Scores: component x method x prompt."""
        return self.table("attribution")

    @property
    def shares(self) -> Table:
        """What gains, rewiring and new directions carry of the effects, with ``--parts``."""
        return self.table("shares")

    @property
    def representations(self) -> Table:
        """How alike activations are on documents, and in how many directions they differ."""
        return self.table("representations")

    @property
    def fidelity(self) -> Table:
        """How far the estimates agree with exact patching."""
        return self.table("fidelity")

    def positions(
        self,
        kind: str,
        *,
        part: str | None = None,
        direction: str | None = None,
        at: str | None = None,
        estimator: str | None = None,
        tuned: str | None = None,
    ) -> "PositionScores":
        """Scores by position of a kind of component, with the tokens at those places.

        Summed over positions in float64 they are the scores in ``attribution``.

        Args:
            kind: ``head``, ``kv_head``, ``neuron`` or ``node``.
            part: The activation; ``z`` of heads and ``post`` of neurons unless named.
            direction: What was put where; ``tuned_into_base`` of several unless named.
            at: The model that ran.
            estimator: How they were estimated; ``first_order`` of several unless named.
            tuned: The fine-tune, where there are several.

        Raises:
            StudyError: The study was made without ``position``, or none or several fit.
        """
        from tvlens.attribution.positions import read_positions

        asked = {"part": part, "direction": direction, "at": at, "tuned": tuned}
        asked["estimator"] = estimator
        found = read_positions(self.folder, kind, **asked)
        prompts = self.table("prompts").where(tuned=found.tuned).to_frame().set_index("prompt")
        rows = prompts.loc[list(found.prompts)]
        own, corrupt = (
            tuple(() if row is None else tuple(row) for row in rows[column])
            for column in ("tokens", "corrupt_tokens")
        )
        return replace(found, tokens=own, corrupt_tokens=corrupt)

    def joined(self, part: str | None = None, method: str = "weight_ig") -> pd.DataFrame:
        """Weights beside mean attribution scores, one row per part of a site.

        Heads, kv heads and neurons have the score of the whole site beside each part; OV and QK
        have their own in a study with ``--circuits``.

        Args:
            part: Keep this part of the weights only, such as ``OV``; None keeps all.
            method: Which attribution to put beside them.
        """
        weights = self.weights.to_frame()
        if part is not None:
            weights = weights[weights["part"] == part]
        means = _mean_scores(self.attribution.where(method=method).to_frame())
        own = weights["component"].isin(means["scored"])
        whole_sites = weights["kind"].isin(SCORED_WHOLE) & ~own
        weights = weights.assign(scored=weights["site"].where(whole_sites, weights["component"]))
        return weights.merge(means, on=["tuned", "scored"], how="left", validate="many_to_one")

    def plot(self, what: str = "heads", tuned: str | None = None) -> "go.Figure":
        """A plotly heat map of layers against heads (relative change of W_O).

        Raises:
            StudyError: ``what`` is not ``heads``.
        """
        import plotly.express as px

        if what != "heads":
            raise StudyError(f"there is no plot {what!r}; there is 'heads'.")
        frame = self.weights.where(kind="head", part="W_O").to_frame()
        frame = frame[frame["tuned"] == (tuned or self.plan.names[0])]
        grid = frame.pivot(index="layer", columns="index", values="relative_delta")
        return px.imshow(grid, labels={"x": "head", "y": "layer", "color": "|delta| / |W_O|"})

    def _repr_html_(self) -> str:
        names = ", ".join(self.plan.names)
        page = self.folder / "report.html"
        return f"<p>tvlens study of {names} against {self.plan.base}: {page}</p>"


def _mean_scores(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean score over prompts of every scored component; neurons have theirs in one row."""
    rows = rows[rows["geometric_part"].isna()]
    neuron = rows["kind"] == "neuron"
    rows = rows[rows["prompt"].isna() == neuron].rename(columns={"component": "scored"})
    return rows.groupby(["tuned", "scored"])["score"].mean().reset_index()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        StudyError: The file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise StudyError(f"cannot read {path}: {error}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` whole or not at all."""
    write_whole(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]") -> None:
    """Write ``tensors`` whole or not at all."""
    from safetensors.torch import save

    write_whole(path, save(dict(tensors), metadata={"format": "pt"}))


def existing_study(folder: Path) -> Study:
    """The study in ``folder``.

    Raises:
        StudyError: There is none.
    """
    if not (folder / MANIFEST).is_file():
        raise StudyError(
            f"{folder} holds no study: it has no {MANIFEST}.",
            hint="Give the folder that `tvlens compare --out` wrote.",
        )
    return Study(folder)


def prepared_folder(folder: Path, inputs: Mapping[str, Any], *, force: bool) -> None:
    """Make ``folder`` ready for a study of ``inputs``, or refuse.

    Args:
        folder: The study folder; made if absent.
        inputs: Model names with their files' hashes; the identity of the pair.
        force: Replace the files of another study.

    Raises:
        StudyError: The folder holds another pair's study, or files that are no study.
    """
    if folder.is_file():
        raise StudyError(f"--out {folder} is a file; give a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / MANIFEST
    if manifest.is_file() and not force and read_json(manifest).get("inputs") != inputs:
        raise StudyError(
            f"{folder} holds the study of another pair.",
            hint="Give another --out, or --force to replace it.",
        )
    others = {path.name for path in folder.iterdir()} - {*PARTIALS, "load_report.json"}
    if not manifest.is_file() and others and not force:
        raise StudyError(
            f"{folder} is not empty and holds no study.",
            hint="Give another --out, or --force to write into it.",
        )
    if force:
        for name in (*STUDY_FILES, *PARTIALS[:-1]):
            (folder / name).unlink(missing_ok=True)
        for name in ("positions", PARTIALS[-1]):
            shutil.rmtree(folder / name, ignore_errors=True)
