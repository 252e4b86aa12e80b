"""Two sources become a pair, or a sentence why they cannot.

Every stored tensor of both gets an entry in the load report; an error carries the report, as far
as it got, in its ``report`` attribute.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tvlens.errors import (
    AdapterError,
    CheckpointError,
    IncomparableModelsError,
    TvlensError,
    UnsupportedFormatError,
)

from .configs import config_differences
from .contents import equal_fraction, refuse_non_finite, settle_identity
from .draft import Draft
from .fitting import account_for_adapter, fit_adapter
from .layout import Layout, has_table, layout_of, unlisted_layout
from .pair import Pair, Weight
from .precision import PRECISIONS
from .report import Status, with_report
from .sources.folder import Source
from .sources.opening import open_source
from .vocabulary import first_disagreement, token_strings

__all__ = ["Pair", "Weight", "load_pair"]

_INCOMPLETE = "The weights are incomplete or belong to another config.json."
_NOT_A_PAIR = "A tuning vector needs a base and a fine-tune of that very base."


def load_pair(
    base: str | Path,
    tuned: str | Path,
    *,
    names: tuple[str, str] | None = None,
    scan: bool = True,
) -> Pair:
    """Match a base with its fine-tune or adapter.

    Args:
        base: Folder, hub id or ``demo:`` name of the base.
        tuned: The same of the tuned model, or an adapter folder.
        names: What tables call the two; the sources' own names by default.
        scan: Read everything once, to find NaN and Inf and to tell identical models. Without
            it only headers are read, and NaN and Inf are found when a component is read.

    Raises:
        CheckpointError: A checkpoint cannot be read, or holds NaN or Inf.
        IncomparableModelsError: The models have different shapes or functions.
        AdapterError: The adapter does not fit the base.
    """
    sources = open_source(base), open_source(tuned)
    if sources[0].is_adapter:
        raise AdapterError(
            f"{sources[0].name} is an adapter; the base must be a full checkpoint.",
            hint="Give the model it was trained on first, the adapter second.",
        )
    layouts = _layouts(*sources)
    draft = Draft(*sources, layouts, layouts[0])
    for source in sources:
        for note in source.notes:
            draft.warn(note)
        if source.adapter_beside:
            draft.warn(f"{source.name} holds an adapter beside the model; only the model is read.")
    try:
        steps = _adapter_steps() if draft.tuned.is_adapter else _checkpoint_steps()
        for step in steps:
            step(draft)
        if scan:
            refuse_non_finite(draft)
            settle_identity(draft)
    except TvlensError as error:
        with_report(error, draft.report)
        raise
    base_name, tuned_name = names or _names(*sources)
    return Pair(
        draft.base,
        draft.tuned,
        base_name,
        tuned_name,
        draft.layout,
        draft.report,
        draft.base_tensors,
        draft.tuned_tensors,
        draft.adapter,
    )


def _layouts(base: Source, tuned: Source) -> tuple[Layout, Layout]:
    """The layouts of two sources; without a table they have one, made from what both hold."""
    kind = base.config.get("model_type")
    if has_table(base.config):
        alike = not tuned.is_adapter and tuned.config.get("model_type") == kind
        own = layout_of(base.config)
        return own, layout_of(tuned.config) if alike else own
    if tuned.is_adapter:
        raise UnsupportedFormatError(
            f"{tuned.name} is an adapter of a {kind} model, and tvlens has no table for that "
            "family, so it cannot tell which way round the factors multiply.",
            hint="Merge it with peft's merge_and_unload() and compare the merged model.",
        )
    layout = unlisted_layout(base.config, base.tensors, tuned.tensors)
    return layout, layout


def _checkpoint_steps() -> list[Callable[[Draft], None]]:
    return [
        _compare_configs,
        _warn_of_missing_table,
        _name_tensors,
        _settle_ties,
        _settle_vocabulary,
        _match_tensors,
    ]


def _adapter_steps() -> list[Callable[[Draft], None]]:
    return [_name_tensors, _settle_ties, _check_base, fit_adapter, account_for_adapter]


def _names(base: Source, tuned: Source) -> tuple[str, str]:
    if base.name != tuned.name:
        return base.name, tuned.name
    first, second = (f"{s.folder.resolve().parent.name}/{s.name}" for s in (base, tuned))
    return (first, second) if first != second else (f"{base.name} (base)", f"{tuned.name} (tuned)")


def _compare_configs(draft: Draft) -> None:
    base, tuned = draft.base, draft.tuned
    types = base.config.get("model_type"), tuned.config.get("model_type")
    if types[0] != types[1]:
        raise IncomparableModelsError(
            f"{base.name} is a {types[0]} model, {tuned.name} a {types[1]} model.",
            hint=_NOT_A_PAIR,
        )
    found = config_differences(base.config, tuned.config, draft.layouts)
    draft.report.config_differences.extend(found)
    for difference in found:
        sides = f"{difference.base!r} in {base.name}, {difference.tuned!r} in {tuned.name}"
        if difference.effect == "refused":
            raise IncomparableModelsError(
                f"the models differ in {difference.field}: {sides}.",
                hint=_NOT_A_PAIR,
            )
        if difference.effect == "function" and difference.field != "tie_word_embeddings":
            draft.warn(
                f"config.json differs in {difference.field}: {sides}. The models compute "
                "different things even where their weights are equal."
            )


def _warn_of_missing_table(draft: Draft) -> None:
    """What a family without a table goes without, and how to give it one."""
    layout = draft.layout
    if layout.listed:
        return
    kind = draft.base.config.get("model_type")
    if not layout.places:
        raise IncomparableModelsError(
            f"tvlens has no table for the family {kind!r}, and {draft.base.name} and "
            f"{draft.tuned.name} have no tensor of one name and shape.",
            hint=_NOT_A_PAIR,
        )
    left_out = [f"{name} ({reason})" for name, reason in layout.left_out.items() if reason]
    also = f" {len(left_out)} more cannot be compared, such as {left_out[0]}." if left_out else ""
    draft.warn(
        f"tvlens has no table for the family {kind!r}: {len(layout.places)} tensors are compared "
        "by their names, one row each. Heads, neurons, OV and QK are missing; which side of a "
        "matrix is its input is unknown, so what depends on it is left empty; gains are taken as "
        "they are stored; attribution cannot run. A family is one table: see "
        f"tvlens/weights/families/llama.py.{also}"
    )


def _name_tensors(draft: Draft) -> None:
    draft.base_tensors = _named(draft.base, draft.layout)
    if not draft.tuned.is_adapter:
        draft.tuned_tensors = _named(draft.tuned, draft.layout)


def _named(source: Source, layout: Layout) -> dict[str, str]:
    names: dict[str, str] = {}
    known = {*layout.stored_shapes, layout.unembedding_tensor}
    for stored, info in source.tensors.items():
        name = layout.canonical_name(stored)
        if name in names:
            raise CheckpointError(
                f"{source.name} stores {name} twice, as {names[name]!r} and as {stored!r}.",
                hint="Save the model again with save_pretrained().",
            )
        if name in known and info.dtype not in PRECISIONS:
            raise UnsupportedFormatError(
                f"{source.name} stores {stored} as {info.dtype}, expected one of "
                f"{', '.join(PRECISIONS)}.",
                hint="Dequantise the model and save it in float32, float16 or bfloat16 first.",
            )
        names[name] = stored
    return names


def _settle_ties(draft: Draft) -> None:
    """W_U is a component of its own as soon as one of the models has its own."""
    base_tied = _is_tied(draft, 0)
    tuned_tied = base_tied if draft.tuned.is_adapter else _is_tied(draft, 1)
    if base_tied != tuned_tied:
        tied, untied = (draft.base, draft.tuned) if base_tied else (draft.tuned, draft.base)
        draft.warn(
            f"{tied.name} ties its unembedding to the embedding, {untied.name} does not: W_U is "
            f"compared with the transposed embedding of {tied.name}."
        )
    draft.ties = base_tied, tuned_tied
    draft.layout = replace(draft.layout, tied=base_tied and tuned_tied)


def _is_tied(draft: Draft, side: int) -> bool:
    layout, (source, names) = draft.layouts[side], draft.sides[side]
    head, embedding = names.get(layout.unembedding_tensor), names.get(layout.embedding_tensor)
    if not layout.tied or head is None or embedding is None:
        return layout.tied
    if source.tensors[head].shape == source.tensors[embedding].shape and (
        equal_fraction((source, head), (source, embedding)) == 1.0
    ):
        return True
    draft.warn(
        f"{source.name} says tie_word_embeddings but stores a {head} that differs from "
        f"{embedding}; both are compared as they are stored."
    )
    return False


def _settle_vocabulary(draft: Draft) -> None:
    """Rows of embeddings are matched by number, if the numbers mean the same tokens."""
    sizes = [
        source.tensors[names[draft.embedding]].shape[0]
        for source, names in draft.sides
        if draft.embedding in names
    ]
    if len(sizes) < 2:
        return
    _compare_tokenizers(draft, sizes)
    draft.layout = replace(draft.layout, d_vocab=min(sizes))


def _compare_tokenizers(draft: Draft, sizes: list[int]) -> None:
    base, tuned = draft.base, draft.tuned
    tokens = token_strings(base.folder), token_strings(tuned.folder)
    described = f"{base.name} has {sizes[0]} embedding rows, {tuned.name} {sizes[1]}"
    if tokens[0] is None or tokens[1] is None:
        if sizes[0] != sizes[1]:
            raise IncomparableModelsError(
                f"{described}, and a tokenizer is missing, so rows cannot be matched to tokens.",
                hint="Put both tokenizer.json files beside the weights.",
            )
        return
    found = first_disagreement(tokens[0], tokens[1])
    if found is None:
        return
    meaning = f"token {found.index} is {found.base!r} in the base and {found.tuned!r} in the tuned"
    if sizes[0] != sizes[1]:
        raise IncomparableModelsError(
            f"{described}, and {meaning} model.",
            hint="A tuning vector needs rows that stand for the same tokens.",
        )
    draft.warn(f"the tokenizers differ: {meaning} model. Embedding rows are compared by number.")


def _match_tensors(draft: Draft) -> None:
    expected = draft.layout.stored_shapes
    problems = [_match_one(draft, name, shape) for name, shape in expected.items()]
    for name in [*draft.base_tensors, *(set(draft.tuned_tensors) - set(draft.base_tensors))]:
        if name not in expected:
            _account_for_other(draft, name)
    draft.note_tie()
    found = [problem for problem in problems if problem is not None]
    if found:
        more = f" {len(found) - 1} more tensors do not fit." if len(found) > 1 else ""
        raise type(found[0])(f"{found[0].args[0]}{more}", hint=found[0].hint)


def _match_one(draft: Draft, name: str, shape: tuple[int, ...]) -> TvlensError | None:
    base, tuned = (_stored(draft, side, name) for side in (0, 1))
    if base is None or tuned is None:
        return _missing(draft, name, base, tuned)
    shapes = draft.base.tensors[base].shape, draft.tuned.tensors[tuned].shape
    vocabulary = name in (draft.embedding, draft.unembedding)
    for source, found in zip((draft.base, draft.tuned), shapes, strict=True):
        if not _fits(found, shape, vocabulary=vocabulary):
            draft.note(base, tuned, "refused", f"{found} in {source.name}, expected {shape}")
            return _misshapen(draft, name, shapes, shape)
    if vocabulary and shapes[0] != shapes[1]:
        draft.note(base, tuned, "aligned", _alignment(draft, shapes))
    elif not shapes[0] == shapes[1] == shape and not vocabulary:
        draft.note(base, tuned, "reshaped", f"{shapes[0]} and {shapes[1]} read as {shape}")
    else:
        draft.note(base, tuned, *_naming(draft, base, tuned))
    return None


def _stored(draft: Draft, side: int, name: str) -> str | None:
    """The stored name on one side; a tied model's W_U is its embedding."""
    names = draft.sides[side][1]
    if name == draft.unembedding and name not in names and draft.ties[side]:
        return names.get(draft.embedding)
    return names.get(name)


