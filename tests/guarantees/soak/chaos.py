"""``make chaos SEED=7 JOBS=10000 FRONTS=0 CELLS=0``: load, faults at random, an audit of all jobs.

Three workers are kept running by a supervisor while they are killed, frozen and drained, Redis is
killed, frozen and filled, and S3 answers with errors, drips and cut connections. With fronts there
are two workers, whose engines and fronts are killed and frozen, too, sockets are sent garbage, and
some pictures crash their decoder. With cells there are two workers in each, and each fault is of
one Redis of several. At the end every job that was ever submitted must have exactly one outcome,
one that its request allows, and be in one cell alone; only jobs that kill their workers may be dead
letters; no key may live for ever. Exit code 0 only if all hold.
"""

import argparse
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from blipq import ErrorCode, JobInfo, QueueFull, QueueUnavailable, Status
from blipq.backoff import Backoff
from blipq.contract import CaptionRequest, Options, Priority
from blipq.local import supervisor
from blipq.local.supervisor import Service
from blipq.submission import new_id
from guarantees.cells.rig import CellsRig
from guarantees.cells.servers import Server
from guarantees.fronts import parts
from guarantees.rig import LEASE_S, Rig, png
from guarantees.stand_ins.faulty_worker import CRASHING_SIZE

WORKERS, WORKERS_WITH_FRONTS, WORKERS_OF_A_CELL = 3, 2, 2
#: Of workers with fronts: some of their processes stay frozen until this ends them.
WATCHDOG_S = 8.0
SETTLE_S = 240.0


@dataclass(frozen=True)
class Recipe:
    """A kind of job, how often it occurs, and the outcomes that are right for it."""

    weight: float
    prompt: str
    right: frozenset[str]
    fault: str | None = None
    cancel: bool = False
    expires_in: float | None = None


def right(*outcomes: str) -> frozenset[str]:
    return frozenset(outcomes)


RECIPES = (
    Recipe(60, "fine", right("succeeded")),
    Recipe(20, "sleep 0.01", right("succeeded")),
    Recipe(2, "raise", right(ErrorCode.INTERNAL)),
    Recipe(2, "oom-in-company", right("succeeded")),
    Recipe(4, "sleep 0.01", right("succeeded", "cancelled"), cancel=True),
    Recipe(3, "fine", right("succeeded", "expired"), expires_in=4.0),
    Recipe(1, "fine", right(ErrorCode.IMAGE_NOT_FOUND), fault="404"),
    Recipe(1, "fine", right(ErrorCode.IMAGE_FORBIDDEN), fault="403"),
    Recipe(1, "fine", right(ErrorCode.IMAGE_CHANGED), fault="412"),
    Recipe(1, "fine", right("succeeded"), fault="503x2"),
    Recipe(1, "fine", right("succeeded"), fault="cutx1"),
    Recipe(0.3, "fine", right("succeeded"), fault="dripx1"),
    Recipe(0.03, "exit", right(ErrorCode.ATTEMPTS_EXHAUSTED)),
)
#: A front that is killed from outside while the picture runs alone is no proof against it: as for
#: any job, three such deaths are the end.
CRASHING = Recipe(
    0.1, "fine", right(ErrorCode.IMAGE_INVALID, ErrorCode.ATTEMPTS_EXHAUSTED), fault="crash"
)


