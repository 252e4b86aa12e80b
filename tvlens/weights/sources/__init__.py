"""Where weights come from: folders, the hub, adapters, the shipped demo models."""

from .folder import Source, TensorInfo
from .opening import open_source

__all__ = ["Source", "TensorInfo", "open_source"]
