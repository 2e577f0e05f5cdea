"""Goes on through an outage of Redis: calls of the ledger that may be repeated are."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from redis.exceptions import RedisError

from blipq.errors import QueueFull, QueueUnavailable
from blipq_worker.jobs.errors import HandBack

log = logging.getLogger(__name__)

#: How often Redis is called again while it is away.
FIRST_PAUSE_S, LAST_PAUSE_S = 0.1, 2.0
#: What Redis answers while it is away, full or broken; the answer itself may have been lost.
UNAVAILABLE = (QueueUnavailable, RedisError)
UNANSWERED = (*UNAVAILABLE, QueueFull)

AnswerT = TypeVar("AnswerT")


def until_answered(
    call: Callable[[], AnswerT],
    stopping: Callable[[], bool],
    unanswered: tuple[type[Exception], ...] = UNANSWERED,
) -> AnswerT:
    """What the ledger answers; ``call`` must be one that can be repeated.

    Raises HandBack if the worker stops meanwhile.
    """
    pause = FIRST_PAUSE_S
    while True:
        try:
            return call()
        except unanswered as error:
            if stopping():
                raise HandBack from error
        time.sleep(pause)
        pause = min(2 * pause, LAST_PAUSE_S)


def written(write: Callable[[], AnswerT], what: str, until: float) -> AnswerT | None:
    """What Redis answers to a write that may be repeated; None if nothing ``until`` (monotonic).

    what: the jobs that it is about, for the log.
    """
    pause = FIRST_PAUSE_S
    while True:
        try:
            return write()
        except UNANSWERED as error:
            log.warning("%s: Redis has not taken what became of it: %s", what, error)
        left = until - time.monotonic()
        if left <= 0:
            return None
        time.sleep(min(pause, left))
        pause = min(2 * pause, LAST_PAUSE_S)
