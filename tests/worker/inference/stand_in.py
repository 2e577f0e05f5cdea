"""An engine without a model, in a thread or as a process: ``python -m worker.inference.stand_in``.

It answers at once, or keeps what it gets until it is told or cancelled.
"""

import itertools
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.stand_ins import model_info

from blipq_worker.inference import (
    Answer,
    EngineServer,
    Failure,
    Feature,
    Generate,
    GenerationParams,
    ImagePixels,
    Item,
    Load,
    Matched,
    ModelInfo,
    Outcome,
    Priority,
    Reading,
    Recipe,
)

SIDE = 224
SIZE = SIDE * SIDE * 3
INFO = model_info(
    checkpoint="opt",
    default_prompt="a photo of",
    recipe=Recipe(SIDE, 3, "one"),
    reading=Reading("/models/opt", 2016),
)
#: Another preprocessing for retrieval: two arrays an image.
TWO = model_info(
    checkpoint="t5",
    family="t5",
    recipe=Recipe(16, 3, "one"),
    reading=Reading("/models/t5", 2016),
    retrieval_checkpoint="itm",
    retrieval_recipe=Recipe(8, 2, "two"),
)
MODELS = {"default": INFO, "two": TWO}
#: What a front may call an image.
NAME = "a" * 64


def answered(*scores: float) -> Answer:
    return Answer(Matched(scores), pass_ms=1.0, vision_ms=0.5, batch_size=1)


def pixels(value: int = 0, side: int = SIDE) -> memoryview:
    return memoryview(bytes([value]) * (side * side * 3))


def item(value: int = 0, prompt: str = "a photo of", name: str | None = None) -> Generate:
    return Generate(ImagePixels(name, False, (pixels(value),)), (prompt,), GenerationParams())


class StandIn:
    """A backend that says of an image how bright its corners are; ``hold`` keeps it from that."""

    def __init__(self, hold: bool = False) -> None:
        self.hold = hold
        self.open: dict[int, tuple[Item, Callable[[Outcome], None]]] = {}
        self.met: list[tuple[str, Item, Priority, float | None]] = []
        self.alone: list[bool] = []
        self.traces: list[str] = []
        self.cancelled: list[int] = []
        self.seen: set[str | None] = set()
        self._handles = itertools.count()

    def models(self) -> Mapping[str, ModelInfo]:
        return MODELS

    def submit(
        self,
        model: str,
        item: Item,
        priority: Priority,
        deadline: float | None,
        done: Callable[[Outcome], None],
        alone: bool = False,
        trace: str = "",
    ) -> int:
        self.met.append((model, item, priority, deadline))
        self.alone.append(alone)
        self.traces.append(trace)
        if item.image is not None and item.image.pixels:
            self.seen.add(item.image.digest)
        handle = next(self._handles)
        self.open[handle] = item, done
        if not self.hold:
            self.answer(handle)
        return handle

    def answer(self, handle: int) -> None:
        item, done = self.open.pop(handle)
        views = item.image.pixels if item.image is not None else ()
        done(answered(*(float(each) for view in views for each in (view[0], view[-1]))))

    def answer_all(self) -> None:
        for handle in list(self.open):
            self.answer(handle)

    def cancel(self, handle: Any) -> None:
        if handle in self.open:
            _, done = self.open.pop(handle)
            self.cancelled.append(handle)
            done(Failure("cancelled", "cancelled", "nobody waits"))

    def knows(
        self, model: str, digests: Sequence[str], features: Collection[Feature]
    ) -> Sequence[bool]:
        return [digest in self.seen for digest in digests]

    def forget(self, model: str, digests: Collection[str]) -> None:
        self.seen -= set(digests)

    def load(self) -> Load:
        return Load(0, len(self.open))


class Served:
    """A server and the thread that polls it."""

    def __init__(self, path: Path, backend: StandIn, **options: Any) -> None:
        self.path, self.backend = path, backend
        self.raised: list[BaseException] = []
        self._asked: list[Callable[[], None]] = []
        self._stop = threading.Event()
        self.server = EngineServer(path, backend, **options)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.server.poll(0.02)
                self.server.progress()
                while self._asked:
                    self._asked.pop(0)()  # in their order
        except BaseException as error:
            self.raised.append(error)
        finally:
            self.server.close()

    def run(self, call: Callable[[], None]) -> None:
        """Has the polling thread call something."""
        self._asked.append(call)
        self.server.wake()

    def stop(self) -> None:
        self._stop.set()
        self.server.wake()
        self.thread.join(10)


@contextmanager
def serving(hold: bool = False, **options: Any) -> Iterator[Served]:
    """A server in a thread. Whatever it meets, it must not raise."""
    with tempfile.TemporaryDirectory(prefix="bq") as folder:
        served = Served(Path(folder) / "engine", StandIn(hold), **options)
        try:
            yield served
        finally:
            served.stop()
        assert not served.raised, served.raised
        assert not served.thread.is_alive()


def main() -> None:
    """Serves until it is killed, and tells how many items it holds, and how many were cancelled.

    "hold" keeps it from answering; a number says how many items it starts.
    """
    path, hold = Path(sys.argv[1]), "hold" in sys.argv[2:]
    starts = sum(int(option) for option in sys.argv[2:] if option.isdecimal())
    backend = StandIn(hold)
    server = EngineServer(path, backend)
    print("ready", flush=True)
    told = ""
    while True:
        server.poll(0.02)
        server.progress()
        server.started(handle for handle in backend.open if handle < starts)
        if (now := f"holds {len(backend.open)} cancelled {len(backend.cancelled)}") != told:
            told = now
            print(f"{time.monotonic()} {now}", flush=True)


if __name__ == "__main__":
    main()
