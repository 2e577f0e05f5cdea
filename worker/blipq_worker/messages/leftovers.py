"""Messages that workers of an earlier version took with them as they died.

They kept a copy of each message in hand under Kombu's keys ``unacked`` and ``unacked_index``, and
put back what was an hour old. Workers keep no copies any more, so the last earlier ones would leave
theirs for ever: among them jobs that other clients sent whole, of which nobody has a record.
"""

import json
import logging
import time
from typing import Any, cast

from blipq.ledger import keys
from blipq.ledger.connection import redis_errors

log = logging.getLogger(__name__)

#: As earlier versions have it (``visibility_timeout``).
AGE_S = 3600
#: Copies that one call looks at.
SLICE = 100


class Leftovers:
    """Puts them back into their queues. broker: a client of the broker's Redis."""

    def __init__(self, broker: Any) -> None:
        self._broker = broker
        # Other applications may keep theirs under the same keys: those are passed over.
        self._offset = 0

    def put_back(self) -> None:
        """Looks at the next slice. Raises QueueUnavailable and QueueFull."""
        with redis_errors():
            tags = self._next()
            copies = self._broker.hmget(keys.UNACKED, tags) if tags else []
            for tag, copy in zip(tags, copies, strict=True):
                self._put_back(tag, copy)

    def _next(self) -> list[str]:
        until, offset = time.time() - AGE_S, self._offset
        found = self._broker.zrange(
            keys.UNACKED_INDEX, "-inf", until, byscore=True, offset=offset, num=SLICE
        )
        self._offset = offset + SLICE if len(found) == SLICE else 0
        return cast("list[str]", found)

    def _put_back(self, tag: str, copy: str | None) -> None:
        """In one transaction, so that no crash loses it; put back twice, it does no harm."""
        try:
            message, _, queue = json.loads(copy or "")
        except (ValueError, TypeError, RecursionError):
            return
        if not isinstance(queue, str) or keys.broker_key(queue) is None:
            return
        with self._broker.pipeline() as pipe:
            pipe.zrem(keys.UNACKED_INDEX, tag)
            pipe.hdel(keys.UNACKED, tag)
            pipe.rpush(queue, json.dumps(message))
            pipe.execute()
        log.warning("a message that a worker of an earlier version had taken is back in %s", queue)
