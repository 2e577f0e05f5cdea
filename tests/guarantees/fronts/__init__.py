"""Workers with fronts, and what ends their processes."""
