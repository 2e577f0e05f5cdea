"""The resident models, and the one thread that runs them."""
