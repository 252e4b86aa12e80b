"""A study folder as the report reads it: each file or nothing, never a guess.

Columns that a table lacks are filled with nulls, so that a page can be made from the tables of an
older version; a file that is not there leaves its section with the command that makes it.
"""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from tvlens.errors import StudyError
from tvlens.tables import KEY_FIELDS, Table

if TYPE_CHECKING:
    from tvlens.attribution.positions import PositionIndex

_KEYS = tuple(field.name for field in KEY_FIELDS)
COLUMNS: dict[str, tuple[str, ...]] = {
    "weights": (*_KEYS, "base_norm", "delta_norm", "relative_delta", "gain", "residual", "snr"),
    "labels": (*_KEYS, "label", "label_reason", "decided_by", "share_new", "share_amplified"),
    "tests": (*_KEYS, "statistic", "null", "effect", "p_value", "q_value", "m"),
    "contrasts": (
        *("base", "tuned", "claim", "measure", "against", "weighting", "n_layers", "attention"),
        *("mlp", "mean", "ci_low", "ci_high", "p_value", "p_floor", "block", "p_block"),
        *("p_block_floor", "detectable", "level", "power", "verdict", "sentence", "headline"),
        *("layers", "attention_by_layer", "mlp_by_layer"),
    ),
    "directions": (
        *(*_KEYS, "label", "share", "promoted", "suppressed", "top_z", "random_z"),
        *("random_z_99", "p_value", "q_value", "stands_out"),
    ),
    "readings": (
        *(*_KEYS, "side", "reading", "rule"),
        *("value", "chance", "corrected", "noise", "noise_corrected"),
    ),
    "overlap": (
        *(*_KEYS, "other", "relation", "norm_a", "norm_b", "inner", "cosine", "cosine_floor_sd"),
        *("cosine_ceiling", "overlap", "overlap_floor", "overlap_ceiling"),
        *("rank_a", "rank_b", "shared"),
    ),
    "lineage": (
        *("base", "parent", "tuned", "level", "kind", "part", "tensors", "norm_first"),
        *("norm_second", "norm_whole", "cosine_steps", "share_first", "share_second"),
    ),
    "prompts": (
        *("prompt", "tuned", "text", "answer", "group", "split", "tokens", "token_scores"),
        *("corrupt_tokens", "metric", "metric_base", "metric_tuned"),
    ),
    "attribution": (
        *_KEYS,
        *("method", "space", "estimator", "direction", "at", "prompt"),
        *("score", "metric", "unit", "n", "nodes", "gap", "geometric_part", "source", "target"),
    ),
    "fidelity": (
        *("tuned", "method", "kind", "stratum", "n", "spearman", "spearman_worst", "slope"),
        *("sign_agreement", "ci_low", "ci_high", "sum_insert", "sum_remove", "sum_ig"),
        *("metric_change", "passed", "direction", "at", "part"),
    ),
    "findings": (*_KEYS, "insert", "remove", "ig", "finding", "role"),
    "circuits": (
        *_KEYS,
        "metric",
        "unit",
        "score_base",
        "score_tuned",
        "difference",
        "ci_low",
        "ci_high",
        "n",
    ),
    "edge_circuits": (
        *("tuned", "direction", "at", "curve", "ranked_by", "draw", "split", "k", "of"),
        *("value", "ci_low", "ci_high", "metric", "change", "change_low", "change_high"),
    ),
    "shares": (
        *("base", "tuned", "metric", "unit", "level", "of", "geometric_part", "components"),
        *("n", "effect", "whole", "share", "ci_low", "ci_high", "energy", "verdict", "sentence"),
    ),
    "curves": (
        *("curve", "ranked_by", "draw", "split", "tuned", "metric", "unit", "k", "of"),
        *("share_of_norm", "scale", "value", "ci_low", "ci_high", "n", "task"),
    ),
    "grafts": (*_KEYS, "curve", "place", "score", "delta_norm", "metric"),
    "evaluation": (
        *("model", "task", "split", "measure", "value"),
        *("ci_low", "ci_high", "n", "unit", "control", "against", "difference"),
        *("difference_low", "difference_high", "p_value"),
    ),
    "representations": (
        *(*_KEYS, "model", "control", "draw", "tokens", "measure", "value", "unit"),
        *("ci_low", "ci_high", "n_tokens", "n_documents", "status"),
    ),
    "combinations": (
        *(
            "model",
            "vectors",
            "scales",
            "by",
            "task",
            "split",
            "measure",
            "primary",
            "unit",
            "better",
        ),
        *("value", "ci_low", "ci_high", "difference"),
        *("interaction", "interaction_low", "interaction_high"),
    ),
    "disturbance": (
        *("level", "tuned", "added", "by", "task", "model", "fall", "ci_low", "ci_high"),
        *("beyond", "beyond_low", "beyond_high"),
    ),
    "interference_ranks": (
        *("tuned", "added", "task", "predictor", "n", "spearman", "ci_low", "ci_high"),
        *("p_value", "verdict"),
    ),
    "verdicts": (
        *("claim", "tuned", "task", "measure", "unit", "value", "ci_low", "ci_high", "control"),
        *("control_value", "control_low", "control_high", "verdict", "why", "command"),
    ),
}
"""What the page reads of each table."""
TUNED_IN = (
    *("weights", "labels", "attribution", "prompts", "fidelity", "curves", "representations"),
)
"""Tables that bring the names of the tuned models, in this order."""

