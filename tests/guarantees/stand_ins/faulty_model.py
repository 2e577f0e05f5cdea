"""A model that does what the caption's prompt tells it: see ``faulty_worker``."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.stand_ins import WithoutSessions, model_info

from blipq_worker.blip2 import GeneratedText, GenerateItem, Pixels
from blipq_worker.engine import backend
from blipq_worker.inference.requests import Recipe
from guarantees.stand_ins import stops

log = logging.getLogger("faulty_worker")


class FaultyModel:
    """Stands in for Blip2."""

    info = model_info(checkpoint="faulty", recipe=Recipe(64, 3, "faulty"))

    def on_step(self, call: Callable[[], None]) -> None:
        self._step = call

    def on_encode(self, call: Any) -> None:
        """It encodes nothing."""

    def pixels(self, views: Any, *, digest: str | None, whole: bool) -> Pixels:
        return Pixels(None, digest=digest)

    def forget(self, digest: str) -> None:
        """It remembers no image."""

    def recall(self, digest: str, needed: Any) -> None:
        """Every image is new."""

    def check(self, item: Any) -> None:
        """Anything will do."""

    def is_long(self, item: Any) -> bool:
        """None is."""
        return False

    def write_readings(self, folder: Path, name: str) -> None:
        """There is nothing that a front would need."""

    def generate(
        self, items: Sequence[GenerateItem], wanted: Callable[[int], bool]
    ) -> list[list[list[GeneratedText]]]:
        _use_device()
        prompts = [prompt for item in items for prompt in item.prompts]
        for prompt in prompts:
            _obey(prompt, self._step, alone=len(prompts) == 1)
        return [[[GeneratedText(f"did {p}", 1)] for p in item.prompts] for item in items]

    def match(self, items: Sequence[Any]) -> list[list[float]]:
        _use_device()
        for text in (text for item in items for text in item.texts):
            _obey(text, self._step, alone=len(items) == 1)
        return [[1.0 for _ in item.texts] for item in items]


def run_batches_alone() -> None:
    """The model knows no sessions: all of its texts are written in batches."""
    backend.Batcher = WithoutSessions  # type: ignore[misc, assignment]


def _use_device() -> None:
    match os.environ.get("FAULTY_DEVICE"):
        case "lost":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        case "nonsense":
            raise RuntimeError("probability tensor contains either inf, nan or element < 0")


def check(name: str) -> None:
    """Raises where the device is known to be broken."""
    _use_device()


def _obey(prompt: str, step: Callable[[], None], *, alone: bool) -> None:
    log.info("runs %r", prompt)
    match prompt.split():
        case ["exit" | "segfault" | "lose-device" as way]:
            _break(way)
        case ["hang" | "stop" as way]:
            _wait(way)
        case ["raise"]:
            raise RuntimeError("the model broke")
        case ["oom"]:
            raise MemoryError
        case ["oom-in-company"] if not alone:
            raise MemoryError
        case ["sleep", seconds]:
            time.sleep(float(seconds))
        case ["steps", count]:
            for _ in range(int(count)):
                time.sleep(0.2)
                step()
        case ["clock", seconds]:
            _set_clock_on(float(seconds))


def _break(way: str) -> None:
    if way == "lose-device":
        os.environ["FAULTY_DEVICE"] = "lost"
        _use_device()
    if way == "exit":
        os._exit(1)
    os.kill(os.getpid(), signal.SIGSEGV)


def _wait(way: str) -> None:
    if way == "stop":
        stops.at("in the pass")
    else:
        threading.Event().wait()


def _set_clock_on(seconds: float) -> None:
    """For all that asks Python for the time of day, as Celery, kombu and blipq do."""
    true_time = time.time
    time.time = lambda: true_time() + seconds
