"""One ``submit_many``: what is recorded, what waits, and whether to go on.

Pure, so that every client shares it.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from blipq.backoff import Backoff
from blipq.contract import Options
from blipq.errors import BlipqError, InvalidRequest, SubmitStopped
from blipq.ledger.codec import Message, Prepared, Recorded, message_of
from blipq.submission import Submission
from blipq.telemetry import names, tracing
from blipq.telemetry.trace import NOTHING, Trace, parsed

#: What one round trip records at most: Redis serves nobody else meanwhile.
MAX_JOBS = 200
MAX_CHARACTERS = 2**20
#: Pauses after a refusal that may pass.
REFUSED = Backoff(0.05, 1.0)


def traced(submission: Submission) -> tuple[Submission, Trace]:
    """A submission at its place in a trace, and the span of its submit, which the caller ends."""
    parent = parsed(submission.traceparent) or tracing.ambient()
    if not (parent or tracing.is_on()):
        return submission, NOTHING
    message = message_of(submission)
    span = tracing.begun(
        f"{names.SUBMIT} {message.queue}",
        parent,
        kind="producer",
        attributes=names.of_message(
            names.SUBMIT, "send", message.queue, submission.id, message.kind.value
        ),
    )
    return replace(submission, traceparent=span.context or None), span


class Submitting:
    """Jobs on their way into the ledger, a chunk at a time, in order."""

    def __init__(
        self,
        prepare: Callable[[Submission], Prepared],
        handle: Callable[[str, Options | None], Any],
        timeout: float,
    ) -> None:
        self.jobs: list[Any] = []
        #: Taken from the caller, and not known to be recorded.
        self.waiting: list[Prepared] = []
        self._spans: deque[Trace] = deque()  # of those that wait, in their order
        self._prepare = prepare
        self._handle = handle
        self._timeout = timeout
        self._invalid: tuple[Submission, InvalidRequest] | None = None
        self._start_chunk()

    def _start_chunk(self) -> None:
        self._size = 0
        self._unsure = False
        self._refusal: BlipqError | None = None
        self._ending: float | None = None
        self._tries = 0

    def add(self, submission: Submission) -> bool:
        """Takes a submission; whether the chunk is to be sent now."""
        submission, span = traced(submission)
        try:
            prepared = self._prepare(submission)
        except InvalidRequest as error:
            span.end(error)
            self._invalid = submission, error
            return True
        self.waiting.append(prepared)
        self._spans.append(span)
        self._size += prepared.size
        return len(self.waiting) >= MAX_JOBS or self._size >= MAX_CHARACTERS

    def settle(self, answers: Sequence[Recorded | BlipqError]) -> list[Message]:
        """Takes in what became of the chunk, up to a refusal; the messages to publish."""
        messages = []
        for answer in answers:
            if isinstance(answer, BlipqError):
                self._refusal = answer
                # It may be recorded without an answer, or behind a refusal of another cell.
                self._unsure = True
                break
            messages += self._recorded(answer)
        if not self.waiting:
            self._start_chunk()
        return messages

    def pause(self) -> float:
        """Seconds to wait before the rest of the chunk is tried. Raises SubmitStopped."""
        refusal, self._refusal = self._refusal, None
        if refusal is None:
            return 0.0
        now = time.monotonic()
        self._ending = self._ending or now + self._timeout
        if not refusal.retryable or now >= self._ending:
            raise self._stopped(refusal) from refusal
        pause = REFUSED.pause_s(self._tries)
        self._tries += 1
        return min(pause, self._ending - now)

    def check(self) -> None:
        """After a chunk: raises SubmitStopped if the request behind it is invalid."""
        if self._invalid is not None:
            raise self._stopped(self._invalid[1]) from self._invalid[1]

    def _recorded(self, answer: Recorded) -> list[Message]:
        prepared = self.waiting.pop(0)
        submission = prepared.submission
        self._spans.popleft().end()
        id = answer.id if isinstance(answer, Message) else answer
        self.jobs.append(self._handle(id, submission.options if id == submission.id else None))
        if isinstance(answer, Message):
            return [answer]
        if prepared.publishes or not self._unsure or id != submission.id:
            return []
        # Recorded by a try that got no answer: nobody has published it. Twice does no harm.
        return [message_of(submission)]

    def _stopped(self, cause: BlipqError) -> SubmitStopped:
        while self._spans:
            self._spans.popleft().end(cause)
        pending = [prepared.submission for prepared in self.waiting]
        if self._invalid is not None:
            pending.append(self._invalid[0])
        return SubmitStopped(cause, self.jobs, pending)
