"""What cells cost: ``python -m benchmarks.cells`` measures two beside one Redis, in turn.

Both have two workers, a client and a door; the model answers at once and knows every image, and
nothing is read from S3. Each part of a round is done on both in turns, a few times, and which is
first changes from turn to turn. What is told is the median of the rounds, and of the rounds'
ratios.

Two servers with half of the jobs each take more CPU of a job than one, whoever chooses between
them: two clients without cells that submit in turns measure that beside.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tools.docs.page import replace_section

from benchmarks import results
from benchmarks.clients import asked, own_redis
from benchmarks.cost import TIMEOUT_S, WARM
from benchmarks.door import door_on
from benchmarks.door.rates import CONNECTIONS, post, post_batches
from benchmarks.overhead import AT_ONCE, THREADS, requests
from benchmarks.page import table
from blipq import Client, Job, Options, Settings
from blipq.contract import ImageRef
from blipq.ledger.cells.operator import operator_of
from blipq.ledger.connection import connect
from blipq.local.stack import worker_service
from blipq.local.supervisor import Service
from blipq.redis.cells import cell_of
from blipq.submission import Submission
from blipq_worker.bench.stack import BenchError

PAGE = Path(__file__).parents[1] / "docs" / "cells.md"
#: Jobs of each part in a turn, and the turns of a round.
ONE_BY_ONE, MANY, RESULTS = 500, 2_000, 500
TURNS = 4
#: A model without a worker: its jobs are submitted and no more.
UNSERVED = Options(model="nobody")
#: Nothing is read or written there.
NO_S3 = {"s3_endpoint_url": "http://127.0.0.1:1", "s3_access_key_id": "-"}
NO_S3 |= {"s3_secret_access_key": "-"}
IMAGE = ImageRef(uri="s3://photos-of-the-shop/1.jpg")
START_TIMEOUT_S = 120.0
#: What idle processes take is left out: a job costs the same whatever the machine's speed.
IDLE_S = 3.0
WORKER = [sys.executable, "-m", "benchmarks.cost", "--worker"]

Spent = dict[str, float]


class Figure(NamedTuple):
    """CPU that a job takes, in a part of a round, of whom; most: the ratio that is wanted."""

    part: str
    whose: str
    name: str
    most: float


FIGURES = (
    Figure("one by one", "client", "client, `submit`", 1.1),
    Figure("keyed", "client", "client, `submit` with a key", 1.1),
    Figure("many", "client", "client, `submit_many`", 1.1),
    Figure("own ids", "client", "client, `submit_many` with ids of its own", 1.1),
    Figure("results", "client", "client, `submit_many` and `wait_all`", 1.1),
    Figure("door", "door", "door, `POST /v1/jobs`", 1.1),
    Figure("batches", "door", "door, `POST /v1/batches`", 1.1),
    Figure("one by one", "redis", "Redis, `submit`", 1.03),
    Figure("keyed", "redis", "Redis, `submit` with a key", 1.03),
    Figure("many", "redis", "Redis, `submit_many`", 1.03),
    Figure("own ids", "redis", "Redis, `submit_many` with ids of its own", 1.03),
    Figure("results", "redis", "Redis, from submit to result", 1.03),
)


class Deployment:
    """One Redis or several cells, by name, with workers, a client and a door."""

    def __init__(self, urls: Mapping[str, str], folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        folder.mkdir()
        cells = {"cells": " ".join(f"{name}={url}" for name, url in urls.items())}
        cells["cell_lists"] = f"1={','.join(urls)}"
        only = {"redis_url": next(iter(urls.values()))}
        self._fields = {**NO_S3, "known_models": UNSERVED.model, "timeout_s": "30"}
        self._fields |= cells if len(urls) > 1 else only
        self.redis = {
            name: stack.enter_context(connect(Settings(redis_url=url)))
            for name, url in urls.items()
        }
        self.client = stack.enter_context(Client(Settings.model_validate(self._fields)))
        #: A client without cells of each Redis.
        self.apart = [
            stack.enter_context(Client(Settings.model_validate(self._fields_of(url))))
            for url in urls.values()
        ]
        self.door = stack.enter_context(door_on(self._environment(), folder / "door.log"))
        serving = list(urls) if len(urls) > 1 else ["", ""]
        self._workers = [self._worker(cell, stack) for cell in serving]
        self._wait_for_workers()
        self.idle_s: Spent = {}
        #: Ids that the client has made, of jobs without a key.
        self.chosen: list[str] = []

    def _fields_of(self, url: str) -> dict[str, str]:
        """The same without cells."""
        common = {name: self._fields[name] for name in (*NO_S3, "known_models", "timeout_s")}
        return {**common, "redis_url": url}

    def _environment(self, **options: str) -> dict[str, str]:
        fields = self._fields | options
        return {f"BLIPQ_{name.upper()}": text for name, text in fields.items()}

    def _worker(self, cell: str, stack: ExitStack) -> Service:
        environment = self._environment(**({"cell": cell} if cell else {})) | AT_ONCE
        environment |= {"BENCH_FETCH": "0", "BLIPQ_CONCURRENCY": str(THREADS)}
        environment["OMP_NUM_THREADS"] = "1"
        number = len([*self._folder.glob("worker-*")])
        worker = worker_service(environment, self._folder / f"worker-{number}.log")
        worker.command = WORKER
        worker.start()
        stack.callback(worker.stop, 30)
        return worker

    def _wait_for_workers(self) -> None:
        operator, deadline = operator_of(self.client.ledger), time.monotonic() + START_TIMEOUT_S
        while len(operator.workers()) < len(self._workers):
            for worker in self._workers:
                if worker.exit_code is not None or time.monotonic() > deadline:
                    raise BenchError(f"the worker does not serve:\n{worker.last_words()}")
            time.sleep(0.05)

    def parts(self, number: int) -> dict[str, tuple[int, Callable[[], object]]]:
        """What a round has, and the jobs of each part."""
        few, many = list(map(asked, range(ONE_BY_ONE))), list(map(asked, range(MANY)))
        bodies = [json.dumps(_body(n)) for n in range(MANY)]
        keyed = [_unserved(idempotency_key=f"{number}-{n}") for n in range(ONE_BY_ONE)]
        own = [Submission(each, UNSERVED, f"own-{number}-{n}") for n, each in enumerate(many)]
        wanted, client = requests(IMAGE, RESULTS), self.client
        return {
            "one by one": (
                ONE_BY_ONE,
                lambda: self._choose(client.submit(each, UNSERVED) for each in few),
            ),
            "apart": (ONE_BY_ONE, lambda: self._submit_apart(few)),
            "keyed": (ONE_BY_ONE, lambda: [*map(client.submit, few, keyed)]),
            "many": (MANY, lambda: self._choose(client.submit_many(many, UNSERVED))),
            "own ids": (MANY, lambda: client.submit_many(own)),
            "results": (RESULTS, lambda: self._finish(wanted)),
            "door": (ONE_BY_ONE, lambda: post(self.door, bodies[:ONE_BY_ONE], CONNECTIONS)),
            "batches": (MANY, lambda: post_batches(self.door, bodies)),
        }

    def _choose(self, jobs: Iterable[Job[Any]]) -> None:
        self.chosen.extend(job.id for job in jobs)

    def _submit_apart(self, requests: Sequence[Any]) -> None:
        chosen = random.Random(0)
        for each in requests:
            chosen.choice(self.apart).submit(each, UNSERVED)

    def _finish(self, wanted: Sequence[Any]) -> None:
        ended = self.client.wait_all(self.client.submit_many(wanted), timeout=TIMEOUT_S)
        if not all(job.info().status == "succeeded" for job in ended[:3]):
            raise BenchError(f"{ended[0].info()}")

    def warm(self) -> None:
        """Fills what grows with the first jobs: caches, connections, the list of the newest."""
        self._finish(requests(IMAGE, WARM))
        self.idle()
        for jobs, work in self.parts(-1).values():
            self.spent(jobs, work)
        self.chosen.clear()

    def spread(self) -> dict[str, dict[str, float]]:
        """How many jobs there are by what says their cell, and the share of the first cell."""
        counts = {"chosen by the client": Counter(map(cell_of, self.chosen))}
        for name, pattern in (("by a key", "blipq:idempotency:*"), ("by an id", "blipq:job:own-*")):
            counts[name] = Counter(
                {
                    cell: sum(1 for _ in raw.scan_iter(pattern, count=1000))
                    for cell, raw in self.redis.items()
                }
            )
        first = next(iter(self.redis))
        return {
            name: {"jobs": cells.total(), "first": cells[first] / cells.total()}
            for name, cells in counts.items()
        }

    def idle(self) -> Spent:
        """Microseconds a second that Redis takes without a job; keeps what all take."""
        before, started = self._cpu_s(), time.monotonic()
        time.sleep(IDLE_S)
        took, after = time.monotonic() - started, self._cpu_s()
        self.idle_s = {name: (each - before[name]) / took for name, each in after.items()}
        return {"redis": sum(1e6 * self.idle_s[f"redis {name}"] for name in self.redis)}

    def spent(self, jobs: int, work: Callable[[], object]) -> Spent:
        """CPU microseconds of a job by who spent them, above what they take idle; jobs a second."""
        before, started = self._cpu_s(), time.monotonic()
        work()
        took, after = time.monotonic() - started, self._cpu_s()
        spent = {
            name: 1e6 * (each - before[name] - self.idle_s[name] * took) / jobs
            for name, each in after.items()
        }
        each_redis = [spent.pop(f"redis {name}") for name in self.redis]
        spent |= {"redis": sum(each_redis), "busiest": max(each_redis)}
        return {**spent, "per_s": jobs / took}

    def _cpu_s(self) -> Spent:
        """CPU seconds until now, finer than the kernel's ticks."""
        found = {"client": time.process_time(), "door": _of([self.door.service])}
        found["workers"] = _of(self._workers)
        for name, raw in self.redis.items():
            told: Any = raw.info("cpu")
            found[f"redis {name}"] = told["used_cpu_user"] + told["used_cpu_sys"]
        return found


