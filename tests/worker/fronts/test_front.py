"""A front process between real services and an engine that dies as it is told to."""

import io
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from PIL import Image

from blipq import Client, Job, Settings
from blipq.ledger.connection import connect
from blipq.local.stack import LocalStack
from blipq.local.supervisor import Service
from blipq_worker.front import share_of
from blipq_worker.fronts.holdings import Holding, read_holdings
from blipq_worker.fronts.seat import EXIT_ENGINE_GONE, EXIT_SHUT_DOWN, Seat
from blipq_worker.fronts.status import FrontStatus, read_status
from blipq_worker.process.heartbeat import EXIT_HUNG
from blipq_worker.process.metrics import WorkerMetrics
from blipq_worker.settings import WorkerSettings
from blipq_worker.supervision.settling import Settler
from conftest import ledger_of, wait_until
from worker.inference.stand_in import INFO

HERE = Path(__file__).parent
QUEUE = "blipq.default.normal"


class Rig:
    """Services, one front and its engine."""

    def __init__(self, stack: LocalStack, settings: Settings, client: Client, folder: Path) -> None:
        self.client, self.seat = client, Seat(folder, 0, 1, "w-test")
        self.seat.metrics.mkdir()
        self.redis: redis.Redis = connect(settings)
        self._environment = stack.environment() | {
            "BLIPQ_REDIS_URL": str(settings.redis_url),
            "BLIPQ_KNOWN_MODELS": "default",
            "BLIPQ_CONCURRENCY": "8",
            "BLIPQ_LEASE_S": "3",
        }
        self.image = client.storage.upload(png((20, 30)))
        self.started: list[Service] = []
        #: Said in messages of a failed wait.
        self.front: Service | None = None

    def start_engine(self) -> Service:
        engine = self._started("engine", str(HERE / "engine_stand_in.py"), str(self.seat.folder))
        self.says(engine, "listens")
        return engine

    def start_demo_engine(self) -> Service:
        """The engine as it ships, with the demo model."""
        own = {"BLIPQ_DTYPE": "float32", "OMP_NUM_THREADS": "1"}
        program = ["-m", "blipq_worker", "engine", "--run", str(self.seat.folder)]
        return self._started("engine", *program, environment=own)

    def says(self, engine: Service, line: str) -> None:
        """Waits until the engine has written a line."""
        wait_until(lambda: line in engine.last_words(1000).splitlines(), f"{line!r} of the engine")

    def start_front(self, *, faulty: bool = False, **options: Any) -> Service:
        own = {f"BLIPQ_{name.upper()}": str(value) for name, value in options.items()}
        program = [str(HERE / "faulty_front.py")] if faulty else ["-m", "blipq_worker"]
        seat = ["--run", str(self.seat.folder), "--number", "0", "--of", "1", "--worker", "w-test"]
        self.front = self._started("front", *program, "front", *seat, environment=own)
        return self.front

    def start_taking_front(self, **options: Any) -> Service:
        front = self.start_front(**options)
        wait_until(lambda: (found := self.status) is not None and found.taking, self._why, 60)
        return front

    def _started(self, name: str, *command: str, environment: Any = None) -> Service:
        log = self.seat.folder / f"{name}-{len(self.started)}.log"
        env = self._environment | (environment or {})
        service = Service(name, [sys.executable, *command], env=env, log=log)
        service.start()
        self.started.append(service)
        return service

    @property
    def _why(self) -> str:
        return f"the front; {self.front.last_words(30) if self.front else ''}"

    @property
    def status(self) -> FrontStatus | None:
        return read_status(self.seat.status)

    def submit(self, prompt: str, image: Any = None) -> Job[Any]:
        return self.client.caption(image or self.image, prompt)

    def field(self, job: Job[Any], name: str) -> str | None:
        """A field of the job's record."""
        found: Any = self.redis.hget(f"blipq:job:{job.id}", name)
        return found

    def held(self) -> dict[str, Holding]:
        """What the front has noted, by id."""
        return {each.id: each for each in read_holdings(self.seat.holdings)}

    def stage(self, job: Job[Any]) -> str | None:
        found = self.held().get(job.id)
        return None if found is None else found.stage

    def ended(self, service: Service) -> int:
        """Waits for a process to end; its exit code."""
        wait_until(lambda: service.exit_code is not None, f"the end; {service.last_words(30)}", 60)
        assert service.exit_code is not None
        return service.exit_code

    def kill(self, service: Service) -> None:
        service.signal(signal.SIGKILL)
        self.ended(service)

    def waiting(self) -> int:
        """Messages in the queue."""
        found: Any = self.redis.llen(QUEUE)
        return int(found)

    def close(self) -> None:
        for service in self.started:
            with suppress(subprocess.TimeoutExpired):
                service.stop(timeout=5)
        self.redis.close()


