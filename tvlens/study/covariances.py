"""What the base's matrices read, for the covariance-matched null of the decompose stage.

``auto`` runs the base on the study's prompts where a later stage runs the models on them anyway,
and keeps to ``AUTO_BYTES``; a file made by ``tvlens.covariances`` holds whatever it holds. Moments
are of one base: a step that starts from the parent gets its own, or with a file none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvlens.errors import StudyError
from tvlens.threads import one_thread

from .plan import StudyPlan
from .prompted import WIDE, base_on_prompts

if TYPE_CHECKING:
    from tvlens.models.covariances import Covariances, Input
    from tvlens.weights.layout import Layout
    from tvlens.weights.pair import Pair

AUTO_BYTES = 2**30
"""Memory that ``auto`` may take: all inputs of SmolLM2-135M; of an 8B none."""


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of a base's inputs.

    Attributes:
        covariances: Their moments, None where there are none.
        facts: For the manifest.
        warnings: What is left out, in sentences.
    """

    covariances: "Covariances | None" = None
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def runs_models(plan: StudyPlan) -> bool:
    """Whether ``auto`` takes covariances: the base is run on the prompts anyway."""
    return plan.covariances == "auto" and "attribute" in plan.stages


def planned_inputs(plan: StudyPlan, layout: "Layout") -> tuple["Input", ...]:
    """The inputs that the decompose stage will know, as far as no file has to be read."""
    return fitting_inputs(layout) if runs_models(plan) else ()


def check_covariances(plan: StudyPlan) -> None:
    """Refuse a file that cannot be read.

    Raises:
        StudyError: There is no such file.
        CheckpointError: It holds no covariances.
    """
    if plan.covariances in ("auto", "off"):
        return
    from tvlens.models.covariances import Covariances

    if not Path(plan.covariances).is_file():
        raise StudyError(
            f"there is no file {plan.covariances!r}.",
            hint="--covariances takes auto, off, or a file made by tvlens.covariances.",
        )
    Covariances.load(plan.covariances)


def base_covariances(plan: StudyPlan, pair: "Pair") -> Known:
    """The covariances of the base of ``pair``, as the plan has them.

    Raises:
        TvlensError: The base or the prompts cannot be used.
    """
    from tvlens.models.covariances import Covariances, covariances

    if runs_models(plan):
        inputs = fitting_inputs(pair.layout)
        if not inputs:
            return Known(warnings=(_left_out(pair.layout, inputs),))
        run = base_on_prompts(plan, pair)
        with one_thread(only_if=run.lens.d_model < WIDE):
            found = covariances(run.lens, run.batch, inputs=inputs)
        left_out = _left_out(pair.layout, inputs)
        return Known(found, _facts(found, run.asked.name), (left_out,) if left_out else ())
    if plan.covariances in ("auto", "off"):
        return Known()
    if pair.base_name != "base":
        return Known(
            warnings=(
                f"{plan.covariances} is about the base, so {pair.tuned_name} is not tested against "
                f"what {pair.base_name} reads.",
            )
        )
    found = Covariances.load(plan.covariances)
    return Known(found, _facts(found, plan.covariances))


def fitting_inputs(layout: "Layout") -> tuple["Input", ...]:
    """The inputs whose moments fit into ``AUTO_BYTES`` together, narrow ones first."""
    from tvlens.models.covariances import INPUTS, bytes_needed

    if not layout.listed:
        return ()
    widths = input_widths(layout)
    narrow: "list[Input]" = sorted(INPUTS, key=lambda name: widths[name])
    while narrow and bytes_needed(widths, narrow, layers=layout.n_layers) > AUTO_BYTES:
        narrow.pop()
    return tuple(name for name in INPUTS if name in narrow)


def input_widths(layout: "Layout") -> dict["Input", int]:
    """Dimensions of every input of a block."""
    heads = layout.n_heads * layout.d_head
    return {
        "attention": layout.d_model,
        "z": heads,
        "mlp": layout.d_model,
        "post": layout.d_mlp,
    }


def _left_out(layout: "Layout", inputs: Sequence["Input"]) -> str:
    from tvlens.models.covariances import INPUTS, bytes_needed

    missing: list[Input] = [name for name in INPUTS if name not in inputs]
    if not missing:
        return ""
    need = bytes_needed(input_widths(layout), missing, layers=layout.n_layers)
    return (
        f"covariances of {', '.join(missing)} were left out: they would take {need / 1e9:.1f} GB. "
        "tvlens.covariances(...).save(FILE) and --covariances FILE bring them in."
    )


def _facts(found: "Covariances", source: str) -> dict[str, Any]:
    shrinkages = {name: float(f"{g:.3g}") for name, g in found.shrinkages().items()}
    about = {"source": source, "tokens": found.tokens, "shrinkage": shrinkages}
    return {"covariances": about}
