"""Faults of Celery's transports that would end a worker, mended for this process.

Seen on kombu 5.7: a message that is not one (anybody can push to a list) raises out of the event
loop; so does an error reply of Redis, as while it fails over; and a confirmation that Redis did not
take keeps its place among the messages in hand for ever. Celery takes the first two for bugs and
exits; after enough of the third the worker takes no more messages, and looks well.
"""

import logging
from collections.abc import Callable
from queue import Empty
from typing import Any

from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from redis.exceptions import RedisError

from blipq_worker.messages.envelope import Malformed, sound

log = logging.getLogger(__name__)

_loads = kombu_redis.loads  # type: ignore[attr-defined]
_deliver = virtual.Transport._deliver


class _InHand(kombu_redis.QoS):
    """The messages in hand. One that is done with leaves even if Redis does not hear of it: it is
    delivered once more when its visibility timeout is over, and finds its job ended.
    """

    def ack(self, delivery_tag: str) -> None:
        try:
            super().ack(delivery_tag)
        finally:
            virtual.QoS.ack(self, delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        try:
            super().reject(delivery_tag, requeue=requeue)
        finally:
            virtual.QoS.ack(self, delivery_tag)


def harden(dropped: Callable[[], None]) -> None:
    """Makes the worker outlive all three. ``dropped`` counts messages that are not ones.

    Every error of Redis is an outage: the consumer connects again until it has passed.
    """

    def parsed(text: str) -> Any:
        try:
            return _loads(text)
        except Exception as error:
            dropped()
            log.error("a message that is not one was dropped: %r: %.200s", error, text)
            raise Empty from error

    def deliver(transport: Any, raw: Any, queue: str) -> None:
        try:
            message = sound(raw, queue)
        except Malformed as error:
            dropped()
            log.error("a message that is not one was dropped: %s: %.200r", error, raw)
            return
        _deliver(transport, message, queue)

    kombu_redis.loads = parsed  # type: ignore[attr-defined]
    virtual.Transport._deliver = deliver  # type: ignore[method-assign, assignment]
    kombu_redis.Channel.QoS = _InHand
    for transport in (kombu_redis.Transport, kombu_redis.SentinelTransport):
        if RedisError not in transport.connection_errors:
            transport.connection_errors += (RedisError,)
