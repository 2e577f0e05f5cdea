"""What each kind of job requests of a model, and its result from the answers."""
