"""The lives and deaths of a worker's processes: real ones, on the real stack.

The main process ships; the engine has no model, and the fronts no Celery (see ``stand_ins``). A
lease lasts a minute here: what comes back sooner was given back by the main process.
"""

import json
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from blipq import Client, Job, Status
from blipq.ledger.connection import connect
from blipq.ledger.operator import OperatorLedger
from blipq.local.stack import LocalStack
from blipq.local.supervisor import Service
from blipq.settings import born
from blipq_worker.fronts.holdings import read_holdings
from blipq_worker.fronts.status import read_status
from conftest import wait_until
from stacks import local_stack
from worker.supervision import stand_ins
from worker.supervision.everybodys import python_for_all

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
        with suppress(StopIteration):
            found = read_status(self.folder / f"front-{front}.json")
            return {} if found is None else msgspec.structs.asdict(found)
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


# -- fronts of another user --

OTHER = pwd.getpwnam("nobody").pw_uid
GROUP = 64_999  # of nobody
AS_OTHER = ["setpriv", f"--reuid={OTHER}", f"--regid={GROUP}", "--clear-groups", "--no-new-privs"]


@pytest.fixture(scope="module")
def python() -> Iterator[str]:
    folder = Path(tempfile.mkdtemp(prefix="bq"))
    folder.chmod(0o755)
    yield python_for_all(folder)
    shutil.rmtree(folder)


@pytest.fixture
def other(split: Callable[..., Split], python: str) -> Callable[..., Split]:
    """Makes a worker whose fronts are another user's, not started."""

    def make(fronts: int, **options: str) -> Split:
        own = {"BLIPQ_FRONT_USER": f"{OTHER}:{GROUP}", "STAND_IN_PYTHON": python, **options}
        worker = split(fronts, **own)
        worker.temporary.chmod(0o711)  # they pass through it
        return worker

    return make


def fields_of(pid: int) -> dict[str, str]:
    """What the kernel says of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: " ".join(value.split()) for name, _, value in (x.partition(":") for x in lines)}


def tried(*command: object) -> subprocess.CompletedProcess[str]:
    """Runs a command as the fronts' user: as what has taken over a front would."""
    arguments = [*AS_OTHER, *map(str, command)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=30)


@pytest.mark.root
def test_fronts_of_another_user_have_no_right_of_root_and_do_their_work(
    other: Callable[..., Split],
) -> None:
    worker = other(2).start()
    for pid in worker.serving():
        found = fields_of(pid)
        assert found["Uid"] == " ".join([str(OTHER)] * 4)
        assert found["Gid"] == " ".join([str(GROUP)] * 4)
        assert found["Groups"] == str(GROUP)
        assert found["NoNewPrivs"] == "1"
        assert {int(found[name], 16) for name in ("CapPrm", "CapEff", "CapAmb")} == {0}
    for pid in (worker.main.pid, worker.engine()):
        assert pid is not None
        assert fields_of(pid)["Uid"].split()[0] == str(os.geteuid())
    assert worker.ended(worker.submit("a job")).status is Status.SUCCEEDED
    worker.wait_for_count(SUCCEEDED.format(1))
    job = worker.submit("hold")
    front = worker.held_by(job, "claimed")
    os.kill(front, signal.SIGKILL)
    worker.wait_until(lambda: worker.held_by(job, "claimed") != front, "another front", SOON_S)
    worker.wait_until(lambda: len(worker.serving()) == 2, "a new front")
    assert worker.get("/readyz")[0] == 200


@pytest.mark.root
def test_fronts_of_another_user_see_nothing_of_the_engine_and_of_other_workers(
    other: Callable[..., Split],
) -> None:
    worker = other(1).start()
    own = worker.folder
    neighbour = Path(tempfile.mkdtemp(prefix="blipq-worker-", dir=worker.temporary))
    (neighbour / "engine.sock").touch()
    closed = [
        f"/proc/{worker.engine()}/environ",
        f"/proc/{worker.main.pid}/environ",
        f"/proc/{worker.main.pid}/fd/1",
        own / "engine.sock.lock",
        own / "metrics/counter_main.db",
        neighbour / "engine.sock",
    ]
    for path in closed:
        seen = tried("cat", path)
        assert (seen.returncode, seen.stdout) == (1, ""), path
        assert "Permission denied" in seen.stderr
    for folder in (own, own / "metrics", neighbour):
        assert "Permission denied" in tried("ls", folder).stderr
    for pid in (worker.engine(), worker.main.pid):
        assert "not permitted" in tried("sh", "-c", f"kill -9 {pid}").stderr