_MADE_BY = {
    "load_report": "decompose",
    "weights": "decompose",
    "tests": "decompose",
    "labels": "decompose",
    "contrasts": "decompose",
    "directions": "decompose",
    "readings": "decompose",
    "prompts": "attribute",
    "attribution": "attribute",
    "fidelity": "attribute",
    "findings": "attribute",
    "shares": "attribute",
    "curves": "graft",
    "grafts": "graft",
    "sweep": "sweep",
    "representations": "represent",
    "combinations": "combine",
    "evaluation": "evaluate",
}
"""The command that makes a table, or the rows of a stage in a table of several."""
_NEEDS = {
    **dict.fromkeys(("attribute", "graft"), "prompts"),
    **dict.fromkeys(("sweep", "combine", "evaluate"), "tasks"),
    "represent": "texts",
}
"""The file that a command needs."""


@dataclass(frozen=True, eq=False)
class StudyFolder:
    """What the files of one study say.

    Attributes:
        plan: Content of study.yaml, empty where there is none.
        plan_text: The same as written.
        manifest: Content of manifest.json, empty where there is none.
        load_reports: Load report by tuned model, empty where there is none.
        tables: The tables that exist, each with all of ``COLUMNS``.
        positions: Scores by position, None where there are none.
    """

    plan: dict[str, Any]
    plan_text: str
    manifest: dict[str, Any]
    load_reports: dict[str, dict[str, Any]]
    tables: dict[str, pd.DataFrame]
    positions: "PositionIndex | None" = None

    @classmethod
    def read(cls, folder: Path) -> "StudyFolder":
        """Read every file that is there.

        Raises:
            StudyError: The folder is missing, or a file in it cannot be read.
        """
        if not folder.is_dir():
            raise StudyError(f"there is no study folder at {folder}.")
        text = _text(folder / "study.yaml")
        return cls(
            plan=_mapping(folder / "study.yaml", text, yaml.safe_load),
            plan_text=text,
            manifest=_json(folder / "manifest.json"),
            load_reports=_load_reports(_json(folder / "load_report.json")),
            tables={
                name: _frame(folder / f"{name}.parquet", columns)
                for name, columns in COLUMNS.items()
                if (folder / f"{name}.parquet").is_file()
            },
            positions=_positions(folder),
        )

    @property
    def tuned_names(self) -> list[str]:
        """The tuned models, in the plan's order, then as the tables bring them."""
        found = [str(name) for name in self.plan.get("tuned_names") or ()]
        for name in TUNED_IN:
            if name in self.tables:
                found += self.tables[name]["tuned"].dropna().astype(str).unique().tolist()
        found += [name for name in self.load_reports if name]
        return list(dict.fromkeys(found)) or ["tuned"]

    def table(self, name: str, tuned: str | None = None) -> pd.DataFrame:
        """The rows of a table, for one tuned model where asked; no rows where it is missing."""
        frame = self.tables.get(name, pd.DataFrame(columns=list(COLUMNS[name])))
        if tuned is None or frame["tuned"].isna().all():
            return frame
        return frame[frame["tuned"] == tuned]

    def title(self, tuned: str) -> str:
        """The tuned model's name; in a lineage, with the model that the step starts from."""
        if not self.plan.get("parent"):
            return tuned
        report = self.load_reports.get(tuned, {})
        return f"{report.get('base_name', 'base')} → {tuned}"

    def missing(self, name: str) -> str:
        """The command that would make what is not there, empty where it is or could not be."""
        tuned = self._tuned_specs()
        if self._holds(name) or (name == "combinations" and len(tuned) < 2):
            return ""
        command, models = _MADE_BY[name], shlex.join([str(self.plan.get("base", "BASE")), *tuned])
        needs = _NEEDS.get(command)
        asked = "" if needs is None else f" --{needs} {self._given(needs)}"
        divided = " --parts" if name == "shares" else ""
        return f"tvlens {command} {models}{asked}{divided} --out DIR"

    def _holds(self, name: str) -> bool:
        if name == "load_report":
            return bool(self.load_reports)
        if name == "sweep":
            return bool(self.table("curves")["curve"].eq("sweep").any())
        return name in self.tables

    def _given(self, option: str) -> str:
        return shlex.quote(str(self.plan.get(option) or "FILE"))

    def _tuned_specs(self) -> list[str]:
        given = self.plan.get("tuned") or "TUNED"
        return [given] if isinstance(given, str) else [str(spec) for spec in given]


def rows_of(frame: pd.DataFrame) -> Iterator[Any]:
    """The rows as named tuples; what a cell holds is known by its column's name alone."""
    return frame.itertuples()


def _text(path: Path) -> str:
    return path.read_text("utf-8") if path.is_file() else ""


def _json(path: Path) -> dict[str, Any]:
    return _mapping(path, _text(path), json.loads)


def _mapping(path: Path, text: str, parse: Any) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        content = parse(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise StudyError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise StudyError(f"{path} holds a {type(content).__name__}, not named values.")
    return content


def _positions(folder: Path) -> "PositionIndex | None":
    if not (folder / "positions").is_dir():
        return None
    from tvlens.attribution.positions import PositionIndex

    return PositionIndex.read(folder)


def _load_reports(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if not content:
        return {}
    reports = content.get("pairs", [content])
    return {str(report.get("tuned_name", "")): report for report in reports}


def _frame(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    return Table.load(path).to_frame().reindex(columns=list(columns))
