"""blipq without Redis, S3 and workers, for services' own tests.

    fake = FakeBlipq()
    fake.answer("caption", CaptionResult(captions=(Caption(text="a cat"),)))
    with Client(backend=fake) as client:
        assert client.caption(b"...").result(timeout=1).text == "a cat"

Both clients take it. Requests and options are checked, ids, statuses, idempotency, deadlines and
errors are those of the real service, and blipq's own tests run the same scenarios on both. There
are no retries, webhooks and retention here, and nothing is sent anywhere.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, cast

from blipq.client.backend import AsyncServices, Backend, Services
from blipq.contract import (
    ErrorCode,
    JobError,
    JobInfo,
    Kind,
    Request,
    Result,
    Status,
    request_adapter,
)
from blipq.errors import WorkError
from blipq.ledger.async_ledger import AsyncLedger
from blipq.ledger.codec import Message, job_info
from blipq.ledger.keys import ended_channel
from blipq.ledger.ledger import Claim, Ledger
from blipq.s3.storage import Storage
from blipq.settings import Settings
from blipq.transport.async_notifications import AsyncNotifier
from blipq.transport.broker import Broker
from blipq.transport.notifications import Notifier

#: What a job comes to: a result, an error, or a function that returns or raises one.
Answer = Result | JobError | WorkError | Callable[[Any], Result]


class FakeBlipq(Backend):
    """An in-memory blipq with one worker that gives the answers it was told."""

    def __init__(self) -> None:
        #: Objects by their s3:// URI: what was uploaded, and what jobs wrote to ``output``.
        self.objects: dict[str, bytes] = {}
        self.records = Records(self._tell)
        self._notifiers: list[Notifier | InMemoryAsyncNotifier] = []
        self._answers: dict[Kind, list[Answer]] = {}
        self._running = True
        self._waiting: list[Message] = []
        self._lock = threading.RLock()

    # -- for the test --

    def answer(self, kind: str, *answers: Answer) -> None:
        """What jobs of a kind come to from now on, one after the other; the last one stays."""
        self._answers[Kind(kind)] = list(answers)

    def stop_worker(self) -> None:
        """From now on jobs stay queued."""
        self._running = False

    def start_worker(self) -> None:
        """Runs the jobs that wait, and from now on every job at once."""
        self._running = True
        self.deliver([])

    @property
    def requests(self) -> list[Request]:
        """What was asked, in the order of the jobs."""
        found = (job["request"] for job in self.records.jobs.values())
        return [request_adapter.validate_json(text) for text in found]

    @property
    def jobs(self) -> list[JobInfo]:
        """All jobs, in order."""
        return [job_info(id, job) for id, job in self.records.jobs.items()]

    # -- for clients --

    def services(self, settings: Settings, client: str) -> Services:
        """The services of a client."""
        notifier = InMemoryNotifier(lambda: cast(Any, None), ended_channel(client))
        self._notifiers.append(notifier)
        return Services(
            InMemoryLedger(self.records, settings),
            InMemoryBroker(self, settings),
            InMemoryStorage(self.objects, settings),
            notifier,
        )

    def async_services(self, settings: Settings, client: str) -> AsyncServices:
        """The services of an asynchronous client."""
        notifier = InMemoryAsyncNotifier(lambda: cast(Any, None), ended_channel(client))
        self._notifiers.append(notifier)
        return AsyncServices(
            InMemoryAsyncLedger(self.records, settings),
            InMemoryBroker(self, settings),
            InMemoryStorage(self.objects, settings),
            notifier,
        )

    def deliver(self, messages: Iterable[Message]) -> None:
        """Gives messages to the worker."""
        with self._lock:
            self._waiting.extend(messages)
            while self._running and self._waiting:
                self._work(self._waiting.pop(0).id)

    # -- the worker --

    def _tell(self, id: str) -> None:
        for notifier in self._notifiers:
            notifier.tell(id)

    def _work(self, id: str) -> None:
        ledger = InMemoryLedger(self.records, Settings())
        claim = ledger.claim(id, "fake")
        if not isinstance(claim, Claim):
            return
        found = self._found(claim)
        if isinstance(found, JobError):
            ledger.fail(claim, found.model_dump_json(), "{}")
            return
        result = found.model_dump_json(exclude_none=True)
        if ledger.succeed(claim, result, "{}") and claim.output:
            self.objects[claim.output] = result.encode()

    def _found(self, claim: Claim) -> Result | JobError:
        try:
            found = self._next_answer(claim.kind)
            if callable(found):
                found = found(request_adapter.validate_json(claim.request))
            if isinstance(found, WorkError):
                raise found
        except WorkError as error:
            return JobError(code=error.code, message=str(error), retryable=error.retryable)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            return JobError(code=ErrorCode.INTERNAL, message=message)
        return found

    def _next_answer(self, kind: Kind) -> Answer:
        answers = self._answers.get(kind)
        if not answers:
            message = (
                f"no answer for {kind} jobs: tell one with FakeBlipq.answer({str(kind)!r}, ...)"
            )
            raise WorkError(ErrorCode.INTERNAL, message)
        return answers.pop(0) if len(answers) > 1 else answers[0]


class Records:
    """The ledger's scripts on dictionaries: those that clients and the fake worker need."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.jobs: dict[str, dict[str, str]] = {}
        self._keys: dict[str, str] = {}
        self._tell = tell
        self._lock = threading.RLock()

    def run(self, script: str, args: Iterable[Any]) -> Any:
        """Runs a script; like Redis, one at a time."""
        with self._lock:
            return getattr(self, script)(*map(str, args))

    def submit(self, retention: str, max_open: str, declared: str, *jobs: str) -> list[str]:
        """Records jobs until one is refused. The one worker serves every model."""
        answers: list[str] = []
        rest = list(jobs)
        while rest and not {"conflict", "full"} & set(answers[-2:-1]):
            id, digest, key, expires_in, size, *rest = rest
            fields, rest = rest[: int(size)], rest[int(size) :]
            answers += self._record(id, digest, key, int(expires_in), fields, int(max_open))
        return answers

    def unknown_models(self, declared: str, *models: str) -> list[str]:
        """None is unknown."""
        return [""]

    def read(self, id: str) -> list[Any]:
        """One job, settled; one worker serves every model."""
        job = self._settled(id)
        return [1, *_flat(job)] if job else []

    def look(self, channel: str, *ids: str) -> list[Any]:
        """Which jobs have ended. Everyone hears of every end, so none is told elsewhere."""
        jobs = {id: self._settled(id) for id in ids}
        ended = [[id, _flat(job)] for id, job in jobs.items() if job and "completed_at" in job]
        open_ = [int(job["deadline"]) for job in jobs.values() if job and "completed_at" not in job]
        left = max(open_, default=int(_now())) - int(_now())
        return [ended, [id for id, job in jobs.items() if job is None], [], left]

    def cancel(self, id: str) -> str:
        """Cancels a job that has not ended."""
        job = self._settled(id)
        if job is None:
            return "unknown"
        if "completed_at" in job:
            return "ended"
        self._end(id, Status.CANCELLED)
        return "cancelled"

    def claim(self, id: str, worker: str, lease: str, contract: str, nonce: str) -> list[Any]:
        """Takes a queued job."""
        job = self._settled(id)
        if job is None or job["status"] != Status.QUEUED:
            return ["busy"]
        job |= {"status": Status.RUNNING, "attempts": "1", "token": nonce, "started_at": _now()}
        claimed = {"output": "", "solo": "0", "retries": "0", "now": _now(), **job}
        return ["claimed", *_flat(claimed)]

    def finish(self, id: str, token: str, status: str, ttl: str, *fields: str) -> int:
        """Ends a job that runs."""
        job = self._settled(id)
        if job is None or job["status"] != Status.RUNNING:
            return 0
        self._end(id, status, dict(zip(fields[::2], fields[1::2], strict=True)))
        return 1

    def _record(
        self, id: str, digest: str, key: str, expires_in: int, fields: Sequence[str], most: int
    ) -> list[str]:
        for known in filter(None, (self._keys.get(key), id)):
            if (job := self.jobs.get(known)) is not None:
                return ["exists" if job["digest"] == digest else "conflict", known]
        if sum("completed_at" not in job for job in self.jobs.values()) >= most:
            return ["full", id]
        now = int(_now())
        self.jobs[id] = {
            "digest": digest,
            "status": Status.QUEUED,
            "created_at": str(now),
            "deadline": str(now + expires_in),
            **dict(zip(fields[::2], fields[1::2], strict=True)),
        }
        if key:
            self._keys[key] = id
        return ["created", id]

    def _settled(self, id: str) -> dict[str, str] | None:
        job = self.jobs.get(id)
        if job and "completed_at" not in job and int(job["deadline"]) <= int(_now()):
            self._end(id, Status.EXPIRED)
        return job

    def _end(self, id: str, status: str, fields: dict[str, str] | None = None) -> None:
        self.jobs[id] |= {"status": status, "completed_at": _now(), **(fields or {})}
        self._tell(id)


