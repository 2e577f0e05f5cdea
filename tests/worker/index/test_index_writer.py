"""Images of many jobs go into an index together, and each job hears what became of its own."""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from threading import Event

import numpy as np
import pytest

from blipq.errors import BlipqError, QueueUnavailable
from blipq.index.store import Entry, Space
from blipq_worker.index import writer as module
from blipq_worker.index.writer import IndexWriter

SPACE = Space("checkpoint", "1")


class Shelf:
    """Stands in for indexes, and for the only one it has. ``before`` is called before a commit."""

    def __init__(self) -> None:
        self.commits: list[list[str]] = []
        self.compacted = 0
        self.before: Callable[[], object] = lambda: None
        self.compacts: Callable[[], object] = lambda: None

    def open_or_create(self, name: str, space: Space, dimensions: int) -> "Shelf":
        assert (name, space, dimensions) == ("photos", SPACE, 256)
        return self

    def upsert(self, entries: Sequence[Entry]) -> None:
        self.before()
        self.commits.append([entry.id for entry in entries])

    def compact(self, *, at_once: bool) -> None:
        assert not at_once
        self.compacted += 1
        self.compacts()


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def writer(shelf: Shelf) -> Iterator[IndexWriter]:
    writer = IndexWriter(shelf, max_waiting=64)  # type: ignore[arg-type]
    writer.start()
    yield writer
    writer.close()


def add(writer: IndexWriter, id: str) -> "Future[BlipqError | None]":
    return writer.submit("photos", SPACE, Entry(id, id, "", np.zeros((32, 256))))


def test_what_comes_during_a_commit_goes_into_the_next_together(
    writer: IndexWriter, shelf: Shelf
) -> None:
    busy, go_on = Event(), Event()

    def hold() -> None:
        busy.set()
        assert go_on.wait(10)

    shelf.before = hold
    first = add(writer, "0")
    assert busy.wait(10)
    later = [add(writer, str(number)) for number in range(1, 9)]
    go_on.set()
    assert [future.result(10) for future in (first, *later)] == [None] * 9
    assert shelf.commits == [["0"], [str(number) for number in range(1, 9)]]


def test_an_index_that_is_away_is_told_to_each_job_after_one_try(
    writer: IndexWriter, shelf: Shelf
) -> None:
    tries = []

    def fail() -> None:
        tries.append(1)
        raise QueueUnavailable("away")

    shelf.before = fail
    futures = [add(writer, str(number)) for number in range(4)]
    assert {str(future.result(10)) for future in futures} == {"away"}
    assert len(tries) < 4


def test_compaction_is_thought_of_now_and_then_and_may_fail(
    writer: IndexWriter,
    shelf: Shelf,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> None:
        raise QueueUnavailable("away")

    shelf.compacts = fail
    monkeypatch.setattr(module, "_COMMITS_BETWEEN_LOOKS", 2)
    with caplog.at_level(logging.WARNING):
        answers = [add(writer, str(number)).result(10) for number in range(5)]
    assert answers == [None] * 5
    assert shelf.compacted == 2
    assert "not compacted: away" in caplog.text
