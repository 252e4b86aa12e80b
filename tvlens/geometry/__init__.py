"""Geometry: what a tuning vector is, relative to the base weights it was added to.

Pure tensor functions on (base, delta) pairs in TransformerLens's orientation (``x @ W``), blind to
models. ``decompose`` fills the table ``weights``; ``classify`` the tables ``tests`` and ``labels``.
"""

from .classify import Labels, classify
from .decompose import WEIGHTS_SCHEMA, decompose, weights_of_block

__all__ = ["WEIGHTS_SCHEMA", "Labels", "classify", "decompose", "weights_of_block"]
