"""The Celery app that both sides use: it carries job ids, the ledger decides.

The settings come from measurements: late acks and one message per thread; no copies of messages in
Redis until they are acknowledged, because leases in the ledger do the recovering; no results in
Celery; sockets that never wait for ever.
"""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote_plus

from blipq.ledger.codec import Message, Prepared
from blipq.ledger.connection import check_one_cell
from blipq.ledger.messages import headers_of
from blipq.redaction import redacted
from blipq.redis.sentinel import sentinel_options
from blipq.redis.url import SCHEMES, TLS_OPTIONS, RedisUrl, tls_of
from blipq.settings import Settings

if TYPE_CHECKING:
    from celery import Celery

log = logging.getLogger(__name__)

_Batch = tuple["Future[None]", list[Message]]

#: A publish that takes longer is left to the reconciler: the job is recorded already.
PUBLISH_TIMEOUT_S = 1.0
WARN_EVERY_S = 60.0

REDIS_TRANSPORT = {
    "ack_emulation": False,
    "health_check_interval": 10,
    "socket_timeout": 10,
    "socket_connect_timeout": 3,
    "socket_keepalive": True,
    "queue_order_strategy": "round_robin",
}


def patience_s(messages: list[Message]) -> float:
    """How long publishing may take before it is left to the reconciler."""
    return PUBLISH_TIMEOUT_S + 0.002 * len(messages)


def make_app(settings: Settings) -> "Celery":
    """A Celery app for the settings' broker."""
    from celery import Celery

    from blipq.transport.failover import EachByItsName

    address = broker_address(settings)
    app = Celery("blipq", broker=address.url, set_as_current=False)
    app.amqp.Connection = EachByItsName
    app.conf.update(
        task_acks_late=True,
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        worker_prefetch_multiplier=1,
        task_publish_retry_policy={
            "max_retries": 2,
            "interval_start": 0,
            "interval_step": 0.2,
            "interval_max": 0.5,
        },
        task_create_missing_queues=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,
        broker_connection_timeout=3,
        broker_transport_options=address.options,
        broker_use_ssl=address.tls,
        # CELERY_BROKER_URL, of an application around us, would beat the URL above, but not these.
        broker_read_url=address.url,
        broker_write_url=address.url,
    )
    return app


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """A broker as Celery is configured: URL, its transport's options, arguments for TLS or False.

    Without arguments of its own, Celery would not verify a Redis behind TLS, nor the name of a
    RabbitMQ.
    """

    url: str
    options: dict[str, Any] = field(default_factory=dict)
    tls: dict[str, Any] | Literal[False] = False


def broker_address(settings: Settings) -> BrokerAddress:
    """The settings' broker. Verified as the ledger's Redis is, where it speaks TLS."""
    check_one_cell(settings)
    url = settings.effective_broker_url
    scheme = url.partition("://")[0].lower()
    if scheme in SCHEMES:
        return _redis_address(RedisUrl.of(url), settings.timeout_s)
    if tls := tls_of(url):
        # Its options for TLS are ours: Celery would pass them on under names that py-amqp lacks.
        bare = ";".join(_without(TLS_OPTIONS, each) for each in url.split(";"))
        return BrokerAddress(bare, tls=tls.for_amqp())
    return BrokerAddress(url, REDIS_TRANSPORT if scheme.startswith("redis+") else {})


def _redis_address(url: RedisUrl, timeout_s: float) -> BrokerAddress:
    options = REDIS_TRANSPORT | ({"client_name": url.client_name} if url.client_name else {})
    if url.has_sentinels:
        options |= {"master_name": url.master, "sentinel_kwargs": sentinel_options(url, timeout_s)}
    return BrokerAddress(url.celery_url, options, url.tls.for_redis() if url.tls else False)


def _without(options: Sequence[str], url: str) -> str:
    """A URL without these options in its query."""
    bare, _, query = url.partition("?")
    given = [each for each in query.split("&") if each]
    kept = [each for each in given if unquote_plus(each.partition("=")[0]) not in options]
    return f"{bare}?{'&'.join(kept)}" if kept else bare


def _batch_of(producer: Any) -> AbstractContextManager[Any]:
    """One round trip for what is published inside, where the transport can and kombu is 5.7."""
    batch = getattr(producer, "batch", nullcontext)
    context: AbstractContextManager[Any] = batch()
    return context


def _batch_publish_error() -> tuple[type[Exception], ...]:
    """What a batch raises that was not published whole; nothing before kombu 5.7."""
    from kombu import exceptions

    error = getattr(exceptions, "BatchPublishError", None)
    return () if error is None else (error,)


