"""A classifier of the user's own: what it is given, what it may give, what becomes of it.

A classifier is any callable ``f(evidence) -> labels``. ``evidence`` is a frame with one row a
component, and writing into it changes nothing:

    the key           component, site, kind, layer, index, part, ...
    measures          all columns of the table ``weights``, and own measures by their names
    gate              resolved, readable: enough above rounding for a gain, for structure
    parts             share_P, p_P, q_P, significant_P of each candidate part P of the energy:
                      gain, within, new_write, new_read, between (``evidence``)
    structure         spikes, alignment, alignment_se
    remark            a sentence about what could not be tested

It gives one label for each row, in order (a list or a Series), or a frame with a column ``label``
and, if it likes, ``label_reason`` and the shares of the table ``labels``; with a column
``component`` the rows may come in any order. Labels are words; the library's own mean something
elsewhere (``classify``), others are counted and shown under their names. ``decided_by`` is the
callable's name in every row, and a share that it does not give is the one that is measured anyway.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tvlens.callables import imported, name_of
from tvlens.errors import ExtensionError

SHARES = ("share_new", "share_amplified", "structured_share", "dominance")
EXPECTED = "expected one label a component: a list, a Series, or a frame with a column 'label'"

Classifier = Callable[[pd.DataFrame], Any]
"""Evidence, one row a component, to labels (module docstring)."""


def resolved_classifier(given: "str | Classifier | None") -> Classifier | None:
    """The classifier that is meant by ``package.module:function``, a callable or None.

    Raises:
        ExtensionError: There is none, or it is nothing that can be called.
    """
    found = own_callable(given, "classifier") if isinstance(given, str) else given
    if found is not None and not callable(found):
        raise ExtensionError(f"expected a classifier, got {type(found).__name__} ({given!r}).")
    return found


def own_callable(spec: str, what: str) -> Any:
    """What ``package.module:function`` names.

    Raises:
        ExtensionError: It has another form, or cannot be imported.
    """
    if ":" not in spec:
        raise ExtensionError(f"there is no {what} {spec!r}.", hint="Give package.module:function.")
    try:
        return imported(spec)
    except (ImportError, AttributeError) as error:
        raise ExtensionError(f"the {what} {spec!r} cannot be imported: {error}.") from error


def called_by(
    classifier: Classifier, evidence: pd.DataFrame, defaults: pd.DataFrame, weights: pd.DataFrame
) -> pd.DataFrame:
    """The labels of a classifier, checked, with what it does not give from ``defaults``.

    Args:
        classifier: The user's own.
        evidence: Evidence with q values.
        defaults: The same with the library's labels.
        weights: Frame of the table ``weights``, with own measures.

    Raises:
        ExtensionError: It gives anything but one label for each component.
    """
    name = name_of(classifier)
    found = _rows_of(classifier(_given(evidence, weights)), evidence, name)
    found["label"] = _words(found["label"], evidence, name)
    own = {column: found[column].to_numpy() for column in SHARES if column in found}
    reason = found.get("label_reason", pd.Series("", index=found.index)).fillna("").astype(str)
    plain = "Called " + found["label"] + f" by {name}."
    return defaults.assign(
        **own,
        label=found["label"].to_numpy(),
        label_reason=reason.where(reason != "", plain).to_numpy(),
        decided_by=name,
    )


def _given(evidence: pd.DataFrame, weights: pd.DataFrame) -> pd.DataFrame:
    """A copy of the evidence with the measures that it lacks."""
    more = [column for column in weights if column not in evidence or column == "component"]
    return evidence.merge(weights[more], on="component", how="left", validate="one_to_one")


def _rows_of(found: Any, evidence: pd.DataFrame, name: str) -> pd.DataFrame:
    """What a classifier gave, as one row a component in the order of ``evidence``."""
    if isinstance(found, pd.DataFrame):
        if "label" not in found:
            raise ExtensionError(
                f"{name} gave a frame without a column 'label'; it has {list(found.columns)[:8]}."
            )
        if "component" in found:
            return _matched(found, evidence, name)
    elif isinstance(found, str) or not isinstance(found, pd.Series | Sequence | np.ndarray):
        raise ExtensionError(f"{name} gave {type(found).__name__}, {EXPECTED}.")
    else:
        found = pd.DataFrame({"label": found})
    if len(found) != len(evidence) or not found.index.equals(evidence.index):
        raise ExtensionError(
            f"{name} gave {len(found)} labels for {len(evidence)} components, or in another order.",
            hint="Keep the rows as they are given, or give a column 'component'.",
        )
    return found.copy()


def _matched(found: pd.DataFrame, evidence: pd.DataFrame, name: str) -> pd.DataFrame:
    """Rows that name their component, in the order of ``evidence``."""
    wanted, given = evidence["component"], found["component"]
    if given.duplicated().any():
        raise ExtensionError(f"{name} gave {given[given.duplicated()].iloc[0]} more than once.")
    missing, unknown = wanted[~wanted.isin(given)], given[~given.isin(wanted)]
    if len(missing):
        raise ExtensionError(f"{name} gave {len(missing)} components no label: {missing.iloc[0]}.")
    if len(unknown):
        raise ExtensionError(f"{name} gave a label to {unknown.iloc[0]}, which is no component.")
    ordered = found.set_index("component").loc[wanted].reset_index()
    return ordered.set_axis(evidence.index)


def _words(labels: pd.Series, evidence: pd.DataFrame, name: str) -> pd.Series:
    """The labels, if all are words."""
    wrong = ~labels.map(lambda label: isinstance(label, str) and bool(label.strip()))
    if wrong.any():
        first = int(wrong.to_numpy().argmax())
        component = evidence["component"].iloc[first]
        raise ExtensionError(
            f"{name} called {component} {labels.tolist()[first]!r}; a label "
            f"is a word ({wrong.sum()} of {len(labels)} are none)."
        )
    return labels.astype(object)
