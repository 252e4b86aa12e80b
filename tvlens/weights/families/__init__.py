"""One small table per model family: which checkpoint tensor holds which canonical part."""
