"""A fleet as a discrete-event simulation: cells, each one Redis and its workers.

Jobs move in groups that were submitted together, and an event is a pass of a worker, not a job: a
minute of 1,000 GPUs takes seconds. Redis serves one request after the other. Who dies, and when, is
up to the scenario. Times are seconds of a simulated clock.
"""

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.fleet.costs import Costs, Gpu

#: Jobs that arrive within this time arrive together.
TICK_S = 0.02
#: From the end of a lease until the sweep that comes about every second, on average.
SWEEP_S = 0.5


@dataclass(frozen=True)
class Group:
    """Jobs that were submitted together. alone: each has a pass of its own, as a suspect."""

    at: float
    count: int
    alone: bool = False


class Ended(NamedTuple):
    """Jobs that ended at a time, and took so long from their submit. alone: they came back."""

    at: float
    took: float
    count: int
    alone: bool


class Redis:
    """One core, which serves in turn."""

    def __init__(self) -> None:
        self.free_at = 0.0
        self.busy_s = 0.0

    def serve(self, now: float, seconds: float) -> float:
        """When a request that comes now is served."""
        self.free_at = max(self.free_at, now) + seconds
        self.busy_s += seconds
        return self.free_at


@dataclass(eq=False)
class Worker:
    """A worker of a cell. life: it rises when it is killed, so that its events come to nothing."""

    cell: "Cell"
    life: int = 0
    running: Sequence[Group] = ()
    serves: bool = False


@dataclass(eq=False)
class Cell:
    """A Redis, what waits in it, and who works for it."""

    redis: Redis = field(default_factory=Redis)
    queue: deque[Group] = field(default_factory=deque)
    waiting: int = 0
    open: int = 0
    most_open: int = 0
    workers: list[Worker] = field(default_factory=list)
    idle: deque[Worker] = field(default_factory=deque)

    def add(self, group: Group) -> None:
        """Puts jobs at the end of the queue."""
        self.queue.append(group)
        self.waiting += group.count

    def take(self, most: int) -> list[Group]:
        """Takes the oldest jobs: those of one pass."""
        taken: list[Group] = []
        while self.queue and most and not (taken and self.queue[0].alone):
            first = self.queue.popleft()
            count = min(1 if first.alone else most, first.count)
            taken.append(Group(first.at, count, first.alone))
            if count < first.count:
                self.queue.appendleft(Group(first.at, first.count - count, first.alone))
            most = 0 if first.alone else most - count
        self.waiting -= sum(each.count for each in taken)
        return taken


