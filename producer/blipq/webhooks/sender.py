"""``blipq webhooks run``: takes due events from the outbox, sends them, records what came of it.

Several may run beside each other. Whatever is not recorded when one dies is sent again when its
lease is over, under the same id.
"""

import asyncio
import logging
import os
import random
import secrets
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from blipq.errors import InvalidRequest, QueueFull, QueueUnavailable
from blipq.exporter import ANYWHERE, served
from blipq.ledger.connection import connect
from blipq.program import blipq
from blipq.s3.storage import Storage
from blipq.settings import Settings
from blipq.ssrf.crowd import Crowd, Crowded, Visit
from blipq.ssrf.http import GuardedHttp
from blipq.telemetry import names, tracing
from blipq.telemetry.logs import about, set_up_logging
from blipq.telemetry.trace import NOTHING, Trace, parsed
from blipq.webhooks.delivery import Verdict, body_of, secrets_for, signed_headers, verdict_on
from blipq.webhooks.metrics import SenderMetrics
from blipq.webhooks.outbox import Event, Outbox
from blipq.webhooks.response import Answer, post

log = logging.getLogger(__name__)

POLL_S = 0.1
ALIVE_S = 15.0
#: Hosts that timed out and have not answered since; beyond this many, the oldest is forgotten.
MOST_SLOW_HOSTS = 1000
#: Hosts that answered when they were last posted to, as many as are remembered.
MOST_ANSWERED_HOSTS = 10_000
#: How long a host is left alone that has no room at its address.
CROWDED_S = 2.0

#: What hosts that have not answered take their places of; no tenant's name.
_UNANSWERED = object()

T = TypeVar("T")


class Lost(Exception):
    """Another sender has the event now."""


class OverQuota(Exception):
    """Events of the tenant have all its places: not sent now. Others to the host may be."""


class Together:
    """What the senders of a process share. Of its event loop's thread.

    several: whether there is more than one, so that none may end the others. has_suspect: whether
    one of them has, or may be given, an event at which a sender died. They all would: one at a
    time is tried, whichever Redis it is in.
    """

    def __init__(self, *, several: bool = False) -> None:
        self.metrics = SenderMetrics()
        self.several = several
        self.has_suspect = False


