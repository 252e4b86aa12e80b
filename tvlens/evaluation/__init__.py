"""How well a model does on a task: held-out loss today, with its interval."""
