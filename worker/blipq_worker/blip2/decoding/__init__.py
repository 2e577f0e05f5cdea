"""Greedy search, sampling and beams: sequences are admitted and leave between two steps.

Read in this order: ``sequences`` (what is to be written), ``loop`` (who runs and what follows),
``languages`` (the forward passes), ``opt_step`` and its like (those for a token), ``kv_cache``
(their keys and values), ``sampling`` (from logits to tokens), ``groups`` (what runs of beams),
``beams`` (what a step makes of their scores). On a GPU ``static`` takes the place of all of these
but ``beams``, unless sequences are long, which ``generation.routing`` decides.
"""

from blipq_worker.blip2.decoding.loop import DecodeLoop
from blipq_worker.blip2.decoding.sequences import Row, RowText, row_seed

__all__ = ["DecodeLoop", "Row", "RowText", "row_seed"]