class Sender:
    """Sends what one Redis has. ``http`` is replaceable for its resolver and its trust in TLS."""

    def __init__(
        self,
        settings: Settings,
        *,
        http: GuardedHttp | None = None,
        together: Together | None = None,
    ) -> None:
        if not settings.webhook_secrets:
            raise InvalidRequest(
                "no secret to sign with, so events wait: set BLIPQ_WEBHOOK_SECRETS to the answer "
                f"of `{blipq('webhooks secret new')}`"
            )
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        self._settings = settings
        self._secrets = [secret.get_secret_value() for secret in settings.webhook_secrets]
        self._http = http or GuardedHttp(
            settings.webhook_policy,
            timeout_s=settings.webhook_timeout_s,
            at_a_time=settings.webhook_concurrency,
        )
        self._storage = Storage(settings)
        self._redis = connect(settings)
        self._outbox = Outbox(self._redis, settings)
        # Longer than any attempt takes: two senders at one event would be a needless repetition.
        self._lease_s = 2 * settings.webhook_timeout_s
        self._threads = ThreadPoolExecutor(8, "blipq-outbox")
        self._sending: Counter[str] = Counter()
        self._slow: dict[str, None] = {}
        self._answered: dict[str, None] = {}
        self._crowd = Crowd()
        #: Hosts without room at their address, until when they are left alone.
        self._crowded: dict[str, float] = {}
        self._freed = asyncio.Event()
        self._registered = -ALIVE_S
        self._together = together or Together()
        self.metrics = self._together.metrics

    async def run(self, stop: asyncio.Event) -> None:
        """Sends until ``stop`` is set, and then finishes what it has begun."""
        log.info("sender %s: webhooks from %s", self.name, self._settings.endpoints)
        stopping = asyncio.create_task(stop.wait())
        try:
            async with asyncio.TaskGroup() as tasks:
                while not stop.is_set():
                    if not await self._take(tasks):
                        self._freed.clear()
                        freed = asyncio.create_task(self._freed.wait())
                        await asyncio.wait(
                            {freed, stopping}, timeout=POLL_S, return_when="FIRST_COMPLETED"
                        )
                        freed.cancel()
        finally:
            stopping.cancel()
            self._http.close()
            self._threads.shutdown()
            self._redis.close()
        log.info("sender %s: stopped", self.name)

    # -- take --

    async def _take(self, tasks: asyncio.TaskGroup) -> int:
        """Starts to send what is due and has room; how many that were."""
        free = self._settings.webhook_concurrency - self._sending.total()
        room = self._room()  # here, because only this thread changes what it reads
        suspects = 0 if self._together.has_suspect else 1
        # Before the wait: another sender of this process must not be given one meanwhile.
        self._together.has_suspect = True
        events: list[Event] = []
        try:
            events = await self._in_thread(lambda: self._taken(free, room, suspects))
        except (QueueUnavailable, QueueFull) as error:
            await self._pause(error)
        except Exception as error:
            if not self._together.several:
                raise
            await self._pause(error)
        finally:
            if suspects and not any(event.suspect for event in events):
                self._together.has_suspect = False
        for event in events:
            self._sending[event.record["host"]] += 1
            self.metrics.sending.inc()
            tasks.create_task(self._deliver(event))
        return len(events)

    async def _pause(self, error: Exception) -> None:
        log.warning("no events of %s: %s", self._settings.cell or "Redis", error)
        await asyncio.sleep(1)

    def _taken(self, free: int, room: dict[str, int], suspects: int) -> list[Event]:
        if time.monotonic() > self._registered + ALIVE_S / 3:
            self._outbox.register(self.name, ALIVE_S)
            self._registered = time.monotonic()
        if free <= 0:
            return []
        return self._outbox.take(
            free,
            lease_s=self._lease_s,
            most_of_a_host=self._settings.webhook_host_concurrency,
            room=room,
            suspects=suspects,
        )

    def _room(self) -> dict[str, int]:
        """How many more events a host may get, where that is less than usual.

        A host that does not answer holds each of its places for the whole timeout, so it has one.
        """
        now = time.monotonic()
        self._crowded = {host: until for host, until in self._crowded.items() if until > now}
        most = self._settings.webhook_host_concurrency
        hosts = {**self._slow, **dict.fromkeys(self._sending), **self._crowded}
        return {host: self._room_of(host, most) for host in hosts}

    def _room_of(self, host: str, most: int) -> int:
        if host in self._crowded:
            return 0
        return max(0, (1 if host in self._slow else most) - self._sending[host])

    # -- send --

    async def _deliver(self, event: Event) -> None:
        with about(event.record["id"], parsed(event.record.get("traceparent"))):
            await self._deliver_now(event)

    async def _deliver_now(self, event: Event) -> None:
        host = event.record["host"]
        started = time.monotonic()
        try:
            answer = await self._attempt(event)
            self._note_speed(host, answer)
            trace = parsed(event.record.get("traceparent"))
            self.metrics.attempted(answer.outcome, started, trace)
            await self._record(event, answer, started)
        except OverQuota:
            await self._defer(event)
        except Crowded:
            if len(self._crowded) < MOST_SLOW_HOSTS:
                self._crowded[host] = time.monotonic() + CROWDED_S
            await self._defer(event)
        except Lost:
            log.warning("%s: taken over by another sender", event.name)
        except (QueueUnavailable, QueueFull) as error:
            log.warning("%s: not recorded, so it is sent again: %s", event.name, error)
        except Exception:  # one event that makes no sense must not end the sender
            log.exception("%s: cannot be sent", event.name)
            with suppress(QueueUnavailable, QueueFull):
                await self._settled(event, Answer("refused", "blipq cannot make sense of it"), 0)
        finally:
            if event.suspect:
                self._together.has_suspect = False
            self.metrics.sending.dec()
            self._sending[host] -= 1
            if not self._sending[host]:
                del self._sending[host]
            self._freed.set()

    async def _attempt(self, event: Event) -> Answer:
        host, tenant = event.record["host"], event.record.get("tenant")
        with self._crowd.visit(self._most_of_an_address(host)) as visit:
            self._take_places(visit, host, tenant)
            body = await self._in_thread(lambda: self._body(event))
            headers = signed_headers(event.webhook_id, body, secrets_for(tenant, self._secrets))
            with _span(event) as span:
                if span.context:
                    headers["traceparent"] = span.context
                url = event.record["url"]
                answer = await post(self._http, url, headers, body, visit=visit)
                span.set_attributes({names.OUTCOME: answer.outcome})
                return answer

    def _most_of_an_address(self, host: str) -> int:
        """Requests at one address at which a host's further ones wait.

        A single server may have any number of names. Those that answered when they were last tried
        may have half of all places there, as behind a large proxy; others as many as one host.
        """
        if host in self._answered:
            return max(1, self._settings.webhook_concurrency // 2)
        return self._settings.webhook_host_concurrency

    def _take_places(self, visit: Visit, host: str, tenant: str | None) -> None:
        """Takes the places of an event, its look-up of a name included.

        Any number of servers or names that never answer cost only some places: hosts that have not
        answered when they were last tried have three quarters of all, and one tenant a quarter.
        To hosts that did, a tenant has half of all. Raises OverQuota, and Crowded where hosts that
        have not answered have all theirs: then none of the host's events is taken for a while.
        """
        most = self._settings.webhook_concurrency
        if host in self._answered:
            share = most // 2
        elif visit.enter_for(_UNANSWERED, max(1, most * 3 // 4)):
            share = most // 4
        else:
            raise Crowded
        if tenant is not None and not visit.enter_for(tenant, max(1, share)):
            raise OverQuota

    async def _defer(self, event: Event) -> None:
        """Puts an event back for which there is no room: it is no attempt."""
        delay = CROWDED_S * random.uniform(1.0, 1.5)
        with suppress(Lost, QueueUnavailable, QueueFull):  # else it is due after its lease
            await self._settled(event, Answer("crowded", "no room"), delay, "defer")

    def _body(self, event: Event) -> bytes:
        """The bytes to send, fixed before they are sent for the first time."""
        if "body" in event.record:
            return event.record["body"].encode()
        body = self._outbox.keep_body(event, body_of(event.record, event.job or {}, self._storage))
        if body is None:
            raise Lost
        return body

    def _note_speed(self, host: str, answer: Answer) -> None:
        slow = answer.outcome == "timeout"
        answered = answer.outcome not in ("timeout", "unreachable", "unresolved", "url_forbidden")
        _remember(self._slow, host, slow, MOST_SLOW_HOSTS)
        _remember(self._answered, host, answered, MOST_ANSWERED_HOSTS)

    # -- record --

    async def _record(self, event: Event, answer: Answer, started: float) -> None:
        """Stores the outcome, for as long as the event is ours."""
        until = started + self._lease_s
        verdict, delay = verdict_on(answer, event.attempts, self._settings.webhook_ladder)
        while True:
            try:
                await self._settled(event, answer, delay, verdict)
                break
            except (QueueUnavailable, QueueFull):
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(0.5)
        log.info(
            "%s %s to %s: %s (%s), attempt %d, %s, %.0f ms",
            event.webhook_id,
            event.name,
            event.record["host"],
            answer.outcome,
            answer.detail,
            event.attempts,
            f"again in {delay:.0f} s" if verdict == "retry" else verdict,
            1000 * (time.monotonic() - started),
        )

    async def _settled(
        self, event: Event, answer: Answer, delay: float, verdict: Verdict = "dead"
    ) -> None:
        settled = await self._in_thread(
            lambda: self._outbox.settle(event, verdict, answer.outcome, answer.detail, delay)
        )
        if not settled:
            raise Lost

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _span(event: Event) -> Trace:
    """The span of an attempt, in the trace of the event's job."""
    record = event.record
    parent = record.get("traceparent", "")
    if not parent:
        return NOTHING
    attributes = {
        names.HTTP_METHOD: "POST",
        names.SERVER: record["host"],
        names.MESSAGE_ID: record["id"],
        names.EVENT: record["type"],
        names.ATTEMPT: event.attempts,
    }
    return tracing.continued(names.WEBHOOK, parent, kind="client", attributes=attributes)


def _remember(hosts: dict[str, None], host: str, belongs: bool, most: int) -> None:
    """Puts a host last among those that belong there, or takes it out; the oldest is forgotten."""
    hosts.pop(host, None)
    if belongs:
        hosts[host] = None
        if len(hosts) > most:
            del hosts[next(iter(hosts))]


def run(
    settings: Settings, *, metrics_port: int | None = None, metrics_host: str = ANYWHERE
) -> None:
    """Sends until SIGTERM or SIGINT, with a sender for each cell.

    Raises InvalidRequest without a secret.
    """
    set_up_logging()
    tracing.start("blipq-webhooks")
    asyncio.run(_until_stopped(settings, metrics_port, metrics_host))


async def _until_stopped(settings: Settings, metrics_port: int | None, metrics_host: str) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    cells = settings.by_cell.values()
    together = Together(several=len(cells) > 1)
    senders = [Sender(own, together=together) for own in cells]
    with served(together.metrics.registry, metrics_port, metrics_host):
        async with asyncio.TaskGroup() as tasks:
            for sender in senders:
                tasks.create_task(sender.run(stop))