def png(size: tuple[int, int]) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, (1, 2, 3)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def rig(stack: LocalStack, apart: Settings) -> Iterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="bq") as folder, Client(apart) as client:
        rig = Rig(stack, apart, client, Path(folder))
        try:
            yield rig
        finally:
            rig.close()


@pytest.mark.parametrize(
    ("device", "threads"),
    [("cpu", 32), ("cuda:0", 256)],
)
def test_fronts_hold_what_keeps_the_slots_of_a_gpu_full(device: str, threads: int) -> None:
    models = {"default": msgspec.structs.replace(INFO, device=device, slots=128)}
    options = WorkerSettings()
    for fronts in (1, 3, 16):
        share = share_of(options, models, fronts)
        assert share.threads == -(-threads // fronts)
        assert share.decode_memory_bytes * fronts >= options.decode_memory_bytes
    assert share_of(options.model_copy(update={"concurrency": 5}), models, 2).threads == 3


def test_a_front_serves_jobs_without_torch(rig: Rig) -> None:
    rig.start_engine()
    front = rig.start_taking_front()
    jobs = [rig.submit(f"hello {number}") for number in range(10)]
    assert [job.result(30).text for job in jobs] == [f"did hello {n}" for n in range(10)]
    assert jobs[0].info().receipt.worker == "w-test"
    maps = Path(f"/proc/{front.pid}/maps").read_text()
    assert "libpython" in maps or "python" in maps, "these are the front's libraries"
    assert "torch" not in maps
    wait_until(lambda: rig.held() == {}, "the end of all notes")
    wait_until(lambda: (found := rig.status) is not None and found.active == 0, "a later beat")
    status = rig.status
    assert status is not None
    assert (status.pid, status.threads) == (front.pid, 8)
    assert (status.problems, status.live) == ({}, {})
    front.signal(signal.SIGTERM)
    assert rig.ended(front) == 0


def test_a_front_has_its_engine_forget_the_image_of_an_erased_job(rig: Rig) -> None:
    engine = rig.start_engine()
    rig.start_taking_front()
    job = rig.submit("hello")
    job.result(30)
    rig.client.forget([job.id])
    rig.says(engine, "forgets 1 of default")


def test_a_front_serves_jobs_with_the_engine_as_it_ships(rig: Rig) -> None:
    """Also those that it judges by itself, which the engine never sees."""
    engine = rig.start_demo_engine()
    front = rig.start_taking_front()
    caption = rig.client.caption(rig.image)
    question = rig.client.vqa(rig.image, ["what is this?", "what color?"])
    too_long = rig.submit("\U0001f408" * 2000)
    matched = rig.client.match(rig.image, ["a cat"])
    assert caption.result(60).text
    assert len(question.result(60).answers) == 2
    assert len(matched.result(60).scores) == 1
    refused = too_long.wait(60)
    assert refused.error is not None, refused
    assert (refused.error.code, refused.receipt.batch_size) == ("invalid_request", None)
    receipt = caption.info().receipt
    assert (receipt.worker, receipt.dtype) == ("w-test", "float32")
    assert not engine_connects_anywhere(engine)
    front.signal(signal.SIGTERM)
    assert rig.ended(front) == 0
    engine.signal(signal.SIGTERM)
    assert rig.ended(engine) == 0, engine.last_words(30)


def engine_connects_anywhere(engine: Service) -> bool:
    """Whether a process has a connection over a network."""
    inodes = {
        line.split()[9]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{engine.pid}/net/{table}").read_text().splitlines()[1:]
    }
    links = {str(each.readlink()) for each in Path(f"/proc/{engine.pid}/fd").iterdir()}
    return any(f"socket:[{inode}]" in links for inode in inodes)


def test_a_front_waits_for_its_engine_and_takes_nothing_meanwhile(rig: Rig) -> None:
    job = rig.submit("hello")
    front = rig.start_front()
    wait_until(lambda: rig.status is not None, "a status")
    status = rig.status
    assert status is not None
    assert not status.taking
    assert "engine" in status.problems
    assert rig.waiting() == 1
    rig.start_engine()
    assert job.result(30).text == "did hello"
    assert front.exit_code is None


def test_a_front_that_waits_for_its_engine_ends_at_once_when_it_is_told_to(rig: Rig) -> None:
    front = rig.start_front()
    wait_until(lambda: rig.status is not None, "a status")
    front.signal(signal.SIGTERM)
    assert rig.ended(front) == 0


def test_what_an_engine_had_begun_is_suspect_and_all_else_goes_back_uncounted(rig: Rig) -> None:
    engine = rig.start_engine()
    front = rig.start_taking_front()
    begun = [rig.submit(f"run {number}") for number in range(2)]
    queued = [rig.submit(f"wait {number}") for number in range(3)]
    for number in range(2):
        rig.says(engine, f"begun run {number}")
    for number in range(3):
        rig.says(engine, f"queued wait {number}")
    rig.kill(engine)
    assert rig.ended(front) == EXIT_ENGINE_GONE, front.last_words(30)
    assert [rig.field(job, "solo") for job in begun] == ["1", "1"]
    assert [rig.field(job, "solo") for job in queued] == [None] * 3
    for job in (*begun, *queued):
        assert (rig.field(job, "status"), rig.field(job, "attempts")) == ("queued", "0")
    assert rig.waiting() == 5, "their messages are there for the next front, or another worker"
    assert rig.held() == {}


def test_an_outage_of_redis_makes_nobody_suspect_and_clears_nobody(rig: Rig) -> None:
    engine = rig.start_engine()
    front = rig.start_taking_front(timeout_s=0.5)
    begun, queued = rig.submit("run"), rig.submit("wait")
    rig.says(engine, "begun run")
    rig.says(engine, "queued wait")
    rig.redis.client_pause(3000)
    rig.kill(engine)
    assert rig.ended(front) == EXIT_ENGINE_GONE, front.last_words(30)
    for job in (begun, queued):
        assert (rig.field(job, "status"), rig.field(job, "attempts")) == ("queued", "0")
    assert (rig.field(begun, "solo"), rig.field(queued, "solo")) == ("1", None)


def test_a_front_that_gives_up_on_redis_leaves_on_record_who_is_suspect(rig: Rig) -> None:
    """Or a job that ends engines would do so again in company, each time Redis is away, too."""
    engine = rig.start_engine()
    front = rig.start_taking_front(timeout_s=0.5)
    begun, queued = rig.submit("run"), rig.submit("wait")
    rig.says(engine, "begun run")
    rig.says(engine, "queued wait")
    rig.redis.client_pause(60_000, all=False)
    try:
        rig.kill(engine)
        assert rig.ended(front) == EXIT_ENGINE_GONE, front.last_words(30)
    finally:
        rig.redis.execute_command("CLIENT", "UNPAUSE")
    assert (rig.stage(begun), rig.stage(queued)) == ("suspect", "claimed")
    settler = Settler(ledger_of(rig.client), rig.client.broker, WorkerMetrics())
    settler.settle(list(rig.held().values()), EXIT_ENGINE_GONE)
    settler.close(30)
    for job in (begun, queued):
        assert (rig.field(job, "status"), rig.field(job, "attempts")) == ("queued", "0")
    assert (rig.field(begun, "solo"), rig.field(queued, "solo")) == ("1", None)


def test_remote_control_drains_a_front_and_ends_its_worker(rig: Rig) -> None:
    """A signal behind it says the same: it is no second one, which would end it at once."""
    engine = rig.start_engine()
    front = rig.start_taking_front()
    job = rig.submit("run")
    rig.says(engine, "begun run")
    rig.client.broker.app.control.shutdown()
    wait_until(lambda: (found := rig.status) is not None and found.draining, "the drain")
    front.signal(signal.SIGTERM)
    time.sleep(1.5)  # beyond an echo
    assert front.exit_code is None
    assert rig.stage(job) == "claimed"
    front.signal(signal.SIGTERM)
    assert rig.ended(front) == EXIT_SHUT_DOWN, front.last_words(30)
    assert (rig.field(job, "status"), rig.field(job, "attempts")) == ("queued", "0")


def test_remote_control_ends_a_front_that_has_nothing_left_to_do(rig: Rig) -> None:
    rig.start_engine()
    front = rig.start_taking_front()
    rig.client.broker.app.control.shutdown()
    assert rig.ended(front) == EXIT_SHUT_DOWN, front.last_words(30)


def test_a_job_that_ended_its_engine_alone_keeps_its_lease(rig: Rig) -> None:
    """It counts as a crash when that runs out, and after the second it is a dead letter."""
    engine = rig.start_engine()
    front = rig.start_taking_front()
    killer = rig.submit("die now")
    assert rig.ended(engine) == -signal.SIGKILL
    assert rig.ended(front) == EXIT_ENGINE_GONE
    assert (rig.field(killer, "attempts"), rig.field(killer, "solo")) == ("0", "1")
    engine, front = rig.start_engine(), rig.start_front()
    rig.says(engine, "begun die now alone")
    assert rig.ended(front) == EXIT_ENGINE_GONE, front.last_words(30)
    assert (rig.field(killer, "status"), rig.field(killer, "attempts")) == ("running", "1")
    assert rig.held() == {}, "nobody is to give it back"
    ledger = ledger_of(rig.client)
    wait_until(lambda: ledger.reconcile(grace_s=0.1).messages, "the end of its lease")
    assert rig.field(killer, "attempts") == "1"


def test_an_engine_that_says_goodbye_leaves_nobody_suspect(rig: Rig) -> None:
    engine = rig.start_engine()
    front = rig.start_taking_front()
    job = rig.submit("run")
    rig.says(engine, "begun run")
    engine.signal(signal.SIGTERM)
    assert rig.ended(front) == EXIT_ENGINE_GONE
    assert "the engine closed the connection" in front.last_words(100)
    assert (rig.field(job, "solo"), rig.field(job, "attempts")) == (None, "0")


def test_the_next_front_runs_what_an_engine_left(rig: Rig) -> None:
    engine = rig.start_engine()
    front = rig.start_taking_front(concurrency=2)
    held = [rig.submit(f"wait {number}") for number in range(2)]
    for number in range(2):
        rig.says(engine, f"queued wait {number}")
    others = [rig.submit(f"hello {number}") for number in range(10)]
    rig.kill(engine)
    assert rig.ended(front) == EXIT_ENGINE_GONE
    engine = rig.start_engine()
    rig.start_taking_front()
    assert {job.result(30).text for job in others} == {f"did hello {n}" for n in range(10)}
    assert {job.info().attempts for job in others} == {1}
    for number in range(2):
        rig.says(engine, f"queued wait {number}")
    assert [rig.field(job, "attempts") for job in held] == ["1", "1"]


def test_what_a_killed_front_held_is_on_record(rig: Rig) -> None:
    engine = rig.start_engine()
    front = rig.start_taking_front(faulty=True)
    running = rig.submit("run")
    rig.says(engine, "begun run")
    decoding = rig.submit("look", rig.client.storage.upload(png((13, 13))))
    wait_until(lambda: rig.stage(decoding) == "decoding", "the picture that hangs")
    rig.kill(front)
    assert {id: each.stage for id, each in rig.held().items()} == {
        running.id: "claimed",
        decoding.id: "decoding",
    }
    for job in (running, decoding):
        held = rig.held()[job.id]
        assert (held.queue, held.kind, held.solo) == (QUEUE, "caption", False)
        ledger = ledger_of(rig.client)
        assert held.token is not None
        assert ledger.renew({job.id: held.token}) == [], "that is the token of its claim"


def test_a_message_that_waits_for_a_job_alone_is_on_record_as_taken(rig: Rig) -> None:
    engine = rig.start_engine()
    front = rig.start_taking_front()
    running = rig.submit("run")
    rig.says(engine, "begun run")
    front.signal(signal.SIGSTOP)
    suspect = rig.submit("hello")
    rig.redis.hset(f"blipq:job:{suspect.id}", "solo", "1")
    front.signal(signal.SIGCONT)
    wait_until(lambda: rig.stage(suspect) == "claimed", "the suspect, which waits to run alone")
    later = rig.submit("hello again")
    wait_until(lambda: rig.stage(later) == "taken", "the message behind it")
    rig.kill(front)
    held = rig.held()
    assert {id: (each.stage, each.solo) for id, each in held.items()} == {
        running.id: ("claimed", False),
        suspect.id: ("claimed", True),
        later.id: ("taken", False),
    }
    assert (held[later.id].token, held[later.id].nonce) == (None, None)


def test_a_decoder_that_hangs_ends_its_front_alone(rig: Rig) -> None:
    engine = rig.start_engine()
    front = rig.start_taking_front(faulty=True, watchdog_s=2)
    decoding = rig.submit("look", rig.client.storage.upload(png((13, 13))))
    assert rig.ended(front) == EXIT_HUNG, front.last_words(30)
    assert rig.stage(decoding) == "decoding"
    assert engine.exit_code is None


def test_a_front_drains_before_it_ends(rig: Rig) -> None:
    rig.start_engine()
    front = rig.start_taking_front()
    jobs = [rig.submit(f"hello {number}") for number in range(30)]
    front.signal(signal.SIGTERM)
    assert rig.ended(front) == 0, front.last_words(30)
    assert rig.held() == {}
    counts = {rig.field(job, "status") for job in jobs}
    assert counts <= {"succeeded", "queued"}
    rig.start_taking_front()
    assert [job.result(30).text for job in jobs] == [f"did hello {n}" for n in range(30)]
