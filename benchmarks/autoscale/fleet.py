"""Workers as a Deployment's pods: started, and stopped by their deletion costs."""

import json
import signal
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import redis

from blipq.ledger import keys
from blipq.local.supervisor import Service
from blipq.ops.deletion_costs import DeletionCosts, Pods

#: Longest that the number of a worker's jobs is on its way into a deletion cost, beside the pause
#: between two costs: a heartbeat of a worker whose lease is LEASE_S.
LEASE_S = 2.0
BEAT_S = LEASE_S / 5
#: Of each worker. One job a pass, so the work ahead of a fleet ends sooner the more workers it has.
SETTINGS = {
    "BLIPQ_LEASE_S": str(LEASE_S),
    "BLIPQ_MAX_BATCH_SIZE": "1",
    "BLIPQ_DRAIN_TIMEOUT_S": "30",
    "BENCH_FETCH": "0",
}


class WorkerDied(Exception):
    """A worker ended otherwise than by a drain."""


@dataclass
class Pod:
    """A worker process. number: it rises with each that was started."""

    number: int
    service: Service
    cost: str | None = None

    @property
    def name(self) -> str:
        """Also its worker's host name."""
        return f"pod-{self.number}"


class Fleet(Pods):
    """A Deployment of one worker each pod, and the part of the API server that costs are kept by.

    start: starts a worker whose host name is the given one.
    """

    def __init__(self, client: "redis.Redis", start: Callable[[str], Service]) -> None:
        self._redis = client
        self._start = start
        self._costs = DeletionCosts(client, self)
        self._number = 0
        self.pods: list[Pod] = []
        self.leaving: list[Pod] = []
        #: Those that held jobs when they were stopped while another had none for as long.
        self.wronged: list[str] = []
        self.stopped = 0
        self._seen: deque[tuple[float, dict[str, int]]] = deque()

    def costs(self) -> Iterator[tuple[str, str | None]]:
        """As the API server lists pods."""
        for pod in self.pods:
            yield pod.name, pod.cost

    def write(self, name: str, cost: str) -> None:
        """As the API server takes a patch."""
        next(pod for pod in self.pods if pod.name == name).cost = cost

    def write_costs(self) -> None:
        """What the exporter does every 15 seconds."""
        self._costs.tick()

    def observe(self, now: float, window_s: float) -> None:
        """Notes who holds jobs, by the ledger's leases; what was before the window is forgotten."""
        self._seen.append((now, self.held()))
        while self._seen[0][0] < now - window_s:
            self._seen.popleft()

    def scale(self, count: int) -> None:
        """Starts pods, or stops some as a ReplicaSet does: by cost, and of equals the newest."""
        while len(self.pods) < count:
            self._number += 1
            self.pods.append(Pod(self._number, self._start(f"pod-{self._number}")))
        while len(self.pods) > count:
            # One that does not serve yet has no cost. Kubernetes stops pods not ready first.
            victim = min(self.pods, key=lambda pod: (int(pod.cost or -1), -pod.number))
            self._judge(victim)
            self.pods.remove(victim)
            victim.service.signal(signal.SIGTERM)
            self.leaving.append(victim)
            self.stopped += 1

    def _judge(self, victim: Pod) -> None:
        """A busy one may go only where none was idle, all the time that costs take to follow."""
        others = [pod for pod in self.pods if pod is not victim and pod.cost is not None]
        was_busy = all(held.get(victim.name) for _, held in self._seen)
        idle = [pod for pod in others if not any(held.get(pod.name) for _, held in self._seen)]
        if self._seen and was_busy and idle:
            self.wronged.append(victim.name)

    def held(self) -> dict[str, int]:
        """How many jobs each worker has under a lease, by its host name."""
        ids = self._redis.zrange(keys.RUNNING, 0, -1)
        held: dict[str, int] = {}
        for id in ids:  # type: ignore[union-attr]
            if worker := self._redis.hget(keys.job(id), "worker"):
                name = str(worker).rsplit("-", 2)[0]
                held[name] = held.get(name, 0) + 1
        return held

    def reap(self) -> None:
        """Forgets those that have drained. Raises WorkerDied where one ended in any other way."""
        for pod in (*self.pods, *self.leaving):
            code = pod.service.exit_code
            if code or (code is not None and pod in self.pods):
                raise WorkerDied(f"{pod.name} ended with {code}: {pod.service.last_words()}")
        self.leaving = [pod for pod in self.leaving if pod.service.exit_code is None]

    def close(self) -> None:
        """Kills what is left."""
        for pod in (*self.pods, *self.leaving):
            pod.service.signal(signal.SIGKILL)
            pod.service.stop()


def work_s(port: int) -> float:
    """Predicted GPU-seconds of all open jobs, as KEDA reads them from the exporter."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/work/default", timeout=5) as page:
        return float(json.load(page)["total_s"])
