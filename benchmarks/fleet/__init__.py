"""A fleet of up to 1,000 GPUs as a simulation, checked against runs of real workers."""
