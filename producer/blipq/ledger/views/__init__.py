"""What people look at: lists of jobs, and the log of actions."""
