"""The job records in Redis: what decides, where Celery only carries.

Every change of a job is one Lua script (``scripts/``) on Redis' own clock, so no crash can leave
half of it. A job is a hash that outlives its message; the zsets beside it say what is due. Every
key has a time to live.
"""

import functools
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from blipq.contract import CONTRACT, JobInfo, Kind, Options, Request, Status
from blipq.errors import BlipqError, InvalidRequest, QueueFull, QueueUnavailable
from blipq.ledger import keys
from blipq.ledger.codec import Looked as Looked
from blipq.ledger.codec import Message as Message
from blipq.ledger.codec import (
    Prepared,
    Recorded,
    declared_models,
    flat,
    job_of,
    looked,
    paired,
    prepare,
    submit_arguments,
    submitted,
    unknown_model,
)
from blipq.ledger.codec import ms as ms
from blipq.redis.sentinel import master_pool
from blipq.redis.url import RedisUrl
from blipq.settings import Settings
from blipq.submission import Submission

LEASE_S = 30.0
#: A queued job whose message must have been lost is published again after this long.
GRACE_S = 10.0
MAX_CRASHES = 3
MAX_RETRIES = 5

#: An error reply begins with a code. These say that the command is wrong, and any other that the
#: server cannot serve it now: READONLY, NOREPLICAS, MISCONF, BUSY, UNBLOCKED, TRYAGAIN and so on.
MISTAKES = {"ERR", "WRONGTYPE", "NOSCRIPT", "NOPROTO", "EXECABORT"}
#: In front, or where a server before Redis 7 puts it when a script met it.
_CODE = re.compile(r"(?:^|: -)([A-Z]{3,})\b")
#: The server lacks a command, or cannot read a login. It may repeat the arguments: a password.
_UNKNOWN = re.compile(r"unknown command|\b(?:hello|auth)\b", re.I)
#: redis-py has classes for some codes, and takes them off the text.
REFUSALS = (
    redis.exceptions.ReadOnlyError,
    redis.exceptions.NoPermissionError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.TryAgainError,
    redis.exceptions.AskError,
)

NO_REDIS = (
    "Redis refuses: it lacks a command that blipq needs, such as HELLO with AUTH: redis_url must "
    "name a Redis 6.2 or later that knows all commands by their own names, not a proxy"
)

#: Threads that use one client at the same time, at most; redis-py's own limit is 100.
MAX_CONNECTIONS = 4096

Unclaimed = Literal["unknown", "ended", "busy", "newer"]


@functools.cache
def script_text(*names: str) -> str:
    """A script, behind the names of keys and the shared functions."""
    folder = resources.files("blipq.ledger") / "scripts"
    texts = ((folder / f"{name}.lua").read_text() for name in ("common", *names))
    return keys.lua_header() + "".join(texts)


@dataclass(frozen=True, slots=True)
class Claim:
    """A job taken under a lease. ``token`` fences: a later claim makes this one stale.

    It is a count and a random part: a count alone could come twice, after a failover to a replica
    that lacks the last claims.

    ``queue_ms`` is how long the job waited, ``expires_in`` the seconds left to its deadline.
    """

    id: str
    kind: Kind
    model: str
    queue: str
    request: str
    output: str
    token: str
    attempts: int
    retries: int
    solo: bool
    queue_ms: float
    expires_in: float


@dataclass(frozen=True, slots=True)
class Turn:
    """One worker at a time sweeps: ``owner``, until it has not swept for ``ttl_s``.

    patience_s: from the start of a turn on, leases that ran out are left alone for so long. Where
    nobody had a turn, Redis may have been away, and then they say nothing about their workers.
    """

    owner: str
    ttl_s: float
    patience_s: float


@dataclass(frozen=True, slots=True)
class Swept:
    """What a chunk of a sweep found: messages to publish again, and whether more may be due."""

    messages: list[Message]
    more: bool


def connection_options(timeout_s: float) -> dict[str, Any]:
    """How every connection behaves: answers or raises in time, nothing is retried silently."""
    return {
        "decode_responses": True,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "socket_keepalive": True,
        "health_check_interval": 30,
    }


def connect(settings: Settings, *, timeout_s: float | None = None) -> "redis.Redis":
    """A Redis client that answers or raises within its timeout."""
    options = connection_options(timeout_s or settings.timeout_s) | {
        "max_connections": MAX_CONNECTIONS,
        # A dropped connection is opened again once; a timeout is final, or it would double.
        "retry": Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
    }
    url = RedisUrl.of(settings.redis_url)
    pool = master_pool(url, **options) if url.has_sentinels else url.pool(**options)
    return redis.Redis.from_pool(pool)