class Fleet:
    """Cells of workers, which serve from ``ready_at`` on."""

    def __init__(
        self, cells: int, gpus: int, gpu: Gpu, costs: Costs, *, ready_at: float = 0.0, seed: int = 1
    ) -> None:
        self.now = 0.0
        self.gpu = gpu
        self.costs = costs
        self.cells = [Cell() for _ in range(cells)]
        self.ended: list[Ended] = []
        #: Seconds that workers served, of all of them together.
        self.worker_s = 0.0
        self._draw = random.Random(seed)
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        for number in range(gpus):
            self.at(ready_at, self.serve, self.new_worker(self.cells[number % cells]))
        for cell in self.cells:
            self.at(1.0, self._idle_load, cell)

    def new_worker(self, cell: Cell) -> Worker:
        """A worker that does not serve yet."""
        worker = Worker(cell)
        cell.workers.append(worker)
        return worker

    def at(self, time: float, do: Callable[..., None], *arguments: Any) -> None:
        """Has something done at a time."""
        heapq.heappush(self._events, (time, next(self._numbers), do, arguments))

    def run(self, until: float = math.inf, *, drained: bool = False) -> None:
        """Lets time pass until then, or until nothing is open."""
        while self._events and self._events[0][0] <= until:
            self.now, _, do, arguments = heapq.heappop(self._events)
            do(*arguments)
            if drained and not any(cell.open for cell in self.cells):
                return
        if until < math.inf:
            self.now = until

    # -- jobs --

    def submit(self, cell: Cell, count: int) -> None:
        """Jobs that are submitted now; they wait once Redis has recorded them."""
        cell.open += count
        cell.most_open = max(cell.most_open, cell.open)
        recorded = cell.redis.serve(self.now, count * self.costs.submit_us / 1e6)
        self.at(recorded, self._arrive, cell, Group(self.now, count))

    def arriving(self, rate: Callable[[float], float], until: float) -> None:
        """Has ``rate(now)`` jobs a second come at random, to the cells whose Redis lives."""
        up = [cell for cell in self.cells if cell.redis.free_at < self.now + 1.0] or self.cells
        mean = rate(self.now) * TICK_S / len(up)
        for cell in up:
            if count := self._poisson(mean):
                self.submit(cell, count)
        if self.now + TICK_S < until:
            self.at(self.now + TICK_S, self.arriving, rate, until)

    def _poisson(self, mean: float) -> int:
        if mean > 50:
            return max(0, round(self._draw.gauss(mean, math.sqrt(mean))))
        count, left = 0, self._draw.expovariate(1.0)
        while left < mean:
            count += 1
            left += self._draw.expovariate(1.0)
        return count

    def _arrive(self, cell: Cell, group: Group) -> None:
        cell.add(group)
        while cell.waiting and cell.idle:
            self._begin(cell.idle.popleft())

    # -- workers --

    def serve(self, worker: Worker) -> None:
        """A worker takes jobs from now on."""
        worker.serves = True
        self._begin(worker)

    def _begin(self, worker: Worker) -> None:
        """The next pass. Its jobs were claimed during the last one, unless Redis has no time."""
        cell = worker.cell
        worker.running = cell.take(self.gpu.batch)
        count = sum(each.count for each in worker.running)
        if not count:
            cell.idle.append(worker)
            return
        claims_s = count * self.costs.work_us / 2e6
        begun = cell.redis.serve(self.now, claims_s) - claims_s
        ends = begun + self.gpu.pass_s + count * self.gpu.row_s
        self.at(ends, self._end, worker, worker.life)

    def _end(self, worker: Worker, life: int) -> None:
        if worker.life != life:
            return
        count = sum(each.count for each in worker.running)
        done = worker.cell.redis.serve(self.now, count * self.costs.work_us / 2e6)
        worker.cell.open -= count
        self.ended += [
            Ended(done, done - each.at, each.count, each.alone) for each in worker.running
        ]
        self._begin(worker)

    def _idle_load(self, cell: Cell) -> None:
        """Heartbeats, sweeps and waits of workers, once a second."""
        workers = sum(each.serves for each in cell.workers)
        self.worker_s += workers
        cell.redis.serve(self.now, workers * self.costs.idle_us / 1e6)
        self.at(self.now + 1.0, self._idle_load, cell)

    # -- faults --

    def kill(self, worker: Worker, *, restarts: bool = True) -> int:
        """Kills a worker; how many jobs it held. They come back alone when its leases are over."""
        cell = worker.cell
        count = sum(each.count for each in worker.running)
        lost = [*worker.running]
        while count < self.gpu.held and (more := cell.take(self.gpu.held - count)):
            lost += more
            count += sum(each.count for each in more)
        worker.life += 1
        worker.serves, worker.running = False, ()
        if worker in cell.idle:
            cell.idle.remove(worker)
        back = self.now + self.gpu.lease_s + SWEEP_S
        for each in lost:
            self.at(back, self._arrive, cell, Group(each.at, each.count, alone=True))
        if restarts:
            self.at(self.now + self.gpu.cold_s, self.serve, worker)
        return count

    def stop_redis(self, cell: Cell, seconds: float) -> None:
        """A Redis that does not answer for so long, and forgets nothing."""
        cell.redis.free_at = max(cell.redis.free_at, self.now + seconds)

    # -- what came of it --

    def jobs_ended(self) -> int:
        """How many jobs have ended."""
        return sum(each.count for each in self.ended)

    def latency(self, share: float, since: float = 0.0) -> float:
        """Seconds from submit to end that so many of the jobs stay under that ended since then."""
        found = sorted((each.took, each.count) for each in self.ended if each.at >= since)
        left = share * sum(count for _, count in found)
        for took, count in found:
            left -= count
            if left <= 0:
                return took
        return math.nan

    def redis_busy(self, seconds: float) -> float:
        """The share of its core that the busiest Redis used over so many seconds."""
        return max(cell.redis.busy_s for cell in self.cells) / seconds
