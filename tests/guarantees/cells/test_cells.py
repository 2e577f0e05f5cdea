"""Cells: one is killed under load, one drains and goes, one joins. No job is doubled or lost."""

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from blipq import CaptionRequest, Client, Job, Options, QueueUnavailable, Settings
from blipq.ledger.cells.operator import operator_of
from blipq.local.stack import LocalStack
from blipq.local.supervisor import Service
from blipq.redis.cells import cell_of, ranked
from blipq.submission import Submission
from conftest import wait_until
from guarantees.cells.fleet import Fleet
from guarantees.rig import png
from guarantees.stand_ins import faulty_worker
from guarantees.stand_ins.forked import Forked

LEASE_S = 3
#: For a server that is busy: one that was killed refuses at once.
TIMEOUT_S = 20
KEYED = 10_000
CHUNK = 500


class Cells:
    """A fleet with a worker in each cell, and the pictures of its jobs."""

    def __init__(self, folder: Path, stack: LocalStack, names: str) -> None:
        fields = stack.settings_fields()
        self._s3 = {name: text for name, text in fields.items() if name.startswith("s3_")}
        self.fleet = Fleet(folder / "cells", names, timeout_s=TIMEOUT_S, **self._s3)
        self._folder = folder
        self._numbers = itertools.count()
        self.workers: dict[str, Service] = {}

    def settings(self, lists: str = "", **options: Any) -> Settings:
        return self.fleet.settings(lists, **options)

    def start_worker(self, cell: str) -> None:
        own = {
            **self._s3,
            "cells": self.fleet.cells,
            "cell": cell,
            "lease_s": LEASE_S,
            "drain_timeout_s": 10,
            "retry_backoff_s": 0.1,
            "fronts": 0,
        }
        environment = {f"BLIPQ_{name.upper()}": str(value) for name, value in own.items()}
        environment |= {"OMP_NUM_THREADS": "1", "FAULTY_STOPS": str(self._folder / "stops")}
        log = self._folder / f"worker-{next(self._numbers)}.log"
        worker = Forked("worker", faulty_worker.main, env=environment, log=log)
        worker.start()
        self.workers[cell] = worker
        with Client(self.settings(cell=cell)) as client:
            operator = operator_of(client.ledger)

            def serves() -> bool:
                assert worker.exit_code is None, worker.last_words(40)
                return any(f"-{worker.pid}-" in name for name in operator.workers())

            wait_until(serves, f"the worker of cell {cell}", timeout=90)

    def stop(self) -> None:
        for worker in self.workers.values():
            worker.stop(timeout=30)
        self.fleet.stop()


@pytest.fixture
def cells(tmp_path: Path, stack: LocalStack) -> Iterator[Cells]:
    cells = Cells(tmp_path, stack, "ab")
    yield cells
    cells.stop()


class Load:
    """Producers that submit jobs without a key until they are stopped."""

    def __init__(self, settings: Settings, image: str, threads: int = 2) -> None:
        self.jobs: list[Job[Any]] = []
        #: Ids of jobs that may be recorded or not: their submit had no answer.
        self.unsure: list[str] = []
        self._settings, self._image = settings, image
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._submit) for _ in range(threads)]
        for each in self._threads:
            each.start()

    def _submit(self) -> None:
        with Client(self._settings) as client:
            while not self._stop.is_set():
                try:
                    self.jobs.append(client.caption(self._image, "sleep 0.01"))
                except QueueUnavailable as error:
                    self.unsure.append(str(error.job_id))
                time.sleep(0.02)

    def stop(self) -> None:
        self._stop.set()
        for each in self._threads:
            each.join()


def by_cell(jobs: Sequence[Job[Any]]) -> dict[str | None, list[Job[Any]]]:
    found: dict[str | None, list[Job[Any]]] = {}
    for job in jobs:
        found.setdefault(cell_of(job.id), []).append(job)
    return found


@pytest.mark.timeout(300)
def test_a_killed_cell_keeps_its_jobs_while_others_go_on_and_new_ones_move(cells: Cells) -> None:
    for name in "ab":
        cells.start_worker(name)
    with Client(cells.settings()) as client:
        image = client.storage.upload(png()).uri
        load = Load(cells.settings(), image)
        try:
            wait_until(lambda: len(by_cell(load.jobs).get("b", ())) >= 20, "jobs in both cells")
            cells.fleet.kill("b")
            at = len(load.jobs)
            wait_until(lambda: len(load.jobs) >= at + 40, "jobs while a cell is away")
            # Those that another thread had on its way at the kill are left out.
            moved = by_cell(load.jobs[at + 4 :])
            assert set(moved) == {"a"}
            assert {job.wait(timeout=60).status for job in moved["a"]} == {"succeeded"}
        finally:
            load.stop()
        # A submit that had no answer at the kill is not moved: it may be recorded.
        assert {cell_of(id) for id in load.unsure} <= {"b"}
        cells.fleet.start("b")
        ended = client.wait_all(load.jobs, timeout=90)
        assert {job.info().status for job in ended} == {"succeeded"}
        records = cells.fleet.records()
        assert not records["a"] & records["b"]
        known = {job.id for job in load.jobs}
        assert known <= records["a"] | records["b"] <= known | set(load.unsure)