def _naming(draft: Draft, base: str, tuned: str) -> tuple[Status, str]:
    names = draft.layout.canonical_name(base), draft.layout.canonical_name(tuned)
    if names[0] != names[1]:
        return "compared", "W_U, which one of the models ties to the embedding"
    return ("compared", "") if base == tuned else ("renamed", f"both are {names[0]}")


def _alignment(draft: Draft, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> str:
    longer = draft.base if shapes[0][0] > shapes[1][0] else draft.tuned
    return (
        f"rows 0 to {min(shapes)[0] - 1} by token number; {abs(shapes[0][0] - shapes[1][0])} "
        f"further rows of {longer.name} have no counterpart"
    )


def _check_base(draft: Draft) -> None:
    """An adapter's base must hold what its config asks for; the report follows later."""
    base = draft.base
    if (embedding := draft.base_tensors.get(draft.embedding)) is not None:
        draft.layout = replace(draft.layout, d_vocab=base.tensors[embedding].shape[0])
    for name, shape in draft.layout.stored_shapes.items():
        stored = _stored(draft, 0, name)
        if stored is None:
            raise CheckpointError(
                f"{base.name} lacks {name}, which its config.json asks for.", hint=_INCOMPLETE
            )
        found = base.tensors[stored].shape
        if _squeezed(found) != _squeezed(shape):
            raise CheckpointError(
                f"{stored} of {base.name} is {found}; its config.json asks for {shape}.",
                hint=_INCOMPLETE,
            )


def _fits(found: tuple[int, ...], expected: tuple[int, ...], *, vocabulary: bool) -> bool:
    """Same shape up to axes of length one; an embedding may have more rows."""
    if vocabulary:
        return len(found) == 2 and found[1] == expected[1] and found[0] >= expected[0]
    return _squeezed(found) == _squeezed(expected)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)


