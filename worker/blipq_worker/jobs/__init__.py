"""One job on a worker, from its claim to its outcome."""
