"""Checkpoints as tensors: reading, matching and subtracting them without any model object."""
