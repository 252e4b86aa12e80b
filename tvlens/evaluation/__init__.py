"""How well a model does on tasks: losses, distances, answers, instructions, with intervals."""
