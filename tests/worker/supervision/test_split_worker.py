"""The lives and deaths of a worker's processes: real ones, on the real stack.

The main process ships; the engine has no model, and the fronts no Celery (see ``stand_ins``). A
lease lasts a minute here: what comes back sooner was given back by the main process.
"""

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from blipq import Client, Job, Status
from blipq.ledger.connection import connect
from blipq.ledger.operator import OperatorLedger
from blipq.local.stack import LocalStack
from blipq.local.supervisor import Service
from blipq_worker.fronts.holdings import read_holdings
from conftest import wait_until
from stacks import local_stack
from worker.supervision import stand_ins

IMAGE = "s3://uploads/cat.jpg"
SUCCEEDED = (
    'blipq_worker_jobs_total{{code="",kind="caption",model="default",outcome="succeeded"}} {:.1f}'
)
#: Of a death, until its jobs are where another front takes them.
SOON_S = 2.0


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


PORT = free_port()


class Split:
    """A worker with fronts, and what can be seen of it from outside."""

    def __init__(
        self, stack: LocalStack, folder: Path, fronts: int, options: dict[str, str]
    ) -> None:
        # A socket's path is short: pytest's own folders are too deep where tests run side by side.
        self.temporary = Path(tempfile.mkdtemp(prefix="bq"))
        environment = stack.environment() | {
            "TMPDIR": str(self.temporary),
            "BLIPQ_LEASE_S": "60",
            "BLIPQ_DRAIN_TIMEOUT_S": "10",
            "BLIPQ_HEALTH_PORT": str(PORT),
            "AWS_SECRET_ACCESS_KEY": "hush",
            **options,
        }
        command = [sys.executable, stand_ins.__file__, "main", str(fronts)]
        self.fronts = range(1, fronts + 1)
        self.main = Service("main", command, env=environment, log=folder / "worker.log")
        self.client = Client(stack.settings())
        self.raw = connect(stack.settings())
        self.operator = OperatorLedger(self.raw, stack.settings())

    def start(self) -> "Split":
        """Starts it and waits until every front serves."""
        self.main.start()
        self.wait_until(lambda: len(self.serving()) == len(self.fronts), "fronts that serve")
        self.wait_until(lambda: self.entry().get("engine") == "serving", "the registry's entry")
        return self

    def wait_until(self, condition: Callable[[], object], what: str, timeout: float = 30.0) -> None:
        """As ``conftest.wait_until``; shows the log where it waits in vain."""
        try:
            wait_until(condition, what, timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.main.last_words(40)}") from None

    @property
    def folder(self) -> Path:
        return next(self.temporary.glob("blipq-worker-*"))

    def status(self, front: int) -> dict[str, Any]:
        with suppress(OSError, StopIteration):
            found: dict[str, Any] = json.loads((self.folder / f"front-{front}.json").read_text())
            return found
        return {}

    def serving(self) -> list[int]:
        """The pids of the fronts that take jobs."""
        found = [self.status(number) for number in self.fronts]
        return [each["pid"] for each in found if each.get("taking") and alive(each["pid"])]

    def engine(self) -> int:
        """The pid of the engine."""
        return next(pid for pid in children(self.main.pid) if b"engine" in command_of(pid))

    def entry(self) -> dict[str, Any]:
        """What the registry says of it; it must be there once at most."""
        entries = list(self.operator.workers().values())
        assert len(entries) <= 1
        return entries[0] if entries else {}

    def submit(self, prompt: str) -> Job[Any]:
        return self.client.caption(IMAGE, prompt)

    def held_by(self, job: Job[Any], stage: str) -> int:
        """Waits until a front holds the job at this stage; the front's pid."""
        found: list[int] = []

        def holds() -> bool:
            for number in self.fronts:
                held = read_holdings(self.folder / f"front-{number}.held")
                pid = self.status(number).get("pid")
                if (
                    pid
                    and alive(pid)
                    and any((each.id, each.stage) == (job.id, stage) for each in held)
                ):
                    found.append(pid)
            return bool(found)

        self.wait_until(holds, f"a front that holds {job.id} as {stage}")
        return found[0]

    def ended(self, job: Job[Any]) -> Any:
        info = job.wait(30)
        assert info.ended, (info, self.main.last_words(40))
        return info

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refused:
            with refused:
                return refused.code, refused.read().decode()

    def wait_for_count(self, sample: str) -> None:
        """Waits until ``/metrics`` has it: a job is counted after its result is stored."""
        self.wait_until(lambda: sample in self.get("/metrics")[1].splitlines(), sample)

    def close(self) -> None:
        pids = [self.main.pid, *children(self.main.pid)]
        for pid in filter(None, pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGKILL)
        self.main.wait(10)
        self.client.close()
        self.raw.close()
        shutil.rmtree(self.temporary, ignore_errors=True)


