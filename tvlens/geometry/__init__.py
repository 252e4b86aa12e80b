"""Geometry: what a tuning vector is, relative to the base weights it was added to.

Pure tensor functions on (base, delta) pairs in TransformerLens's orientation (``x @ W``), blind to
models. ``decompose`` fills the table ``weights``; ``classify`` the tables ``tests`` and ``labels``;
``decompose_and_classify`` does both in one pass, for all fine-tunes of a base.
"""

from .classify import Geometry, Labels, classify, decompose_and_classify, labelled
from .decompose import WEIGHTS_SCHEMA, decompose, weights_of_block
from .own_measures import Measure

__all__ = [
    "WEIGHTS_SCHEMA",
    "Geometry",
    "Labels",
    "Measure",
    "classify",
    "decompose",
    "decompose_and_classify",
    "labelled",
    "weights_of_block",
]
