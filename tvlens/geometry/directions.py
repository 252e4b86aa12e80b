"""The table ``directions``: what a tuning vector writes, by the tokens it promotes and suppresses.

The directions, their measures and labels are those of ``writes``; their tokens, and whether these
stand out against random directions, those of ``readout``. ``stands_out`` is a false discovery rate
of Q over all directions of the fine-tune. ``spread_ratio`` is how far the direction moves logits
apart, relative to a random direction of its length: below 1 it avoids the unembedding.

Sign: a singular triplet has none, since (r, u) and (-r, -u) are one. It is turned so that its most
extreme token is promoted (``sign`` tokens); which of the two is written at run time depends on the
input. Without a readout the largest entry of u is positive (``sign`` entry). A neuron's change has
a sign of its own (``sign`` own): with a positive activation it promotes what stands there.

In families with a norm after the sub-layer (``ln1_post``, ``ln2_post``) tokens are read behind that
norm's gain; the saved u is what the matrix writes, before it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.components import key_columns
from tvlens.tables import Table, keyed_schema
from tvlens.threads import one_thread

from .nulls import benjamini_hochberg
from .reading import Pair, kv_index_of
from .readout import RandomReadout, Readout, Unembedding, random_readout, readout, token_names
from .spectra import spectra_of_block
from .writes import FACTS, Direction, directions_of_block

Q = 0.05
"""False discovery rate of ``stands_out``, over the directions of one fine-tune."""
_TYPES = {
    "label": pa.string(),
    **dict.fromkeys(("spikes", "k"), pa.int32()),
    **{name: pa.bool_() for name in FACTS if name.startswith("intruder_")},
    **{name: pa.int32() for name in FACTS if name.startswith("intruders_")},
}
"""Types of the columns that are no plain numbers."""
_CHANCE = ("top_z", "random_z", "random_z_99", "p_value", "p_floor", "q_value")
DIRECTIONS_SCHEMA = keyed_schema(
    *((name, _TYPES.get(name, pa.float64())) for name in FACTS),
    ("sign", pa.string()),
    *(
        (f"{end}{suffix}", pa.list_(kind))
        for end in ("promoted", "suppressed")
        for suffix, kind in (("", pa.string()), ("_ids", pa.int64()), ("_z", pa.float64()))
    ),
    *((name, pa.float64()) for name in _CHANCE),
    ("stands_out", pa.bool_()),
    ("spread_ratio", pa.float64()),
    ("vector", pa.string()),
)


class Directions(NamedTuple):
    """The table, and the vectors that its column ``vector`` names.

    Attributes:
        table: One row a direction.
        vectors: ``NAME.write`` and, where there is one, ``NAME.read``; float32 unit vectors.
    """

    table: Table
    vectors: dict[str, Tensor]


def directions_table(
    pair: Pair,
    found: Sequence[Direction],
    unembedding: Unembedding | None,
    tokens: Sequence[str] | None = None,
    *,
    seed: int,
) -> Directions:
    """Name the directions of one pair by their tokens and put them in a table.

    Args:
        pair: Base and tuned checkpoint.
        found: The directions of all blocks.
        unembedding: What reads them; None where the family has no table.
        tokens: Token strings by number, None where no tokenizer is known.
        seed: Seed of the random directions.
    """
    columns = _key(pair, found)
    columns |= {name: [one.facts.get(name) for one in found] for name in FACTS}
    signs = [_entry_sign(one.write) if one.rank is not None else 1.0 for one in found]
    columns["sign"] = ["own" if one.rank is None else "entry" for one in found]
    if unembedding is not None and found:
        said = readout(torch.stack([one.residual for one in found]), unembedding)
        leaning = said.leaning.tolist()
        signs = [1.0 if one.rank is None else s for one, s in zip(found, leaning, strict=True)]
        columns["sign"] = ["own" if one.rank is None else "tokens" for one in found]
        columns |= _token_columns(said, signs, unembedding, tokens)
        columns |= _chance_columns(said, found, random_readout(unembedding, seed=seed))
    vectors: dict[str, Tensor] = {}
    for one, sign, name in zip(found, signs, columns["vector"], strict=True):
        turned = one.turned(sign)
        vectors[f"{name}.write"] = turned.write.float().contiguous()
        if turned.read is not None:
            vectors[f"{name}.read"] = turned.read.float().contiguous()
    table = Table.of("directions", DIRECTIONS_SCHEMA, columns, order="strength")
    return Directions(table, vectors)


def _key(pair: Pair, found: Sequence[Direction]) -> dict[str, Any]:
    """Key columns: kind ``direction`` with a rank; a neuron's whole change is a ``neuron``."""
    group = kv_index_of(pair).tolist()
    sources = [one.source for one in found]
    kv_index = [group[c.index or 0] if c.kind == "head" else None for c in sources]
    count = len(found)
    return {
        **key_columns(sources, kv_index=kv_index),
        "component": [one.name for one in found],
        "kind": ["neuron" if one.rank is None else "direction" for one in found],
        "rank": [one.rank for one in found],
        "base": [pair.base_name] * count,
        "tuned": [pair.tuned_name] * count,
        "tied": [False] * count,
        "vector": [f"{pair.tuned_name}/{one.name}" for one in found],
    }


