"""Puts the images of many jobs into their indexes together: one commit at a time, as it fits."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeAlias

from blipq.errors import BlipqError
from blipq.index.store import Entry, Indexes, Space
from blipq_worker.batching.batcher import Batcher

log = logging.getLogger(__name__)

_MOST_AT_ONCE = 1024
_WINDOW_S = 0.02
_COMMITS_BETWEEN_LOOKS = 16

#: The name of an index and whose vectors it holds.
_Key: TypeAlias = tuple[str, Space]


class IndexWriter:
    """Commits what waits. While one commit runs, the next fills by itself."""

    def __init__(self, indexes: Indexes, *, max_waiting: int) -> None:
        self._indexes = indexes
        self._commits: Counter[_Key] = Counter()
        self._batcher: Batcher[Entry, BlipqError | None] = Batcher(
            self._commit,  # type: ignore[arg-type]  # its keys are the tuples of submit
            max_batch_size=_MOST_AT_ONCE,
            batch_wait_timeout_s=_WINDOW_S,
            max_waiting=max_waiting,
            name="index-writer",
        )

    def start(self) -> None:
        """Starts the thread that commits."""
        self._batcher.start()

    def close(self) -> None:
        """Commits what waits, and stops."""
        self._batcher.close(timeout=5)

    def submit(self, name: str, space: Space, entry: Entry) -> "Future[BlipqError | None]":
        """Adds an image to the next commit: None when it is in the index, else why not."""
        return self._batcher.submit(entry, (name, space))

    def _commit(
        self, key: _Key, entries: Sequence[Entry], wanted: Callable[[int], bool]
    ) -> Sequence[BlipqError | None]:
        """One commit. An index that does not answer is no entry's fault: none is tried alone."""
        try:
            index = self._indexes.open_or_create(*key, entries[0].vectors.shape[1])
            index.upsert(entries)
        except BlipqError as error:
            return [error] * len(entries)
        self._commits[key] += 1
        if self._commits[key] % _COMMITS_BETWEEN_LOOKS == 0:
            try:
                index.compact(at_once=False)
            except BlipqError as error:
                log.warning("%s: not compacted: %s", key[0], error)
        return [None] * len(entries)
