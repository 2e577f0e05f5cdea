"""A real worker process around a model that does what the caption's prompt tells it.

Everything but the model is what ships: Celery, ledger, leases, fetch, decode and batcher. Prompts:
"exit" and "segfault" end the process, "hang" never returns, "raise" raises, "oom" runs out of
memory, "oom-in-company" only beside other items, "sleep N" takes N seconds, "steps N" takes N
steps, "clock N" sets the process' clock N seconds on, "lose-device" leaves a device on which every
later call fails, others answer at once. ``FAULTY_CONTRACT`` makes it a worker of an older or newer
version. With ``FAULTY_DEVICE=lost`` it has lost its device; with ``FAULTY_DEVICE=nonsense`` every
job fails, and so does the check of the model.
"""

import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from blipq.ledger import worker
from blipq.settings import Settings
from blipq_worker.app import Worker
from blipq_worker.blip2 import GeneratedText, GenerateItem, Pixels
from blipq_worker.images import loader
from blipq_worker.images.fetch import Fetched, Fetcher
from blipq_worker.inference.requests import ModelInfo, Reading, Recipe
from blipq_worker.settings import WorkerSettings

log = logging.getLogger("faulty_worker")

#: A picture of this size hangs its decoder.
HANGING_SIZE = (13, 13)


class FaultyModel:
    """Stands in for Blip2."""

    info = ModelInfo(
        checkpoint="faulty",
        family="opt",
        dtype="float32",
        quantization="none",
        device="cpu",
        revision="0",
        default_prompt="",
        recipe=Recipe(64, 3, "faulty"),
        reading=Reading("", 512),
    )

    def on_step(self, call: Callable[[], None]) -> None:
        self._step = call

    def on_encode(self, call: Any) -> None:
        """It encodes nothing."""

    def pixels(self, views: Any, *, digest: str | None, whole: bool) -> Pixels:
        return Pixels(None, digest=digest)

    def recall(self, digest: str, needed: Any) -> None:
        """Every image is new."""

    def check(self, item: Any) -> None:
        """Anything will do."""

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


def _use_device() -> None:
    match os.environ.get("FAULTY_DEVICE"):
        case "lost":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        case "nonsense":
            raise RuntimeError("probability tensor contains either inf, nan or element < 0")


def _check(name: str) -> None:
    _use_device()


def _obey(prompt: str, step: Callable[[], None], *, alone: bool) -> None:
    log.info("runs %r", prompt)
    match prompt.split():
        case ["exit" | "segfault" | "lose-device" as way]:
            _break(way)
        case ["hang"]:
            threading.Event().wait()
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


def _set_clock_on(seconds: float) -> None:
    """For all that asks Python for the time of day, as Celery, kombu and blipq do."""
    true_time = time.time
    time.time = lambda: true_time() + seconds


def _hang_on_one_size() -> None:
    pixels_of = loader.pixels_of

    def made(image: Any, recipes: Any) -> Any:
        if image.size == HANGING_SIZE:
            threading.Event().wait()
        return pixels_of(image, recipes)

    loader.pixels_of = made


def _make_no_two_images_equal() -> None:
    """So that no two jobs are: each does what its prompt says."""
    fetch = Fetcher.fetch

    def fetched(self: Fetcher, image: Any, *, unless: str | None = None) -> Fetched:
        found = fetch(self, image)
        return replace(found, digest=secrets.token_hex(32))

    Fetcher.fetch = fetched  # type: ignore[method-assign, assignment]


def main() -> int:
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if "FAULTY_CONTRACT" in os.environ:
        worker.CONTRACT = int(os.environ["FAULTY_CONTRACT"])
    _hang_on_one_size()
    _make_no_two_images_equal()
    options = WorkerSettings()
    models: Any = {name: FaultyModel() for name in options.models}
    return Worker(Settings(), options, models, check=_check).run()


if __name__ == "__main__":
    sys.exit(main())
