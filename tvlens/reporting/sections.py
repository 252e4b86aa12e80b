"""The sections of the page: tables of strings and drawings, made from a study's tables."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from .answer import Statement, answer, kind_words, percent
from .circuitsvis import TokenPlot
from .figures import (
    LABELS,
    NOTHING,
    SIGNED,
    Grid,
    HeatMap,
    Scatter,
    colour_at,
    heat_map,
    hex_code,
    label_scatter,
    number,
)
from .folder import StudyFolder, rows_of
from .scores import (
    ESTIMATE,
    EXACT,
    checks,
    disjoint,
    energy_shares,
    labels_of,
    mean_scores,
    of_method,
    relative_size,
    split_prompts,
    verdict,
)

TOP = 12  # rows of a ranking that fit a screen with their captions
TOKEN_PROMPTS = 8  # texts shown; the table holds the rest
MAX_LISTED = 200  # tensors named one by one in the load report
PARTS = ("W_Q", "W_K", "W_V", "W_O", "W_gate", "W_in", "W_out")
_PRODUCTS = ("OV", "QK")
_FINER = ("head", "kv_head", "neuron")


@dataclass(frozen=True)
class DataTable:
    """A table of strings.

    Attributes:
        caption: One sentence on what the rows are.
        columns: Headings.
        rows: Cells, as many a row as there are headings.
        text_columns: How many of the first columns are words, so aligned left.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1

    def without_empty_columns(self) -> "DataTable":
        """The same table less the columns that hold nothing but dashes."""
        kept = [i for i in range(len(self.columns)) if any(row[i] != NOTHING for row in self.rows)]
        return replace(
            self,
            columns=tuple(self.columns[i] for i in kept),
            rows=tuple(tuple(row[i] for i in kept) for row in self.rows),
            text_columns=sum(i < self.text_columns for i in kept),
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
        label_table: Labels by kind.
        scatter: Neurons by gain and residual.
        ranking_tables: Estimate beside exact.
        score_maps: Heat maps of scores.
        fidelity: The checks.
        tokens: Texts coloured by score.
        notes: What could not be drawn and why, by section.
        missing: The command that makes a section, by table.
    """

    slug: str
    name: str
    statements: list[Statement]
    size_tables: list[DataTable]
    size_maps: list[HeatMap]
    label_table: DataTable | None
    scatter: Scatter | None
    ranking_tables: list[DataTable]
    score_maps: list[HeatMap]
    fidelity: DataTable | None
    tokens: list["TokenText"]
    missing: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenText:
    """One prompt's tokens with the sentence above them."""

    heading: str
    plot: TokenPlot
    colours: tuple[str, ...]


def model_part(study: StudyFolder, tuned: str, place: int, *, tooltips: bool = True) -> ModelPart:
    """Everything about one tuned model; ``place`` numbers its ids."""
    slug = f"m{place}"
    weights = study.table("weights", tuned)
    tokens, note = token_texts(study, tuned, slug)
    names = ("weights", "labels", "attribution", "fidelity", "prompts")
    return ModelPart(
        slug=slug,
        name=tuned,
        statements=answer(study, tuned),
        size_tables=[] if weights.empty else [places_table(weights), largest_table(study, tuned)],
        size_maps=[heat_map(grid, tooltips=tooltips) for grid in size_grids(weights, slug)],
        label_table=label_table(study, tuned),
        scatter=neuron_scatter(study, tuned, slug, tooltips=tooltips),
        ranking_tables=ranking_tables(study, tuned),
        score_maps=[heat_map(grid, tooltips=tooltips) for grid in score_grids(study, tuned, slug)],
        fidelity=fidelity_table(study.table("fidelity", tuned)),
        tokens=tokens,
        missing={name: study.missing(name) for name in names},
        notes={"tokens": note},
    )


def places_table(weights: pd.DataFrame) -> DataTable:
    """Length of the tuning vector by place in the model."""
    pieces = disjoint(weights)
    shares = energy_shares(weights, "place")
    rows = []
    for name, share in shares.items():
        here = pieces[pieces["place"] == name]
        delta, base, ratio = relative_size(here)
        cells = (f"{len(here):,}", number(base), number(delta), percent(ratio), percent(share))
        rows.append((str(name), *cells))
    return DataTable(
        "The tuning vector by place. Shares are of its squared length, so they add up to 100 %.",
        ("place", "tensors", "|base|", "|delta|", "|delta| / |base|", "share of |delta|²"),
        tuple(rows),
    )


def largest_table(study: StudyFolder, tuned: str) -> DataTable:
    """The pieces and heads that changed most for their size."""
    weights = study.table("weights", tuned).dropna(subset=["relative_delta"])
    labels = labels_of(study, tuned)
    order = weights["relative_delta"].abs().sort_values(ascending=False, kind="stable").index
    ranked = weights.reindex(order)
    pieces = disjoint(ranked).head(TOP)
    heads = ranked[ranked["kind"].isin(("head", "kv_head"))].head(TOP)
    rows = tuple(
        (
            row.component,
            row.kind.replace("_", " "),
            labels.get(row.component, labels.get(row.site, NOTHING)).replace("_", " "),
            percent(row.relative_delta),
            number(row.gain),
            number(row.residual),
            number(row.snr),
        )
        for row in rows_of(pd.concat([pieces, heads]))
    )
    return DataTable(
        f"The {len(pieces)} tensors and the {len(heads)} head slices that changed most for their "
        "size. gain > 0: longer along its own base direction; residual: the rest, relative to the "
        "base; snr: energy over the expected rounding energy. A head's label is that of its whole "
        "OV circuit.",
        ("component", "kind", "label", "|delta| / |base|", "gain", "residual", "snr"),
        rows,
        text_columns=3,
    )


def size_grids(weights: pd.DataFrame, slug: str) -> list[Grid]:
    """Heat maps of relative change: heads, kv heads, matrices."""
    grids = [
        _head_grid(weights, kind, words, f"{slug}-size-{kind}")
        for kind, words in (("head", "head"), ("kv_head", "key-value head"))
    ]
    matrices = weights[(weights["kind"] == "matrix") & weights["part"].isin(PARTS)]
    grids.append(
        _grid(
            matrices.assign(value=matrices["relative_delta"], column=matrices["part"]),
            f"{slug}-size-matrix",
            "Matrices: |delta| / |base|",
            what="layer {} {}",
        )
    )
    return [grid for grid in grids if grid is not None]


def _head_grid(weights: pd.DataFrame, kind: str, words: str, name: str) -> Grid | None:
    rows = weights[(weights["kind"] == kind) & ~weights["part"].isin(_PRODUCTS)]
    squares = rows.assign(delta=rows["delta_norm"] ** 2, whole=rows["base_norm"] ** 2)
    sums = squares.groupby(["layer", "index"], as_index=False)[["delta", "whole"]].sum()
    sums = sums.assign(value=np.sqrt(sums["delta"] / sums["whole"].where(sums["whole"] > 0)))
    parts = "W_Q, W_O" if kind == "head" else "W_K, W_V"
    return _grid(
        sums.assign(column=sums["index"]),
        name,
        f"{words.capitalize()}s ({parts} together): |delta| / |base|",
        what=f"layer {{}} {words} {{}}",
    )


def score_grids(study: StudyFolder, tuned: str, slug: str) -> list[Grid]:
    """Heat maps of mean weight-space scores: heads, kv heads, matrices."""
    rows = of_method(study.table("attribution", tuned), ESTIMATE)
    means = mean_scores(rows)
    unit = str(rows["unit"].dropna().iloc[0]) if rows["unit"].notna().any() else ""
    grids = []
    for kind, words in (("head", "head"), ("kv_head", "key-value head"), ("matrix", "")):
        here = means[(means["kind"] == kind) & means["layer"].notna()]
        here = here[here["part"].isin(PARTS)] if kind == "matrix" else here
        placed = here.assign(column=here["part" if kind == "matrix" else "index"])
        summed = placed.groupby(["layer", "column"], as_index=False)["score"].sum()
        title = f"{words.capitalize()}s" if words else "Matrices"
        grids.append(
            _grid(
                summed.assign(value=summed["score"]),
                f"{slug}-score-{kind}",
                f"{title}: mean {ESTIMATE} score",
                what=f"layer {{}} {words}".rstrip() + " {}",
                signed=True,
                unit=unit,
            )
        )
    return [grid for grid in grids if grid is not None]


def _grid(
    frame: pd.DataFrame, name: str, title: str, *, what: str, signed: bool = False, unit: str = ""
) -> Grid | None:
    frame = frame.dropna(subset=["layer", "column", "value"])
    if frame.empty:
        return None
    words = isinstance(frame["column"].iloc[0], str)
    present = set(frame["column"])
    columns = [part for part in PARTS if part in present] if words else range(int(max(present)) + 1)
    wide = frame.pivot_table(index="layer", columns="column", values="value", aggfunc="first")
    layers = range(int(frame["layer"].max()) + 1)
    return Grid(
        name=name,
        title=title,
        values=wide.reindex(index=list(layers), columns=list(columns)).to_numpy(float),
        rows=tuple(str(layer) for layer in layers),
        columns=tuple(str(column) for column in columns),
        signed=signed,
        unit=unit,
        what=what,
    )


def label_table(study: StudyFolder, tuned: str) -> DataTable | None:
    """How many components of each kind got which label."""
    frame = study.table("labels", tuned).dropna(subset=["label"])
    if frame.empty:
        return None
    counts = pd.crosstab(frame["kind"], frame["label"])
    labels = [x for x in LABELS if x in counts.columns]
    labels += sorted(set(counts.columns) - set(labels))
    rows = tuple(
        (kind_words(str(kind)), f"{int(counts.loc[kind].sum()):,}", *(f"{n:,}" for n in numbers))
        for kind, numbers in zip(counts.index, counts[labels].to_numpy().tolist(), strict=True)
    )
    return DataTable(
        "Labels by kind. Heads, kv heads and neurons are finer cuts of the matrices: never add "
        "them. “New direction” is new read or new write; any gradient update looks like one, so "
        "read the contrast in the answer before this table.",
        ("kind", "all", *(label.replace("_", " ") for label in labels)),
        rows,
    )


def neuron_scatter(
    study: StudyFolder, tuned: str, slug: str, *, tooltips: bool = True
) -> Scatter | None:
    """Gain against residual of the neurons' write vectors, by label."""
    weights = study.table("weights", tuned)
    rows = weights[(weights["kind"] == "neuron") & (weights["part"] == "W_out")]
    rows = rows.dropna(subset=["gain", "residual"])
    if rows.empty:
        return None
    labels = labels_of(study, tuned)
    found = [
        labels.get(component, labels.get(site, "no label"))
        for component, site in zip(rows["component"], rows["site"], strict=True)
    ]
    frame = rows[["component", "gain", "residual"]].assign(label=found)
    return label_scatter(f"{slug}-neurons", frame.reset_index(drop=True), tooltips=tooltips)


def ranking_tables(study: StudyFolder, tuned: str) -> list[DataTable]:
    """The components with the largest scores: disjoint pieces, then their finer cuts."""
    attribution = study.table("attribution", tuned)
    rows = of_method(attribution, ESTIMATE)
    if rows.empty:
        return []
    prompts = study.table("prompts", tuned)
    joined = _beside_exact(rows, of_method(attribution, EXACT), prompts)
    joined = _with_findings(joined, study.table("findings", tuned))
    decided = checks(study.table("fidelity", tuned))
    own = decided[decided["method"] == ESTIMATE]
    passed = own.groupby("kind")["verdict"].agg(
        lambda v: "passed" if all(v == "passed") else "withheld"
    )
    joined["check"] = joined["kind"].map(passed).fillna("not checked")
    finer = joined["kind"].isin(_FINER)
    unit = str(rows["unit"].dropna().iloc[0]) if rows["unit"].notna().any() else "metric units"
    tables = [
        _ranking(joined[~finer], f"Pieces of the model: they add up to the whole change ({unit})."),
        _ranking(joined[finer], f"Heads and neurons: finer cuts of the same matrices ({unit})."),
    ]
    return [table for table in tables if table.rows]


def _beside_exact(
    rows: pd.DataFrame, exact_rows: pd.DataFrame, prompts: pd.DataFrame
) -> pd.DataFrame:
    joined = mean_scores(rows).set_index("component")
    choose, judge = split_prompts(prompts, "choose"), split_prompts(prompts, "judge")
    tested = exact_rows[["component", "prompt"]].dropna().drop_duplicates()
    same = rows.merge(tested, on=["component", "prompt"])
    joined["same"] = same.groupby("component")["score"].mean()
    joined["exact"] = mean_scores(exact_rows).set_index("component")["score"]
    joined["rank"], joined["judge"] = joined["score"], np.nan
    if choose and judge:
        joined["rank"] = mean_scores(rows, choose).set_index("component")["score"]
        joined["judge"] = mean_scores(rows, judge).set_index("component")["score"]
    return joined.reset_index()


def _with_findings(joined: pd.DataFrame, findings: pd.DataFrame) -> pd.DataFrame:
    key = "site" if findings["component"].isna().all() else "component"
    found = findings.dropna(subset=["finding"]).drop_duplicates(key).set_index(key)
    columns = ("insert", "remove", "finding")
    return joined.assign(**{column: joined[key].map(found[column]) for column in columns})


def _ranking(frame: pd.DataFrame, what: str) -> DataTable:
    order = frame["rank"].abs().sort_values(ascending=False, kind="stable", na_position="last")
    split = bool(frame["judge"].notna().any())
    rows = []
    for row in rows_of(frame.reindex(order.index[:TOP])):
        scores = (_signed(row.rank), _signed(row.judge)) if split else (_signed(row.score),)
        checked = (_signed(row.same), _signed(row.exact), _signed(row.insert), _signed(row.remove))
        finding = row.finding if isinstance(row.finding, str) else NOTHING
        rows.append((row.component, row.check, finding, *scores, *checked))
    how = (
        "Ranked on the prompts of the split 'choose'; the score on 'judge' stands beside it."
        if split
        else "Ranked by the mean over all prompts."
    )
    headings = ("on choose", "on judge") if split else ("estimate",)
    return DataTable(
        f"{what} {how} The exact swing averages what swapping the component in does along the path "
        "and is set against the estimate on the same prompts. A dash: not measured exactly. Read "
        "no order into rows whose kind did not pass its check.",
        (
            *("component", "check", "finding", *headings),
            *("estimate, same prompts", "exact swing", "alone into base", "alone out of tuned"),
        ),
        tuple(rows),
        text_columns=3,
    ).without_empty_columns()


def _signed(value: Any) -> str:
    return f"{value:+.3g}" if isinstance(value, float) and math.isfinite(value) else NOTHING


def fidelity_table(frame: pd.DataFrame) -> DataTable | None:
    """Every check of an estimate against exact patching."""
    if frame.empty:
        return None
    rows = tuple(
        (
            str(row.method),
            kind_words(str(row.kind)),
            str(row.stratum),
            verdict(row.passed) if row.stratum == "random" else NOTHING,
            number(row.n),
            number(row.spearman),
            _interval(row.ci_low, row.ci_high),
            number(row.spearman_worst),
            number(row.slope),
            number(row.sign_agreement),
            *(_signed(value) for value in (row.sum_insert, row.sum_remove, row.sum_ig)),
            _signed(row.metric_change),
        )
        for row in rows_of(frame)
    )
    return DataTable(
        "Estimates against the exact quantity that asks the same question. The random sample "
        "decides: passed needs Spearman ≥ 0.9 and a slope of 0.8 to 1.25. A claim that rests on an "
        "estimate that did not pass is withheld.",
        (
            *("method", "kind", "sample", "claims", "n", "Spearman", "95 % interval"),
            *("worst prompt", "slope", "signs agree"),
            *("Σ into base", "Σ out of tuned", "Σ integrated", "change of the metric"),
        ),
        rows,
        text_columns=4,
    ).without_empty_columns()


def _interval(low: float, high: float) -> str:
    return f"{number(low)} to {number(high)}" if pd.notna(low) and pd.notna(high) else NOTHING


def token_texts(study: StudyFolder, tuned: str, slug: str) -> tuple[list[TokenText], str]:
    """The first prompts that have a score for each token, and what was left out and why."""
    prompts = study.table("prompts", tuned)
    rows = prompts[prompts["tokens"].notna() & prompts["token_scores"].notna()]
    usable, refused = [], 0
    for place, row in enumerate(rows_of(rows)):
        scores = [float("nan") if s is None else float(s) for s in row.token_scores]
        if len(scores) != len(row.tokens) or not all(map(math.isfinite, scores)) or not scores:
            refused += 1
            continue
        usable.append((place, row, scores))
    shown = usable[:TOKEN_PROMPTS]
    limit = max((abs(s) for _, _, scores in shown for s in scores), default=0.0) or 1.0
    texts = [_token_text(f"cv-{slug}-{p}", row, scores, limit) for p, row, scores in shown]
    notes = []
    if shown:
        notes.append(f"Full colour is {number(limit)} either way.")
        notes.append(f"{len(shown)} of {len(prompts)} prompts are shown.")
    if refused:
        notes.append(f"{refused} left out: a token without a finite score.")
    return texts, " ".join(notes)


def _token_text(name: str, row: Any, scores: list[float], limit: float) -> TokenText:
    named = {"split": row.split, "group": row.group, "answer": row.answer}
    known = [f"{key}: {value}" for key, value in named.items() if isinstance(value, str) and value]
    number_of = "" if pd.isna(row.prompt) else f" {int(row.prompt)}"
    heading = f"Prompt{number_of}" + (f" ({', '.join(known)})" if known else "")
    tokens = tuple(str(token) for token in row.tokens)
    plot = TokenPlot(name, tokens, tuple(scores), limit)
    return TokenText(heading, plot, tuple(_shade(score / limit) for score in scores))


def _shade(position: float) -> str:
    return hex_code(colour_at(SIGNED, position / 2 + 0.5))


def load_tables(report: dict[str, Any]) -> list[DataTable]:
    """Status counts, then every tensor that was not plainly compared."""
    tensors = [t for t in report.get("tensors") or () if isinstance(t, dict)]
    counts = Counter(str(t.get("status")) for t in tensors)
    rows = tuple((status, f"{count:,}") for status, count in sorted(counts.items()))
    tables = [DataTable("Tensors of the two checkpoints by status.", ("status", "tensors"), rows)]
    odd = [t for t in tensors if t.get("status") != "compared"]
    listed = tuple(
        tuple(_words(t.get(key)) for key in ("status", "base", "tuned", "reason"))
        for t in odd[:MAX_LISTED]
    )
    if listed:
        more = f" (the first {MAX_LISTED} of {len(odd):,})" if len(odd) > MAX_LISTED else ""
        caption = f"Tensors that were not simply compared{more}."
        columns = ("status", "base", "tuned", "reason")
        tables.append(DataTable(caption, columns, listed, text_columns=4))
    return tables


def config_table(report: dict[str, Any]) -> DataTable | None:
    """The config entries that differ, and what that means."""
    found = [d for d in report.get("config_differences") or () if isinstance(d, dict)]
    effects = {"function": "changes the function", "refused": "not comparable", "note": "noted"}
    rows = tuple(
        (
            _words(difference.get("field")),
            *(_words(difference.get(end)) for end in ("base", "tuned")),
            effects.get(str(difference.get("effect")), _words(difference.get("effect"))),
        )
        for difference in found
    )
    columns = ("entry", "base", "tuned", "effect")
    return DataTable("Config entries that differ.", columns, rows, text_columns=4) if rows else None


def described(items: object) -> list[str]:
    """Config differences or warnings, one line each, whatever form they are stored in."""
    if isinstance(items, dict):
        return [f"{key}: {_words(value)}" for key, value in items.items()]
    if isinstance(items, str):
        return [items]
    if not isinstance(items, Iterable):
        return []
    return [_words(item) for item in items]


def _words(value: object) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(inner)}" for key, inner in value.items())
    return str(value)


def evaluation_table(frame: pd.DataFrame) -> DataTable | None:
    """Measured values, one column a model."""
    rows = frame.dropna(subset=["value"])
    if rows.empty:
        return None
    models = [str(m) for m in rows["model"].dropna().unique()]
    keys = ["task", "split", "measure", "unit", "n"]
    lines = []
    for _, group in rows.groupby(keys, sort=False, dropna=False):
        first = next(rows_of(group))
        named = (first.task, first.split, first.measure, first.unit)
        words = (word if isinstance(word, str) else NOTHING for word in named)
        cells = (_measured(group[group["model"] == model]) for model in models)
        lines.append((*words, number(first.n), *cells))
    return DataTable(
        "Measured on held-out data, with 95 % intervals. A lower loss is better.",
        ("task", "split", "measure", "unit", "n", *models),
        tuple(lines),
        text_columns=4,
    )


def _measured(rows: pd.DataFrame) -> str:
    cells = []
    for row in rows_of(rows):
        known = pd.notna(row.ci_low) and pd.notna(row.ci_high)
        interval = f" [{number(row.ci_low, 4)}, {number(row.ci_high, 4)}]" if known else ""
        cells.append(number(row.value, 4) + interval)
    return "; ".join(cells) or NOTHING