@pytest.mark.root
def test_nothing_can_be_planted_where_root_works_with_fronts_of_another_user(
    other: Callable[..., Split],
) -> None:
    worker = other(2).start()
    folder, before = worker.folder, listing(worker.folder)
    for path in (folder / "front-3.json", folder / "metrics/counter_x.db", folder / "capturing"):
        for command in (["ln", "-s", "/etc/passwd"], ["mkfifo"], ["mkdir"], ["touch"]):
            assert "Permission denied" in tried(*command, path).stderr
    for name in ("front-1.json", "front-1.held", "metrics/counter_front-1.db", "engine.sock"):
        for command in (["rm", "-f"], ["chmod", "777"], ["chown", str(OTHER)]):
            seen = tried(*command, folder / name)
            assert "Permission denied" in seen.stderr or "not permitted" in seen.stderr
        assert "Permission denied" in tried("mv", folder / name, folder / "moved").stderr
    for path in (folder, folder.with_name("moved")):
        assert tried("mv", folder, path).returncode != 0
    assert listing(folder) == before


def listing(folder: Path) -> dict[str, tuple[str, int, int]]:
    """What is in a folder, with its kind and rights, its user and group."""
    return {
        str(each.relative_to(folder)): (
            stat.filemode((found := each.lstat()).st_mode),
            found.st_uid,
            found.st_gid,
        )
        for each in folder.rglob("*")
    }


@pytest.mark.root
def test_whatever_a_front_writes_its_worker_goes_on_and_the_next_front_is_well(
    other: Callable[..., Split],
) -> None:
    worker = other(2, BLIPQ_WATCHDOG_S="5").start()
    assert worker.ended(worker.submit("a job")).status is Status.SUCCEEDED
    first = worker.status(1)["pid"]
    mine = [worker.folder / "front-1.held", *worker.folder.glob("metrics/*_front-1.db")]
    os.kill(first, signal.SIGSTOP)  # so that it does not write over it
    for path in (worker.folder / "front-1.json", *mine):
        assert tried("sh", "-c", f"head -c 5000 /dev/zero | tr '\\0' '[' > {path}").stderr == ""
    for path in (worker.folder / "front-1.json", mine[0]):
        assert tried("truncate", "-s", "1T", path).stderr == ""
    assert worker.get("/readyz")[0] == 200
    assert worker.get("/metrics")[0] == 200
    assert worker.ended(worker.submit("a job")).status is Status.SUCCEEDED
    os.kill(first, signal.SIGKILL)
    worker.wait_until(lambda: worker.status(1).get("taking"), "its successor")
    assert worker.status(1)["pid"] != first
    assert worker.ended(worker.submit("a job")).status is Status.SUCCEEDED
    page = worker.get("/metrics")[1]
    assert "blipq_worker_fronts 2.0" in page
    assert all(path.stat().st_size < 2**25 for path in worker.folder.rglob("*"))


@pytest.mark.root
def test_fronts_of_another_user_find_the_local_stack_that_root_has_started(
    other: Callable[..., Split], services: LocalStack, tmp_path: Path
) -> None:
    """Its file is in root's home, and its pid is none that they could ask for."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    pid = os.getpid()
    found = {"pid": pid, "born": born(pid), "settings": services.settings_fields()}
    (home / "stack.json").write_text(json.dumps(found))
    worker = other(1, HOME=str(home), BLIPQ_STACK_FILE=str(home / "stack.json"))
    for name in services.settings_fields():
        del worker.main.env[f"BLIPQ_{name.upper()}"]
    worker.start()
    assert worker.ended(worker.submit("a job")).status is Status.SUCCEEDED
    environment = Path(f"/proc/{worker.serving()[0]}/environ").read_bytes().split(b"\0")
    assert not [each for each in environment if str(home).encode() in each]


@pytest.mark.root
@pytest.mark.parametrize(
    ("user", "why"),
    [
        ("nobody-here", "there is no such user"),
        ("root", "this user is root, or in its group"),
        # Its folder is closed to this group.
        (f"{OTHER}:{GROUP}", "cannot run a front: "),
    ],
)
def test_a_user_that_cannot_run_fronts_is_refused_in_one_line(
    split: Callable[..., Split], user: str, why: str
) -> None:
    worker = split(1, BLIPQ_FRONT_USER=user)
    worker.temporary.chmod(0o700)
    worker.main.start()
    worker.wait_until(lambda: worker.main.exit_code is not None, "the end")
    assert worker.main.exit_code == 78
    words = worker.main.last_words(40).splitlines()
    assert words[-1].startswith(f"blipq worker: BLIPQ_FRONT_USER={user}")
    assert why in words[-1]
    assert not [line for line in words if "Traceback" in line]
    assert not list(worker.temporary.iterdir())
