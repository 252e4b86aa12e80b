"""The model card of a merge: what it is, what it was made from, what was lost."""

import shlex
from pathlib import Path

from tvlens.weights.sources.hub import HUB_ID

from .manifest import InputRecord, Manifest

MOST_TENSORS = 12
"""Tensors that a card names; the manifest names all."""


def model_card(manifest: Manifest, name: str, method: str) -> str:
    """The text of README.md.

    Args:
        manifest: What the folder holds.
        name: The folder's name.
        method: What the merge method does, one clause.
    """
    parts = [_front_matter(manifest), f"# {name}\n", _what(manifest, method), _inputs(manifest)]
    return "\n".join([*parts, _loss(manifest), _again(manifest)])


def _front_matter(manifest: Manifest) -> str:
    models = [record.given for record in (manifest.base, *manifest.terms)]
    hub_ids = [given for given in dict.fromkeys(models) if _is_hub_id(given)]
    lines = ["---", f"library_name: {'peft' if manifest.kind == 'adapter' else 'transformers'}"]
    if hub_ids:
        lines += ["base_model:", *(f"- {given.split('@')[0].split('#')[0]}" for given in hub_ids)]
    return "\n".join([*lines, "tags:", "- merge", "- tvlens", "---", ""])


def _is_hub_id(given: str) -> bool:
    return bool(HUB_ID.match(given)) and not Path(given).expanduser().exists()


def _what(manifest: Manifest, method: str) -> str:
    kind = "A LoRA adapter" if manifest.kind == "adapter" else "A checkpoint"
    text = f"{kind} made by {manifest.made_by} without training: `{manifest.name}`.\\\n"
    text += f"Method `{manifest.method}`: {method}"
    if manifest.density < 1:
        text += f"; share kept {manifest.density:g}, seed {manifest.seed}"
    text += ".\n"
    if manifest.selection:
        text += f"Only this part was changed: `{manifest.selection}`.\n"
    return text


def _inputs(manifest: Manifest) -> str:
    rows = ["| input | kind | scale |", "|---|---|---|"]
    rows.append(f"| {_shown(manifest.base)} | base | |")
    for term in manifest.terms:
        weighted = ", weighted by component" if term.weighted else ""
        rows.append(f"| {_shown(term)} | {term.kind}{weighted} | {term.scale:g} |")
    return "\n".join([*rows, ""])


def _shown(record: InputRecord) -> str:
    return record.name.replace("|", "\\|")


def _loss(manifest: Manifest) -> str:
    if (adapter := manifest.adapter) is not None:
        return (
            f"Rank {adapter.rank}; {adapter.relative_error:.2g} of the change's length was lost by "
            f"truncation, and {adapter.left_out_share_of_squared_norm:.2g} of its squared length "
            "lies in components that an adapter cannot hold.\n"
        )
    shown = ", ".join(f"`{tensor}`" for tensor in manifest.changed[:MOST_TENSORS])
    more = len(manifest.changed) - MOST_TENSORS
    changed = f"{shown} and {more} more" if more > 0 else shown or "none"
    loss = manifest.rounding
    return (
        f"Changed tensors: {changed}. All others are the base's, byte by byte.\\\n"
        f"Stored {manifest.stored_as}; rounding lost {loss.relative:.2g} of the change's length "
        f"and {loss.share_of_entries_lost:.2%} of its entries.\n"
    )


def _again(manifest: Manifest) -> str:
    text = (
        "`tvlens verify` checks this folder against its inputs; `tvlens_manifest.json` has their "
    )
    text += "sha256."
    command = shlex.join(map(_without_folder, shlex.split(manifest.command)))
    return f"{text}\n\n```\n{command}\n```\n" if command else f"{text}\n"


def _without_folder(word: str) -> str:
    """A word of a command; of a local path the name alone, since a card is for others."""
    local = word.startswith(("/", ".", "~")) or ("/" in word and Path(word).exists())
    return Path(word).name if local else word
