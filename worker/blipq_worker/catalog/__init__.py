"""Names of models, and where their weights are."""