@dataclass
class Chaos:
    """One run."""

    rig: Rig
    jobs: int
    rng: random.Random
    fronts: int = 0
    submitted: dict[str, Recipe] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)

    def run(self) -> bool:
        """Load and faults, then calm, then the audit; whether it is clean."""
        options = {"max_batch_size": 16, "fetch_timeout_s": 2}
        if self.fronts:
            options["watchdog_s"] = WATCHDOG_S
        workers = self._launch_workers(**options)
        calm, quiet, stop = threading.Event(), threading.Event(), threading.Event()
        supervisor.RESTARTS = Backoff(1.0, 1.0)  # a day's trouble in minutes
        keep = threading.Thread(
            target=supervisor.supervise, args=(workers, stop), kwargs={"report": self._say}
        )
        trouble = threading.Thread(target=self._make_trouble, args=(workers, calm, quiet, stop))
        keep.start()
        trouble.start()
        try:
            self._submit_all()
            self._wait_until_most_have_ended()
            calm.set()
            quiet.wait(60)
            self._say("calm")
            return self._audit()
        finally:
            calm.set()
            stop.set()
            keep.join()
            trouble.join()

    def _launch_workers(self, **options: Any) -> list[Service]:
        if isinstance(self.rig, CellsRig):
            cells = [*self.rig.fleet.servers] * WORKERS_OF_A_CELL
            return [self.rig.launch_worker_in(cell, **options) for cell in cells]
        count = WORKERS_WITH_FRONTS if self.fronts else WORKERS
        return [self.rig.launch_worker(**options) for _ in range(count)]

    # -- load --

    def _submit_all(self) -> None:
        recipes = (*RECIPES, CRASHING) if self.fronts else RECIPES
        weights = [recipe.weight for recipe in recipes]
        for number in range(self.jobs):
            self._submit(self.rng.choices(recipes, weights)[0])
            if number % 1000 == 999:
                self._say(f"{number + 1} submitted")

    def _submit(self, recipe: Recipe) -> None:
        """Submits as a careful service does: the same id again until it is taken.

        Half of the ids are its own; with cells these stay with theirs, and the others may move.
        """
        image = self._image(recipe)
        request = CaptionRequest.model_validate({"image": image, "prompt": recipe.prompt})
        priority = self.rng.choice(tuple(Priority))
        options = Options(priority=priority, expires_in=recipe.expires_in)
        id = new_id() if self.rng.random() < 0.5 else None
        while True:
            try:
                job = self.rig.client.submit(request, options, id=id)
                break
            except (QueueUnavailable, QueueFull) as error:
                self.refused[type(error).__name__] += 1
                id = id or getattr(error, "job_id", None)
                time.sleep(0.2)
        self.submitted[job.id] = recipe
        if recipe.cancel:
            with suppress(QueueUnavailable, QueueFull):
                job.cancel()

    def _image(self, recipe: Recipe) -> str:
        if recipe is CRASHING:
            return self.rig.upload("none", png(size=CRASHING_SIZE))
        return self.rig.image if recipe.fault is None else self.rig.upload(recipe.fault)

    def _wait_until_most_have_ended(self) -> None:
        """Faults go on until nine jobs in ten have ended."""
        deadline = time.monotonic() + SETTLE_S + self.jobs / 20
        while time.monotonic() < deadline:
            with suppress(Exception):
                if self._open() < self.jobs / 10:
                    return
            time.sleep(1)

    def _open(self) -> int:
        return sum(
            int(server.redis(lambda raw: raw.zcard("blipq:open"))) for server in self.rig.servers
        )

    # -- faults --

    def _make_trouble(
        self,
        workers: list[Service],
        calm: threading.Event,
        quiet: threading.Event,
        stop: threading.Event,
    ) -> None:
        """Faults until ``calm``; then the thread stays, as Redis ends with who started it."""
        kinds: dict[str, Callable[[], None]] = {
            "worker killed": lambda: self.rng.choice(workers).signal(signal.SIGKILL),
            "worker drained": lambda: self.rng.choice(workers).signal(signal.SIGTERM),
            "worker frozen": lambda: self._freeze(self.rng.choice(workers), 2 * LEASE_S),
            "redis killed": self._kill_redis,
            "redis frozen": lambda: self._freeze(
                self._server().service, self.rng.uniform(1, 2 * LEASE_S)
            ),
            "redis full": self._fill_redis,
            "connections cut": self._cut_connections,
        }
        weights = [4, 2, 2, 1, 1, 1, 2]
        if self.fronts:
            own = self._faults_of_parts(workers)
            kinds |= {kind: fault for kind, (_, fault) in own.items()}
            weights += [weight for weight, _ in own.values()]
        while not calm.wait(self.rng.uniform(2, 6)):
            kind = self.rng.choices(list(kinds), weights)[0]
            self._say(kind)
            self.faults[kind] += 1
            kinds[kind]()
        quiet.set()
        stop.wait()

    def _faults_of_parts(self, workers: list[Service]) -> dict[str, tuple[int, Callable[[], None]]]:
        """Faults of a worker's other processes: how often, and what."""

        def process(role: str) -> psutil.Process | None:
            found = parts.processes(self.rng.choice(workers), role)
            return self.rng.choice(found) if found else None

        def kill(role: str) -> None:
            if (victim := process(role)) is not None:
                victim.kill()

        def freeze(role: str) -> None:
            """Half of the time for longer than the watchdog takes to end it."""
            if (victim := process(role)) is not None:
                victim.suspend()
                time.sleep(self.rng.choice((LEASE_S, WATCHDOG_S + 4)))
                victim.resume()

        def faults(fault: Callable[[str], None], role: str) -> Callable[[], None]:
            def harmed() -> None:
                with suppress(psutil.NoSuchProcess):  # it has just ended by itself
                    fault(role)

            return harmed

        return {
            "front killed": (4, faults(kill, "front")),
            "engine killed": (2, faults(kill, "engine")),
            "front frozen": (1, faults(freeze, "front")),
            "engine frozen": (1, faults(freeze, "engine")),
            "garbage on the socket": (2, lambda: self._throw_garbage(self.rng.choice(workers))),
        }

    def _throw_garbage(self, worker: Service) -> None:
        with suppress(OSError, IndexError, psutil.NoSuchProcess):
            path = str(parts.run_folder(worker) / "engine.sock")
            for size in (0, 1, 24, 70_000, 3_000_000) * 10:
                with suppress(OSError), socket.socket(socket.AF_UNIX) as raw:
                    raw.settimeout(1)
                    raw.connect(path)
                    raw.sendall(self.rng.randbytes(size))

    def _freeze(self, service: Service, seconds: float) -> None:
        service.signal(signal.SIGSTOP)
        time.sleep(seconds)
        service.signal(signal.SIGCONT)

    def _server(self) -> Server:
        return self.rng.choice(self.rig.servers)

    def _kill_redis(self) -> None:
        server = self._server()
        server.kill()
        time.sleep(self.rng.uniform(0.5, 2 * LEASE_S))
        server.start()

    def _fill_redis(self) -> None:
        server = self._server()
        with suppress(Exception):
            server.redis(lambda raw: raw.config_set("maxmemory", 1))
            time.sleep(self.rng.uniform(1, LEASE_S))
        server.redis(lambda raw: raw.config_set("maxmemory", 0))

    def _cut_connections(self) -> None:
        with suppress(Exception):
            self._server().redis(lambda raw: raw.client_kill_filter(_type="normal", skipme=True))

    # -- audit --

    def _audit(self) -> bool:
        self._settle()
        wrong = Counter(
            f"{recipe.prompt} {recipe.fault or ''} -> {outcome}"
            for recipe, outcome in map(self._outcome, self.submitted.items())
            if outcome not in recipe.right
        )
        dead = {info.id for info in self.rig.operator.dead_letters(10_000)}
        innocent = [
            id for id in dead if ErrorCode.ATTEMPTS_EXHAUSTED not in self.submitted[id].right
        ]
        forever = self.rig.keys_without_ttl()
        kept = Counter(key for server in self.rig.servers for key in server.keys("blipq:job:*"))
        doubled = [key for key, count in kept.items() if count > 1]
        unasked = kept.keys() - {f"blipq:job:{id}" for id in self.submitted}
        print(f"jobs {len(self.submitted)}, open {self._open()}, faults {dict(self.faults)}")
        print(f"submits repeated {dict(self.refused)}, dead letters {len(dead)}")
        print(f"wrong outcomes {dict(wrong)}, innocent dead letters {len(innocent)}")
        print(f"keys without a time to live {forever}")
        print(f"jobs in two cells {len(doubled)}, jobs that nobody has asked for {len(unasked)}")
        return not (wrong or innocent or forever or doubled or unasked)

    def _settle(self) -> None:
        deadline = time.monotonic() + SETTLE_S
        while self._open() and time.monotonic() < deadline:
            time.sleep(0.5)

    def _outcome(self, item: tuple[str, Recipe]) -> tuple[Recipe, str]:
        id, recipe = item
        info: JobInfo | None = self.rig.client.ledger.read(id)
        if info is None:
            return recipe, "lost"
        if info.status is Status.FAILED and info.error is not None:
            return recipe, info.error.code
        return recipe, info.status

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--fronts", type=int, default=0, help="of each worker")
    parser.add_argument("--cells", type=int, default=0, help="each with a Redis of its own")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = {"forked": False, "fronts": arguments.fronts}
        cells = arguments.cells
        rig = CellsRig(Path(folder), cells, **options) if cells else Rig(Path(folder), **options)
        try:
            rng = random.Random(arguments.seed)
            clean = Chaos(rig, arguments.jobs, rng, arguments.fronts).run()
        finally:
            rig.close()
    print("clean" if clean else "NOT CLEAN")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
