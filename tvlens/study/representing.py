"""Representations: what a tuning vector does to activations, beside what could stand in its place.

On the documents of ``texts`` the base is compared (``evaluation.representations``) with

    the fine-tune                        control null
    base + a Gaussian vector as long     control ``random``, tensor by tensor; some draws
    base + a control fine-tune's vector  control NAME

A second copy of the base holds each random vector for the time of its comparison: memory is that of
three models and a few copies of the vector beside the sums, 8.3 GB for SmolLM2-135M.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tvlens.errors import StudyError
from tvlens.tables import Table, concatenated
from tvlens.threads import one_thread

from .controls import controls_from, draw_seed
from .plan import StudyPlan
from .prompted import WIDE

if TYPE_CHECKING:
    import pandas as pd

    from tvlens.compose.edits import EditableModel
    from tvlens.models.lens import LensModel
    from tvlens.models.prompts import Batch
    from tvlens.weights.matching import Pair
    from tvlens.weights.vector import TuningVector

Progress = Callable[[str], None]
RANDOM = "random"


class Represented(NamedTuple):
    """What was found for one pair.

    Attributes:
        table: ``representations``.
        facts: Documents and tokens, and what they show in a sentence.
        warnings: What the reader should know.
    """

    table: Table
    facts: dict[str, Any]
    warnings: tuple[str, ...]


def check_represent(plan: StudyPlan) -> None:
    """Find what the stage would refuse, before any model is loaded.

    Raises:
        StudyError: There are no documents.
        PromptError: Their file cannot be used.
    """
    from tvlens.models.prompts import load_texts

    if plan.texts is None:
        raise StudyError(
            "representations are compared on documents.",
            hint="Give a file of them, or demo:NAME, with --texts.",
        )
    load_texts(plan.texts, skip_bad_lines=plan.skip_bad_lines)


def represent(plan: StudyPlan, pair: "Pair", say: Progress, *, device: str) -> Represented:
    """Compare activations of ``pair``'s base with the fine-tune's, and with what stands beside it.

    Raises:
        HostError: The models cannot be run.
        PromptError: The documents cannot be read by both.
    """
    import torch

    from tvlens.compose.edits import EditableModel
    from tvlens.models.pair import base_lens, common_tokens_of
    from tvlens.models.prompts import load_texts, tokenised

    model = EditableModel.of_pair(pair, device=device)
    base = base_lens(pair, common_tokens_of(pair), device=device, dtype=torch.float32)
    texts = load_texts(str(plan.texts), skip_bad_lines=plan.skip_bad_lines)
    batch = tokenised(texts, model.tokenizer, chat=plan.chat)
    run = _Run(plan, pair, model, base, batch, say)
    with one_thread(only_if=base.d_model < WIDE):
        table = concatenated("representations", list(run.all()))
    facts = {"texts": texts.name, **represented(table.to_frame())}
    return Represented(table, {"represent": facts}, (*model.warnings, *batch.warnings))


@dataclass(frozen=True)
class _Run:
    """All comparisons of one pair."""

    plan: StudyPlan
    pair: "Pair"
    model: "EditableModel"
    base: "LensModel"
    batch: "Batch"
    say: Progress

    def all(self) -> Iterator[Table]:
        """The fine-tune, then every random vector, then every control."""
        from tvlens.compose.controls import random_vector
        from tvlens.compose.edits import scaled
        from tvlens.weights.vector import tuning_vector

        tuned = self.pair.tuned_name
        yield self._compared(self.model.edited(scaled(1.0)), tuned)
        for draw in range(self.plan.draws):
            vector = random_vector(self.model, seed=draw_seed(self.plan, draw))
            name = f"random {draw + 1} for {tuned}"
            yield self._compared(self._added(vector), name, RANDOM, draw)
        for control in controls_from(self.plan, self.pair):
            name = control.tuned_name
            yield self._compared(self._added(tuning_vector(control)), f"{name} for {tuned}", name)

    def _added(self, vector: "TuningVector") -> "AbstractContextManager[LensModel]":
        """The base with a vector in its weights, for the time of a block."""
        from tvlens.attribution.gates import GatedModel
        from tvlens.compose.edits import Edit, Share, written

        gated = GatedModel.of_vector(self.model.lens, vector)
        return written(self.model.lens, [Share(gated, self.model.doses(Edit(1.0)))])

    def _compared(
        self,
        edited: "AbstractContextManager[Any]",
        model: str,
        control: str | None = None,
        draw: int | None = None,
    ) -> Table:
        from tvlens.evaluation.representation_tables import Named, representations_table
        from tvlens.evaluation.representations import compared

        self.say(f"representations: {model}")
        heads = self.base.n_heads // self.base.n_kv_heads
        names = self.pair.base_name, self.pair.tuned_name
        named = Named(*names, model, control, draw, heads_per_kv=heads)
        with edited as lens:
            found = compared(self.base, lens, self.batch, seed=self.plan.seed)
            return representations_table(found, named)


STREAM = {"part": "resid_post", "tokens": "without_first"}
"""Which rows a sentence and the verdict are about."""


def at_stream(frame: "pd.DataFrame", measure: str) -> "pd.DataFrame":
    """The rows of one measure of the residual stream after the blocks, first tokens left out."""
    rows = frame[(frame["part"] == STREAM["part"]) & (frame["tokens"] == STREAM["tokens"])]
    return rows[rows["measure"] == measure]


def represented(frame: "pd.DataFrame") -> dict[str, Any]:
    """What the rows of one pair show at the residual stream; medians over the blocks.

    Args:
        frame: Rows of ``representations`` of one pair.
    """
    first = at_stream(frame, "cka").iloc[0]
    facts: dict[str, Any] = {
        "documents": int(first["n_documents"]),
        "tokens": int(first["n_tokens"]),
        "width": int(first["width"]),
    }
    measures = ("effective_rank_share", "cka", "cosine", "relative_change", "mean_share")
    for name in measures:
        rows = at_stream(frame, name)
        by_model = rows.groupby("model", sort=False)["value"].median()
        facts[name] = {
            str(model): float(value) if np.isfinite(value) else None
            for model, value in by_model.items()
        }
    return {**facts, "sentence": _sentence(frame, facts)}


def _sentence(frame: "pd.DataFrame", facts: dict[str, Any]) -> str:
    kinds = at_stream(frame, "cka")[["model", "control"]].drop_duplicates()
    tuned = str(kinds[kinds["control"].isna()]["model"].iloc[0])
    shares = facts["effective_rank_share"]
    if not shares[tuned]:
        return f"Half of the blocks and more of {tuned} give what the base's give."
    random = sorted(shares[m] for m in kinds[kinds["control"] == RANDOM]["model"])
    others = kinds[kinds["control"].notna() & (kinds["control"] != RANDOM)]
    beside = [f"random vectors as long: {_range(random)}"] if random else []
    beside += [
        f"the control {control}: {_percent(shares[model])}"
        for model, control in others.itertuples(index=False, name=None)
    ]
    width = facts["width"]
    return (
        f"At {facts['tokens']:,} tokens of {facts['documents']:,} documents, first tokens left "
        f"out, the residual stream of {tuned} differs from the base's in an effective rank of "
        f"{shares[tuned] * width:.3g} of {width} dimensions ({_percent(shares[tuned])}) in the "
        f"median block{'; ' if beside else ''}{'; '.join(beside)}. CKA {facts['cka'][tuned]:.3g}, "
        f"cosine {facts['cosine'][tuned]:.3g}."
    )


def _range(shares: list[float]) -> str:
    ends = dict.fromkeys((_percent(shares[0]), _percent(shares[-1])))
    return " to ".join(ends)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
