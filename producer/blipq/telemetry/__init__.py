"""Traces of jobs by OpenTelemetry, where it is configured, and the log of a process of blipq's."""
