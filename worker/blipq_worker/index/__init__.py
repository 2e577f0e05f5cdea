"""Search indexes: read, written and filled."""
