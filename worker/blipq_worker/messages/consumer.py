"""Celery's consumer, made to outlive what comes in and what Redis answers."""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from celery.worker import consumer as celery_consumer
from celery.worker import state

from blipq.contract import Kind
from blipq.errors import QueueFull, QueueUnavailable
from blipq_worker.messages.envelope import Malformed, Received, WholeJob, malformed, rewrite
from blipq_worker.process.health import TURN_S, BrokerLoop

log = logging.getLogger(__name__)

PAUSE_S = 1.0


class InHand(Protocol):
    """Follows the messages that this process has taken and not settled."""

    def take(self, id: str, kind: Kind, queue: str) -> None:
        """A message of a job has come; nothing is done with it yet."""

    def release(self, id: str) -> None:
        """A message is acknowledged, or back in its queue."""


@dataclass(frozen=True, slots=True)
class Door:
    """What the consumer reports to the worker.

    record: records a job that a message brought whole. Raises QueueUnavailable and QueueFull.
    refuse: records or drops a malformed message. Raises the same.
    dropped: counts a malformed message that could not be recorded.
    problem: why Redis takes no writes, or None.
    ended: the consumer has ended, by an error or on request.
    in_hand: follows each message that is well-formed, if anybody does.
    """

    record: Callable[[WholeJob], None]
    refuse: Callable[[Malformed], None]
    dropped: Callable[[], None]
    problem: Callable[[], str | None]
    ended: Callable[[BaseException], None]
    in_hand: InHand | None = None


class Consumer(celery_consumer.Consumer):
    """Refuses malformed messages, and connects again after any error of the broker."""

    door: Door
    broker_loop: BrokerLoop
    connection_errors: tuple[type[BaseException], ...]
    _turns: Any = None

    def start(self) -> None:
        """Runs until the worker stops."""
        try:
            super().start()
        except BaseException as error:
            # Celery now waits for the jobs that run: the worker must not look alive meanwhile.
            self.door.ended(error)
            raise

    # -- messages --

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        """What is done with each message."""
        handle = super().create_task_handler(*args, **kwargs)

        def on_task_received(message: Any) -> None:
            try:
                received = rewrite(message)
                if self._is_to_run(message, received.whole):
                    if self.door.in_hand is not None:
                        _follow(message, received, self.door.in_hand)
                    handle(message)
            except Malformed as error:
                self._refuse(message, error)
            except Exception as error:
                # kombu takes a KeyError for a lost connection: the message would come for ever.
                if isinstance(error, self.connection_errors) and not isinstance(error, KeyError):
                    raise
                log.exception("a message could not be taken")
                self._refuse(message, malformed(error, message.headers))

        return on_task_received

    def _is_to_run(self, message: Any, job: WholeJob | None) -> bool:
        """Whether Celery is to run a message now; ``job``: what it brings whole.

        Redis keeps no copy of it: a job that nobody has recorded is, before it waits for a thread.
        """
        if job is None:
            return True
        if not self._is_recorded(message, partial(self.door.record, job)):
            return False
        if job.delay_s:  # the ledger has it published when it is due
            message.ack_log_error(log, self.connection_errors)
            return False
        return True

    def on_decode_error(self, message: Any, exc: BaseException) -> None:
        """Kombu could not make a message of it."""
        self._refuse(message, malformed(exc, message.headers))

    def _refuse(self, message: Any, error: Malformed) -> None:
        try:
            if not self._is_recorded(message, partial(self.door.refuse, error)):
                return
        except Exception:
            # It would fail the same way on the next worker, and end one after another.
            self.door.dropped()
            log.exception("a malformed message was dropped: it cannot be recorded")
        message.ack_log_error(log, self.connection_errors)

    def _is_recorded(self, message: Any, record: Callable[[], None]) -> bool:
        """Whether the ledger recorded a message's job; if not, the message is in its queue again.

        Until one of the two has worked, nobody else has the message: it waits for Redis.
        """
        while True:
            try:
                record()
                return True
            except (QueueUnavailable, QueueFull) as away:
                log.warning("a message waits to be recorded: %s", away)
            time.sleep(PAUSE_S)  # or it would be here again at once
            try:
                message.reject(requeue=True)
                return False
            except self.connection_errors as away:
                self.broker_loop.failed(away)
            state.maybe_shutdown()

    # -- the connection --

    def ensure_connected(self, conn: Any) -> Any:
        """Tries for as long as it takes, at most 5 s apart."""

        def failed(error: BaseException, interval: float) -> None:
            self.broker_loop.failed(error)
            log.warning("the broker is away: %s: again in %g s", error, interval)

        return conn.ensure_connection(
            failed,
            interval_start=1,
            interval_step=1,
            interval_max=5,
            callback=state.maybe_shutdown,
        )

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Any error of the broker's, its error replies too."""
        self.broker_loop.failed(exc)
        log.warning("the broker failed: %s: connecting again", exc)
        with suppress(Exception):
            super().on_connection_error_after_connected(exc)
        self._wait_for_redis()

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        """An error while it connects."""
        self.broker_loop.failed(exc)
        log.warning("the broker is away: %s", exc)
        self._wait_for_redis()

    def _wait_for_redis(self) -> None:
        """A Redis that refuses writes lets itself be connected to, and then fails at once."""
        while True:
            state.maybe_shutdown()
            time.sleep(PAUSE_S)
            problem = self.door.problem()
            if problem is None:
                return
            self.broker_loop.failed(problem)

    def on_ready(self) -> None:
        super().on_ready()
        # After an error Celery has cleared its timer.
        if self._turns is not None:
            self._turns.cancel()
        self.broker_loop.turned()
        self._turns = self.timer.call_repeatedly(TURN_S, self.broker_loop.turned)


def _follow(message: Any, received: Received, in_hand: InHand) -> None:
    """Has a message followed until it is settled, in whichever of the two ways Celery does it."""
    in_hand.take(received.id, received.kind, str(message.delivery_info.get("routing_key", "")))
    left = [received.id]

    def settle(settling: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            settling(*args, **kwargs)
        finally:  # what the broker has not received it delivers again
            while left:
                in_hand.release(left.pop())

    message.ack_log_error = partial(settle, message.ack_log_error)
    message.reject_log_error = partial(settle, message.reject_log_error)


def consumer_class(door: Door, broker_loop: BrokerLoop) -> type[Consumer]:
    """The class that Celery makes its consumer of."""
    return type("Consumer", (Consumer,), {"door": door, "broker_loop": broker_loop})
