"""Which model is in memory when, across all backends."""
