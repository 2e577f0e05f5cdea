"""Who runs: rows join by a prefill, take steps together, and leave at any time."""

from collections.abc import Sequence
from typing import Any

import torch

from blipq_worker.blip2.decoding.languages import T5, Language, Opt
from blipq_worker.blip2.decoding.sampling import choose
from blipq_worker.blip2.decoding.sequences import Row

#: Columns of keys and values per slot, on average: longer rows run with fewer beside them.
COLUMNS_PER_SLOT = 256


class DecodeLoop:
    """Runs up to ``slots`` rows of a language model, OPT or T5. Of one thread.

    ends: end tokens. What raises leaves all rows as they were, and can be tried again with fewer.
    """

    def __init__(self, model: Any, *, ends: Sequence[int], slots: int = 32) -> None:
        self._language: Language = T5(model) if model.config.is_encoder_decoder else Opt(model)
        self._ends = tuple(ends)
        self._slots = slots
        #: The rows in the slots, in their order.
        self.running: list[Row] = []

    @property
    def free(self) -> int:
        """Slots without a row."""
        return self._slots - len(self.running)

    @property
    def bytes(self) -> int:
        """What keys and values take now."""
        return sum(slots.bytes for slots in self._language.slots)

    def fits(self, row: Row, beside: Sequence[Row] = ()) -> bool:
        """Whether there is a slot for a row, and memory for it at its longest.

        beside: rows that will join with it. Alone, every row fits.
        """
        rows = [*self.running, *beside, row]
        if len(rows) == 1:
            return True
        columns = len(rows) * max(self._language.columns(each) for each in rows)
        return len(rows) <= self._slots and columns <= self._slots * COLUMNS_PER_SLOT

    @torch.inference_mode()
    def join(self, rows: Sequence[Row]) -> list[Row]:
        """Takes rows in and writes the first token of each. They must fit. Returns them."""
        if not rows:
            return []
        scores, filled = self._language.prefill(rows)
        tokens = choose(scores, rows, ends=self._ends, start=self._language.start)
        self._language.put(self.running, rows, filled)
        self.running.extend(rows)
        for row in rows:
            row.joined = True
        return self._write(rows, tokens)

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> list[Row]:
        """Writes one more token of each of these running rows. Returns them, by slot."""
        among = set(rows)
        at = [index for index, row in enumerate(self.running) if row in among]
        if not at:
            return []
        chosen = [self.running[index] for index in at]
        everyone = len(at) == len(self.running)
        where = slice(len(at)) if everyone else torch.tensor(at, device=chosen[0].queries.device)
        scores = self._language.step(chosen, where)
        tokens = choose(scores, chosen, ends=self._ends, start=self._language.start)
        return self._write(chosen, tokens)

    @torch.inference_mode()
    def leave(self, rows: Sequence[Row]) -> None:
        """Frees the slots of rows; the last rows move into the holes."""
        gone = set(rows)
        left = len(self.running) - sum(row in gone for row in self.running)
        holes = [index for index, row in enumerate(self.running[:left]) if row in gone]
        movers = [
            index for index in range(left, len(self.running)) if self.running[index] not in gone
        ]
        for slots in self._language.slots:
            if not left:
                slots.clear()
            elif holes:
                slots.move(movers, holes)
        for hole, mover in zip(holes, movers, strict=True):
            self.running[hole] = self.running[mover]
        del self.running[left:]

    def _write(self, rows: Sequence[Row], tokens: Sequence[int]) -> list[Row]:
        for row, token in zip(rows, tokens, strict=True):
            row.write(token, self._ends)
        return list(rows)
