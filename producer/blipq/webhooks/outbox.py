"""The events that wait to be sent, in Redis: taken under a lease, settled once, replayable."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from blipq.ledger import keys
from blipq.ledger.codec import ms
from blipq.ledger.connection import redis_errors
from blipq.ledger.scripts.runner import ScriptRunner
from blipq.webhooks.delivery import Verdict, webhook_id

if TYPE_CHECKING:
    import redis

DEAD_EVENT_TTL_S = 14 * 86400.0
#: At most this many in one script, so that no other script waits long.
MOST_AT_ONCE = 64

#: Senders that died or hung with an event before it is tried apart from other such events, and
#: before it is given up.
SUSPECT_AFTER, MAX_CRASHES = 2, 5


@dataclass(frozen=True, slots=True)
class Event:
    """An event taken under a lease. ``token`` fences: a later lease makes this one stale."""

    name: str
    token: int
    attempts: int
    crashes: int
    record: Mapping[str, str]
    job: Mapping[str, str] | None

    @property
    def suspect(self) -> bool:
        """Whether it may be what killed its senders."""
        return self.crashes >= SUSPECT_AFTER

    @property
    def webhook_id(self) -> str:
        """The id by which receivers recognize repetitions."""
        return webhook_id(self.name)


class Outbox(ScriptRunner):
    """The scripts as methods, with the errors of the ledger's clients."""

    shared = ("outbox",)

    def take(
        self,
        limit: int,
        *,
        lease_s: float,
        most_of_a_host: int,
        room: Mapping[str, int],
        suspects: int = 1,
    ) -> list[Event]:
        """Due events under a lease, at most ``suspects`` of them suspect.

        ``room``: hosts that may get fewer than the others.
        """
        pairs = [part for pair in room.items() for part in pair]
        limit = min(limit, MOST_AT_ONCE)
        ttl = ms(DEAD_EVENT_TTL_S)
        with redis_errors():
            bounds = (suspects, SUSPECT_AFTER, MAX_CRASHES)
            taken = self._run(
                "take_events", limit, ms(lease_s), most_of_a_host, ttl, *bounds, *pairs
            )
        return [
            Event(name, token, attempts, crashes, *map(json.loads, (record, job or "null")))
            for name, token, attempts, crashes, record, job in taken
        ]

    def keep_body(self, event: Event, body: bytes) -> bytes | None:
        """Fixes the bytes to send; those of an earlier attempt win. None if the lease is lost."""
        with redis_errors():
            kept = self._run("keep_body", event.name, event.token, body.decode())
        return None if kept is None else cast("str", kept).encode()

    def settle(
        self, event: Event, verdict: Verdict, outcome: str, detail: str, delay_s: float = 0.0
    ) -> bool:
        """Records what came of an attempt; False if the lease is lost."""
        args = (event.name, event.token, verdict, outcome, detail)
        with redis_errors():
            return bool(
                self._run("settle_event", *args, round(delay_s * 1000), ms(DEAD_EVENT_TTL_S))
            )

    def replay(self, id: str) -> list[str]:
        """Sends again what an event's id, a webhook-id or a job's id names; the events' ids."""
        with redis_errors():
            return [
                name for name in self._named(id) if self._act("replay", name, "replay_event", name)
            ]

    def _named(self, id: str) -> Iterator[str]:
        if "/job." in id:
            yield id
            return
        known = [*self._dead_names(), *self._waiting_names()]
        named = [name for name in known if id in (webhook_id(name), name.rpartition("/job.")[0])]
        yield from named
        if not named:
            yield from self._last_of(id)

    def _last_of(self, id: str) -> Iterator[str]:
        """The event of a job's end, delivered before."""
        fields = self.redis.hmget(keys.job(id), ["status", "revivals"])
        status, revivals = cast("list[str | None]", fields)
        if status is not None:
            yield f"{id}/job.{status}" + (f"/{revivals}" if revivals else "")

    def _dead_names(self, limit: int = 0) -> list[str]:
        return cast("list[str]", self.redis.zrevrange(keys.DEAD_EVENTS, 0, limit - 1))

    def _waiting_names(self, limit: int = 0) -> Iterator[str]:
        for host in cast("list[str]", self.redis.zrange(keys.OUTBOX, 0, -1)):
            yield from cast("list[str]", self.redis.zrange(keys.outbox(host), 0, limit - 1))

    # -- what there is to see --

    def listed(self, *, dead: bool, limit: int) -> list[dict[str, Any]]:
        """Events for people and programs: dead ones newest first, or waiting ones."""
        with redis_errors():
            names = self._dead_names(limit) if dead else list(self._waiting_names(limit))[:limit]
            found = ((name, self._described(name)) for name in names)
            return [described for _, described in found if described is not None]

    def _described(self, name: str) -> dict[str, Any] | None:
        fields = ("id", "type", "url", "attempts", "outcome", "detail", "at", "dead_at")
        values = cast("list[str | None]", self.redis.hmget(keys.event(name), fields))
        record = dict(zip(fields, values, strict=True))
        if record["id"] is None:
            return None
        described: dict[str, Any] = {"event": name, "webhook_id": webhook_id(name)}
        described |= {key: value for key, value in record.items() if value is not None}
        described["job_id"] = described.pop("id")
        described["attempts"] = int(record["attempts"] or 0)
        due = self.redis.zscore(keys.outbox(self._host(name)), name)
        for key, at in (("at", record["at"]), ("dead_at", record["dead_at"]), ("due_at", due)):
            if at is not None:
                described[key] = float(at) / 1000
        return described

    def _host(self, name: str) -> str:
        return cast("str", self.redis.hget(keys.event(name), "host"))

    def counts(self) -> dict[str, int]:
        """What came of all attempts so far, by outcome."""
        with redis_errors():
            found = cast("dict[str, str]", self.redis.hgetall(keys.EVENT_COUNTS))
        return {outcome: int(number) for outcome, number in sorted(found.items())}

    def pending(self) -> int:
        """How many events are not delivered yet."""
        with redis_errors():
            hosts = cast("list[str]", self.redis.zrange(keys.OUTBOX, 0, -1))
            return sum(self.redis.zcard(keys.outbox(host)) for host in hosts)

    def dead(self) -> int:
        """How many events were given up."""
        with redis_errors():
            return int(self.redis.zcard(keys.DEAD_EVENTS))

    # -- senders --

    def register(self, sender: str, ttl_s: float) -> None:
        """Says that a sender lives, for ``ttl_s`` from now on."""
        with redis_errors(), self.redis.pipeline() as pipe:
            now = redis_ms(self.redis)
            pipe.zremrangebyscore(keys.SENDERS, "-inf", now)
            pipe.zadd(keys.SENDERS, {sender: now + ms(ttl_s)})
            pipe.pexpire(keys.SENDERS, ms(ttl_s))
            pipe.execute()

    def senders(self) -> Sequence[str]:
        """The live senders."""
        with redis_errors():
            now = redis_ms(self.redis)
            return sorted(cast("list[str]", self.redis.zrangebyscore(keys.SENDERS, now, "+inf")))


def redis_ms(client: "redis.Redis") -> int:
    """Milliseconds on Redis' clock, by which all its times are."""
    seconds, micros = client.time()
    return seconds * 1000 + micros // 1000
