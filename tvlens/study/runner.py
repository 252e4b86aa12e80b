"""Runs the stages of a plan into a study folder; a killed run resumes at the last whole table."""

import json
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from tvlens.callables import name_of, spec_of
from tvlens.errors import AdapterError, ExtensionError, StudyError, TvlensError
from tvlens.reporting.report import render_report
from tvlens.tables import Table, concatenated
from tvlens.weights.matching import load_pair
from tvlens.weights.sources.memory import MemorySource

from . import refusals, stages
from .claims import verdicts_table
from .outputs import StageOutput
from .plan import PLANNED, WHOLE_WAY, StudyPlan
from .store import MANIFEST, ORDERS, Study, prepared_folder, write_json, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from tvlens.models.prompts import PromptSet
    from tvlens.weights.matching import Pair
    from tvlens.weights.sources.folder import Source

Progress = Callable[[str], None]
SHARED = {
    "curves": ("curve", "sweep", "sweep"),
    "evaluation": ("split", "held_out", "evaluate"),
}
"""Tables that two stages fill: the column and value that mark the rows of one, and which."""
SOMETIMES = {"attribute": ("circuits", "edge_circuits", "fidelity", "findings")}
"""Tables that a stage makes only of some plans: an earlier plan's must not stay."""
PACKAGES = ("tvlens", "torch", "transformer-lens", "transformers", "safetensors", "scipy")


def run_study(
    plan: StudyPlan,
    folder: Path,
    *,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Study:
    """Run ``plan`` into ``folder`` and write its report.

    Args:
        plan: What to do.
        folder: The study folder; made if absent. A study of the same pair grows.
        force: Replace another study that is there.
        resume: Keep a stage's tables where all of them are already whole.
        progress: Called with one line at the start of each stage.

    Raises:
        StudyError: The folder holds another pair's study, or a table of another plan.
        TvlensError: The models or prompts cannot be used; a refused load report is written.
    """
    say = progress if progress is not None else (lambda text: None)
    say("reading and matching the checkpoints")
    refusals.check_inputs(plan)
    pairs = _pairs(plan, folder)
    refusals.check_pairs(plan, pairs)
    refusals.check_vocabularies(plan, pairs)
    prepared_folder(folder, _inputs(pairs), force=force)
    plan = _resumed(plan, folder) if resume else plan
    run = _Run(plan, folder, pairs, say, resume)
    run.write_manifest()
    plan.save(folder)
    write_json(folder / "load_report.json", load_reports(pairs))
    for name in plan.stages:
        run.stage(name)
    run.join()
    say("writing the report")
    render_report(folder)
    return Study(folder)


def compare(
    pair: "Pair",
    prompts: "PromptSet | None" = None,
    *,
    out: Path | str | None = None,
    metric: str | None = None,
    controls: Sequence[str] = (),
    classifier: "str | Callable[..., Any] | None" = None,
    measures: "Sequence[str | Callable[..., Any]]" = (),
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Study:
    """The whole study of a pair: what was written, what kind it is, and what it does.

    Args:
        pair: The models; read again from where they lie.
        prompts: What the behaviour is measured on; None for the shipped neutral texts. They are
            written beside the study, as ``FOLDER-prompts.jsonl``, so that it can be run again.
        out: The study folder; a new temporary one where None.
        metric: Metric name or ``package.module:function``; None chooses by the prompts.
        controls: Specifications of control fine-tunes.
        classifier: Your own labels: ``package.module:function``, or a function of a module.
        measures: Your own numbers of a component, likewise.
        force: Replace another study in ``out``.
        progress: Called with one line at the start of each stage.
        options: Further fields of ``StudyPlan``: ``seed``, ``canonical``, ``parts``, ...

    Raises:
        StudyError: ``out`` holds another pair's study.
        ExtensionError: A function of yours is in no module, so that a study could not name it.
        TvlensError: The prompts or the metric do not fit.
    """
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="tvlens-")) / "study"
    asked = None
    if prompts is not None:
        asked = str(saved_prompts(prompts, folder.with_name(folder.name + "-prompts.jsonl")))
    plan = StudyPlan(
        base=_spec(pair.base),
        tuned=(_spec(pair.tuned),),
        tuned_names=(pair.tuned_name,),
        controls=tuple(controls),
        classifier=None if classifier is None else _named(classifier),
        measures=tuple(map(_named, measures)),
        prompts=asked,
        metric=metric,
        **options,
    )
    return run_study(plan, folder, force=force, progress=progress)


def _named(function: "str | Callable[..., Any]") -> str:
    """How a study names a function, so that it can be run again."""
    if isinstance(function, str):
        return function
    spec = spec_of(function)
    if spec is None:
        raise ExtensionError(
            f"{name_of(function)} cannot be imported under that name, and a study is run again "
            "from files.",
            hint="Put it into a module of its own, or call tvlens.classify, which takes anything.",
        )
    return spec


