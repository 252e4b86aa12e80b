"""Edits of a model by its tuning vector, and the controls that they are judged beside."""
