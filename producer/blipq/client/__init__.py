"""The clients: they submit jobs, and wait for them."""
