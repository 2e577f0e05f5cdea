"""Checkpoints of LAVIS, written as folders that can be served."""
