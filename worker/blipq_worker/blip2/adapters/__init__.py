"""LoRA adapters over resident weights: rows of one pass may have different ones, or none.

Read in this order: ``layers`` (what a layer adds for each row), ``attaching`` (from a folder's
numbers to the layers of a model). What a folder holds is in ``catalog.adapters``.
"""
