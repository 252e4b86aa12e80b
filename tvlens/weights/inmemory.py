"""What matching must say and check when a model of the pair is in memory."""

from tvlens.errors import AdapterError

from .contents import equal_fraction
from .draft import Draft
from .sources.memory import FILE, MemorySource


def warn_of_memory(draft: Draft) -> None:
    """Say that what a file once held is not known.

    Raises:
        AdapterError: The tuned model holds factors, which are only read from a PeftModel.
    """
    if isinstance(draft.tuned, MemorySource) and draft.tuned.has_factors_inside:
        raise AdapterError(
            f"{draft.tuned.name} has the layers of an adapter inside.",
            hint="Give the PeftModel around it, or merge the adapter.",
        )
    for source in (draft.base, draft.tuned):
        if isinstance(source, MemorySource):
            dtypes = ", ".join(sorted({info.dtype for info in source.tensors.values()}))
            draft.warn(
                f"{source.name} is read from {FILE}: rounding floors are those of its tensors "
                f"there ({dtypes}), which may be finer than those of the file it came from."
            )


def refuse_other_beneath(draft: Draft) -> None:
    """An adapter in memory must sit on the very base it is compared with.

    Raises:
        AdapterError: A weight under the adapter differs from the base's.
    """
    beneath = draft.tuned.beneath if isinstance(draft.tuned, MemorySource) else None
    if beneath is None:
        return
    canonical = draft.layout.canonical_name
    names = {canonical(stored): stored for stored in beneath.tensors}
    for name in draft.layout.stored_shapes:
        ours, theirs = draft.base_tensors.get(name), names.get(name)
        if ours is None or theirs is None:
            continue
        if equal_fraction((draft.base, ours), (beneath, theirs)) < 1:
            raise AdapterError(
                f"the model under the adapter {draft.tuned.name} differs from {draft.base.name} "
                f"in {name}.",
                hint="Give the base that the PeftModel was made from.",
            )
