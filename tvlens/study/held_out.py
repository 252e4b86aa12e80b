"""The stage of held-out losses: models and held-out texts -> evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tvlens.tables import concatenated
from tvlens.weights.matching import load_pair

from .outputs import Outputs, Progress, StageOutput
from .plan import WHOLE_WAY, StudyPlan, name_of
from .prompted import chosen_device

if TYPE_CHECKING:
    from tvlens.weights.matching import Pair


def evaluate_stage(plan: StudyPlan, pairs: "Sequence[Pair]", say: Progress) -> Outputs:
    """Held-out loss per domain of the base, the fine-tunes and the controls, each model once."""
    from tvlens.evaluation.losses import losses_table
    from tvlens.models.lens import LensModel
    from tvlens.models.pair import common_tokens_of, tokenizer_in
    from tvlens.models.prompts import load_texts, tokenised

    measured = [pair for pair in pairs if not pair.tuned_name.endswith(WHOLE_WAY)]
    for spec in plan.controls:
        measured.append(load_pair(plan.base, spec, names=("base", name_of(spec)), scan=False))
    common = [common_tokens_of(pair) for pair in measured]
    base = measured[0].base.folder
    base_first = any(tokens.folders[0] == base for tokens in common)
    tokenizer = tokenizer_in((base, *common[0].folders) if base_first else common[0].folders)
    tasks = {
        task: tokenised(load_texts(spec), tokenizer, chat=plan.chat)
        for task, spec in plan.evaluate.items()
    }
    models: dict[str, tuple[Path, Path | None]] = {"base": (base, None)}
    for pair in measured:
        adapter = pair.tuned.folder if pair.adapter else None
        models[pair.tuned_name] = (pair.base.folder if adapter else pair.tuned.folder, adapter)
    made = []
    for name, (folder, adapter) in models.items():
        say(f"held-out losses of {name}")
        lens = LensModel.load(folder, adapter=adapter, device=chosen_device(plan))
        made.append(losses_table(name, lens, tasks, seed=plan.seed))
    warnings = tuple(sentence for tokens in common for sentence in tokens.warnings)
    output = StageOutput((concatenated("evaluation", made),), warnings=warnings)
    yield pairs[-1].tuned_name, output