@contextmanager
def redis_errors(job_id: str | None = None) -> Iterator[None]:
    """Redis' exceptions as blipq's, but for replies that say that a command of ours is wrong."""
    try:
        yield
    except redis.exceptions.OutOfMemoryError as error:
        raise QueueFull("Redis has no memory left (maxmemory)") from error
    except redis.AuthenticationError as error:  # a ConnectionError, but it did answer
        raise QueueUnavailable(f"Redis refuses the user or password: {error}", job_id) from error
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise QueueUnavailable(f"Redis does not answer: {error}", job_id) from error
    except redis.exceptions.ResponseError as error:
        if "DB index" in str(error):
            raise InvalidRequest(f"redis_url: {error}") from None
        code = _CODE.search(str(error))
        if code and code[1] == "OOM":
            raise QueueFull("Redis has no memory left (maxmemory)") from error
        if isinstance(error, REFUSALS) or (code and code[1] not in MISTAKES):
            raise QueueUnavailable(f"Redis refuses: {error}", job_id) from error
        if _UNKNOWN.search(str(error)):
            raise QueueUnavailable(NO_REDIS, job_id) from None
        raise


def new_nonce() -> str:
    """The random part of a claim's token."""
    return secrets.token_hex(8)


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
    """The scripts as methods. Raises QueueUnavailable and QueueFull; Redis' own errors for faults
    of the scripts alone.
    """

    def close(self) -> None:
        """Closes the connections."""
        self.redis.close()

    # -- the producer's side --

    def submit(self, id: str, request: Request, options: Options, *, notify: str) -> Recorded:
        """Records a job once; the message to publish, or the id of the job that exists already.

        The same id or idempotency key with the same request is the same job; with another one it
        raises IdempotencyConflict.
        """
        job = self.prepare(Submission(request, options, id), notify=notify)
        (answer,) = self.submit_all([job])
        if isinstance(answer, BlipqError):
            raise answer
        return answer

    def prepare(self, submission: Submission, *, notify: str) -> Prepared:
        """Makes a job ready to be recorded. Raises InvalidRequest for a forbidden URL."""
        return prepare(submission, self.settings, notify=notify)

    def submit_all(self, jobs: Sequence[Prepared]) -> list[Recorded | BlipqError]:
        """Records jobs, each once and in order, in one round trip.

        Answers like ``submit`` for each job, up to the first that is refused: its answer is the
        error (IdempotencyConflict, UnknownModel or QueueFull), and nothing after it was looked at.
        """
        with redis_errors(jobs[0].submission.id if len(jobs) == 1 else None):
            answer = self._run("submit", *submit_arguments(jobs, self.settings))
        return submitted(jobs, answer)

    def check_models(self, models: Iterable[str]) -> None:
        """Raises UnknownModel if a job for one of these models would be refused."""
        names = sorted(set(models))
        with redis_errors():
            served, *unknown = self._run("unknown_models", declared_models(self.settings), *names)
        if unknown:
            raise unknown_model(unknown[0], served)

    def read(self, id: str) -> JobInfo | None:
        """The job, after settling what is due; None for an unknown id."""
        with redis_errors(id):
            return job_of(id, self._run("read", id))

    def look(self, ids: Sequence[str], *, notify: str) -> Looked:
        """Which of these jobs have ended, after settling what is due; in one round trip."""
        with redis_errors(ids[0] if len(ids) == 1 else None):
            return looked(self._run("look", keys.ended_channel(notify), *ids))

    def cancel(self, id: str) -> Literal["cancelled", "ended", "unknown"]:
        """Cancels a job at once, wherever it is."""
        with redis_errors(id):
            return cast("Literal['cancelled', 'ended', 'unknown']", self._run("cancel", id))

    # -- dead letters: jobs that are out of attempts --

    def dead_letters(self, limit: int = 100) -> list[JobInfo]:
        """The newest dead letters."""
        with redis_errors():
            ids = cast("list[str]", self.redis.zrevrange(keys.DEAD_LETTERS, 0, limit - 1))
        found = (self.read(id) for id in ids)
        return [info for info in found if info is not None]

    def retry_dead_letter(self, id: str) -> Message | None:
        """Queues a dead letter again, alone, with fresh attempts; the message to publish."""
        settings = self.settings
        retention = ms(max(settings.result_ttl, settings.failed_ttl))
        with redis_errors(id):
            if not self._run("revive", id, ms(settings.default_expires_in), retention):
                return None
            kind, queue = cast("list[str]", self.redis.hmget(keys.job(id), "kind", "queue"))
        return Message(Kind(kind), id, queue)

    def drop_dead_letter(self, id: str) -> bool:
        """Forgets a dead letter and its job."""
        with redis_errors(id):
            if not self.redis.zrem(keys.DEAD_LETTERS, id):
                return False
            self.redis.delete(keys.job(id))
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

    def claim(
        self, id: str, worker: str, *, lease_s: float = LEASE_S, nonce: str | None = None
    ) -> Claim | Unclaimed:
        """Takes a job under a lease, or says why not.

        Who got no answer asks again with the same ``nonce``: it is one claim.
        """
        nonce = nonce or new_nonce()
        with redis_errors(id):
            outcome, *pairs = self._run("claim", id, worker, ms(lease_s), CONTRACT, nonce)
        if outcome != "claimed":
            return cast("Unclaimed", outcome)
        job = paired(pairs)
        return Claim(
            id=id,
            kind=Kind(job["kind"]),
            model=job["model"],
            queue=job["queue"],
            request=job["request"],
            output=job["output"],
            token=job["token"],
            attempts=int(job["attempts"]),
            retries=int(job["retries"]),
            solo=job["solo"] == "1",
            queue_ms=float(job["now"]) - float(job["created_at"]),
            expires_in=(float(job["deadline"]) - float(job["now"])) / 1000,
        )

    def withdraw(self, asked: Mapping[str, str]) -> list[Message]:
        """Takes back, uncounted, the claims of ``asked`` (nonce to id), whose answers did not come.

        A claim that reaches Redis only later is refused. Returns messages of those jobs that wait
        now, for whoever cannot return theirs to the broker.
        """
        with redis_errors():
            return _messages(self._run("withdraw", *flat(asked)))

    def begin(self, claim: Claim) -> bool:
        """Says that a claim that is ``solo`` begins now; False if it is no longer held.

        Until then its worker's crash is not counted: it waited for its turn to run alone.
        """
        with redis_errors(claim.id):
            return bool(self._run("begin", claim.id, claim.token))

    def refuse(self, id: str, kind: Kind, error: str, *, model: str = "default") -> bool:
        """Records an unknown job as failed with an error (JSON): its message makes no sense."""
        fields = {"kind": kind, "model": model, "error": error}
        with redis_errors(id):
            return bool(self._run("refuse", id, ms(self.settings.failed_ttl), *flat(fields)))

    def renew(self, held: Mapping[str, str], *, lease_s: float = LEASE_S) -> list[str]:
        """Extends the leases of ``held`` (id to token); the ids that are no longer held."""
        with redis_errors():
            lost = self._run("renew", ms(lease_s), *flat(held))
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
            return bool(self._run("finish", claim.id, claim.token, status, ttl, *flat(fields)))

    def retry(self, claim: Claim, delay_s: float, error: str = "") -> bool:
        """Puts a job back for a later, counted retry; the reconciler publishes it when due.

        ``error`` (JSON) is told of the job while it is open.
        """
        with redis_errors(claim.id):
            return bool(self._run("requeue", claim.id, claim.token, ms(delay_s), "retry", error))

    def hand_back(self, claim: Claim, delay_s: float = 0.0, *, suspect: bool = False) -> bool:
        """Puts a job back, uncounted. The caller publishes it, or the reconciler when it is due.

        suspect: it may have broken its worker's device, and runs alone from now on.
        """
        delay, why = ms(delay_s) if delay_s else 0, "suspect" if suspect else "hand-back"
        with redis_errors(claim.id):
            return bool(self._run("requeue", claim.id, claim.token, delay, why))

    def reconcile(
        self, *, limit: int = 100, grace_s: float = GRACE_S, turn: Turn | None = None
    ) -> Swept:
        """One chunk of a sweep over what is due: at most ``limit`` of each kind.

        With a ``turn`` nothing is done while it is another's.
        """
        ttl = ms(self.settings.dead_letter_ttl)
        is_broker = self.settings.effective_broker_url == self.settings.redis_url
        options = limit, ms(grace_s), MAX_CRASHES, ttl, int(is_broker)
        whose = () if turn is None else (turn.owner, ms(turn.ttl_s), ms(turn.patience_s))
        with redis_errors():
            more, *found = self._run("reconcile", *options, *whose)
        return Swept(_messages(found), bool(more))

    def register(
        self, worker: str, models: Sequence[str], info: str, *, ttl_s: float, spare: bool
    ) -> None:
        """Says that a worker lives, and whether it could take more jobs now."""
        with redis_errors():
            self._run("register", worker, ms(ttl_s), int(spare), info, *models)

    def workers(self) -> dict[str, dict[str, Any]]:
        """The live workers by name, and what they say of themselves."""
        with redis_errors():
            found = list(self.redis.scan_iter(keys.worker("*"), count=1000))
            texts = cast("list[str | None]", self.redis.mget(found)) if found else []
        return {
            key.removeprefix(keys.worker("")): json.loads(text)
            for key, text in zip(found, texts, strict=True)
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


def _messages(found: Sequence[str]) -> list[Message]:
    """Kind, id and queue of each, as scripts answer them."""
    triples = zip(found[::3], found[1::3], found[2::3], strict=True)
    return [Message(Kind(kind), id, queue) for kind, id, queue in triples]
