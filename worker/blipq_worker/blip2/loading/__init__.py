"""Checkpoints, read and made ready for a device."""
