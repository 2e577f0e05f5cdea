"""What the door answers under /v1, by what it is about."""
