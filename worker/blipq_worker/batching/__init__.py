"""Batches, and items that join and leave while others run."""
