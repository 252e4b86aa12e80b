"""Two sources become a pair, or a sentence why they cannot.

Every stored tensor of both gets an entry in the load report; an error carries the report, as far
as it got, in its ``report`` attribute.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from tvlens.errors import (
    AdapterError,
    CheckpointError,
    IncomparableModelsError,
    TvlensError,
    UnsupportedFormatError,
)

from .configs import config_differences
from .contents import equal_fraction, measure_new_rows, non_finite_tensors, settle_identity
from .draft import Draft
from .fitting import account_for_adapter, fit_adapter
from .gauge import same_function, same_function_warning
from .inmemory import refuse_other_beneath, warn_of_memory
from .layout import Layout, has_table, layout_of, unlisted_layout
from .lineage import likeness
from .pair import Pair, Weight
from .precision import PRECISIONS, is_block_type
from .report import Status, with_report
from .sources.folder import Source
from .sources.opening import open_source
from .vocabulary import RowMatch, matched_rows, token_strings

__all__ = ["Pair", "Weight", "load_pair"]

PEEKED_ROWS = 32
"""Rows that tell a copy of an embedding from an unembedding of its own."""

_INCOMPLETE = "The weights are incomplete or belong to another config.json."
_NOT_A_PAIR = "A tuning vector needs a base and a fine-tune of that very base."


def load_pair(
    base: Any,
    tuned: Any,
    *,
    names: tuple[str, str] | None = None,
    scan: bool = True,
    peek: bool = False,
) -> Pair:
    """Match a base with its fine-tune or adapter.

    A base that looks like no parent of the tuned model is a warning in the load report.

    Args:
        base: Folder, hub id or ``demo:`` name of the base, or a model in memory: transformers,
            TransformerBridge.
        tuned: The same of the tuned model, or an adapter's folder or PeftModel.
        names: What tables call the two; the sources' own names by default.
        scan: Read everything once, to find NaN and Inf and to tell identical models. Without
            it only headers are read, and NaN and Inf are found when a component is read; of a
            tied model that stores its unembedding all the same, these two tensors are read too.
        peek: Read ``PEEKED_ROWS`` rows of those two instead, for a look that must cost nothing.

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
    draft = _begun(*sources)
    draft.peek = peek
    try:
        steps = _adapter_steps() if draft.tuned.is_adapter else _checkpoint_steps()
        for step in steps:
            step(draft)
        _refuse_problems(draft, scan=scan)
        if scan:
            refuse_other_beneath(draft)
            settle_identity(draft)
            measure_new_rows(draft)
    except TvlensError as error:
        with_report(error, draft.report)
        raise
    base_name, tuned_name = names or _names(*sources)
    pair = Pair(
        draft.base,
        draft.tuned,
        base_name,
        tuned_name,
        draft.layout,
        draft.report,
        draft.base_tensors,
        draft.tuned_tensors,
        draft.adapter,
        rows=draft.rows or RowMatch.by_number(draft.layout.d_vocab),
    )
    if scan:
        _warn_of_stranger(draft, pair)
        draft.report.same_function = same_function(pair)
        if sentence := same_function_warning(pair):
            draft.warn(sentence)
    return pair


def _warn_of_stranger(draft: Draft, pair: Pair) -> None:
    """A base that looks like no parent; an adapter is judged by its shapes instead."""
    if pair.adapter is None and (sentence := likeness(pair).warning):
        draft.warn(sentence)


def _begun(base: Source, tuned: Source) -> Draft:
    """A draft that holds what opening the sources had to say."""
    layouts = _layouts(base, tuned)
    draft = Draft(base, tuned, layouts, layouts[0])
    for source in (base, tuned):
        for note in source.notes:
            draft.warn(note)
        if source.adapter_beside:
            draft.warn(f"{source.name} holds an adapter beside the model; only the model is read.")
    warn_of_memory(draft)
    return draft


def _refuse_problems(draft: Draft, *, scan: bool) -> None:
    """Raise what was found wrong with single tensors, all of it marked in the report before."""
    kinds: list[tuple[Sequence[TvlensError], str]] = [(draft.misfits, "do not fit")]
    if scan:
        kinds.append((non_finite_tensors(draft), "hold one"))
    sentences = []
    for found, rest in kinds:
        if found:
            more = f" {len(found) - 1} more tensors {rest}." if found[1:] else ""
            sentences.append(f"{found[0].args[0]}{more}")
    if sentences:
        first = next(found[0] for found, _ in kinds if found)
        raise type(first)(" ".join(sentences), hint=first.hint)


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
        readable = info.dtype in PRECISIONS or is_block_type(info.dtype)
        if name in known and not readable:
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
    if source.tensors[head].shape == source.tensors[embedding].shape:
        rows = PEEKED_ROWS if draft.peek else None
        if equal_fraction((source, head), (source, embedding), rows=rows) == 1.0:
            return True
    draft.warn(
        f"{source.name} says tie_word_embeddings but stores a {head} that differs from "
        f"{embedding}; both are compared as they are stored."
    )
    return False


