"""What is measured on tasks: names, units, which way is good, and what an item's rows hold.

=================  =========================================================================
loss               mean over texts of the mean surprise of a text's answer tokens, nats
perplexity         exp of the mean surprise of a token, over all texts' tokens
bits_per_byte      the same per byte of UTF-8 text, in bits: comparable across tokenizers
kl_to_base         KL(base || model) at the answer tokens, mean of a text, nats; kl_to_tuned too
agree_base         share of answer tokens where both models' likeliest token is one; agree_tuned
acc                share of questions whose right choice is the likeliest, by its summed log p
acc_norm           the same by log p per byte of the choice
choice_logprob     log p of the right choice among the choices, nats
said               share of questions whose right choice the model writes
valid              share of questions for which it writes any choice at all
exact              the last number written is the answer's (or, without a number, the text)
exact_match        what lm-eval's task of that metric says of a written answer
strict             the first line written is the answer, to case and spaces
prompt_strict      share of prompts all of whose constraints hold; prompt_loose
instruction_strict share of constraints that hold; instruction_loose
distinct_1 _2      different words (pairs of words) of a text over all of them
rep_4              1 minus the same for runs of four words
loop               share of texts that end in something said three times or more
length             tokens written
ended              share of texts that end by themselves
chrf               chrF of a text against its reference, 0 to 100 [1]
rouge_l            ROUGE-L F of a text against its reference, 0 to 1 [2]
=================  =========================================================================

[1] Popovic 2015, as sacrebleu computes it; [2] Lin 2004, as rouge-score computes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from .intervals import Transform

Better = Literal["higher", "lower", ""]


@dataclass(frozen=True)
class Measure:
    """A named number.

    Attributes:
        name: What tables call it.
        unit: Its unit.
        better: Which way is good; empty where neither is.
        transform: What is taken of the weighted mean over items.
    """

    name: str
    unit: str
    better: Better
    transform: Transform | None = None


class Item(NamedTuple):
    """One value of one measure.

    Attributes:
        item: Number of the text, question or prompt in its task.
        measure: Name of the measure.
        value: The value.
        weight: How much it counts in the mean.
        detail: What the value is of, where an item has several: a constraint's name.
        response: What the model wrote, on one row of the item.
    """

    item: int
    measure: str
    value: float
    weight: float = 1.0
    detail: str | None = None
    response: str | None = None


_ALL = (
    Measure("loss", "nats/token", "lower"),
    Measure("perplexity", "", "lower", np.exp),
    Measure("bits_per_byte", "bits/byte", "lower"),
    Measure("kl_to_base", "nats/token", ""),
    Measure("kl_to_tuned", "nats/token", ""),
    Measure("agree_base", "share", ""),
    Measure("agree_tuned", "share", ""),
    Measure("acc", "share", "higher"),
    Measure("acc_norm", "share", "higher"),
    Measure("choice_logprob", "nats", "higher"),
    Measure("said", "share", "higher"),
    Measure("valid", "share", "higher"),
    Measure("exact", "share", "higher"),
    Measure("exact_match", "share", "higher"),
    Measure("strict", "share", "higher"),
    Measure("prompt_strict", "share", "higher"),
    Measure("prompt_loose", "share", "higher"),
    Measure("instruction_strict", "share", "higher"),
    Measure("instruction_loose", "share", "higher"),
    Measure("distinct_1", "share", ""),
    Measure("distinct_2", "share", ""),
    Measure("rep_4", "share", "lower"),
    Measure("loop", "share", "lower"),
    Measure("length", "tokens", ""),
    Measure("ended", "share", ""),
    Measure("chrf", "0 to 100", "higher"),
    Measure("rouge_l", "share", "higher"),
)
MEASURES: Mapping[str, Measure] = {measure.name: measure for measure in _ALL}
"""Every measure by its name."""
