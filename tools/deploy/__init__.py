"""Writes what is under ``deploy/``."""
