"""The engine process, but its matching obeys the texts: ``python -m worker.serving.faulty_engine``.

``slow`` takes a while, ``hang`` never ends, ``die`` kills the process, ``lost`` breaks the device,
``bad`` fails, and after ``break`` everything does. FAULTY_GRAPHS in the environment is what the
process does while it captures graphs, ``die`` or ``hang``.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from blipq_worker.__main__ import main
from blipq_worker.blip2 import Blip2
from blipq_worker.serving import engine, loader
from blipq_worker.settings import WorkerSettings

SLOW_S = 0.5
engine.PATIENCE_S = 1.0
_match = Blip2.match
_broken: list[bool] = []


def _obey(self: Blip2, items: Sequence[Any]) -> list[list[float]]:
    texts = {text for item in items for text in item.texts}
    if "slow" in texts:
        time.sleep(SLOW_S)
    if "hang" in texts:
        time.sleep(3600)
    if "die" in texts:
        os.kill(os.getpid(), signal.SIGKILL)
    if "lost" in texts:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if "break" in texts:
        _broken.append(True)
    if _broken or "bad" in texts:
        raise ValueError("broken")
    return _match(self, items)


def _capture(models: Any, options: WorkerSettings, opening: AbstractContextManager[object]) -> None:
    """As kernels that read where nothing is, or that wait for something."""
    if not options.graphs:
        return
    with opening:
        if os.environ["FAULTY_GRAPHS"] == "die":
            os.kill(os.getpid(), signal.SIGABRT)
        time.sleep(3600)


Blip2.match = _obey  # type: ignore[method-assign]
if "FAULTY_GRAPHS" in os.environ:
    loader._open_slots = _capture

if __name__ == "__main__":
    sys.exit(main())
