"""What each kind of job asks of the model."""
