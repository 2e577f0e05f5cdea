"""The job records in Redis: what decides, where Celery only carries.

Every change of a job is one Lua script (``lua/``) on Redis' own clock, so no crash can leave half
of it. A job is a hash that outlives its message; the zsets beside it say what is due. Every key has
a time to live.
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from blipq.contract import (
    CONTRACT,
    JobInfo,
    Kind,
    Options,
    Request,
    Status,
    queue_name,
)
from blipq.errors import IdempotencyConflict, InvalidRequest, QueueFull, QueueUnavailable
from blipq.guard import Forbidden
from blipq.settings import Settings

LEASE_S = 30.0
#: A queued job whose message must have been lost is published again after this long.
GRACE_S = 10.0
MAX_CRASHES = 3
MAX_RETRIES = 5

#: Answers of a Redis that is failing over, full on disk, or not ours to write to.
REFUSALS = ("READONLY", "NOREPLICAS", "MISCONF", "CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN", "NOPERM")
READ_ONLY = (
    redis.exceptions.ReadOnlyError,
    redis.exceptions.NoPermissionError,
    redis.exceptions.ClusterDownError,
)

DEAD_LETTERS = "blipq:dead-letters"

Unclaimed = Literal["unknown", "ended", "busy", "newer"]


@functools.cache
def script_text(*names: str) -> str:
    """A script with the shared functions in front of it."""
    folder = resources.files("blipq") / "lua"
    return "".join((folder / f"{name}.lua").read_text() for name in ("common", *names))


def ms(seconds: float) -> int:
    """Seconds as the whole milliseconds that the scripts count in."""
    return max(1, round(seconds * 1000))


@dataclass(frozen=True, slots=True)
class Claim:
    """A job taken under a lease. ``token`` fences: a later claim makes this one stale.

    ``queue_ms`` is how long the job waited, ``expires_in`` the seconds left to its deadline.
    """

    id: str
    kind: Kind
    model: str
    queue: str
    request: str
    output: str
    token: int
    attempts: int
    retries: int
    solo: bool
    queue_ms: float
    expires_in: float


@dataclass(frozen=True, slots=True)
class Message:
    """What must be published so that a worker looks at a job."""

    kind: Kind
    id: str
    queue: str


def connect(settings: Settings, *, timeout_s: float | None = None) -> "redis.Redis":
    """A Redis client that answers or raises within its timeout: nothing is retried silently."""
    timeout = timeout_s or settings.timeout_s
    return redis.Redis.from_url(
        settings.redis_url,
        decode_responses=True,
        socket_timeout=timeout,
        socket_connect_timeout=timeout,
        socket_keepalive=True,
        health_check_interval=30,
        # A dropped connection is opened again once; a timeout is final, or it would double.
        retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
    )


@contextmanager
def redis_errors(job_id: str | None = None) -> Iterator[None]:
    """Redis' exceptions as blipq's."""
    try:
        yield
    except redis.exceptions.OutOfMemoryError as error:
        raise QueueFull("Redis has no memory left (maxmemory)") from error
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise QueueUnavailable(f"Redis does not answer: {error}", job_id) from error
    except redis.exceptions.ResponseError as error:
        if "OOM" in str(error):
            raise QueueFull("Redis has no memory left (maxmemory)") from error
        if str(error).startswith(REFUSALS) or isinstance(error, READ_ONLY):
            raise QueueUnavailable(f"Redis refuses: {error}", job_id) from error
        raise


def digest(request: str, options: Options) -> str:
    """What makes two submits the same: the request and every option but the key itself."""
    given = options.model_dump(mode="json", exclude_defaults=True, exclude={"idempotency_key"})
    rest = json.dumps(given, sort_keys=True)  # metadata in another order is the same
    return hashlib.sha256(f"{request}\n{rest}".encode()).hexdigest()[:32]


def notify_channel(client: str) -> str:
    """The one channel on which a client process hears that its jobs have ended."""
    return f"blipq:ended:{client}"


class Scripted:
    """Runs scripts. ``shared``: texts that stand between ``common.lua`` and each script."""

    shared: tuple[str, ...] = ()

    def __init__(self, client: "redis.Redis", settings: Settings) -> None:
        self.redis = client
        self.settings = settings
        self._scripts: dict[str, Any] = {}

    def _run(self, script: str, *args: str | int | float) -> Any:
        if script not in self._scripts:
            # Sent by its hash, and loaded again where Redis lost it.
            text = script_text(*self.shared, script)
            self._scripts[script] = self.redis.register_script(text)
        return self._scripts[script](args=args)


class Ledger(Scripted):
    """The scripts as methods. Raises QueueUnavailable and QueueFull, never Redis' own errors."""

    # -- the producer's side --

    def submit(self, id: str, request: Request, options: Options, *, notify: str) -> Message | str:
        """Records a job once; the message to publish, or the id of the job that exists already.

        The same id or idempotency key with the same request is the same job; with another one it
        raises IdempotencyConflict.
        """
        args = self.submit_arguments(id, request, options, notify=notify)
        with redis_errors(id):
            outcome, known_id = self._run("submit", *args)
        return self.submitted(outcome, known_id, request, options)

    def submit_arguments(
        self, id: str, request: Request, options: Options, *, notify: str
    ) -> list[str | int]:
        """The submit script's arguments."""
        settings = self.settings
        _check_urls(request, options, settings)
        expires_in = options.expires_in or settings.default_expires_in
        text = request.model_dump_json(exclude_defaults=True)
        text = json.dumps({"kind": request.kind, **json.loads(text)}, separators=(",", ":"))
        fields: dict[str, str | int] = {
            "contract": CONTRACT,
            "kind": request.kind,
            "model": options.model,
            "queue": queue_name(options.model, options.priority),
            "request": text,
            "notify": notify_channel(notify),
            "result_ttl": ms(settings.result_ttl),
            "failed_ttl": ms(settings.failed_ttl),
        }
        if options.output:
            fields["output"] = options.output
        if options.metadata:
            fields["metadata"] = json.dumps(options.metadata)
        if options.webhook:
            fields["webhook_url"] = options.webhook.url
            fields["webhook_events"] = " ".join(options.webhook.events)
        return [
            id,
            digest(text, options),
            options.idempotency_key or "",
            ms(expires_in),
            ms(max(settings.result_ttl, settings.failed_ttl)),
            settings.max_open_jobs,
            *_flat(fields),
        ]

    @staticmethod
    def submitted(outcome: str, id: str, request: Request, options: Options) -> Message | str:
        """What the submit script's answer means."""
        if outcome == "conflict":
            raise IdempotencyConflict(f"job {id} was submitted with another request or options")
        if outcome == "full":
            raise QueueFull("too many jobs are open (BLIPQ_MAX_OPEN_JOBS)")
        if outcome == "exists":
            return id
        return Message(Kind(request.kind), id, queue_name(options.model, options.priority))

    def read(self, id: str) -> JobInfo | None:
        """The job, after settling what is due; None for an unknown id."""
        with redis_errors(id):
            answer = self._run("read", id)
        if not answer:
            return None
        live, *pairs = answer
        return job_info(id, _paired(pairs), live_workers=int(live))

    def notify_channel_of(self, id: str) -> str | None:
        """The channel on which the end of this job is told."""
        with redis_errors(id):
            return cast("str | None", self.redis.hget(f"blipq:job:{id}", "notify"))

    def cancel(self, id: str) -> Literal["cancelled", "ended", "unknown"]:
        """Cancels a job at once, wherever it is."""
        with redis_errors(id):
            return cast("Literal['cancelled', 'ended', 'unknown']", self._run("cancel", id))

    # -- dead letters: jobs that are out of attempts --

    def dead_letters(self, limit: int = 100) -> list[JobInfo]:
        """The newest dead letters."""
        with redis_errors():
            ids = cast("list[str]", self.redis.zrevrange(DEAD_LETTERS, 0, limit - 1))
        found = (self.read(id) for id in ids)
        return [info for info in found if info is not None]

    def retry_dead_letter(self, id: str) -> Message | None:
        """Queues a dead letter again, alone, with fresh attempts; the message to publish."""
        settings = self.settings
        retention = ms(max(settings.result_ttl, settings.failed_ttl))
        with redis_errors(id):
            if not self._run("revive", id, ms(settings.default_expires_in), retention):
                return None
            kind, queue = cast("list[str]", self.redis.hmget(f"blipq:job:{id}", "kind", "queue"))
        return Message(Kind(kind), id, queue)

    def drop_dead_letter(self, id: str) -> bool:
        """Forgets a dead letter and its job."""
        with redis_errors(id):
            if not self.redis.zrem(DEAD_LETTERS, id):
                return False
            self.redis.delete(f"blipq:job:{id}")
        return True

    # -- many jobs --

    def purge(self, queue: str, ids: Sequence[str]) -> int:
        """Cancels those of these jobs that still wait in the queue; how many."""
        with redis_errors():
            return int(self._run("purge", queue, *ids))

    def release(self, ids: Sequence[str]) -> int:
        """Forgets jobs whose outcome the caller keeps; how many.

        Dead letters stay, and jobs with a webhook.
        """
        with redis_errors():
            return int(self._run("release", *ids))

    # -- the worker's side --

    def claim(self, id: str, worker: str, *, lease_s: float = LEASE_S) -> Claim | Unclaimed:
        """Takes a job under a lease, or says why not."""
        with redis_errors(id):
            outcome, *pairs = self._run("claim", id, worker, ms(lease_s), CONTRACT)
        if outcome != "claimed":
            return cast("Unclaimed", outcome)
        job = _paired(pairs)
        return Claim(
            id=id,
            kind=Kind(job["kind"]),
            model=job["model"],
            queue=job["queue"],
            request=job["request"],
            output=job["output"],
            token=int(job["token"]),
            attempts=int(job["attempts"]),
            retries=int(job["retries"]),
            solo=job["solo"] == "1",
            queue_ms=float(job["now"]) - float(job["created_at"]),
            expires_in=(float(job["deadline"]) - float(job["now"])) / 1000,
        )

    def refuse(self, id: str, kind: Kind, error: str) -> bool:
        """Records an unknown job as failed with an error (JSON): its message makes no sense."""
        fields = {"kind": kind, "model": "default", "error": error}
        with redis_errors(id):
            return bool(self._run("refuse", id, ms(self.settings.failed_ttl), *_flat(fields)))

    def renew(self, held: Mapping[str, int], *, lease_s: float = LEASE_S) -> list[str]:
        """Extends the leases of ``held`` (id to token); the ids that are no longer held."""
        with redis_errors():
            lost = self._run("renew", ms(lease_s), *_flat(held))
        return cast("list[str]", lost)

    def succeed(self, claim: Claim, result: str, receipt: str) -> bool:
        """Ends a job with its result (JSON); False if it is no longer this worker's to end."""
        return self._finish(claim, Status.SUCCEEDED, {"result": result, "receipt": receipt})

    def fail(self, claim: Claim, error: str, receipt: str, *, dead: bool = False) -> bool:
        """Ends a job with an error (JSON), as a dead letter if it is out of attempts."""
        fields = {"error": error, "receipt": receipt}
        return self._finish(claim, Status.FAILED, fields, dead=dead)

    def _finish(
        self, claim: Claim, status: Status, fields: Mapping[str, str], *, dead: bool = False
    ) -> bool:
        ttl = ms(self.settings.dead_letter_ttl) if dead else 0
        with redis_errors(claim.id):
            return bool(self._run("finish", claim.id, claim.token, status, ttl, *_flat(fields)))

    def retry(self, claim: Claim, delay_s: float) -> bool:
        """Puts a job back for a later, counted retry; the reconciler publishes it when due."""
        with redis_errors(claim.id):
            return bool(self._run("requeue", claim.id, claim.token, ms(delay_s), "retry"))

    def hand_back(self, claim: Claim) -> bool:
        """Puts a job back at once, uncounted; the caller publishes it."""
        with redis_errors(claim.id):
            return bool(self._run("requeue", claim.id, claim.token, 0, "hand-back"))

    def reconcile(
        self, *, limit: int = 100, grace_s: float = GRACE_S, judge: bool = True
    ) -> list[Message]:
        """One sweep over what is due; the messages to publish again.

        Without ``judge`` it leaves leases that ran out alone: after an outage of Redis they say
        nothing about their workers.
        """
        ttl = ms(self.settings.dead_letter_ttl)
        with redis_errors():
            flat = self._run("reconcile", limit, ms(grace_s), MAX_CRASHES, ttl, int(judge))
        triples = zip(flat[::3], flat[1::3], flat[2::3], strict=True)
        return [Message(Kind(kind), id, queue) for kind, id, queue in triples]

    def register(
        self, worker: str, models: Sequence[str], info: str, *, ttl_s: float, spare: bool
    ) -> None:
        """Says that a worker lives, and whether it could take more jobs now."""
        with redis_errors():
            self._run("register", worker, ms(ttl_s), int(spare), info, *models)

    def workers(self) -> dict[str, dict[str, Any]]:
        """The live workers by name, and what they say of themselves."""
        with redis_errors():
            keys = list(self.redis.scan_iter("blipq:worker:*", count=1000))
            texts = cast("list[str | None]", self.redis.mget(keys)) if keys else []
        return {
            key.removeprefix("blipq:worker:"): json.loads(text)
            for key, text in zip(keys, texts, strict=True)
            if text is not None
        }

    def lock(self, key: str, owner: str, ttl_s: float) -> Literal["taken", "kept", "new"]:
        """Takes or renews a lock that its owner's death cannot keep.

        ``taken`` by another owner, ``kept`` from before, or ``new``: nobody held it until now.
        """
        with redis_errors():
            answer: int = self._run("lock", key, owner, ms(ttl_s))
        outcomes: tuple[Literal["taken", "kept", "new"], ...] = ("taken", "kept", "new")
        return outcomes[answer]