@pytest.mark.timeout(300)
def test_a_frozen_cell_holds_up_its_own_jobs_while_others_go_on_and_new_ones_move(
    cells: Cells,
) -> None:
    """Its connections stay open, so whoever asks it learns nothing until the time is over."""
    for name in "ab":
        cells.start_worker(name)
    settings = cells.settings(timeout_s=2)
    key = next(f"k{n}" for n in range(100) if ranked(f"k{n}", "ab")[0] == "b")
    with Client(settings) as client:
        image = client.storage.upload(png()).uri
        load = Load(settings, image)
        try:
            wait_until(lambda: len(by_cell(load.jobs).get("b", ())) >= 20, "jobs in both cells")
            cells.fleet.servers["b"].freeze()
            at = len(load.jobs)
            wait_until(
                lambda: len(by_cell(load.jobs[at:]).get("a", ())) >= 40, "jobs of the other", 60
            )
            later = by_cell(load.jobs[at:])
            # Each thread may have had one on its way whose record was answered just before.
            assert len(later.get("b", ())) <= 2
            assert {job.wait(timeout=60).status for job in later["a"]} == {"succeeded"}
            with pytest.raises(QueueUnavailable):
                client.caption(image, idempotency_key=key)
            with pytest.raises(QueueUnavailable):
                by_cell(load.jobs)["b"][0].info()
        finally:
            load.stop()
            cells.fleet.servers["b"].thaw()
        assert {cell_of(id) for id in load.unsure} <= {"b"}
        ended = client.wait_all(load.jobs, timeout=120)
        assert {job.info().status for job in ended} == {"succeeded"}
        again = {client.caption(image, idempotency_key=key).id for _ in range(2)}
        assert [cell_of(id) for id in again] == ["b"]
        records = cells.fleet.records()
        assert not records["a"] & records["b"]
        assert {job.id for job in load.jobs} <= records["a"] | records["b"]


@pytest.mark.timeout(300)
def test_a_cell_drains_and_is_removed_and_no_job_is_lost(cells: Cells) -> None:
    for name in "ab":
        cells.start_worker(name)
    with Client(cells.settings("1=a,b")) as client:
        image = client.storage.upload(png()).uri
        requests = [CaptionRequest(image=image, prompt="sleep 0.02") for _ in range(60)]
        before = client.submit_many(requests)
    with Client(cells.settings("1=a,b 2=a")) as client:
        during = client.submit_many(requests)
        assert {cell_of(job.id) for job in during} == {"a"}
        ended = client.wait_all(before + during, timeout=90)
        assert {job.info().status for job in ended} == {"succeeded"}
        with Client(cells.settings(cell="b")) as drained:
            assert operator_of(drained.ledger).open_jobs() == 0
    cells.workers.pop("b").stop(timeout=30)
    cells.fleet.kill("b")
    only = {name: url for name, url in cells.settings().cells.items() if name == "a"}
    with Client(cells.settings("2=a", cells=only)) as client:
        after = client.wait_all(client.submit_many(requests[:10]), timeout=60)
        assert {job.info().status for job in after} == {"succeeded"}


def keyed(key: str) -> Submission:
    return Submission(CaptionRequest(image="s3://bucket/key"), Options(idempotency_key=key))


#: What clients are given one after the other: a cell joins, another one drains and goes.
LISTS = ("1=a,b", "1=a,b 2=a,b,c", "1=a,b 2=a,b,c 3=a,c")


@pytest.mark.timeout(300)
def test_ten_thousand_keys_are_one_job_each_while_a_cell_joins_and_another_one_drains(
    tmp_path: Path,
) -> None:
    """Clients with the old and the new lists submit the same keys, each in an order of its own."""
    fleet = Fleet(tmp_path, "abc", timeout_s=TIMEOUT_S)
    found: list[dict[str, str]] = [{} for _ in LISTS]
    failures: list[BaseException] = []

    def submit(at: int, lists: str) -> None:
        keys = [f"key-{number}" for number in range(KEYED)]
        random.Random(at).shuffle(keys)
        try:
            with Client(fleet.settings(lists)) as client:
                for start in range(0, KEYED, CHUNK):
                    chunk = keys[start : start + CHUNK]
                    jobs = client.submit_many(keyed(key) for key in chunk)
                    found[at].update(zip(chunk, (job.id for job in jobs), strict=True))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=submit, args=each) for each in enumerate(LISTS)]
    try:
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert failures == []
        kept = Counter(key for keys in fleet.keys("blipq:idempotency:*").values() for key in keys)
        assert len(kept) == KEYED
        assert set(kept.values()) == {1}, "no key is in two cells"
        records = fleet.records()
        assert sum(map(len, records.values())) == KEYED, "none doubled, none lost"
        assert found[0] == found[1] == found[2], "whatever its list, a client gets the same job"
        everywhere = set().union(*records.values())
        assert set(found[0].values()) == everywhere
        assert all(records.values()), "each cell has a share"
    finally:
        fleet.stop()