def _settle_vocabulary(draft: Draft) -> None:
    """Rows of embeddings are matched by token string, or by number without both tokenizers."""
    sizes = [
        source.tensors[names[draft.embedding]].shape[0]
        for source, names in draft.sides
        if draft.embedding in names
    ]
    if len(sizes) < 2:
        return
    draft.rows = _rows(draft, (sizes[0], sizes[1]))
    draft.layout = replace(draft.layout, d_vocab=len(draft.rows))
    draft.report.vocabulary = draft.rows.to_dict()
    for sentence in _vocabulary_warnings(draft, draft.rows):
        draft.warn(sentence)


def _rows(draft: Draft, sizes: tuple[int, int]) -> RowMatch:
    base, tuned = draft.base, draft.tuned
    tokens = _tokens(base), _tokens(tuned)
    if tokens[0] is None or tokens[1] is None:
        if sizes[0] != sizes[1]:
            raise IncomparableModelsError(
                f"{base.name} has {sizes[0]} embedding rows, {tuned.name} {sizes[1]}, and a "
                "tokenizer is missing, so rows cannot be matched to tokens.",
                hint="Put both tokenizer.json files beside the weights.",
            )
        return RowMatch.by_number(sizes[0])
    rows = matched_rows((tokens[0], tokens[1]), sizes)
    if not rows.by_token:
        raise IncomparableModelsError(
            f"the tokenizers of {base.name} and {tuned.name} have no token in common.",
            hint="A tuning vector needs rows that stand for the same tokens.",
        )
    return rows


def _tokens(source: Source) -> dict[int, str] | None:
    return token_strings(source.folder) if source.tokens is None else source.tokens


def _vocabulary_warnings(draft: Draft, rows: RowMatch) -> Iterator[str]:
    base, tuned = draft.base.name, draft.tuned.name
    if rows.moved:
        yield (
            f"{rows.moved:,} tokens have another number in {tuned} than in {base}; their embedding "
            "rows are compared by token, not by number."
        )
    if rows.new or rows.gone:
        yield (
            f"{len(rows.new):,} embedding rows of {tuned} and {len(rows.gone):,} of {base} have no "
            f"counterpart and are not compared ({rows.sentence})."
        )
    for name, count in zip((base, tuned), rows.rowless, strict=True):
        if count:
            yield f"the tokenizer of {name} numbers {count:,} tokens beyond its embedding rows."
    if rows.tokens and 2 * rows.by_token < min(map(len, rows.tokens)):
        yield (
            f"the tokenizers share only {rows.by_token:,} token strings, less than half of the "
            "smaller one; the embeddings may not be comparable."
        )


def _match_tensors(draft: Draft) -> None:
    expected = draft.layout.stored_shapes
    found = [_match_one(draft, name, shape) for name, shape in expected.items()]
    draft.misfits = [problem for problem in found if problem is not None]
    for name in dict.fromkeys([*draft.base_tensors, *draft.tuned_tensors]):
        if name not in expected:
            _account_for_other(draft, name)
    draft.note_tie()


def _match_one(draft: Draft, name: str, shape: tuple[int, ...]) -> TvlensError | None:
    base, tuned = (_stored(draft, side, name) for side in (0, 1))
    if base is None or tuned is None:
        return _missing(draft, name, base, tuned)
    shapes = draft.base.tensors[base].shape, draft.tuned.tensors[tuned].shape
    vocabulary = name in (draft.embedding, draft.unembedding) and draft.rows is not None
    wanted = _stored_sizes(draft, shape) if vocabulary else (shape, shape)
    for source, found, want in zip((draft.base, draft.tuned), shapes, wanted, strict=True):
        if (found if vocabulary else _squeezed(found)) != (want if vocabulary else _squeezed(want)):
            draft.note(base, tuned, "refused", f"{found} in {source.name}, expected {want}")
            return _misshapen(draft, name, shapes, want)
    if vocabulary:
        draft.note(base, tuned, *_alignment(draft, base, tuned))
    elif not shapes[0] == shapes[1] == shape:
        draft.note(base, tuned, "reshaped", f"{shapes[0]} and {shapes[1]} read as {shape}")
    else:
        draft.note(base, tuned, *_naming(draft, base, tuned))
    return None


def _stored_sizes(draft: Draft, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shape that an embedding must have in base and tuned: every row that has a token."""
    sizes = draft.rows.sizes if draft.rows else ()
    return [(size, *shape[1:]) for size in sizes]


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


def _alignment(draft: Draft, base: str, tuned: str) -> tuple[Status, str]:
    """Status and reason of an embedding or unembedding."""
    status, reason = _naming(draft, base, tuned)
    if draft.rows is None:
        return status, reason
    if not draft.rows.whole:
        status = "aligned"
    return status, "; ".join(part for part in (reason, draft.rows.sentence) if part)


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
    reason = f"{lacks.name} lacks it, although its config.json asks for it"
    draft.note(base, tuned, "only_in_base" if base else "only_in_tuned", reason)
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
    if name in (draft.embedding, draft.unembedding) and draft.rows:
        rows = draft.rows.sizes
        return IncomparableModelsError(
            f"{name} is {shapes[0]} in {draft.base.name} and {shapes[1]} in {draft.tuned.name}, "
            f"whose embeddings have {rows[0]} and {rows[1]} rows of {expected[1]}.",
            hint="Embedding and unembedding must have one row for each token.",
        )
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
