"""The ways in which one would serve BLIP-2 without blipq, each with its best settings.

Each module is a program of the peers' own environment (``make peers``), reads a job from stdin and
prints images per second as JSON: ``common.py``.
"""
