"""Who runs: rows join by a prefill, take steps together, and leave at any time."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from blipq_worker.blip2.decoding.groups import Groups
from blipq_worker.blip2.decoding.languages import Language, Pool, language_of
from blipq_worker.blip2.decoding.sampling import choose
from blipq_worker.blip2.decoding.sequences import Row
from blipq_worker.blip2.decoding.views import Where

#: Columns of keys and values per slot, on average: longer rows run with fewer beside them.
COLUMNS_PER_SLOT = 256
#: Beams per slot, on average: by default all slots may have as many. With more, fewer searches run.
BEAMS_PER_SLOT = 5


class DecodeLoop:
    """Runs up to ``slots`` rows of a language model: OPT, Llama or T5. Of one thread.

    A row with beams has one slot, too, and takes as many rows of a step as it has beams. ends: end
    tokens. What raises leaves all rows as they were, and can be tried again with fewer.
    """

    def __init__(self, model: Any, *, ends: Sequence[int], slots: int = 32) -> None:
        language: Language = language_of(model)
        self._language, self._ends = language, tuple(ends)
        self._slots = slots
        #: The rows without beams in their slots, in order.
        self._alone: list[Row] = []
        device = model.get_input_embeddings().weight.device
        stopping = model.generation_config.early_stopping or False
        self._groups = Groups(ends, language.start, stopping, device)

    @property
    def running(self) -> list[Row]:
        """The rows in slots."""
        return [*self._alone, *self._groups.rows]

    @property
    def free(self) -> int:
        """Slots without a row."""
        return self._slots - len(self._alone) - len(self._groups.running)

    @property
    def room(self) -> int:
        """Slots for which there is memory: beside long rows fewer than are free."""
        if not self.free:  # as mostly under load, at each step
            return 0
        taken = math.ceil(self._columns(self.running) / COLUMNS_PER_SLOT)
        return max(0, min(self.free, self._slots - taken))

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
        _, groups = _by_kind(rows)
        beams = sum(each.params.num_beams for each in groups)
        if row.has_beams and len(groups) > 1 and beams > self._slots * BEAMS_PER_SLOT:
            return False
        return len(rows) <= self._slots and self._columns(rows) <= self._slots * COLUMNS_PER_SLOT

    def _columns(self, rows: Sequence[Row]) -> int:
        """Columns of these at their longest. Those of a kind are all as wide as their widest."""
        kinds = [[self._language.columns(row) for row in kind] for kind in _by_kind(rows) if kind]
        return sum(len(columns) * max(columns) for columns in kinds)

    def size(self, row: Row) -> int:
        """What a row takes of ``room`` at its longest: one, or more where it is longer than most.

        Each of its beams has columns of its own. One that takes more than there is runs alone.
        """
        return min(self._slots, math.ceil(self._language.columns(row) / COLUMNS_PER_SLOT))

    def queue(self, row: Row) -> str:
        """What else waits where it does: where one row does not fit, others of its queue wait."""
        return "beams" if row.has_beams else "slots"

    @torch.inference_mode()
    def join(self, rows: Sequence[Row]) -> list[Row]:
        """Takes rows in and writes the first token of each. They must fit. Returns them."""
        if not rows:
            return []
        alone, groups = _by_kind(rows)
        language, number = self._language, len(alone)
        scores, filled = language.prefill([*alone, *groups])
        tokens: list[tuple[int, float]] = []
        begun = None
        if alone:
            tokens = choose(scores[:number], alone, ends=self._ends, start=language.start)
            language.put(language.alone, self._alone, alone, filled, slice(number))
        if groups:
            firsts = [language.first(row) for row in groups]
            begun = self._groups.begin(groups, firsts, scores[number:])
            part = slice(number, None)
            language.put(language.groups, self._groups.rows, groups, filled, part)
        if begun is not None:
            self._groups.admit(begun)
        # Behind all that may raise.
        self._alone.extend(alone)
        for row in rows:
            row.joined = True
        self._write(alone, tokens)
        return list(rows)

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> list[Row]:
        """Writes one more token of each of these running rows. Returns them, by slot."""
        among = set(rows)
        at, alone, where = self._some(self._alone, among)
        places, groups, _ = self._some(self._groups.rows, among)
        if not at and not places:
            return []
        step = self._groups.ready(places) if places else None
        scores = self._language.step(alone, where, step)
        tokens: list[tuple[int, float]] = []
        if alone:
            some = scores[: len(alone)]
            tokens = choose(some, alone, ends=self._ends, start=self._language.start)
        if step is not None:
            # It may raise, and writes nothing before the others can be written, too.
            self._groups.write(step, self._groups.choose(step, scores[len(alone) :]))
        self._write(alone, tokens)
        return [*alone, *groups]

    def _some(self, running: Sequence[Row], among: set[Row]) -> tuple[list[int], list[Row], Where]:
        """Which of the running ones are meant: their slots, they, and where a step finds them."""
        at = [index for index, row in enumerate(running) if row in among]
        rows = [running[index] for index in at]
        if len(at) == len(running):
            return at, rows, slice(len(at))
        return at, rows, torch.tensor(at, dtype=torch.long, device=running[0].queries.device)

    @torch.inference_mode()
    def leave(self, rows: Sequence[Row]) -> None:
        """Frees the slots of rows; the last rows move into the holes."""
        gone = set(rows)
        order = _without(gone, self._alone, self._language.alone)
        self._alone = [self._alone[index] for index in order]
        if gone.intersection(self._groups.rows):
            self._groups.keep(_without(gone, self._groups.rows, self._language.groups))

    def _write(self, rows: Sequence[Row], tokens: Sequence[tuple[int, float]]) -> None:
        for row, (token, log) in zip(rows, tokens, strict=True):
            row.write(token, log, self._ends)


def _by_kind(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Rows without beams, and rows with some."""
    alone: list[Row] = []
    groups: list[Row] = []
    for row in rows:
        (groups if row.has_beams else alone).append(row)
    return alone, groups


def _without(gone: set[Row], running: Sequence[Row], pool: Pool) -> list[int]:
    """Lets rows of a pool go; which of the running ones are in the first slots then, in order."""
    left = len(running) - sum(row in gone for row in running)
    order = list(range(left))
    holes = [index for index in order if running[index] in gone]
    movers = [index for index in range(left, len(running)) if running[index] not in gone]
    for hole, mover in zip(holes, movers, strict=True):
        order[hole] = mover
    for slots in pool:
        if not left:
            slots.clear()
        elif holes:
            slots.move(movers, holes)
    return order
