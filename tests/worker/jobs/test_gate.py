"""Together, alone, or nobody any more."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from blipq_worker.jobs.quarantine import Draining, Gate
from conftest import wait_until


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_many_are_inside_together() -> None:
    gate = Gate()
    with gate.shared(), gate.shared():
        assert not gate.closed


def test_one_who_wants_to_be_alone_waits_for_the_others(threads: ThreadPoolExecutor) -> None:
    gate, inside = Gate(), threading.Event()
    with gate.shared():
        alone = threads.submit(_enter, gate.alone, inside.set)
        wait_until(lambda: gate._solo, "the other to wait")
        assert not inside.is_set()
    alone.result(timeout=10)
    assert inside.is_set()


def test_nobody_enters_while_one_is_alone(threads: ThreadPoolExecutor) -> None:
    gate, inside = Gate(), threading.Event()
    with gate.alone():
        others = [threads.submit(_enter, gate.shared, inside.set) for _ in range(2)]
        others.append(threads.submit(_enter, gate.alone, inside.set))
        assert not inside.wait(0.05)
    for other in others:
        other.result(timeout=10)


def test_an_exception_inside_opens_the_gate_again() -> None:
    gate = Gate()
    for way_in in (gate.shared, gate.alone):
        with pytest.raises(KeyError), way_in():
            raise KeyError
    with gate.alone():
        pass


def test_nobody_enters_a_closed_gate() -> None:
    gate = Gate()
    gate.close()
    assert gate.closed
    for way_in in (gate.shared, gate.alone):
        with pytest.raises(Draining), way_in():
            pass


def test_who_is_inside_may_finish_after_the_gate_closed() -> None:
    gate = Gate()
    with gate.shared():
        gate.close()


def test_those_who_wait_are_turned_away_when_the_gate_closes(threads: ThreadPoolExecutor) -> None:
    gate = Gate()
    with gate.alone():
        waiting: list[Future[None]] = [threads.submit(_enter, gate.shared, int)]
        waiting.append(threads.submit(_enter, gate.alone, int))
        gate.close()
        for one in waiting:
            with pytest.raises(Draining):
                one.result(timeout=10)


def _enter(way_in: Callable[[], object], then: Callable[[], object]) -> None:
    with way_in():  # type: ignore[attr-defined]
        then()
