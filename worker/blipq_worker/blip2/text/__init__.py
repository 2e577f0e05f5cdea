"""Prompts, and their tokens."""