def children(pid: int | None) -> list[int]:
    with suppress(OSError):
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def command_of(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    stack = local_stack(tmp_path_factory.mktemp("stack"))
    stack.start()
    yield stack
    stack.stop()


@pytest.fixture
def split(services: LocalStack, tmp_path: Path) -> Iterator[Callable[..., Split]]:
    """Makes a worker, not started, on an empty Redis. Options are environment variables."""
    with connect(services.settings()) as raw:
        raw.flushall()
    made: list[Split] = []

    def make(fronts: int, **options: str) -> Split:
        made.append(Split(services, tmp_path, fronts, options))
        return made[0]

    yield make
    for each in made:
        each.close()


def test_a_worker_with_fronts_is_one_worker(split: Callable[..., Split]) -> None:
    worker = split(2).start()
    assert worker.ended(worker.submit("a job")).status is Status.SUCCEEDED
    entry = worker.entry()
    assert (entry["pid"], entry["fronts"], entry["threads"]) == (worker.main.pid, 2, 16)
    assert entry["models"] == ["default", "two"]
    assert worker.get("/healthz")[0] == 200
    assert worker.get("/readyz")[0] == 200
    worker.wait_for_count(SUCCEEDED.format(1))
    page = worker.get("/metrics")[1]
    assert "blipq_worker_slots 16.0" in page
    assert 'blipq_worker_process_memory_bytes{process="front-2"}' in page
    assert 'blipq_worker_model_load_seconds{model="two"}' in page
    assert page.count("# TYPE process_resident_memory_bytes") == 1


def test_who_reads_that_a_worker_is_ready_finds_it_in_the_registry(
    split: Callable[..., Split],
) -> None:
    worker = split(1)
    worker.main.start()
    worker.wait_until(lambda: " is ready: " in worker.main.last_words(100), "its line")
    assert worker.entry()["models"] == ["default", "two"]


def test_the_engine_gets_no_key_and_no_address(split: Callable[..., Split]) -> None:
    worker = split(1, BLIPQ_MODELS="default=demo").start()
    environment = json.loads((worker.folder / "engine.environment").read_text())
    assert environment["BLIPQ_MODELS"] == "default=demo"
    reaching = ("AWS_", "BLIPQ_REDIS", "BLIPQ_S3", "BLIPQ_BROKER", "BLIPQ_WEBHOOK", "BLIPQ_STACK")
    assert not [name for name in environment if name.startswith(reaching)]


@pytest.mark.parametrize(
    ("prompt", "stage"), [("hold", "claimed"), ("unclaimed", "taken"), ("unheard", "taken")]
)
def test_what_a_killed_front_held_another_one_takes(
    split: Callable[..., Split], prompt: str, stage: str
) -> None:
    worker = split(2).start()
    job = worker.submit(prompt)
    dead = worker.held_by(job, stage)
    os.kill(dead, signal.SIGKILL)
    worker.wait_until(lambda: worker.held_by(job, stage) != dead, "another front", SOON_S)
    attempts = 0 if prompt == "unclaimed" else 1
    worker.wait_until(lambda: job.info().attempts == attempts, "its claim")


def test_a_dead_front_runs_again_and_goes_on_counting(split: Callable[..., Split]) -> None:
    worker = split(1).start()
    engine, before = worker.engine(), worker.serving()
    worker.ended(worker.submit("a job"))
    worker.wait_for_count(SUCCEEDED.format(1))  # a front counts a job behind its end
    os.kill(before[0], signal.SIGKILL)
    worker.wait_until(lambda: worker.serving() not in ([], before), "a new front")
    worker.ended(worker.submit("a job"))
    worker.wait_for_count(SUCCEEDED.format(2))
    assert worker.engine() == engine


@pytest.mark.parametrize(("prompt", "why"), [("segfault", "crashed (SIGSEGV)"), ("hang", "hung")])
def test_a_picture_that_ends_two_fronts_is_invalid_and_its_neighbour_is_not_charged(
    split: Callable[..., Split], prompt: str, why: str
) -> None:
    worker = split(1).start()
    neighbour = worker.submit("hold")
    worker.held_by(neighbour, "claimed")
    info = worker.ended(worker.submit(prompt))
    assert info.error.code == "image_invalid"
    assert f"decoding this image {why} the process" in info.error.message
    assert info.attempts == 2
    worker.held_by(neighbour, "claimed")
    assert neighbour.info().attempts == 1
    labels = 'code="image_invalid",kind="caption",model="default",outcome="failed"'
    sample = f"blipq_worker_jobs_total{{{labels}}} 1.0"
    worker.wait_for_count(sample)


def test_a_picture_whose_front_is_killed_from_outside_is_not_invalid(
    split: Callable[..., Split],
) -> None:
    worker = split(1).start()
    job = worker.submit("decode")
    pids = set()
    for _ in range(3):  # once uncounted, then alone
        pid = worker.held_by(job, "decoding")
        pids.add(pid)
        os.kill(pid, signal.SIGKILL)
        worker.wait_until(lambda pid=pid: not alive(pid), "its death")
    info = worker.ended(job)
    assert info.error.code == "attempts_exhausted"
    assert len(pids) == 3


def test_a_frozen_front_is_ended_and_its_jobs_go_on(split: Callable[..., Split]) -> None:
    worker = split(2, BLIPQ_WATCHDOG_S="2").start()
    job = worker.submit("hold")
    frozen = worker.held_by(job, "claimed")
    os.kill(frozen, signal.SIGSTOP)
    worker.wait_until(lambda: worker.held_by(job, "claimed") != frozen, "another front", 10)
    assert not alive(frozen)


def test_a_dead_engine_runs_again_and_fronts_come_back(split: Callable[..., Split]) -> None:
    worker = split(2).start()
    engine, fronts = worker.engine(), worker.serving()
    job = worker.submit("hold")
    worker.held_by(job, "claimed")
    os.kill(engine, signal.SIGKILL)
    worker.wait_until(lambda: worker.get("/readyz")[0] == 503, "not ready")
    assert worker.get("/healthz")[0] == 200
    worker.wait_until(lambda: len(set(worker.serving()) - set(fronts)) == 2, "new fronts")
    worker.held_by(job, "claimed")
    assert job.info().attempts == 1
    worker.wait_until(lambda: worker.get("/readyz")[0] == 200, "ready again")
    assert worker.engine() != engine


def test_a_frozen_engine_is_ended(split: Callable[..., Split]) -> None:
    worker = split(1, BLIPQ_WATCHDOG_S="2").start()
    frozen = worker.engine()
    os.kill(frozen, signal.SIGSTOP)
    worker.wait_until(lambda: not alive(frozen), "the engine's end", 10)
    worker.wait_until(lambda: worker.entry().get("engine") == "serving", "a new engine")


def test_a_model_that_cannot_be_loaded_ends_all(split: Callable[..., Split]) -> None:
    worker = split(2, STAND_IN_REFUSES="1")
    worker.main.start()
    worker.wait_until(lambda: worker.main.exit_code is not None, "the end")
    assert worker.main.exit_code == 78
    assert "the model cannot be loaded" in worker.main.last_words(40)
    assert not list(worker.temporary.iterdir())


def test_an_engine_that_refuses_later_leaves_a_worker_that_says_why(
    split: Callable[..., Split],
) -> None:
    worker = split(2).start()
    fronts = worker.serving()
    os.kill(worker.engine(), signal.SIGUSR1)
    worker.wait_until(lambda: worker.entry().get("engine") == "refused", "the refusal")
    worker.wait_until(lambda: not any(alive(pid) for pid in fronts), "the fronts' end")
    for path in ("/healthz", "/readyz"):
        status, body = worker.get(path)
        assert status == 503
        assert "the model answers nonsense" in json.loads(body)["model"]
    job = worker.submit("a job")
    worker.wait_until(lambda: job.info().live_workers == 0, "no worker that serves the model")
    worker.main.signal(signal.SIGTERM)
    worker.wait_until(lambda: worker.main.exit_code == 0, "the end")


def test_a_drained_worker_leaves_nothing_behind(split: Callable[..., Split]) -> None:
    worker = split(2).start()
    job = worker.submit("hold")
    worker.held_by(job, "claimed")
    processes = children(worker.main.pid)
    assert len(processes) == 3
    worker.main.signal(signal.SIGTERM)
    worker.wait_until(lambda: worker.main.exit_code == 0, "the end")
    assert not any(alive(pid) for pid in processes)
    assert not list(worker.temporary.iterdir())
    assert (job.info().status, job.info().attempts) == (Status.QUEUED, 0)


def test_a_front_that_remote_control_ends_ends_its_worker(split: Callable[..., Split]) -> None:
    """It goes to every front: each would be started again, and the worker run on."""
    worker = split(2).start()
    held = worker.submit("hold")
    worker.held_by(held, "claimed")
    job = worker.submit("shut down")
    worker.wait_until(lambda: worker.main.exit_code is not None, "the end")
    assert worker.main.exit_code == 0
    assert not list(worker.temporary.iterdir())
    for each in (held, job):
        assert (each.info().status, each.info().attempts) == (Status.QUEUED, 0)


def test_a_killed_main_process_takes_all_others_with_it_and_the_next_one_cleans_up(
    split: Callable[..., Split], tmp_path: Path
) -> None:
    worker = split(2).start()
    processes = children(worker.main.pid)
    left = worker.folder
    worker.main.signal(signal.SIGKILL)
    worker.main.wait(10)
    worker.wait_until(lambda: not any(alive(pid) for pid in processes), "their end")
    assert left.exists()
    worker.main.start()
    worker.wait_until(lambda: not left.exists(), "the sweep")
    worker.wait_until(lambda: len(worker.serving()) == 2, "fronts that serve")
