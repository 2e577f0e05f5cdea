"""Checkpoints in S3: where they are, what they hold, and how weights are read. Without torch."""