class _Run:
    """The state of one run: what is measured and written while stages pass."""

    def __init__(
        self, plan: StudyPlan, folder: Path, pairs: "list[Pair]", say: Progress, resume: bool
    ) -> None:
        self.plan, self.folder, self.pairs = plan, folder, pairs
        self.say, self.resume = say, resume
        self.facts: dict[str, Any] = _earlier(folder, "facts")
        self.measured: dict[str, dict[str, float]] = self._kept("stages")
        self.warnings: dict[str, list[str]] = self._kept("warnings_of_stages")

    def _kept(self, key: str) -> dict[str, Any]:
        """What the manifest says of stages that will not run again."""
        anew = () if self.resume else self.plan.stages
        return {name: v for name, v in _earlier(self.folder, key).items() if name not in anew}

    def stage(self, name: str) -> None:
        """Run one stage for every pair and save its tables."""
        if self.resume and name in self.measured:
            self.say(f"{name}: kept")
            return
        with self.timed(name):
            made, self.warnings[name] = [], []
            for tuned_name, output in stages.STAGES[name](self.plan, self.pairs, self.say):
                self.warnings[name] += output.warnings
                self.facts.setdefault(tuned_name, {}).update(output.facts)
                self._fix_sample(output.facts)
                made.append(output)
            for table_name in SOMETIMES.get(name, ()):
                (self.folder / f"{table_name}.parquet").unlink(missing_ok=True)
            self._save(name, made)
        self.write_manifest()

    def _save(self, stage: str, outputs: "Sequence[StageOutput]") -> None:
        """Write what a stage made for all pairs, each table and file whole or not at all."""
        made: dict[str, list[Table]] = {}
        vectors: dict[str, "dict[str, Tensor]"] = {}
        for output in outputs:
            for table in output.tables:
                made.setdefault(table.name, []).append(table)
            for file_name, named in output.vectors.items():
                vectors.setdefault(file_name, {}).update(named)
        for table_name, parts in made.items():
            joined = concatenated(table_name, parts, order=ORDERS.get(table_name, ""))
            self._with_other_rows(stage, joined).save(self.folder)
        for file_name, named in vectors.items():
            write_tensors(self.folder / f"{file_name}.safetensors", named)
        positions = [output.positions for output in outputs if output.positions is not None]
        if positions:
            from tvlens.attribution.positions import write_positions

            write_positions(self.folder, [series for own in positions for series in own])

    def _with_other_rows(self, stage: str, table: Table) -> Table:
        """A table that two stages fill, with the rows of the other one that are there."""
        path = self.folder / f"{table.name}.parquet"
        if table.name not in SHARED or not path.is_file():
            return table
        column, value, owner = SHARED[table.name]
        earlier = Table.load(path)
        if column not in earlier.data.column_names:
            return table
        mine = earlier.to_frame()[column].eq(value)
        kept = earlier.data.filter(pa.array((~mine if stage == owner else mine).to_numpy(bool)))
        both = pa.concat_tables([kept, table.data], promote_options="default")
        return Table(table.name, both.select(table.data.column_names), table.order)

    def join(self) -> None:
        """Write what needs the tables of two stages, as far as they are there."""
        study = Study(self.folder)
        if {"evaluation_items", "combination_gains", "representations"} & set(study.tables):
            verdicts_table(study).save(self.folder)
        if "attribution" not in study.tables:
            return
        if "contrasts" in study.tables:
            self._join_contrasts(study)
        self._join_ranks(study, sizes="weights" in study.tables and not self._renumbered())
        if self.plan.parts:
            self._join_parts(study)

    def _join_contrasts(self, study: Study) -> None:
        """The contrasts with layers counted by what the metric owes to them, beside the others."""
        from tvlens.attribution.joins import effect_of_layers
        from tvlens.geometry.contrasts import WRITES, with_weighted

        parts = []
        for pair in self.pairs:
            scores = study.attribution.where(tuned=pair.tuned_name)
            weights = effect_of_layers(scores, WRITES)
            own = study.contrasts.where(tuned=pair.tuned_name)
            parts.append(with_weighted(own, weights, seed=self.plan.seed))
        concatenated("contrasts", parts).save(self.folder)

    def _join_ranks(self, study: Study, *, sizes: bool) -> None:
        """Rank agreement of sizes with effects, and of the base's circuit with the tuned one's."""
        from tvlens.attribution.joins import circuit_agreement, size_and_effect

        parts, seed = [], self.plan.seed
        for name in (pair.tuned_name for pair in self.pairs):
            if sizes:
                weights, scores = (t.where(tuned=name) for t in (study.weights, study.attribution))
                parts.append(size_and_effect(weights, scores, seed=seed))
            if "circuits" in study.tables:
                circuits = study.table("circuits").where(tuned=name)
                parts.append(circuit_agreement(circuits, seed=seed))
        if parts:
            concatenated("joins", parts).save(self.folder)

    def _join_parts(self, study: Study) -> None:
        """What the geometric parts carry of the effects, beside energies and labels."""
        from tvlens.attribution.shares import shares_table

        beside = {} if self._renumbered() else {n: n for n in ("weights", "labels")}
        parts = []
        for pair in self.pairs:
            known = {
                name: study.table(table).where(tuned=pair.tuned_name)
                for name, table in beside.items()
                if table in study.tables
            }
            own = study.attribution.where(tuned=pair.tuned_name)
            parts.append(shares_table(own, **known, seed=self.plan.seed))
        concatenated("shares", parts, order="effect").save(self.folder)

    def _renumbered(self) -> bool:
        """Whether a site of ``weights`` and one of ``attribution`` are not the same unit."""
        found = [facts.get("canonical", {}) for facts in self.facts.values()]
        return self.plan.canonical and any(any(counts.values()) for counts in found)

    def _fix_sample(self, facts: Mapping[str, Any]) -> None:
        """Write down the exact sample that was planned by time."""
        fixed = self.plan.with_sample(facts)
        if fixed is not self.plan:
            self.plan = fixed
            fixed.save(self.folder)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Record the seconds and the peak resident memory of what runs inside."""
        start = time.perf_counter()
        yield
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.measured[name] = {
            "seconds": round(time.perf_counter() - start, 2),
            "peak_resident_bytes": peak,
        }

    def write_manifest(self) -> None:
        """Write versions, inputs and what is known so far."""
        said = [w for pair in self.pairs for w in pair.load_report.warnings]
        said += [w for warnings in self.warnings.values() for w in warnings]
        content = {
            "format": 1,
            "versions": {"python": platform.python_version(), **_versions()},
            "command": self.plan.command,
            "inputs": _inputs(self.pairs),
            "identical": {p.tuned_name: p.load_report.identical for p in self.pairs},
            "seed": self.plan.seed,
            "dtype": self.plan.dtype,
            "device": self.plan.device,
            "stages": self.measured,
            "warnings": list(dict.fromkeys(said)),
            "warnings_of_stages": self.warnings,
            "facts": self.facts,
        }
        write_json(self.folder / MANIFEST, content)


def saved_prompts(prompts: "PromptSet", path: Path) -> Path:
    """Write ``prompts`` as JSON lines, fields that are None left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for prompt in prompts:
        entry = {name: value for name, value in asdict(prompt).items() if value is not None}
        lines.append(json.dumps(entry, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def _pairs(plan: StudyPlan, folder: Path) -> "list[Pair]":
    pairs: list[Pair] = []
    for step in plan.steps:
        if step.tuned_name.endswith(WHOLE_WAY) and pairs[-1].adapter is not None:
            pairs[-1].load_report.warnings.append(
                f"{pairs[-1].tuned_name} is an adapter of {pairs[-1].base_name}: its whole way "
                "from the base is in lineage.parquet alone."
            )
            continue
        try:
            pairs.append(load_pair(step.base, step.tuned, names=(step.base_name, step.tuned_name)))
            if plan.parent is not None and pairs[0].adapter is not None:
                raise AdapterError(
                    f"the parent {plan.parent} is an adapter, which nothing can start from.",
                    hint="Merge it into its base and save that as a model.",
                )
        except TvlensError as error:
            _write_refusal(folder, error)
            raise
    return pairs


def _spec(source: "Source") -> str:
    """What reads ``source`` again: its name if that is one, else its folder.

    Raises:
        StudyError: The model is in memory alone.
    """
    if isinstance(source, MemorySource):
        raise StudyError(
            f"{source.name} is in memory, but a study can be run again, from files.",
            hint="Save it with save_pretrained() and compare the folders.",
        )
    return source.name if source.name.startswith("demo:") else str(source.folder.resolve())


def _write_refusal(folder: Path, error: TvlensError) -> None:
    report = getattr(error, "report", None)
    if report is None or (folder / MANIFEST).exists() or folder.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "load_report.json", report.to_dict())


def load_reports(pairs: "list[Pair]") -> dict[str, Any]:
    """The load report of a single pair, or ``{"pairs": [...]}`` for several fine-tunes."""
    reports = [
        {"base_name": p.base_name, "tuned_name": p.tuned_name, **p.load_report.to_dict()}
        for p in pairs
    ]
    return reports[0] if len(reports) == 1 else {"pairs": reports}


def _inputs(pairs: "list[Pair]") -> dict[str, Any]:
    inputs: dict[str, Any] = {"base": pairs[0].base.sha256()}
    own = [pair for pair in pairs if not pair.tuned_name.endswith(WHOLE_WAY)]
    inputs.update({pair.tuned_name: pair.tuned.sha256() for pair in own})
    return inputs


def _resumed(plan: StudyPlan, folder: Path) -> StudyPlan:
    """The plan of the study that is there: the one asked for, with its sample if that is fixed.

    Raises:
        StudyError: The study that is there has other options.
    """
    path = folder / "study.yaml"
    if not path.is_file():
        return plan
    earlier = StudyPlan.load(path)
    unfixed = dict.fromkeys(PLANNED) if plan.check_exact is None else {}
    if earlier.model_copy(update=unfixed) != plan:
        raise StudyError(
            f"{folder} was made with other options, so its tables cannot be kept.",
            hint="Use the options of its study.yaml, or --force to start again.",
        )
    return earlier


def _earlier(folder: Path, key: str) -> dict[str, Any]:
    path = folder / MANIFEST
    return dict(json.loads(path.read_text("utf-8")).get(key, {})) if path.is_file() else {}


def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}
