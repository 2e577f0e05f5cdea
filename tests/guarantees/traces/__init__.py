"""Traces: a collector, and what it is sent."""