def _entry_sign(vector: Float[Tensor, " d_model"]) -> float:
    return 1.0 if float(vector[vector.abs().argmax()]) >= 0 else -1.0


def _token_columns(
    said: Readout, signs: Sequence[float], unembedding: Unembedding, tokens: Sequence[str] | None
) -> dict[str, list[Any]]:
    """Promoted and suppressed tokens; a turned direction promotes what it suppressed."""
    columns: dict[str, list[Any]] = {}
    for end, other in (("promoted", "suppressed"), ("suppressed", "promoted")):
        places, scores, names = [], [], []
        for row, sign in enumerate(signs):
            mine = end if sign > 0 else other
            column = getattr(said, mine)[row]
            places.append(unembedding.ids[column].tolist())
            scores.append((sign * getattr(said, f"{mine}_z")[row]).tolist())
            names.append(token_names(column, unembedding.ids, tokens))
        columns |= {end: names, f"{end}_ids": places, f"{end}_z": scores}
    return columns


def _chance_columns(
    said: Readout, found: Sequence[Direction], chance: RandomReadout
) -> dict[str, list[Any]]:
    """The most extreme token of every direction beside what random directions show."""
    extremes, count = said.extreme.numpy(), len(found)
    p_values = chance.p_values(extremes)
    q_values = benjamini_hochberg(p_values)
    lengths = torch.stack([one.residual for one in found]).norm(dim=1)
    return {
        "top_z": extremes.tolist(),
        "random_z": [chance.mean] * count,
        "random_z_99": [chance.bound] * count,
        "p_value": p_values.tolist(),
        "p_floor": [chance.p_floor] * count,
        "q_value": q_values.tolist(),
        "stands_out": (q_values <= Q).tolist(),
        "spread_ratio": (said.spread / lengths / chance.spread).tolist(),
    }


@one_thread()
def new_directions(
    pair: Pair,
    labels: Table | None = None,
    *,
    unembedding: Unembedding | None = None,
    tokens: Sequence[str] | None = None,
    seed: int = 0,
) -> Directions:
    """The directions that a pair's tuning vector writes, named by tokens where that is possible.

    Args:
        pair: Base and tuned checkpoint.
        labels: Its table from ``classify``, from which changed neurons are chosen.
        unembedding: ``unembedding_of(pair)``, or another model's to read with.
        tokens: Token strings by number.
        seed: Seed of the noise edges and of the random directions.
    """
    frame = None if labels is None else labels.to_frame()
    found: list[Direction] = []
    for block in pair.blocks():
        found += directions_of_block(
            pair, spectra_of_block(pair, block, seed=seed), frame, seed=seed
        )
    return directions_table(pair, found, unembedding, tokens, seed=seed)