def _check_urls(request: Request, options: Options, settings: Settings) -> None:
    """Says at once what the text of a URL says; its addresses are judged when it is met."""
    field = "webhook.url"
    try:
        if options.webhook:
            settings.webhook_policy.check(options.webhook.url)
        field = "image.uri"
        if request.image is not None and not request.image.in_s3:
            settings.image_policy.check(request.image.uri)
    except Forbidden as error:
        raise InvalidRequest(f"{field}: {error}") from None


def _flat(fields: Mapping[str, Any]) -> list[Any]:
    return [part for pair in fields.items() for part in pair]


def _paired(flat: Sequence[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def job_info(id: str, job: Mapping[str, str], *, live_workers: int | None = None) -> JobInfo:
    """A record's fields as everyone sees the job."""

    def loaded(field: str) -> Any:
        return json.loads(job[field]) if field in job else None

    def at(field: str) -> float | None:
        return float(job[field]) / 1000 if field in job else None

    open_ = "completed_at" not in job
    return JobInfo.model_validate(
        {
            "id": id,
            "kind": job["kind"],
            "model": job["model"],
            "status": job["status"],
            "created_at": at("created_at"),
            "started_at": at("started_at"),
            "completed_at": at("completed_at"),
            "expires_at": at("deadline"),
            "attempts": int(job.get("attempts", 0)),
            "result": loaded("result"),
            "error": loaded("error"),
            "receipt": loaded("receipt"),
            "metadata": loaded("metadata") or {},
            "live_workers": live_workers if open_ else None,
        }
    )
