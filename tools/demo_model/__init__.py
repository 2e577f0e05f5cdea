"""Trains and measures the demo model: a small, real BLIP-2 of a world of coloured shapes."""
