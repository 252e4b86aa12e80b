"""One tuned model's part of the page."""

from dataclasses import dataclass, field

from .activation_maps import PassingPart, circuits_table, passing_parts
from .answer import Statement, answer
from .contrast_tables import contrast_plots, contrasts_table
from .datatable import DataTable
from .direction_tables import directions_table, readings_table
from .edge_tables import EdgePart, edge_circuit_tables, edge_parts
from .effect_tables import fidelity_tables, ranking_tables
from .figures import HeatMap, Scatter, heat_map
from .folder import StudyFolder
from .graft_tables import graft_tables
from .grids import score_grids, size_grids
from .part_tables import Bars, parts_bars, parts_table
from .position_maps import PlacedPart, placed_parts
from .representation_plots import representation_note, representation_plots
from .sweeps import sweep_notes, sweep_plots
from .tokens import TokenText, token_texts
from .weight_tables import (
    inputs_table,
    label_table,
    largest_table,
    neuron_scatter,
    places_table,
)


@dataclass(frozen=True)
class ModelPart:
    """What the page says about one tuned model.

    Attributes:
        slug: Prefix of its ids in the page.
        name: The tuned model.
        statements: The answer.
        size_tables: Where the tuning vector is, and the largest changes.
        size_maps: Heat maps of relative change.
        contrasts: MLP against attention.
        contrast_plots: The same layer by layer.
        label_table: Labels by kind.
        inputs_table: Gains and reads against what the base's inputs explain.
        scatter: Neurons by gain and residual.
        directions: What is written, by name.
        readings: The paper's candidate readings.
        ranking_tables: Estimate beside exact.
        score_maps: Heat maps of scores.
        passing: Activations, direction by direction.
        placed: One prompt's scores by position.
        circuits: The base's circuit against the tuned model's.
        edges: Edges, direction by direction.
        edge_circuits: What circuits of few edges carry.
        parts: What gains, rewiring and new directions carry.
        parts_bars: The same by part.
        fidelity: The checks.
        grafts: The smallest sets that carry the behaviour.
        sweeps: Tasks along the tuning vector, beside controls.
        sweep_notes: What they show, a sentence a task.
        represented: Activations beside the base's, block by block.
        represented_note: What they show, a sentence.
        tokens: Texts coloured by score.
        notes: What could not be drawn and why, by section.
        missing: The command that makes a section, by table.
    """

    slug: str
    name: str
    statements: list[Statement]
    size_tables: list[DataTable]
    size_maps: list[HeatMap]
    contrasts: DataTable | None
    contrast_plots: list[Scatter]
    label_table: DataTable | None
    inputs_table: DataTable | None
    scatter: Scatter | None
    directions: DataTable | None
    readings: DataTable | None
    ranking_tables: list[DataTable]
    score_maps: list[HeatMap]
    passing: list[PassingPart]
    placed: list[PlacedPart]
    circuits: DataTable | None
    edges: list[EdgePart]
    edge_circuits: list[DataTable]
    parts: DataTable | None
    parts_bars: Bars | None
    fidelity: list[DataTable]
    grafts: list[DataTable]
    sweeps: list[Scatter]
    sweep_notes: list[str]
    represented: list[Scatter]
    represented_note: str
    tokens: list[TokenText]
    missing: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> bool:
        """Whether the study holds anything about this model alone."""
        made = [name for name, command in self.missing.items() if not command]
        return bool(made or self.sweeps or self.represented)


def model_part(study: StudyFolder, tuned: str, place: int, *, tooltips: bool = True) -> ModelPart:
    """Everything about one tuned model; ``place`` numbers its ids."""
    slug = f"m{place}"
    weights, contrasts = study.table("weights", tuned), study.table("contrasts", tuned)
    tokens, note = token_texts(study, tuned, slug)
    names = ("weights", "contrasts", "labels", "directions", "readings", "attribution", "fidelity")
    shares = study.table("shares", tuned)
    return ModelPart(
        slug=slug,
        name=study.title(tuned),
        statements=answer(study, tuned),
        size_tables=[] if weights.empty else [places_table(weights), largest_table(study, tuned)],
        size_maps=[heat_map(grid, tooltips=tooltips) for grid in size_grids(weights, slug)],
        contrasts=contrasts_table(contrasts),
        contrast_plots=contrast_plots(contrasts, slug, tooltips=tooltips),
        label_table=label_table(study, tuned),
        inputs_table=inputs_table(study.table("tests", tuned)),
        scatter=neuron_scatter(study, tuned, slug, tooltips=tooltips),
        directions=directions_table(study.table("directions", tuned)),
        readings=readings_table(study.table("readings", tuned)),
        ranking_tables=ranking_tables(study, tuned),
        score_maps=[heat_map(grid, tooltips=tooltips) for grid in score_grids(study, tuned, slug)],
        passing=passing_parts(study, tuned, slug, tooltips=tooltips),
        placed=placed_parts(study, tuned, slug, tooltips=tooltips),
        circuits=circuits_table(study.table("circuits", tuned)),
        edges=edge_parts(study, tuned),
        edge_circuits=edge_circuit_tables(study, tuned),
        parts=parts_table(shares),
        parts_bars=parts_bars(shares, slug),
        fidelity=fidelity_tables(study.table("fidelity", tuned)),
        grafts=graft_tables(study, tuned),
        sweeps=sweep_plots(study, tuned, slug, tooltips=tooltips),
        sweep_notes=sweep_notes(study, tuned),
        represented=representation_plots(study, tuned, slug, tooltips=tooltips),
        represented_note=representation_note(study, tuned),
        tokens=tokens,
        missing={name: study.missing(name) for name in (*names, "shares", "grafts", "prompts")},
        notes={"tokens": note},
    )
