"""Greedy search, sampling and beams in static slots: what GPUs run.

Read in this order: ``loop`` (who is in which slot), ``step`` (what a step is), ``state`` (what the
device knows of the sequences), ``groups`` (and of their beams), ``opt``, ``llama`` and ``t5`` (the
forward passes), ``attention`` and ``kernel``, ``sampler`` (from scores to tokens),
``graphs`` (steps as CUDA graphs), ``setup`` (what of all this a device can run).
"""

from blipq_worker.blip2.decoding.static.loop import StaticLoop
from blipq_worker.blip2.decoding.static.setup import (
    COLUMNS,
    LONG_COLUMNS,
    Way,
    free_memory,
    static_loop,
    ways,
)
from blipq_worker.blip2.decoding.static.step import on_device

__all__ = [
    "COLUMNS",
    "LONG_COLUMNS",
    "StaticLoop",
    "Way",
    "free_memory",
    "on_device",
    "static_loop",
    "ways",
]