def _of(services: Sequence[Service]) -> float:
    # clock_getcpuclockid(3), which Python lacks: the clock of all threads of a process.
    return sum(time.clock_gettime((~each.pid << 3) | 2) for each in services)


def _unserved(**options: Any) -> Options:
    return UNSERVED.model_copy(update=options)


def _body(number: int) -> dict[str, Any]:
    image = asked(number).image
    assert image is not None
    return {"kind": "caption", "image": image.uri, "options": {"model": UNSERVED.model}}


@contextmanager
def deployed() -> Iterator[list[Deployment]]:
    """One Redis, and two cells."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blipq-cells-")))
        urls = [stack.enter_context(own_redis()).redis_url for _ in range(3)]
        one = Deployment({"": urls[0]}, folder / "one", stack)
        yield [one, Deployment({"a": urls[1], "b": urls[2]}, folder / "two", stack)]


def measured(rounds: int) -> dict[str, Any]:
    """Medians of one Redis and of two cells, and of the rounds' ratios; the spread of jobs."""
    with deployed() as both:
        for each in both:
            each.warm()
        ran = [_round(both, number) for number in range(rounds)]
        spread = both[1].spread()
    parts = {
        part: {
            name: _compared([[each[name] for each in one_round[part]] for one_round in ran])
            for name in pair[0]
        }
        for part, pair in ran[0].items()
    }
    return {"rounds": rounds, "cores": os.cpu_count(), "parts": parts, "spread": spread}


