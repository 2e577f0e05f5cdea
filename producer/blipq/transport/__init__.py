"""What carries job ids to workers, and news of jobs to clients."""
