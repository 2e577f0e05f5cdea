"""Recording submissions through trouble: for commands that must not lose one, and can wait."""

from collections.abc import Callable, Sequence
from typing import Any, cast

from blipq.backoff import Backoff
from blipq.client.job import Job
from blipq.client.sync_client import Client
from blipq.errors import BlipqError, SubmitStopped
from blipq.submission import Submission

#: Pauses while the queue is full or away.
AWAY = Backoff(0.2, 5.0)


def record_all(
    client: Client,
    submissions: Sequence[Submission],
    wait: Callable[[BlipqError, float], None],
) -> list[str | BlipqError]:
    """The job's id of each submission, or why it can never be one, in order.

    While the queue is full or away, ``wait(why, seconds)`` is called and the rest is tried again,
    for as long as it returns.
    """
    answers: list[str | BlipqError] = []
    tries = 0
    while len(answers) < len(submissions):
        try:
            jobs: list[Job[Any]] = client.submit_many(submissions[len(answers) :])
            answers += [job.id for job in jobs]
        except SubmitStopped as stopped:
            answers += [job.id for job in stopped.jobs]
            cause = cast(BlipqError, stopped.__cause__)
            if not cause.retryable:
                answers.append(cause)
                continue
            tries = 0 if stopped.jobs else tries + 1
            wait(cause, AWAY.pause_s(tries))
    return answers
