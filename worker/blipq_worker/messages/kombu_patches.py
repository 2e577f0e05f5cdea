"""Faults of Celery's transports that would end a worker, mended for this process.

Seen on kombu 5.7: a message that is not one (anybody can push to a list) raises out of the event
loop; so does an error reply of Redis, as while it fails over. Celery takes both for bugs and exits.
What is in hand when a connection closes, and cannot go back to its list, is written to a file that
nobody reads.
"""

import json
import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty
from typing import Any

from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from redis.exceptions import RedisError

from blipq_worker.messages.envelope import Malformed, sound

log = logging.getLogger(__name__)

_deliver = virtual.Transport._deliver


class _InHand(virtual.QoS):
    """The messages in hand, which Redis has no copy of: the ledger brings back what dies with them.

    At the end, and when the connection closes, they go back to their lists, as far as Redis takes
    them.
    """

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        try:
            super().reject(delivery_tag, requeue=requeue)
        finally:  # or it would keep its place for ever
            self.ack(delivery_tag)

    def restore_unacked(self) -> None:
        restore: Callable[[], Any] = super().restore_unacked
        if errors := restore():
            log.warning("messages that Redis did not take back: %d: %s", len(errors), errors[0][0])


#: Messages that a read takes beside its first; and reads that take one after there were no more.
MOST_AT_ONCE, SKIP = 16, 16
_TAKE = """
local count = math.min(tonumber(ARGV[1]), math.floor(redis.call('LLEN', KEYS[1]) / 8))
return count > 0 and redis.call('RPOP', KEYS[1], count) or {}
"""


def _keeping(channel: Any) -> Any:
    """A class of channels whose messages in hand are kept as above.

    Where a backlog waits, a read takes several: as many as there is room for, but no more than an
    eighth of the list, so that other workers get theirs.
    """

    class Channel(channel):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.QoS = _InHand  # kombu has set its own, without acknowledgements in Redis
            self._reads_to_skip = 0

        def _brpop_read(self, **options: Any) -> Any:
            taken = super()._brpop_read(**options)
            if self._reads_to_skip:
                self._reads_to_skip -= 1
            else:
                self._take_more(self._queue_cycle.items[-1])  # the one that was read goes last
            return taken

        def _take_more(self, queue: str) -> None:
            room = self.qos.can_consume_max_estimate() or 0
            with self.conn_or_acquire() as client:
                texts = client.eval(_TAKE, 1, queue, min(room, MOST_AT_ONCE)) if room else []
            if not texts:
                self._reads_to_skip = SKIP
            left = deque(texts)
            try:
                while left:
                    self._deliver_text(left.popleft(), queue)
            except BaseException:
                if left:
                    with self.conn_or_acquire() as client:
                        client.rpush(queue, *reversed(left))
                raise

        def _deliver_text(self, text: bytes, queue: str) -> None:
            with suppress(Empty):  # it is no message
                self.connection._deliver(kombu_redis.loads(text), queue)  # type: ignore[attr-defined]

    return Channel


def harden(dropped: Callable[[], None]) -> None:
    """Makes the worker outlive them. ``dropped`` counts messages that are not ones.

    Every error of Redis is an outage: the consumer connects again until it has passed.
    """

    def parsed(text: str) -> Any:
        try:
            return json.loads(text)  # kombu's own also makes dates and the like, in Python
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
    for transport in (kombu_redis.Transport, kombu_redis.SentinelTransport):
        transport.Channel = _keeping(transport.Channel)
        if RedisError not in transport.connection_errors:
            transport.connection_errors += (RedisError,)
