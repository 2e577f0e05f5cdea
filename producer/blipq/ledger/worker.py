"""A worker's client of the ledger: it claims jobs under leases, and records their outcomes."""

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from blipq.contract import CONTRACT, Kind, Status
from blipq.ledger.codec import Message, flat, messages, ms, paired
from blipq.ledger.connection import redis_errors
from blipq.ledger.keys import FORGOTTEN
from blipq.ledger.producer import ProducerLedger

LEASE_S = 30.0
#: A queued job whose message must have been lost is published again after this long.
GRACE_S = 10.0
MAX_CRASHES = 3
MAX_RETRIES = 5

Unclaimed = Literal["unknown", "ended", "busy", "newer", "paused"]
#: What the death of a process means for a job that it held (see ``requeue.lua``).
Loss = Literal["hand-back", "lost", "suspect", "crash"]


@dataclass(frozen=True, slots=True)
class Claim:
    """A job taken under a lease. ``token`` fences: a later claim makes this one stale.

    It is random: a count could come twice, after a failover to a replica that lacks the last
    claims.

    ``rights`` (JSON) is what a job of the HTTP door may name, ``webhook_url`` of such a job what it
    names; "" where there is none. ``queue_ms`` is how long the job waited, ``expires_in`` the
    seconds left to its deadline.
    ``work`` is its shape (see ``blipq.ledger.work``), empty where an earlier version submitted it.
    ``traceparent`` is its place in a trace, or ""; then ``waited_ms`` counts from when it was put
    into its queue last.
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
    work: str = ""
    tenant: str = ""
    rights: str = ""
    webhook_url: str = ""
    traceparent: str = ""
    waited_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Turn:
    """The turn of a worker to sweep: ``owner``, until it has not swept for ``ttl_s``.

    patience_s: from the start of a turn on, leases that ran out are left alone for so long. Where
    nobody had a turn, Redis may have been away, and the leases do not show that a worker died.
    """

    owner: str
    ttl_s: float
    patience_s: float


@dataclass(frozen=True, slots=True)
class Swept:
    """What a chunk of a sweep found: messages to publish again, and whether more may be due."""

    messages: list[Message]
    more: bool


#: The system's own source would cost each claim a call that lets other threads take over.
_random = random.Random()
# Or a parent and its child would draw the same nonces, and so share their claims.
os.register_at_fork(after_in_child=_random.seed)


def new_nonce() -> str:
    """What makes a claim's token its own."""
    return f"{_random.getrandbits(64):016x}"