def _round(both: Sequence[Deployment], number: int) -> dict[str, list[Spent]]:
    """What each part takes of both: means of turns, one right after the other."""
    found = {"idle": [each.idle() for each in both]}
    turns = [[each.parts(number * TURNS + turn) for each in both] for turn in range(TURNS)]
    for part in turns[0][0]:
        spent: tuple[list[Spent], list[Spent]] = ([], [])
        for turn, parts in enumerate(turns):
            for place in (0, 1) if (number + turn) % 2 else (1, 0):
                spent[place].append(both[place].spent(*parts[place][part]))
        found[part] = [_mean(each) for each in spent]
    return found


def _mean(turns: Sequence[Spent]) -> Spent:
    return {name: statistics.fmean(each[name] for each in turns) for name in turns[0]}


def _compared(pairs: Sequence[Sequence[float]]) -> dict[str, float]:
    one, two = (statistics.median(pair[place] for pair in pairs) for place in range(2))
    ratios = [pair[1] / pair[0] for pair in pairs if pair[0]]
    return {"one": one, "two": two, "ratio": statistics.median(ratios) if ratios else 0.0}


def text(found: Mapping[str, Any]) -> Iterator[str]:
    """The section, in Markdown."""
    rows = []
    for figure in FIGURES:
        each = found["parts"][figure.part][figure.whose]
        told = f"{each['one']:,.0f}", f"{each['two']:,.0f}", f"**{each['ratio']:.2f}**"
        rows.append([figure.name, *told, f"{figure.most:g}"])
    head = ["CPU of a job, us", "one Redis", "two cells", "ratio", "at most"]
    yield from table(head, rows)
    yield ""
    yield from _told(found)
    yield ""
    yield results.source("cells")


