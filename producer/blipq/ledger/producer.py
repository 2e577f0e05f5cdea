"""A producer's client of the ledger: it records jobs, reads them and cancels them."""

from collections.abc import Iterable, Sequence
from typing import cast

from blipq.contract import JobInfo, Options
from blipq.errors import BlipqError
from blipq.ledger import changes, codec
from blipq.ledger.changes import Changed, Chunk
from blipq.ledger.codec import Cancelled, Polled, Prepared, Recorded
from blipq.ledger.connection import redis_errors
from blipq.ledger.erasure import Erased, erased, named, named_arguments
from blipq.ledger.scripts.runner import ScriptRunner
from blipq.submission import Submission


class ProducerLedger(ScriptRunner):
    """What ``Producer`` promises, on Redis."""

    def prepare(self, submission: Submission, *, notify: str) -> Prepared:
        """Makes a job ready to be recorded."""
        return codec.prepare(submission, self.settings, notify=notify)

    def make_id(self, options: Options) -> str:
        """An id for a new job."""
        return codec.made_id(self.settings)

    def submit(self, submission: Submission, *, notify: str) -> Recorded:
        """Records a job once."""
        (answer,) = self.submit_all([self.prepare(submission, notify=notify)])
        if isinstance(answer, BlipqError):
            raise answer
        return answer

    def submit_all(self, jobs: Sequence[Prepared]) -> list[Recorded | BlipqError]:
        """Records jobs, each once and in order."""
        with redis_errors(codec.only(job.submission.id for job in jobs)):
            answer = self._run("submit", *codec.submit_arguments(jobs, self.settings))
        return codec.submitted(jobs, answer, self.settings.cell)

    def check_models(self, models: Iterable[str]) -> None:
        """Raises UnknownModel if a job for one of these models would be refused."""
        arguments = codec.check_arguments(models, self.settings)
        with redis_errors():
            answer = self._run("unknown_models", *arguments)
        codec.check(answer)

    def read(self, id: str) -> JobInfo | None:
        """A job as it is now; None for an unknown id."""
        with redis_errors(id):
            return codec.job_of(id, self._run("read", id, 1))

    def poll(self, ids: Sequence[str], *, notify: str) -> Polled:
        """Which of these jobs have ended."""
        with redis_errors(codec.only(ids)):
            return codec.polled(self._run("poll", *codec.poll_arguments(ids, notify)))

    def cancel(self, id: str) -> Cancelled:
        """Cancels a job."""
        with redis_errors(id):
            return cast(Cancelled, self._act("cancel", id, "cancel", id))

    def pause(self, queue: str) -> int:
        """Lets no worker take a job from a queue."""
        return self._pause(queue, True)

    def resume(self, queue: str) -> int:
        """Lets workers take jobs from a queue again."""
        return self._pause(queue, False)

    def _pause(self, queue: str, pause: bool) -> int:
        arguments = changes.pause_arguments(queue, pause, self.settings)
        with redis_errors():
            answer = self._act("pause" if pause else "resume", queue, "pause", *arguments)
        return changes.waiting(queue, answer)

    def limit(self, tenant: str, open_jobs: int | None, rate: float | None) -> None:
        """Limits a tenant."""
        arguments = codec.limit_arguments(tenant, open_jobs, rate)
        target = codec.limits_text(tenant, open_jobs, rate)
        with redis_errors():
            self._act("limit", target, "limit", *arguments)

    def change(self, chunk: Chunk) -> Changed:
        """Makes one chunk of a change."""
        arguments = changes.arguments(chunk, self.settings)
        noted = changes.noted(chunk)
        with redis_errors():
            if noted is None:
                return changes.changed(self._run("change", *arguments))
            return changes.changed(self._act(*noted, "change", *arguments))

    def forget(self, ids: Sequence[str], *, erase: bool, only_ended: bool = False) -> list[Erased]:
        """Ends jobs, or erases their records."""
        with redis_errors():
            if not erase:  # the first of two steps, which is no action yet
                step = "close ended" if only_ended else "close"
                return erased(self._run("forget", step, *ids))
            answer = self._act("forget", " ".join(ids), "forget", "erase", *ids)
        return erased(answer)

    def named(self, uris: Sequence[str]) -> set[str]:
        """Which of these images open jobs name."""
        found: set[str] = set()
        cursor = "0"
        while uris:
            with redis_errors():
                answer = self._run("named", *named_arguments(cursor, uris))
            cursor, more = named(answer)
            found |= more
            if cursor == "0":
                break
        return found

    def release(self, ids: Sequence[str]) -> int:
        """Deletes the records of jobs that have ended."""
        with redis_errors():
            return int(self._run("release", *ids))
