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
    found = adapter_of(draft.tuned)
    canonical = draft.layout.canonical_name
    draft.adapter = Adapter(
        {canonical(name): factors for name, factors in found.factors.items()},
        {canonical(name): stored for name, stored in found.replaced.items()},
        found.base_model,
    )
    draft.tuned_tensors = dict(draft.adapter.replaced)
    _settle_tie(draft, {*draft.adapter.factors, *draft.adapter.replaced})
    problems = [*_misfits(draft, draft.adapter)]
    if problems:
        more = f" {len(problems) - 1} more of its changes do not fit." if problems[1:] else ""
        raise AdapterError(f"{problems[0]}{more}", hint=_HINT.format(base=draft.base.name))
    _warn_of_other_base(draft, found.base_model)


def account_for_adapter(draft: Draft) -> None:
    """An entry for every tensor of the base and of the adapter."""
    adapter = draft.adapter or Adapter({}, {}, "")
    for name, stored in draft.base_tensors.items():
        if not _account_for_change(draft, adapter, name, stored):
            _account_for_untouched(draft, name, stored)
    draft.note_tie()
    if draft.unembedding not in draft.base_tensors:
        embedding = draft.base_tensors[draft.embedding]
        _account_for_change(draft, adapter, draft.unembedding, embedding)


def _settle_tie(draft: Draft, changed: set[str]) -> None:
    """An adapter may change one use of a tied embedding and not the other."""
    if not draft.layout.tied:
        return
    if draft.unembedding in changed:
        draft.layout = replace(draft.layout, tied=False)
    elif draft.embedding in changed:
        draft.warn(
            f"the adapter changes {draft.embedding}, which {draft.base.name} also uses as W_U; "
            "merging it changes both."
        )


def _misfits(draft: Draft, adapter: Adapter) -> Iterator[str]:
    tensors = draft.tuned.tensors
    stored, ends = draft.layout.stored_shapes, draft.layout.in_and_out
    for name, factors in adapter.factors.items():
        found = tensors[factors.first].shape[1], tensors[factors.second].shape[0]
        yield from _misfit(draft, name, (factors.first, found), ends.get(name))
    for name, own in adapter.replaced.items():
        yield from _misfit(draft, name, (own, tensors[own].shape), stored.get(name))


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
    if name in adapter.replaced:
        draft.note(stored, adapter.replaced[name], "compared", "stored whole by the adapter")
    return name in adapter.factors or name in adapter.replaced


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
