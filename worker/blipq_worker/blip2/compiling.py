"""``torch.compile`` for a loaded checkpoint, and the news of it that a watchdog needs.

A first pass of each kind compiles, for minutes in all; so may a later pass of a shape that none had
before. Meanwhile the model makes no progress, and yet it is not hung.
"""

import math
import time
from typing import Any

#: A compilation that takes longer counts as hung from then on.
LONGEST_S = 1800.0

_PARTS = ("vision_model", "qformer", "language_model")


class _Clock:
    """When this process last began and ended a compilation, in monotonic seconds."""

    began: float | None = None
    ended = -math.inf
    watched = False


def compile_parts(model: Any, backend: str = "inductor") -> None:
    """Has the large parts compiled at their first use, for batches and lengths of any size."""
    _watch()
    for part in _PARTS:
        if hasattr(model, part):
            getattr(model, part).compile(backend=backend, dynamic=True)


def since_compiling() -> float:
    """Seconds since the last compilation; 0 while one runs, infinite where none ever did."""
    began = _Clock.began
    if began is not None:
        return max(0.0, time.monotonic() - began - LONGEST_S)
    return time.monotonic() - _Clock.ended


def _watch() -> None:
    if _Clock.watched:
        return
    from torch._dynamo import callback  # a second of imports that others need not wait for

    callback.on_compile_start(lambda _: _begin())
    callback.on_compile_end(lambda _: _end())
    _Clock.watched = True


def _begin() -> None:
    _Clock.began = time.monotonic()


def _end() -> None:
    _Clock.began, _Clock.ended = None, time.monotonic()
