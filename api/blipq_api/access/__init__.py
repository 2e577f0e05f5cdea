"""The HTTP door's callers: their keys, and sessions in place of a key."""
