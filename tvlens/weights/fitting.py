"""Does an adapter fit a base? Judged by module names and shapes, never by the base's name."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tvlens.errors import AdapterError

from .draft import Draft
from .sources.adapter import Adapter, adapter_of

_HINT = "The adapter was trained on another model than {base}."


def fit_adapter(draft: Draft) -> None:
    """Take the adapter's changes; every one must name a weight of the base and have its shape.

    Raises:
        AdapterError: One does not; all such changes are marked in the report.
    """
    draft.adapter = adapter_of(draft.tuned).renamed(draft.layout.canonical_name)
    draft.tuned_tensors = dict(draft.adapter.replaced)
    for note in draft.adapter.notes:
        draft.warn(note)
    _settle_tie(draft, draft.adapter)
    problems = [*_misfits(draft, draft.adapter)]
    if problems:
        more = f" {len(problems) - 1} more of its changes do not fit." if problems[1:] else ""
        raise AdapterError(f"{problems[0]}{more}", hint=_HINT.format(base=draft.base.name))
    _warn_of_other_base(draft, draft.adapter.base_model)


def account_for_adapter(draft: Draft) -> None:
    """An entry for every tensor of the base and of the adapter."""
    adapter = draft.adapter or Adapter()
    for name, stored in draft.base_tensors.items():
        if not _account_for_change(draft, adapter, name, stored):
            _account_for_untouched(draft, name, stored)
    draft.note_tie()
    if draft.unembedding not in draft.base_tensors:
        embedding = draft.base_tensors[draft.embedding]
        _account_for_change(draft, adapter, draft.unembedding, embedding)


def _settle_tie(draft: Draft, adapter: Adapter) -> None:
    """Part W_E and W_U where an adapter changes one use of a tied embedding and not the other.

    In training only the adapted layer computes with the change; peft's merge into the shared
    tensor would change the other use too. Rows of tokens are the exception: peft applies them to
    both.
    """
    ends = {draft.embedding, draft.unembedding}
    apart = ends & {*adapter.factors, *adapter.replaced}
    if not draft.layout.tied or not (apart or draft.unembedding in adapter.rows):
        return
    if ends & adapter.rows.keys():
        raise AdapterError(
            f"adapter {draft.tuned.name} changes the tied embedding of {draft.base.name} by rows "
            "and otherwise, which peft does not define.",
            hint="Merge it with peft's merge_and_unload() and compare the merged model.",
        )
    draft.layout = replace(draft.layout, tied=False)
    if len(apart) == 1:
        draft.warn(
            f"the adapter changes {apart.pop()} alone, of the embedding and unembedding that "
            f"{draft.base.name} ties: they are compared as two weights, as in training. A merged "
            "checkpoint may have changed both."
        )


def _misfits(draft: Draft, adapter: Adapter) -> Iterator[str]:
    tensors = draft.tuned.tensors
    stored, ends = draft.layout.stored_shapes, draft.layout.in_and_out
    for name, factors in adapter.factors.items():
        found = tensors[factors.first].shape[1], tensors[factors.second].shape[0]
        yield from _misfit(draft, name, (factors.first, found), ends.get(name))
    whole = [*adapter.replaced.items(), *((n, s.stored) for n, s in adapter.shifts.items())]
    for name, own in whole:
        yield from _misfit(draft, name, (own, tensors[own].shape), stored.get(name))
    for name, rows in adapter.rows.items():
        expected = stored.get(name)
        width = None if expected is None else expected[1:]
        yield from _misfit(draft, name, (rows.stored, tensors[rows.stored].shape[1:]), width)
        if expected is not None and max(rows.numbers, default=0) >= expected[0]:
            draft.note(draft.base_tensors.get(name), rows.stored, "refused", "rows beyond the base")
            yield (
                f"adapter {draft.tuned.name} changes row {max(rows.numbers)} of {name}, which has "
                f"{expected[0]} in {draft.base.name}."
            )


def _misfit(
    draft: Draft,
    name: str,
    change: tuple[str, tuple[int, ...]],
    expected: tuple[int, ...] | None,
) -> Iterator[str]:
    adapter, base = draft.tuned.name, draft.base.name
    own, found = change
    if expected is None:
        draft.note(None, own, "refused", f"{base} has no {name}")
        yield f"adapter {adapter} changes {name}, which {base} does not have."
    elif expected != found:
        reason = f"{found} in the adapter, {expected} in the base"
        draft.note(draft.base_tensors.get(name), own, "refused", reason)
        yield f"adapter {adapter} changes {name} of size {found}; in {base} it is {expected}."


def _account_for_change(draft: Draft, adapter: Adapter, name: str, stored: str) -> bool:
    if found := adapter.factors.get(name):
        reason = f"rank {found.rank}, scaling {found.scaling:g}"
        draft.note(stored, found.first, "compared", f"factor A, {reason}")
        draft.note(stored, found.second, "compared", f"factor B, {reason}")
        if found.magnitude is not None:
            draft.note(stored, found.magnitude, "compared", "DoRA's length of each output column")
    if name in adapter.replaced:
        draft.note(stored, adapter.replaced[name], "compared", "stored whole by the adapter")
    if name in adapter.shifts:
        draft.note(stored, adapter.shifts[name].stored, "compared", "added to the bias")
    if name in adapter.rows:
        rows = adapter.rows[name]
        draft.note(stored, rows.stored, "compared", f"{len(rows.numbers)} rows stored whole")
    return name in adapter.changed


def _account_for_untouched(draft: Draft, name: str, stored: str) -> None:
    if draft.layout.is_buffer(name):
        draft.note(stored, None, "buffer", "no parameter: recomputed from config.json")
    elif draft.layout.tied and name == draft.unembedding:
        draft.note(stored, None, "tied", f"equal to {draft.embedding}")
    elif name in draft.layout.stored_shapes:
        draft.note(stored, None, "untouched_by_adapter")
    else:
        draft.note(stored, None, "only_in_base", f"no {draft.layout.family} model uses it")


def _warn_of_other_base(draft: Draft, base_model: str) -> None:
    trained_on = Path(base_model).name
    own = {draft.base.name.split("@")[0].split("/")[-1], draft.base.folder.resolve().name}
    if trained_on and trained_on not in own:
        draft.warn(
            f"adapter {draft.tuned.name} says it was trained on {base_model!r}, not on "
            f"{draft.base.name}; module names and shapes fit, so it is taken as given."
        )
