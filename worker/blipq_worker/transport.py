"""Two faults of Celery's Redis transport that would end a worker, mended for this process.

Both were seen on kombu 5.7: a message that is not one (anybody can push to a list) raises out of
the event loop, and so does a Redis that has no memory left to note a message as taken. Celery
takes either for a bug and exits.
"""

import logging
from queue import Empty
from typing import Any

from kombu.transport import redis as kombu_redis
from redis.exceptions import OutOfMemoryError

log = logging.getLogger(__name__)

_loads = kombu_redis.loads  # type: ignore[attr-defined]


def harden() -> None:
    """Makes the worker outlive both: the first is dropped, the second is an outage."""
    kombu_redis.loads = _message  # type: ignore[attr-defined]
    transport = kombu_redis.Transport
    if OutOfMemoryError not in transport.connection_errors:
        transport.connection_errors += (OutOfMemoryError,)


def _message(text: str) -> Any:
    """What kombu stored, as JSON: a message in a queue, or one that was taken with its address.
    What is not a message is logged and skipped, as if nothing had come.
    """
    try:
        message = _loads(text)
        if isinstance(message, list):  # a message that was taken, with its exchange and key
            return message
        message["body"], message["headers"], message["properties"]["delivery_info"]
        message["properties"]["delivery_tag"]
    except (ValueError, TypeError, KeyError) as error:
        log.error("a message that is not one was dropped: %s: %.200s", repr(error), text)
        raise Empty from error
    return message
