"""``torch.compile`` for a loaded checkpoint, and the news of it that a watchdog needs.

A first pass of each kind compiles, for minutes in all; so may a later pass of a shape that none had
before. Meanwhile the model makes no progress, and yet it is not hung.
"""

import math
import time
from collections.abc import Callable
from typing import Any

#: A compilation that takes longer counts as hung from then on.
LONGEST_S = 1800.0

#: The decoders are called on their own where texts are written in flight.
_PARTS = (
    *("vision_model", "qformer"),
    *("language_model.model.decoder", "language_model.encoder", "language_model.decoder"),
)


class _Clock:
    """When this process last began and ended a compilation, in monotonic seconds."""

    began: float | None = None
    ended = -math.inf
    watched = False
    on_begin: Callable[[], None] = staticmethod(lambda: None)


def compile_parts(model: Any, backend: str = "inductor") -> None:
    """Has the large parts compiled at their first use, for batches and lengths of any size.

    Parts in int8 are left as they are: their shapes depend on what they compute, at which the
    compiler stops and starts again layer by layer.
    """
    _watch()
    parts = dict(model.named_modules())
    for name in _PARTS:
        if name in parts and not _is_int8(parts[name]):
            parts[name].compile(backend=backend, dynamic=True)


def _is_int8(part: Any) -> bool:
    return any(type(module).__name__ == "Linear8bitLt" for module in part.modules())


def on_compiling(call: Callable[[], None]) -> None:
    """Has ``call`` called when a compilation begins, on the thread that is about to wait for it."""
    _Clock.on_begin = staticmethod(call)


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
    _Clock.on_begin()


def _end() -> None:
    _Clock.began, _Clock.ended = None, time.monotonic()
