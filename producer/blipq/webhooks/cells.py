"""The outboxes of several cells as one, for people. Senders take from each on its own."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from blipq.ledger.cells.operator import beside_each
from blipq.webhooks.outbox import Outbox


def outbox_of(ledger: object) -> Outbox:
    """An outbox on the connections of a ledger. Raises TypeError for a fake."""
    each = beside_each(Outbox, ledger)
    return Outbox.beside(ledger) if each is None else CellsOutbox(each)


class CellsOutbox(Outbox):
    """What there is to see of several outboxes, and what is sent again."""

    def __init__(self, outboxes: Mapping[str, Outbox]) -> None:
        self._outboxes = list(outboxes.values())

    def replay(self, id: str) -> list[str]:
        """Sends again what an event's id, a webhook-id or a job's id names; the events' ids."""
        return [name for each in self._outboxes for name in each.replay(id)]

    def listed(self, *, dead: bool, limit: int) -> list[dict[str, Any]]:
        """Events for people and programs: dead ones newest first, or waiting ones."""
        lists = (each.listed(dead=dead, limit=limit) for each in self._outboxes)
        found = list(itertools.chain(*lists))
        if dead:
            found.sort(key=lambda event: -event.get("dead_at", 0.0))
        return found[:limit]

    def counts(self) -> dict[str, int]:
        """What came of all attempts so far, by outcome."""
        total: Counter[str] = Counter()
        for each in self._outboxes:
            total.update(each.counts())
        return dict(sorted(total.items()))

    def pending(self) -> int:
        """How many events are not delivered yet."""
        return sum(each.pending() for each in self._outboxes)

    def dead(self) -> int:
        """How many events were given up."""
        return sum(each.dead() for each in self._outboxes)

    def senders(self) -> Sequence[str]:
        """The live senders."""
        return sorted(itertools.chain(*(each.senders() for each in self._outboxes)))
