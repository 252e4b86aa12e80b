"""What the decompose stage says beyond labels: directions by name, the paper's readings, overlap.

one pair    -> directions (with their vectors), readings
all pairs   -> overlap of every two fine-tunes of one base, controls among them
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvlens.errors import StudyError
from tvlens.tables import Table, concatenated
from tvlens.threads import one_thread
from tvlens.weights.vocabulary import token_strings

from .plan import StudyPlan, name_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tvlens.weights.matching import Pair

Progress = Callable[[str], None]
UNDECODABLE = "\N{REPLACEMENT CHARACTER}"
"""What a decoder puts for bytes that are no whole character."""
WORD_STARTS = {"byte level": "\u0120", "sentencepiece": "\u2581"}
"""How vocabularies write a leading blank."""


@dataclass(frozen=True, eq=False)
class WrittenDirections:
    """Tables of one pair and the unit vectors that ``directions`` names."""

    directions: Table
    readings: Table
    vectors: Mapping[str, "Tensor"]


@one_thread()
def written_directions(pair: "Pair", labels: Table, *, seed: int) -> WrittenDirections:
    """Directions and readings of a pair in one pass over its blocks."""
    from tvlens.geometry.directions import directions_table
    from tvlens.geometry.readings import d_head_of, readings_of_block
    from tvlens.geometry.readout import unembedding_of
    from tvlens.geometry.spectra import spectra_of_block
    from tvlens.geometry.writes import directions_of_block

    found, tables = [], []
    frame, d_head = labels.to_frame(), d_head_of(pair)
    for block in pair.blocks():
        spectra = spectra_of_block(pair, block, seed=seed)
        found += directions_of_block(pair, spectra, frame, seed=seed)
        tables.append(readings_of_block(pair, spectra, d_head, seed=seed))
    unembedding = unembedding_of(pair, pair.rows.base)
    named = directions_table(pair, found, unembedding, token_texts(pair), seed=seed)
    return WrittenDirections(named.table, concatenated("readings", tables), named.vectors)


def token_texts(pair: "Pair") -> list[str] | None:
    """The base's tokens as text, by number; None without a tokenizer that can be listed."""
    known = pair.rows.tokens[0] if pair.rows.tokens else token_strings(pair.base.folder)
    if not known:
        return None
    return readable([known.get(number, "") for number in range(max(known) + 1)])


def readable(tokens: Sequence[str]) -> list[str]:
    """Stored token strings as the text they stand for, blanks in front kept.

    Byte-level vocabularies write every byte as a character; a token that is part of a character
    only stays as it is stored.
    """
    if any(token.startswith(WORD_STARTS["byte level"]) for token in tokens):
        from tokenizers.decoders import ByteLevel

        decoder = ByteLevel()
        texts = (decoder.decode([token]) for token in tokens)
        return [s if UNDECODABLE in t else t for s, t in zip(tokens, texts, strict=True)]
    return [token.replace(WORD_STARTS["sentencepiece"], " ") for token in tokens]


def check_replicates(plan: StudyPlan) -> None:
    """Refuse a replicate that the study has not, before any time is spent.

    Raises:
        StudyError: A name among ``replicates`` is none of the study's fine-tunes.
    """
    names = {*plan.names, *(name_of(spec) for spec in plan.controls)}
    for name in (*plan.replicates, *plan.replicates.values()):
        if name not in names:
            raise StudyError(
                f"the replicate {name!r} is none of the fine-tunes {sorted(names)}.",
                hint="Give both runs of a recipe as fine-tunes, and replicates by their names.",
            )


def overlap_tables(
    plan: StudyPlan,
    pairs: "Sequence[Pair]",
    controls: "Mapping[Path, Sequence[Pair]]",
    say: Progress,
) -> list[Table]:
    """Every two fine-tunes and controls against each other; none where there is only one.

    Args:
        plan: What was asked.
        pairs: Those of the study, as they are measured.
        controls: The controls by the folder of the base that they are seen from.
        say: Called with one line.
    """
    from tvlens.geometry.overlap import overlap

    named = [pair for pair in pairs if pair.tuned_name in plan.names]  # all start from one model
    beside = controls[named[0].base.folder]
    others = [pair for pair in beside if pair.tuned_name not in plan.names]
    together = [*named, *others]  # a fine-tune is no control of itself
    if len(together) < 2:
        return []
    say(f"overlap: {', '.join(pair.tuned_name for pair in together)}")
    names = [pair.tuned_name for pair in others]
    return [overlap(together, replicates=plan.replicates, controls=names, seed=plan.seed)]
