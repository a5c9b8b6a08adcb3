"""What to keep: token scorers, budget allocators, the configuration that names them. Knows no storage, no engine."""