def _now() -> str:
    return str(time.time_ns() // 1_000_000)


def _flat(job: dict[str, str]) -> list[str]:
    return [part for pair in job.items() for part in pair]


class InMemoryLedger(Ledger):
    """The ledger on dictionaries: what clients need of it."""

    def __init__(self, records: Records, settings: Settings) -> None:
        super().__init__(cast(Any, None), settings)
        self._records = records

    def close(self) -> None:
        """Nothing is open."""

    def _run(self, script: str, *args: str | int | float) -> Any:
        return self._records.run(script, args)


class InMemoryAsyncLedger(AsyncLedger):
    """The ledger on dictionaries, for an event loop."""

    def __init__(self, records: Records, settings: Settings) -> None:
        super().__init__(cast(Any, None), settings)
        self._records = records

    async def aclose(self) -> None:
        """Nothing is open."""

    async def _run(self, script: str, *args: str | int | float) -> Any:
        return self._records.run(script, args)


class InMemoryBroker(Broker):
    """Gives each message to the fake worker as it is published."""

    def __init__(self, fake: FakeBlipq, settings: Settings) -> None:
        super().__init__(settings)
        self._fake = fake

    def send(self, messages: list[Message]) -> "Future[None]":
        """Delivers messages before it returns."""
        self._fake.deliver(messages)
        sent: Future[None] = Future()
        sent.set_result(None)
        return sent

    def publish_all(self, messages: list[Message]) -> bool:
        """Delivers messages."""
        self.send(messages)
        return True


class InMemoryStorage(Storage):
    """S3 as a dictionary."""

    def __init__(self, objects: dict[str, bytes], settings: Settings) -> None:
        super().__init__(settings)
        self._objects = objects

    def put(self, uri: str, data: bytes, *, content_type: str) -> None:
        """Writes an object."""
        self._objects[uri] = data

    def _put_once(self, bucket: str, key: str, data: bytes, content_type: str) -> None:
        self._objects.setdefault(f"s3://{bucket}/{key}", data)


class InMemoryNotifier(Notifier):
    """Is told by the fake, not by a subscription."""

    def _start(self) -> None:
        pass


class InMemoryAsyncNotifier(AsyncNotifier):
    """Is told by the fake, from any thread."""

    def _start(self) -> None:
        self._loop = asyncio.get_running_loop()

    def tell(self, id: str) -> None:
        """A job has ended."""
        if len(self):
            self._loop.call_soon_threadsafe(super().tell, id)