class WorkerLedger(ProducerLedger):
    """A worker's calls. It is a producer, too: it records jobs that foreign clients sent whole.

    A call that returns False came too late: the claim is no longer this worker's. All raise
    QueueUnavailable and QueueFull, and can then be repeated.
    """

    combined = frozenset({"claim", "finish"})

    def claim(
        self, id: str, worker: str, *, lease_s: float = LEASE_S, nonce: str | None = None
    ) -> Claim | Unclaimed:
        """Takes a job under a lease, or returns why it cannot be taken.

        A call that is repeated with the same ``nonce``, after its answer was lost, is one claim.
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
            work=job["work"],
            tenant=job["tenant"],
            rights=job["rights"],
            webhook_url=job["webhook_url"],
            traceparent=job.get("traceparent", ""),
            waited_ms=float(job.get("waited", 0)),
        )

    def withdraw(self, unanswered: Mapping[str, str]) -> list[Message]:
        """Takes back, uncounted, claims (nonce to id) whose replies did not arrive.

        A claim that reaches Redis only later is refused. Returns messages of those jobs that wait
        now, for callers that cannot return theirs to the broker.
        """
        with redis_errors():
            return messages(self._run("withdraw", *flat(unanswered)))

    def begin(self, claim: Claim) -> bool:
        """Marks the begin of a claim that is ``solo``; False if it is no longer held.

        Until then a crash of its worker is not counted: it waited for its turn to run alone.
        """
        with redis_errors(claim.id):
            return bool(self._run("begin", claim.id, claim.token))

    def refuse(self, id: str, kind: Kind, error: str, *, model: str = "default") -> bool:
        """Records an unknown job as failed, with an error (JSON): its message cannot be run.

        False if the id is known.
        """
        fields = {"kind": kind, "model": model, "error": error}
        with redis_errors(id):
            return bool(self._run("refuse", id, ms(self.settings.failed_ttl), *flat(fields)))

    def renew(self, held: Mapping[str, str], *, lease_s: float = LEASE_S) -> list[str]:
        """Extends the leases of ``held`` (id to token); the ids that are no longer held."""
        with redis_errors():
            lost = self._run("renew", ms(lease_s), *flat(held))
        return cast("list[str]", lost)

    def succeed(
        self, claim: Claim, result: str, receipt: str, *, result_uri: str | None = None
    ) -> bool:
        """Ends a job with its result (JSON); False if it is no longer this worker's to end.

        With a ``result_uri``, of an object that holds it, the ledger keeps that alone.
        """
        held = {"result": result} if result_uri is None else {"result_uri": result_uri}
        return self._finish(claim.id, claim.token, Status.SUCCEEDED, {**held, "receipt": receipt})

    def fail(self, claim: Claim, error: str, receipt: str, *, dead: bool = False) -> bool:
        """Ends a job with an error (JSON), as a dead letter if it is out of attempts."""
        fields = {"error": error, "receipt": receipt}
        return self._finish(claim.id, claim.token, Status.FAILED, fields, dead=dead)

    def _finish(
        self, id: str, token: str, status: Status, fields: Mapping[str, str], *, dead: bool = False
    ) -> bool:
        ttl = ms(self.settings.dead_letter_ttl) if dead else 0
        with redis_errors(id):
            return bool(self._run("finish", id, token, status, ttl, *flat(fields)))

    def retry(self, claim: Claim, delay_s: float, error: str = "") -> bool:
        """Puts a job back for a later, counted retry; the reconciler publishes it when due.

        ``error`` (JSON) is the job's ``last_error`` while it is open.
        """
        with redis_errors(claim.id):
            return bool(self._run("requeue", claim.id, claim.token, ms(delay_s), "retry", error))

    def hand_back(
        self, claim: Claim, delay_s: float = 0.0, error: str = "", *, suspect: bool = False
    ) -> bool:
        """Puts a job back, uncounted. The caller publishes it, or the reconciler when it is due.

        error (JSON): its ``last_error`` while it is open. suspect: it may have broken its worker's
        device, and runs alone from now on.
        """
        delay, why = ms(delay_s) if delay_s else 0, "suspect" if suspect else "hand-back"
        with redis_errors(claim.id):
            return bool(self._run("requeue", claim.id, claim.token, delay, why, error))

    def settle(self, id: str, token: str, loss: Loss) -> bool:
        """Puts back a job whose process died; whether it waits again, for the caller to publish.

        It does not where the claim is no longer the dead process', or where the job has crashed
        once too often and is a dead letter.
        """
        ttl = ms(self.settings.dead_letter_ttl)
        with redis_errors(id):
            return bool(self._run("requeue", id, token, 0, loss, "", MAX_CRASHES, ttl) == 1)

    def fail_lost(self, id: str, token: str, error: str) -> bool:
        """Ends a job whose process died of it, with an error (JSON).

        False if the claim is no longer the dead process'.
        """
        return self._finish(id, token, Status.FAILED, {"error": error})

    def put_off(self, id: str, delay_s: float) -> bool:
        """Has a job that waits published again, and claimed, only later; False if it is not one."""
        with redis_errors(id):
            return bool(self._run("put_off", id, ms(delay_s)))

    def reconcile(
        self, *, limit: int = 100, grace_s: float = GRACE_S, turn: Turn | None = None
    ) -> Swept:
        """One chunk of a sweep over what is due: at most ``limit`` of each kind.

        With a ``turn`` nothing is done while it is another's.
        """
        ttl = ms(self.settings.dead_letter_ttl)
        options = limit, ms(grace_s), MAX_CRASHES, ttl, int(self.settings.redis_is_broker)
        owned = () if turn is None else (turn.owner, ms(turn.ttl_s), ms(turn.patience_s))
        with redis_errors():
            more, *found = self._run("reconcile", *options, *owned)
        return Swept(messages(found), bool(more))

    def register(
        self, worker: str, models: Sequence[str], info: str, *, ttl_s: float, spare: bool
    ) -> None:
        """Registers a live worker for ``ttl_s``. ``spare``: whether it could take more jobs now."""
        with redis_errors():
            self._run("register", worker, ms(ttl_s), int(spare), info, *models)

    def forgotten(self, since: float) -> tuple[float, set[str]]:
        """The time now, and SHA-1 digests of the URIs of images whose jobs were erased since then.

        Times are Redis' own, in milliseconds. Each digest is kept for an hour. One may come twice.
        """
        with redis_errors():
            seconds, micros = self.redis.time()  # first: what is added meanwhile is found next time
            found = self.redis.zrangebyscore(FORGOTTEN, f"{since:.0f}", "+inf")
        return seconds * 1000 + micros // 1000, set(cast("list[str]", found))

    def learn(self, taken: str) -> None:
        """Adds what jobs have taken (JSON): see ``learn.lua``."""
        with redis_errors():
            self._run("learn", taken)

    def lock(self, key: str, owner: str, ttl_s: float) -> Literal["taken", "kept", "new"]:
        """Takes or renews a lock that its owner's death cannot keep.

        ``taken`` by another owner, ``kept`` from before, or ``new``: nobody held it until now.
        """
        with redis_errors():
            answer: int = self._run("lock", key, owner, ms(ttl_s))
        outcomes: tuple[Literal["taken", "kept", "new"], ...] = ("taken", "kept", "new")
        return outcomes[answer]
