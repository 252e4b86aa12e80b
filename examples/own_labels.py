"""A measure and a classifier of one's own: is a change concentrated in few rows of its matrix?

python examples/own_labels.py

or, in this folder, as part of a study that can be run again:

tvlens decompose demo:base demo:med --measure own_labels:row_concentration \
    --classifier own_labels:by_concentration --out study
"""

import pandas as pd
from torch import Tensor

import tvlens as tv
from tvlens.geometry import labelled

TOP = 0.1
"""Share of the rows that are called few."""
MOST = 0.17
"""Share of the energy in them from which a change is concentrated; evenly spread, it is TOP."""


def row_concentration(base: Tensor, delta: Tensor) -> Tensor:
    """Share of a change's energy in the tenth of its rows that changed most."""
    energy = delta.square().sum(-1).sort(descending=True).values
    return energy[: max(1, round(TOP * len(energy)))].sum() / energy.sum()


def by_concentration(evidence: pd.DataFrame) -> pd.DataFrame:
    """The library's labels, but for matrices whose change is concentrated."""
    calls = labelled(evidence)
    few = evidence["row_concentration"] > MOST  # false where it was not measured
    reason = evidence["row_concentration"].map("{:.0%} of the energy in a tenth of the rows".format)
    return calls.assign(
        label=calls["label"].mask(few, "concentrated"),
        label_reason=calls["label_reason"].mask(few, reason),
    )[["component", "label", "label_reason"]]


def main() -> None:
    """Print how many matrices of the shipped fine-tune are concentrated, by part."""
    pair = tv.load_pair("demo:base", "demo:med")
    found = tv.classify(
        pair, tv.decompose(pair), measures=[row_concentration], classifier=by_concentration
    )
    matrices = found.labels.where(kind="matrix").to_frame()
    print(pd.crosstab(matrices["part"], matrices["label"]))
    print(found.measures.top(3)[["component", "value"]] if found.measures else "")


if __name__ == "__main__":
    main()
