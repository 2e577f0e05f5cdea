"""A worker whose model only takes the time of a GPU: ``python -m benchmarks.gpu.fake HOW SLOTS``.

Everything else is real: jobs, pictures from S3, decoding, the batcher, and with ``BLIPQ_FRONTS``
the main process, the socket and the fronts. So what the host loses shows without a card. The times
are those of one H100 80GB with OPT-2.7b in fp16 (docs/gpu.md).
"""

import logging
import os
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import stand_ins
from benchmarks.stand_ins import LOOK_S, model_info
from blipq.settings import Settings
from blipq_worker.blip2 import GeneratedText, GenerateItem, Pixels
from blipq_worker.blip2.loading.checkpoints import open_checkpoint
from blipq_worker.blip2.vision.features import OnEncode
from blipq_worker.blip2.vision.preprocessing import Preprocessor
from blipq_worker.inference.requests import Reading
from blipq_worker.settings import WorkerSettings
from blipq_worker.supervision.sizing import fronts_of

How = Literal["captured", "launches"]
Ticket = tuple[int, int]
Texts = list[list[GeneratedText]]

#: Seconds of a step with up to 32 and with 128 sequences.
STEP_S: dict[How, tuple[float, float]] = {
    "captured": (stand_ins.STEP_S[32], stand_ins.STEP_S[128]),
    "launches": (0.008, 0.012),
}
LAUNCHES = 500


def step_s(how: How, sequences: int) -> float:
    """Seconds of a step."""
    few, many = STEP_S[how]
    return few + (many - few) * max(0, sequences - 32) / 96


def allowed_per_s(how: How, slots: int, tokens: int) -> float:
    """Captions a second if the device never waits for the host."""
    return slots / (tokens * step_s(how, slots) + slots * LOOK_S)


@dataclass(frozen=True)
class Device:
    """Takes a device's time in the calling thread.

    captured: one call that holds no GIL. launches: so many short calls, each of which computes in
    Python for half of its time and releases the GIL for the other half, as launching a kernel does.
    """

    how: How

    def step(self, sequences: int) -> None:
        """One step of so many sequences."""
        if self.how == "captured":
            time.sleep(step_s(self.how, sequences))
        else:
            _launch(step_s(self.how, sequences) / LAUNCHES)

    def look(self, images: int) -> None:
        """A pass of the vision tower."""
        time.sleep(LOOK_S * images)


def _launch(each_s: float) -> None:
    data = bytes(_bytes_for(each_s / 2))
    due = time.perf_counter()
    for _ in range(LAUNCHES):
        zlib.crc32(data)  # releases the GIL
        due += each_s
        while time.perf_counter() < due:
            pass


def _bytes_for(seconds: float) -> int:
    """How much zlib checks in that time on this machine; enough that it releases the GIL."""
    return max(6 * 1024, int(seconds * _SPEED))


def _speed() -> float:
    data = bytes(2**20)
    started = time.perf_counter()
    for _ in range(20):
        zlib.crc32(data)
    return 20 * len(data) / (time.perf_counter() - started)


_SPEED = _speed()


class Session:
    """Sequences that take their steps on the device.

    See ``blipq_worker.batching.batcher.Session``.
    """

    def __init__(
        self, device: Device, slots: int, on_step: Callable[[], None], on_encode: OnEncode
    ) -> None:
        self._device, self._slots = device, slots
        self._on_step, self._on_encode = on_step, on_encode
        self._left: dict[Ticket, int] = {}
        self._items: dict[Ticket, GenerateItem] = {}
        self._new: list[Pixels] = []

    def has_room(self, ticket: Ticket) -> bool:
        """Whether a slot is free."""
        return len(self._left) < self._slots

    def join(self, ticket: Ticket, item: GenerateItem) -> None:
        """Takes a slot."""
        self._left[ticket], self._items[ticket] = item.params.max_new_tokens, item
        self._new.append(item.pixels)

    def has_begun(self, ticket: Ticket) -> bool:
        """Whether it has a token."""
        return self._left[ticket] < self._items[ticket].params.max_new_tokens

    def leave(self, ticket: Ticket) -> None:
        """Frees a slot."""
        self._left.pop(ticket, None)
        self._items.pop(ticket, None)

    def step(self, tickets: Sequence[Ticket]) -> list[tuple[Ticket, Texts]]:
        """A token more of each, after a look at the images of those that are new."""
        if self._new:
            self._device.look(len(self._new))
            self._on_encode(self._new, 1000 * LOOK_S)
            self._new = []
        self._device.step(len(tickets))
        self._on_step()
        for ticket in tickets:
            self._left[ticket] -= 1
        return [(ticket, self._texts(ticket)) for ticket in tickets if not self._left[ticket]]

    def _texts(self, ticket: Ticket) -> Texts:
        item = self._items[ticket]
        self.leave(ticket)
        return [[GeneratedText("a text", item.params.max_new_tokens)] for _ in item.prompts]


class Model:
    """Stands in for ``Blip2``: makes pixels ready for real, and writes nothing."""

    def __init__(self, folder: str, device: Device, slots: int) -> None:
        checkpoint = open_checkpoint(folder)
        self._device, self._slots = device, slots
        self._on_step: Callable[[], None] = lambda: None
        self._on_encode: OnEncode = lambda images, ms: None
        self.info = model_info(
            dtype="float16",
            device=device.how,
            slots=slots,
            recipe=Preprocessor(checkpoint).recipe,
            reading=Reading(str(checkpoint.folder / "tokenizer.json"), 2016),
        )

    def on_step(self, call: Callable[[], None]) -> None:
        """Has ``call`` called after every step."""
        self._on_step = call

    def on_encode(self, call: OnEncode) -> None:
        """Has ``call`` called after images are encoded."""
        self._on_encode = call

    def pixels(
        self, views: Sequence[memoryview], *, digest: str | None = None, whole: bool = False
    ) -> Pixels:
        """As the real one."""
        side = self.info.image_size
        made = torch.frombuffer(bytearray(views[0]), dtype=torch.uint8).view(side, side, 3)
        return Pixels(made, digest=digest)

    def forget(self, digest: str) -> None:
        """It remembers no image."""

    def recall(self, digest: str, needed: Any) -> None:
        """It remembers nothing."""

    def check(self, item: Any) -> None:
        """Anything will do."""

    def is_long(self, item: Any) -> bool:
        """None is."""
        return False

    def session(self) -> Session:
        """Where sequences take their steps."""
        return Session(self._device, self._slots, self._on_step, self._on_encode)


def main(how: How, slots: int, *part: str) -> int:
    """Becomes the worker, or the part of one that is named; the exit code."""
    if part[:1] == ("front",):  # as it ships, without what this program has imported
        os.execv(sys.executable, [sys.executable, "-m", "blipq_worker", *part])
    logging.basicConfig(level="WARNING", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    options = WorkerSettings()
    if part[:2] == ("engine", "--run"):
        from blipq_worker.serving.engine import SOCKET, EngineProcess

        models = _models(options, how, slots)
        return EngineProcess(Path(part[2]) / SOCKET, options, models, None).run()
    if fronts := fronts_of(options):
        from blipq_worker.supervision.worker import SplitWorker

        command = (sys.executable, "-m", "benchmarks.gpu.fake", how, str(slots))
        return SplitWorker(Settings(), options, fronts, command).run()
    from blipq_worker.app import Worker

    return Worker(Settings(), options.filling(slots), _models(options, how, slots)).run()


def _models(options: WorkerSettings, how: How, slots: int) -> Any:
    return {name: Model(folder, Device(how), slots) for name, folder in options.models.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))  # type: ignore[arg-type]
