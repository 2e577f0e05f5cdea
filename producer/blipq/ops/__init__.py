"""For operators: the doctor's checks, jobs and queues at a glance, the ledger's metrics."""
