"""Tuning vectors edited, combined, taken home as a checkpoint or adapter, and checked again."""
