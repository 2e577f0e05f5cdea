"""Texts in flight: items join, their rows wait for slots, and when all have ended they leave."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from msgspec.structs import replace

from blipq_worker.blip2.decoding import Row, RowText, row_seed
from blipq_worker.blip2.generation.halving import by_halves
from blipq_worker.blip2.generation.items import Asking, GeneratedText, GenerateItem
from blipq_worker.blip2.generation.routing import Loop
from blipq_worker.inference.requests import GenerationParams

#: Most rows that join at one step, while the others wait: each costs its image's pass. Where more
#: than half of the slots are taken, at least half as many join together: reading prompts stops the
#: others, and a few take nearly as long as one.
JOINING_ON_A_CPU = 8
JOINING = 16
#: The same where there are many slots: half of them, up to a batch in which images cost least.
MOST_JOINING = 64


def most_joining(slots: int) -> int:
    """Most rows that join at one step on a GPU."""
    return max(JOINING, min(MOST_JOINING, slots // 2))


#: What a text that is written again after a loop never repeats, in tokens.
REWRITING_NGRAM = 3

Ticket = tuple[int, int]
Texts = list[list[GeneratedText]]


@dataclass(slots=True, eq=False)
class _Writing:
    """An item. ``rows`` has those of all prompts: a prompt's alternatives one after the other.

    sizes: the slots that each of them takes. seen: whether the image was; until then its queries
    are there only by their number.
    """

    item: GenerateItem
    rows: list[Row]
    sizes: list[int]
    seen: bool = False

    @property
    def waiting(self) -> bool:
        """Whether a row has had no slot yet."""
        return not all(row.joined for row in self.rows)

    @property
    def slots(self) -> int:
        """Slots that such rows will take."""
        pairs = zip(self.rows, self.sizes, strict=True)
        return sum(size for row, size in pairs if not row.joined)

    def see(self, looks: Sequence[torch.Tensor]) -> None:
        """Gives the rows the image. looks: the queries for each prompt, (32, hidden)."""
        alternatives = len(self.rows) // max(1, len(looks))
        for place, row in enumerate(self.rows):
            row.queries = looks[place // alternatives]
        self.seen = True


def _is_to_be_rewritten(row: Row) -> bool:
    return row.ended and bool(row.kept) and row.params.on_loop == "rewrite"


class Writer(Protocol):
    """What a session needs of a ``Generator``."""

    model: Any

    def checked_ids(self, prompt: str, params: GenerationParams) -> list[int]:
        """A prompt's token ids. Raises PermanentError ``invalid_request`` if they are too many."""

    def seen(self, items: Sequence[Asking]) -> list[list[torch.Tensor]]:
        """The image as the language model reads it, (32, its hidden size), per item and prompt."""

    def answer(self, written: RowText, params: GenerationParams) -> GeneratedText:
        """What was written, and how sure of it the model was."""


