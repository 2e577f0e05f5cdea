"""What a job took: collected while it runs, and part of its outcome."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

from blipq.contract import Receipt
from blipq.telemetry.trace import NOTHING, Trace

DEMO = "demo"
DEMO_LARGEST_PX = 256
DEMO_NOTE = (
    "the demo model was trained on coloured shapes on a plain background alone; "
    "serve a real model for photos (BLIPQ_MODELS=default=opt-2.7b)"
)


class Stopwatch:
    """Collects a job's receipt. trace: the span of its run, below which stages have theirs."""

    def __init__(self, *, queue_ms: float, worker: str, trace: Trace = NOTHING) -> None:
        self.trace = trace
        self._fields: dict[str, float | int | str] = {"queue_ms": queue_ms, "worker": worker}
        self._notes: list[str] = []
        self._started = time.monotonic()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the milliseconds of the block to the field ``{name}_ms``; it has a span, too."""
        started = time.monotonic()
        try:
            with self.trace.child(name):
                yield
        finally:
            self.add(f"{name}_ms", (time.monotonic() - started) * 1000)

    def add(self, name: str, amount: float) -> None:
        """Adds to a field that counts from 0."""
        self._fields[name] = cast("float", self._fields.get(name, 0)) + amount

    def record_first_token(self, ago_ms: float) -> None:
        """Records when the first token was written: so many milliseconds ago, or before that."""
        if "first_token_ms" not in self._fields:
            queued = cast("float", self._fields.get("queue_ms", 0.0))
            self.record(first_token_ms=max(0.0, queued + self.run_ms - ago_ms))

    def record(self, **facts: float | int | str) -> None:
        """Sets fields of the receipt."""
        self._fields.update(facts)

    def note(self, text: str) -> None:
        """Adds to what a person should know about the answer; each text once."""
        if text not in self._notes:
            self._notes.append(text)
            self.record(note="; ".join(self._notes))

    def note_size(self, checkpoint: str, size: tuple[int, int]) -> None:
        """Warns who sent a photo to the demo model: its own pictures are small."""
        if checkpoint == DEMO and max(size) > DEMO_LARGEST_PX:
            self.note(DEMO_NOTE)

    @property
    def run_ms(self) -> float:
        """Milliseconds since the job was claimed."""
        return (time.monotonic() - self._started) * 1000

    @property
    def took(self) -> Mapping[str, float | int | str]:
        """What the receipt has so far."""
        return self._fields

    def receipt(self) -> str:
        """The receipt as JSON."""
        rounded = {
            name: round(value, 1) if isinstance(value, float) else value
            for name, value in self._fields.items()
        }
        return Receipt.model_validate(rounded).model_dump_json(exclude_none=True)
