"""Which hosts may be called, and the HTTP client that keeps to it."""
