"""Datasets: how fast the command is by itself, and whether kills lose or double a row."""
