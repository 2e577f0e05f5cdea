"""The items that wait, in the order in which they come to run."""

from bisect import bisect_left, insort
from collections.abc import Collection, Hashable, Iterable, Iterator
from typing import Any

from blipq_worker.batching.entries import Entry


def _order(entry: Entry[Any, Any]) -> tuple[int, int]:
    return entry.ticket


class Waiting:
    """Entries that wait, by key; those that must run alone are kept apart. Not thread-safe.

    What is taken is found by its ticket: the cost does not grow with what waits.
    """

    def __init__(self) -> None:
        self._by_key: dict[Hashable, list[Entry[Any, Any]]] = {}
        self._alone: list[Entry[Any, Any]] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Entry[Any, Any]]:
        """All, in no order."""
        yield from self._alone
        for entries in self._by_key.values():
            yield from entries

    def add(self, entry: Entry[Any, Any]) -> None:
        """Puts an entry among those that wait."""
        entries = self._alone if entry.alone else self._by_key.setdefault(entry.key, [])
        insort(entries, entry, key=_order)
        entry.waits = True
        self._count += 1

    def remove(self, entry: Entry[Any, Any]) -> None:
        """Takes an entry out."""
        entries = self._alone if entry.alone else self._by_key[entry.key]
        del entries[bisect_left(entries, entry.ticket, key=_order)]
        if not entries and not entry.alone:
            del self._by_key[entry.key]
        entry.waits = False
        self._count -= 1

    @property
    def alone(self) -> Entry[Any, Any] | None:
        """The most urgent of those that must run alone."""
        return self._alone[0] if self._alone else None

    @property
    def count_alone(self) -> int:
        """How many must run alone."""
        return len(self._alone)

    def of(self, key: Hashable) -> list[Entry[Any, Any]]:
        """Those of a key that may have neighbours, most urgent first. Not to be changed."""
        return self._by_key.get(key, [])

    def batch(self, key: Hashable, size: int) -> list[Entry[Any, Any]]:
        """The most urgent entries of a key: ``size`` at most."""
        return self.of(key)[:size]

    def first_of(self, keys: Iterable[Hashable]) -> Entry[Any, Any] | None:
        """The most urgent entry of these keys that may have neighbours."""
        heads = [self._by_key[key][0] for key in keys if key in self._by_key]
        return min(heads, key=_order, default=None)

    def first_but(self, keys: Collection[Hashable]) -> Entry[Any, Any] | None:
        """The most urgent entry of any other key that may have neighbours."""
        return self.first_of(key for key in self._by_key if key not in keys)
