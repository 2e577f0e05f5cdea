"""A worker as a process: leases, health, metrics."""
