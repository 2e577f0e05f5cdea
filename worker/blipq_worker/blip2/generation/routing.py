"""Which loop a sequence runs in: static slots where they suit it, else growing ones."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from blipq_worker.blip2.decoding.loop import DecodeLoop
from blipq_worker.blip2.decoding.sequences import Row
from blipq_worker.blip2.decoding.static.loop import StaticLoop


class Loop(Protocol):
    """Runs sequences in slots, greedily, sampled or with beams. Of one thread.

    What raises can be tried again with fewer.
    """

    @property
    def running(self) -> Sequence[Row]:
        """The sequences in slots."""

    @property
    def free(self) -> int:
        """Slots without a sequence."""

    @property
    def room(self) -> int:
        """Slots for which there is memory, by ``size``."""

    @property
    def bytes(self) -> int:
        """What keys and values take now."""

    def fits(self, row: Row, beside: Sequence[Row] = ()) -> bool:
        """Whether a row may join, together with those ``beside``."""

    def size(self, row: Row) -> int:
        """How much of ``room`` a row takes."""

    def queue(self, row: Row) -> str:
        """Where it waits: rows of one queue join in their order, and pass those of another."""

    def join(self, rows: Sequence[Row]) -> list[Row]:
        """Takes rows in. They must fit. Returns them; their first tokens may come later."""

    def step(self, rows: Sequence[Row]) -> list[Row]:
        """Takes a step of these running rows. Returns them; their tokens may come later."""

    def leave(self, rows: Sequence[Row]) -> None:
        """Frees the slots of rows, ended or not."""


class RoutedLoop:
    """Static slots, and beside them a loop with few slots that grow, for long sequences.

    A long one is one with more columns than a static slot, n-grams that a static step cannot
    forbid, or more beams than there are slots. ``free`` counts static slots alone: they are where
    nearly all sequences run.
    """

    def __init__(self, static: StaticLoop, long: DecodeLoop) -> None:
        self._static, self._long = static, long

    @property
    def running(self) -> list[Row]:
        """The sequences in slots."""
        return [*self._static.running, *self._long.running]

    @property
    def free(self) -> int:
        """Static slots without a sequence."""
        return self._static.free

    @property
    def room(self) -> int:
        """The same."""
        return self.free

    @property
    def bytes(self) -> int:
        """What keys and values take now."""
        return self._static.bytes + self._long.bytes

    def fits(self, row: Row, beside: Sequence[Row] = ()) -> bool:
        """Whether a row may join, together with those ``beside``."""
        short, long = self._parts(beside)
        if self._static.suits(row):
            return self._static.fits(row, short)
        return self._long.fits(row, long)

    def size(self, row: Row) -> int:
        """How many static slots a row takes; a long one takes none."""
        return self._static.size(row) if self._static.suits(row) else 0

    def queue(self, row: Row) -> str:
        """Where it waits."""
        return "static" if self._static.suits(row) else self._long.queue(row)

    def join(self, rows: Sequence[Row]) -> list[Row]:
        """Takes rows in. They must fit."""
        short, long = self._parts(rows)
        self._static.join(short)
        try:
            self._long.join(long)
        except BaseException:
            # What raises must leave all as it was: nothing was read of these yet.
            self._static.leave(short)
            for row in short:
                row.joined = False
            raise
        return list(rows)

    def step(self, rows: Sequence[Row]) -> list[Row]:
        """Takes a step of these running rows."""
        short, long = self._by_place(rows)
        self._static.step(short)
        if long:
            self._long.step(long)
        return list(rows)

    def leave(self, rows: Iterable[Row]) -> None:
        """Frees the slots of rows, ended or not."""
        short, long = self._by_place(rows)
        self._static.leave(short)
        if long:
            self._long.leave(long)

    def _by_place(self, rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
        """Rows in static slots, and the others."""
        short: list[Row] = []
        long: list[Row] = []
        for row in rows:
            (short if row in self._static else long).append(row)
        return short, long

    def _parts(self, rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
        """Rows for static slots, and the others."""
        short: list[Row] = []
        long: list[Row] = []
        for row in rows:
            (short if self._static.suits(row) else long).append(row)
        return short, long