class WritingSession:
    """Texts of one generation checkpoint: a ``batching.interface.Session``.

    Tickets stand for items; rows of smaller tickets get their slots first.
    """

    def __init__(self, generator: Writer, loop: Loop) -> None:
        self._generator = generator
        self._loop = loop
        self._items: dict[Ticket, _Writing] = {}
        #: Those of them with rows that have had no slot yet, how many slots these will take, and
        #: the last of them in their order.
        self._new: dict[Ticket, _Writing] = {}
        self._waiting = 0
        self._latest: Ticket | None = None
        self._slots = loop.free + len(loop.running)
        device = generator.model.query_tokens.device
        self._joining = JOINING_ON_A_CPU
        if device.type != "cpu":
            self._joining = most_joining(self._slots)

    def has_room(self, ticket: Ticket) -> bool:
        """Whether a slot is free that no more urgent row waits for."""
        # All waiting items call this before each step, most of them behind all that are here.
        room, behind_all = self._loop.room, self._latest is None or ticket > self._latest
        if not room or behind_all:
            return room > self._waiting
        return room > sum(each.slots for key, each in self._new.items() if key < ticket)

    def join(self, ticket: Ticket, item: GenerateItem) -> None:
        """Takes an item in. Raises PermanentError ``invalid_request`` for a prompt too long."""
        rows = self._rows(item)
        sizes = [self._loop.size(row) for row in rows]
        self._items[ticket] = self._new[ticket] = _Writing(item, rows, sizes)
        self._waiting += self._new[ticket].slots
        self._latest = ticket if self._latest is None else max(self._latest, ticket)

    def _rows(self, item: GenerateItem) -> list[Row]:
        params = item.params
        seed = secrets.randbits(63) if params.seed is None else params.seed
        # Beams come to all alternatives of a prompt together.
        alternatives = 1 if params.num_beams > 1 else params.num_return_sequences
        seeds = [row_seed(seed, index) for index in range(alternatives)]
        prompts = [self._generator.checked_ids(prompt, params) for prompt in item.prompts]
        unseen = self._generator.model.query_tokens[0]
        return [
            Row(unseen, ids, params, seed, adapter=item.adapter)
            for ids in prompts
            for seed in seeds
        ]

    def has_begun(self, ticket: Ticket) -> bool:
        """Whether a text of an item has been begun: its first token is there, or comes next."""
        return any(row.joined for row in self._items[ticket].rows)

    def leave(self, ticket: Ticket) -> None:
        """Lets an item go, finished or not."""
        # First what may raise: rows of an item that is forgotten would keep their slots.
        self._loop.leave([row for row in self._items[ticket].rows if row.joined])
        del self._items[ticket]
        if self._new.pop(ticket, None) is not None:
            self._count_new()

    def close(self) -> None:
        """Lets all items go."""
        for ticket in list(self._items):
            self.leave(ticket)

    def step(self, tickets: Sequence[Ticket]) -> list[tuple[Ticket, Texts]]:
        """One more token for each running row of these items, after waiting rows have joined.

        The texts of the items that are done, per prompt and alternative; they have left.
        """
        among = [self._items[ticket] for ticket in sorted(tickets)]
        if self._is_worth_joining():
            coming = self._next_rows(among)
            self._see(among, set(coming))
            by_halves(self._loop.join, coming)
        self._count_new()
        rows = [row for each in among for row in each.rows if row.joined]
        by_halves(self._loop.step, [row for row in rows if not row.ended])
        self._loop.leave([row for row in rows if row.ended])
        self._write_again(tickets)
        return [(ticket, self._texts(ticket)) for ticket in tickets if self._is_done(ticket)]

    def _write_again(self, tickets: Sequence[Ticket]) -> None:
        """Puts a row that repeats nothing in the place of one with loops, where that is wanted."""
        for ticket in tickets:
            each = self._items[ticket]
            looped = [index for index, row in enumerate(each.rows) if _is_to_be_rewritten(row)]
            if not looped:
                continue
            params = replace(each.item.params, on_loop="end", no_repeat_ngram_size=REWRITING_NGRAM)
            for index in looped:
                old = each.rows[index]
                each.rows[index] = Row(
                    old.queries, old.ids, params, old.seed, adapter=old.adapter, replaced=old
                )
            self._new[ticket] = each
            self._count_new()

    def _count_new(self) -> None:
        self._new = {ticket: each for ticket, each in self._new.items() if each.waiting}
        self._waiting = sum(each.slots for each in self._new.values())
        self._latest = max(self._new, default=None)

    def _is_worth_joining(self) -> bool:
        free = self._loop.free
        return 2 * free >= self._slots or free >= self._joining // 2

    def _see(self, among: Sequence[_Writing], coming: set[Row]) -> None:
        """One pass of the vision tower over the images of the rows that come next."""
        new = [each for each in among if not each.seen and not coming.isdisjoint(each.rows)]
        if new:
            looks = self._generator.seen([each.item for each in new])
            for each, some in zip(new, looks, strict=True):
                each.see(some)

    def _next_rows(self, among: Sequence[_Writing]) -> list[Row]:
        """The rows that join now, in the order of their tickets within each queue."""
        rows: list[Row] = []
        full: set[str] = set()
        for row in (row for each in among for row in each.rows if not row.joined):
            if len(rows) == self._joining:
                break
            queue = self._loop.queue(row)
            if queue in full:
                continue
            if self._loop.fits(row, rows):
                rows.append(row)
            else:
                full.add(queue)
        return rows

    def _is_done(self, ticket: Ticket) -> bool:
        return ticket not in self._new and all(row.ended for row in self._items[ticket].rows)

    def _texts(self, ticket: Ticket) -> Texts:
        each = self._items.pop(ticket)
        params = each.item.params
        texts = [self._generator.answer(one, params) for row in each.rows for one in row.outputs]
        number = params.num_return_sequences
        return [texts[start : start + number] for start in range(0, len(texts), number)]