class Broker:
    """Publishes job ids. Never blocks its caller for more than PUBLISH_TIMEOUT_S."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._silent_until = 0.0

    @cached_property
    def app(self) -> "Celery":
        """The Celery app, made at the first publish: importing Celery takes a while."""
        return make_app(self.settings)

    @cached_property
    def _outgoing(self) -> "SimpleQueue[_Batch | None]":
        """What the publishing thread takes. It is a daemon: a hanging broker holds no exit up."""
        # Of two threads that come first together each may make one: both are read to their ends.
        outgoing: SimpleQueue[_Batch | None] = SimpleQueue()
        target, args = self._publish_from, (outgoing,)
        threading.Thread(target=target, args=args, name="blipq-publish", daemon=True).start()
        return outgoing

    def with_message(self, job: Prepared) -> Prepared:
        """A job that the ledger is to publish as it records it, where its Redis is the broker.

        That is one round trip, and nothing can come between.
        """
        if not self.settings.redis_is_broker:
            return job
        return replace(job, publishes=True)

    def publish(self, message: Message) -> bool:
        """Publishes a recorded job; False if the broker did not take it in time.

        That loses nothing: the record is there, and a worker's reconciler publishes it again.
        """
        return self.publish_all([message])

    def publish_all(self, messages: list[Message]) -> bool:
        """Publishes many through one producer; False if the broker did not take them in time.

        Those that are published already are left out. Never raises: whatever a transport may
        raise, the jobs of these messages are recorded.
        """
        if all(message.published for message in messages):
            return True
        try:
            _ = self.app  # importing Celery must not use up the publisher's time
            self.send(messages).result(timeout=patience_s(messages))
        except FutureTimeout:  # it is sent all the same; twice does no harm
            return False
        except Exception as error:
            self.warn(error)
            return False
        return True

    def send(self, messages: list[Message]) -> "Future[None]":
        """Hands messages to the publishing thread; the future has the outcome."""
        sent: Future[None] = Future()
        left = [message for message in messages if not message.published]
        if not left:
            sent.set_result(None)
            return sent
        try:
            self._outgoing.put((sent, left))
        except RuntimeError as error:  # no thread can be started
            sent.set_exception(error)
        return sent

    def warn(self, error: BaseException) -> None:
        """Logs why messages were not taken, once a minute: it may be the same for each."""
        if time.monotonic() >= self._silent_until:
            self._silent_until = time.monotonic() + WARN_EVERY_S
            why = redacted(f"{type(error).__name__}: {error}", self.settings.secrets)
            log.warning("the broker does not take messages, workers publish them later: %s", why)

    def _publish_from(self, outgoing: "SimpleQueue[_Batch | None]") -> None:
        """Publishes what comes; what has come meanwhile goes out together."""
        going_on = True
        while going_on:
            come = [outgoing.get()]
            while not outgoing.empty():
                come.append(outgoing.get_nowait())
            going_on = None not in come
            self._publish_together(
                [batch for batch in come if batch and batch[0].set_running_or_notify_cancel()]
            )

    def _publish_together(self, batches: list[_Batch]) -> None:
        try:
            self._send([message for _, messages in batches for message in messages])
        except Exception as error:
            for sent, _ in batches:
                sent.set_exception(error)
        else:
            for sent, _ in batches:
                sent.set_result(None)

    def _send(self, messages: list[Message]) -> None:
        if not messages:
            return
        dropped = _batch_publish_error()
        with self.app.producer_pool.acquire(block=True) as producer:
            try:
                with _batch_of(producer):
                    self._put_all(producer, messages)
            except dropped:  # the connection was closed meanwhile: twice does no harm
                self._put_all(producer, messages)

    def _put_all(self, producer: Any, messages: list[Message]) -> None:
        """Puts messages out. A queue is declared with its first one: kombu's check costs time."""
        declared: set[str] = set()
        for message in messages:
            self._put(producer, message, declares=message.queue not in declared)
            declared.add(message.queue)

    def _put(self, producer: Any, message: Message, *, declares: bool) -> None:
        """A Celery task message of protocol 2 with no more in it than workers need."""
        producer.publish(
            [[message.id], {}, {}],
            routing_key=message.queue,
            declare=[self.app.amqp.queues[message.queue]] if declares else [],
            headers=headers_of(message.kind, message.id),
            correlation_id=message.id,
            retry=True,
            retry_policy=self.app.conf.task_publish_retry_policy,
        )

    def close(self) -> None:
        """Closes the connections."""
        if "_outgoing" in self.__dict__:
            self._outgoing.put(None)
        if "app" in self.__dict__:
            self.app.close()