def _told(found: Mapping[str, Any]) -> Iterator[str]:
    spread = [
        f"{each['first']:.1%} of {each['jobs']:,} {name}" for name, each in found["spread"].items()
    ]
    listed = ", ".join(spread[:-1]), spread[-1]
    apart = {who: found["parts"]["apart"][who]["ratio"] for who in ("client", "redis")}
    yield (
        f"Medians of {found['rounds']} rounds. The first of the two cells has "
        f"{listed[0]}, and {listed[1]}."
    )
    yield ""
    yield (
        "Of what `submit` takes more with two cells, a part is that of two servers with half of "
        "the jobs each, which sleep longer between two jobs: two clients without cells, each of "
        f"one Redis, that submit in turns take **{apart['client']:.2f}** times the CPU of one "
        f"client, and their Redis **{apart['redis']:.2f}** times that of one."
    )
    parts, idle = found["parts"]["results"], found["parts"]["idle"]["redis"]
    room = {name: 1e6 / parts["busiest"][name] for name in ("one", "two")}
    whole = {
        name: sum(parts[who][name] for who in ("client", "workers", "redis")) / 1000
        for name in ("one", "two")
    }
    yield ""
    yield (
        "A cell adds the thread of a Redis. From submit to result the only Redis takes "
        f"{parts['busiest']['one']:,.0f} us of it for a job, and the busier of two "
        f"{parts['busiest']['two']:,.0f} us for each job of both: these threads have room for "
        f"{room['one']:,.0f} and {room['two']:,.0f} jobs a second, "
        f"**{room['two'] / room['one']:.2f}** times as many."
    )
    yield (
        f"The {found['cores']} cores of this machine do not show that as jobs: client, workers and "
        f"Redis take {whole['one']:.2f} and {whole['two']:.2f} ms of CPU a job together, and did "
        f"{parts['per_s']['one']:,.0f} and {parts['per_s']['two']:,.0f} jobs a second."
        f" Without jobs the Redis of two workers takes {idle['one']:,.0f} us a second, and those "
        f"of two cells with a worker each {idle['two']:,.0f}: that is left out above."
    )


def main() -> None:
    """Measures, keeps the figures, and writes them into docs/cells.md."""
    parser = argparse.ArgumentParser("python -m benchmarks.cells", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    command = f"python -m benchmarks.cells --rounds {rounds}"
    found = results.measure("cells", lambda: measured(rounds), command=command)
    lines = [*text(found)]
    replace_section(PAGE, "cost", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
