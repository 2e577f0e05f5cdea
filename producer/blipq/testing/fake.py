"""The fake: one worker that gives prepared answers, and the services that clients need."""

import threading
from collections.abc import Callable, Iterable
from typing import Any, cast

from blipq.client.backend import AsyncServices, Backend, Services
from blipq.contract import ErrorCode, JobError, JobInfo, Kind, Receipt, Request, Result, Status
from blipq.contract.base import Output
from blipq.errors import WorkError
from blipq.ledger.codec import Message
from blipq.ledger.keys import ended_channel
from blipq.settings import Settings
from blipq.testing.ledger import InMemoryAsyncLedger, InMemoryLedger, Jobs
from blipq.testing.services import (
    InMemoryAsyncNotifier,
    InMemoryBroker,
    InMemoryNotifier,
    InMemoryStorage,
)

#: The outcome of a job: a result, an error, or a function that returns or raises one.
Answer = Result | JobError | WorkError | Callable[[Any], Result]


class FakeBlipq(Backend):
    """An in-memory blipq with one worker that gives prepared answers."""

    def __init__(self) -> None:
        #: Objects by their s3:// URI: uploads, and what jobs wrote to ``output``.
        self.objects: dict[str, bytes] = {}
        self._jobs = Jobs(self._notify, self.deliver)
        self._notifiers: list[InMemoryNotifier | InMemoryAsyncNotifier] = []
        self._answers: dict[Kind, list[Answer]] = {}
        self._running = True
        self._queue: list[Message] = []
        # One job at a time. Reentrant: a function given as an answer may itself submit a job.
        self._lock = threading.RLock()

    # -- for the test --

    def answer(self, kind: str, *answers: Answer) -> None:
        """Sets the outcomes of the next jobs of a kind, in order; the last one stays."""
        self._answers[Kind(kind)] = list(answers)

    def stop_worker(self) -> None:
        """From now on jobs stay queued."""
        self._running = False

    def start_worker(self) -> None:
        """Runs the jobs that wait, and from now on every job at once."""
        self._running = True
        self.deliver([])

    @property
    def requests(self) -> list[Request]:
        """The requests of all jobs, in order."""
        return [submission.request for submission in self._jobs.submissions()]

    @property
    def jobs(self) -> list[JobInfo]:
        """All jobs, in order."""
        return self._jobs.infos()

    # -- for clients --

    def services(self, settings: Settings, client: str) -> Services:
        """The services of a client."""
        notifier = InMemoryNotifier(lambda: cast(Any, None), ended_channel(client))
        self._notifiers.append(notifier)
        return Services(
            InMemoryLedger(self._jobs, settings),
            InMemoryBroker(self.deliver, settings),
            InMemoryStorage(self.objects, settings),
            notifier,
        )

    def async_services(self, settings: Settings, client: str) -> AsyncServices:
        """The services of an asynchronous client."""
        notifier = InMemoryAsyncNotifier(lambda: cast(Any, None), ended_channel(client))
        self._notifiers.append(notifier)
        return AsyncServices(
            InMemoryAsyncLedger(self._jobs, settings),
            InMemoryBroker(self.deliver, settings),
            InMemoryStorage(self.objects, settings),
            notifier,
        )

    def deliver(self, messages: Iterable[Message]) -> None:
        """Gives messages to the worker."""
        with self._lock:
            self._queue.extend(messages)
            while self._running and self._queue:
                self._work(self._queue.pop(0).id)

    # -- the worker --

    def _notify(self, id: str) -> None:
        for notifier in self._notifiers:
            notifier.put(id)

    def _work(self, id: str) -> None:
        submission = self._jobs.begin(id)
        if submission is None:
            return
        outcome = self._outcome(submission.request)
        if isinstance(outcome, JobError):
            self._jobs.end(id, Status.FAILED, error=outcome, receipt=Receipt())
            return
        stored = self._jobs.end(id, Status.SUCCEEDED, result=outcome, receipt=Receipt())
        if stored and submission.options.output:
            text = outcome.model_dump_json(exclude_none=True)
            self.objects[submission.options.output] = text.encode()

    def _outcome(self, request: Request) -> Result | JobError:
        try:
            answer = self._next_answer(request.kind)
            if callable(answer):
                answer = answer(request)
            if isinstance(answer, WorkError):
                raise answer
            if not isinstance(answer, Output):
                raise TypeError(f"an answer must be a result, not {type(answer).__name__}")
        except WorkError as error:
            return JobError(code=error.code, message=str(error), retryable=error.retryable)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            return JobError(code=ErrorCode.INTERNAL, message=message)
        return answer

    def _next_answer(self, kind: Kind) -> Answer:
        answers = self._answers.get(kind)
        if not answers:
            how = f"set one with FakeBlipq.answer({str(kind)!r}, ...)"
            raise WorkError(ErrorCode.INTERNAL, f"no answer for {kind} jobs: {how}")
        return answers.pop(0) if len(answers) > 1 else answers[0]