def _missing(draft: Draft, name: str, base: str | None, tuned: str | None) -> TvlensError:
    if base is None and tuned is None:
        return CheckpointError(
            f"neither {draft.base.name} nor {draft.tuned.name} has {name}, which config.json "
            "asks for.",
            hint=_INCOMPLETE,
        )
    has, lacks = (draft.base, draft.tuned) if base else (draft.tuned, draft.base)
    draft.note(base, tuned, "only_in_base" if base else "only_in_tuned", "the other must have it")
    return IncomparableModelsError(
        f"{has.name} has {base or tuned}, {lacks.name} lacks it.",
        hint=f"The weights of {lacks.name} are incomplete or of another architecture.",
    )


def _misshapen(
    draft: Draft,
    name: str,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    expected: tuple[int, ...],
) -> TvlensError:
    if shapes[0] == shapes[1]:
        return CheckpointError(
            f"{name} is {shapes[0]} in {draft.base.name} and {draft.tuned.name}; their "
            f"config.json asks for {expected}.",
            hint="Weights and config.json belong to different models.",
        )
    return IncomparableModelsError(
        f"{name} is {shapes[0]} in {draft.base.name} and {shapes[1]} in {draft.tuned.name}.",
        hint=_NOT_A_PAIR,
    )


def _account_for_other(draft: Draft, name: str) -> None:
    """An entry for a tensor that no component holds."""
    base, tuned = (names.get(name) for _, names in draft.sides)
    if draft.layout.tied and name == draft.unembedding:
        draft.note(base, tuned, "tied", f"equal to {draft.embedding}")
        return
    if draft.layout.is_buffer(name):
        draft.note(base, tuned, "buffer", "no parameter: recomputed from config.json")
        return
    reason = f"no {draft.layout.family} model uses it, so no component holds it"
    if not draft.layout.listed:
        reason = draft.layout.left_out.get(name, "the other checkpoint has no tensor of its name")
    status: Status = "refused" if base and tuned else "only_in_base" if base else "only_in_tuned"
    draft.note(base, tuned, status, reason)
    if name not in draft.layout.left_out:  # those are warned of together
        draft.warn(f"{base or tuned} is not analysed: {reason}.")
