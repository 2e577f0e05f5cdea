"""A worker as a process: lease renewal, reconciliation, health, metrics, memory."""
