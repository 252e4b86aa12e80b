"""Where weights come from: folders, the hub, adapters, models in memory, the demo models."""
