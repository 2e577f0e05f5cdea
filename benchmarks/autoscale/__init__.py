"""A fleet of real workers that a simulated KEDA scales: ``python -m benchmarks.autoscale``."""
