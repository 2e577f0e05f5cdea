"""What each kind of job asks of a model, and what it makes of the answers."""
