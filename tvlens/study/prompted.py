"""A base model and the study's prompts as it reads them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .plan import StudyPlan

if TYPE_CHECKING:
    from tvlens.models.lens import LensModel
    from tvlens.models.prompts import Batch, PromptSet
    from tvlens.weights.pair import Pair

WIDE = 512
"""d_model from which a forward pass gains from several threads."""


@dataclass(frozen=True, eq=False)
class BaseRun:
    """A base with the prompts that it is to be run on.

    Attributes:
        lens: The base, hooked.
        asked: The prompts.
        batch: Their tokens, which both models of the pair know.
        warnings: What the two vocabularies leave out, in sentences.
    """

    lens: "LensModel"
    asked: "PromptSet"
    batch: "Batch"
    warnings: tuple[str, ...]


def base_on_prompts(plan: StudyPlan, pair: "Pair") -> BaseRun:
    """The base of ``pair`` and the plan's prompts.

    Raises:
        TvlensError: The base, its tokenizer or the prompts cannot be used.
    """
    from tvlens.models.lens import LensModel
    from tvlens.models.pair import common_tokens_of, tokenizer_in
    from tvlens.models.prompts import load_prompts, tokenised

    asked = load_prompts(plan.prompts, skip_bad_lines=plan.skip_bad_lines)
    common = common_tokens_of(pair)
    batch = tokenised(asked, tokenizer_in(common.folders), chat=plan.chat)
    lens = LensModel.load(pair.base.folder, rows=common.size, device=chosen_device(plan))
    lens.unknown = common.unknown
    return BaseRun(lens, asked, batch, common.warnings)


def chosen_device(plan: StudyPlan) -> str:
    """Where the models run: as asked, else on an accelerator if there is one."""
    return device_of(plan.device)


def device_of(asked: str) -> str:
    """A device by name; ``auto`` is an accelerator if there is one."""
    import torch

    if asked != "auto":
        return asked
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"


def of_split(asked: "PromptSet", batch: "Batch", split: str) -> list[int]:
    """The rows of a batch whose prompts are of a split."""
    return [row for row, number in enumerate(batch.numbers) if asked[number].split == split]
