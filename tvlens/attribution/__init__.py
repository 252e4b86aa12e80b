"""Which components a metric depends on: estimates and the exact effect, in one sign."""
