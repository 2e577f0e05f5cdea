"""Workers that stand in for the real one: ``python -m benchmarks.workers KIND``.

batchwise: the real one, but batch after batch, each a call that returns all answers. closed: the
real one, but no job joins a batch that has begun; each is answered as it ends. sleeping: no model;
BLIPQ_MODELS says how many milliseconds a pass takes, and how many more for each of its rows:
``default=8+4``. With BENCH_FETCH=0 nothing is read from S3, and with BENCH_CHECKPOINT, a folder,
images are made ready as for that model. BENCH_HOST is the worker's host name, as a pod has its own.
"""

import hashlib
import io
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from msgspec.structs import replace
from PIL import Image

from benchmarks.stand_ins import WithoutSessions, model_info
from blipq.contract import ImageRef
from blipq.settings import Settings
from blipq_worker.blip2 import GeneratedText, GenerateItem, Pixels
from blipq_worker.blip2.loading.checkpoints import open_checkpoint
from blipq_worker.blip2.vision.preprocessing import Preprocessor
from blipq_worker.engine import backend
from blipq_worker.images.fetch import Fetched, Fetcher
from blipq_worker.inference.requests import Recipe
from blipq_worker.settings import WorkerSettings


class SleepingModel:
    """Stands in for Blip2: says nothing, and takes its time."""

    info = model_info(dtype="none", device="none")

    def __init__(self, times: str, recipe: Recipe | None) -> None:
        self._pass_s, self._row_s = (float(each) / 1000 for each in times.split("+"))
        if recipe is not None:
            self.info = replace(self.info, recipe=recipe)

    def on_step(self, call: Callable[[], None]) -> None:
        """It has no steps."""

    def on_encode(self, call: Callable[..., None]) -> None:
        """It encodes nothing."""

    def pixels(self, views: Any, *, digest: str | None = None, whole: bool = False) -> Pixels:
        """As the real one, but without their values."""
        return Pixels(None, digest=digest)

    def forget(self, digest: str) -> None:
        """It remembers no image."""

    def recall(self, digest: str, needed: Any) -> None:
        """It remembers nothing."""

    def check(self, item: Any) -> None:
        """Anything will do."""

    def is_long(self, item: Any) -> bool:
        """None is."""
        return False

    def generate(
        self, items: Sequence[GenerateItem], wanted: Callable[[int], bool]
    ) -> list[list[list[GeneratedText]]]:
        if took := self._pass_s + self._row_s * sum(len(item.prompts) for item in items):
            time.sleep(took)
        return [[[GeneratedText("a text", 2)] for _ in item.prompts] for item in items]


def _picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "PNG")
    return stream.getvalue()


def _sleeping(options: WorkerSettings) -> dict[str, Any]:
    if os.environ.get("BENCH_FETCH") == "0":
        data = _picture()

        def fetch(self: Fetcher, image: ImageRef, **options: Any) -> Fetched:
            return Fetched(data, hashlib.sha256(data).hexdigest(), None)

        Fetcher.fetch = fetch  # type: ignore[method-assign]
    # Batches, as the work of a pass depends on the rows in it.
    backend.Batcher = WithoutSessions  # type: ignore[misc, assignment]
    folder = os.environ.get("BENCH_CHECKPOINT")
    recipe = Preprocessor(open_checkpoint(folder)).recipe if folder else None
    return {name: SleepingModel(what, recipe) for name, what in options.models.items()}


def _batchwise(options: WorkerSettings) -> dict[str, Any]:
    """A batch is one call of the same decode loop, and its answers come when the call returns."""
    from blipq_worker.serving.loader import load_models

    backend.Batcher = WithoutSessions  # type: ignore[misc, assignment]
    return dict(load_models(options))


def _closed(options: WorkerSettings) -> dict[str, Any]:
    from blipq_worker.serving.loader import load_models

    class Batch(backend.Writing):
        """A session that is closed once it has begun; the next opens when all have left."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            free, self._begun = self.has_room, False
            self.has_room = lambda ticket: not self._begun and free(ticket)

        def step(self, tickets: Any) -> Any:
            self._begun = True
            return super().step(tickets)

    backend.Writing = Batch  # type: ignore[misc]
    return dict(load_models(options))


def main(kind: str) -> int:
    logging.basicConfig(level="WARNING", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    from blipq_worker.app import Worker

    if host := os.environ.get("BENCH_HOST"):
        socket.gethostname = lambda: host
    options = WorkerSettings()
    models = {"sleeping": _sleeping, "batchwise": _batchwise, "closed": _closed}[kind](options)
    return Worker(Settings(), options, models).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
