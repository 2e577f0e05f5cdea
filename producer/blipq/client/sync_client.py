"""The client: one verb per kind of job. What it shares with ``AsyncClient`` is in ``base``."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Unpack, cast

from blipq.client.backend import Backend, PerProcess
from blipq.client.base import ClientBase, Fields, embed_fields, folder_of, options_of, request_of
from blipq.client.forgetting import Forgetting, Forgotten, Unindex
from blipq.client.job import Job, last_expiry
from blipq.client.progress import Progress
from blipq.client.submitting import Submitting, traced
from blipq.contract import (
    Asks,
    CaptionRequest,
    CaptionResult,
    DescribeRequest,
    DescribeResult,
    EmbedDtype,
    EmbedMode,
    EmbedRequest,
    EmbedResult,
    Generation,
    Head,
    ImageRef,
    IndexEntry,
    JobFilter,
    JobInfo,
    MatchRequest,
    MatchResult,
    Options,
    Priority,
    Result,
    ResultT,
    SearchRequest,
    SearchResult,
    Turn,
    VQARequest,
    VQAResult,
)
from blipq.errors import BlipqError, QueueFull, QueueUnavailable
from blipq.ledger.acting import as_one
from blipq.ledger.changes import Change, Changing, target_of
from blipq.ledger.codec import Message, Polled, Prepared
from blipq.ledger.erasure import CHUNK as ERASED_AT_ONCE
from blipq.ledger.protocols import Producer
from blipq.s3.storage import Storage
from blipq.settings import Settings
from blipq.submission import ImageSource, Submission, turns
from blipq.transport.broker import Broker
from blipq.transport.notifications import Notifier


class Client(ClientBase):
    """Submits jobs and reads their results. Close it, or use it as a context.

        with Client() as client:
            job = client.caption("s3://uploads/cat.jpg")
            print(job.result(timeout=30).text)

    Without arguments it finds the services by ``BLIPQ_*`` variables, then a running local stack,
    then the defaults. Every verb takes the options of ``Options`` as keyword arguments. A local
    path or bytes are uploaded first.

    Threads may share it, and a process that forks may go on with it on both sides. ``backend``
    replaces the services, such as by ``blipq.testing.FakeBlipq``.
    """

    def __init__(
        self, settings: Settings | None = None, *, backend: Backend | None = None, **overrides: Any
    ) -> None:
        super().__init__(settings, overrides)
        backend = backend or Backend()
        self._services = PerProcess(lambda: backend.services(self.settings, self._id))
        self._services()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections. Jobs go on."""
        if (services := self._services.made) is not None:
            services.close()

    @property
    def ledger(self) -> Producer:
        """The job records."""
        return self._services().ledger

    @property
    def broker(self) -> Broker:
        """Publishes the ids of jobs."""
        return self._services().broker

    @property
    def storage(self) -> Storage:
        """Reads and writes objects in S3."""
        return self._services().storage

    @property
    def notifier(self) -> Notifier:
        """Hears when jobs end."""
        return self._services().notifier

    # -- verbs --

    def caption(
        self,
        image: ImageSource,
        prompt: str | None = None,
        *,
        generation: Generation | Mapping[str, Any] | None = None,
        best_of: int | None = None,
        min_confidence: float | None = None,
        **options: Unpack[Fields],
    ) -> Job[CaptionResult]:
        """Asks for a caption, optionally one that goes on from ``prompt``.

        ``best_of`` n: n captions ranked by image-text matching. ``min_confidence``: captions whose
        ``mean_token_probability`` is lower are marked as ``uncertain``.
        """
        fields: dict[str, Any] = {"prompt": prompt, "generation": generation, "best_of": best_of}
        fields["min_confidence"] = min_confidence
        return self._submit_request(CaptionRequest, image, fields, options)

    def vqa(
        self,
        image: ImageSource,
        questions: str | Sequence[str],
        *,
        history: Sequence[Turn | tuple[str, str]] | None = None,
        choices: Sequence[str] | None = None,
        generation: Generation | Mapping[str, Any] | None = None,
        min_confidence: float | None = None,
        **options: Unpack[Fields],
    ) -> Job[VQAResult]:
        """Asks one or many questions about an image.

        ``history`` holds earlier (question, answer) turns, oldest first. ``choices`` are the only
        answers allowed: they come back ranked, with probabilities.
        """
        fields: dict[str, Any] = {"questions": questions, "history": turns(history)}
        fields |= {"choices": choices, "generation": generation, "min_confidence": min_confidence}
        return self._submit_request(VQARequest, image, fields, options)

    def match(
        self,
        image: ImageSource,
        texts: str | Sequence[str],
        *,
        head: Head = "itm",
        explain: bool = False,
        **options: Unpack[Fields],
    ) -> Job[MatchResult]:
        """Asks how well each text matches: ``itm`` is a probability, ``itc`` a cosine.

        ``explain`` adds where ``itm`` looked.
        """
        return self._submit_request(
            MatchRequest, image, {"texts": texts, "head": head, "explain": explain}, options
        )

    def embed(
        self,
        image: ImageSource | None = None,
        text: str | None = None,
        *,
        mode: EmbedMode | None = None,
        dtype: EmbedDtype = "float16",
        index: str | Mapping[str, Any] | IndexEntry | None = None,
        **options: Unpack[Fields],
    ) -> Job[EmbedResult]:
        """Asks for features of an image, a text, or both read together (``multimodal``).

        Without ``mode``, what is given decides. With ``index`` the image goes into a search index.
        """
        return self._submit_request(
            EmbedRequest, image, embed_fields(image, text, mode, dtype, index), options
        )

    def describe(
        self,
        image: ImageSource,
        *,
        caption: bool = True,
        questions: str | Sequence[str] = (),
        texts: str | Sequence[str] = (),
        embed: bool = False,
        generation: Generation | Mapping[str, Any] | None = None,
        min_confidence: float | None = None,
        **options: Unpack[Fields],
    ) -> Job[DescribeResult]:
        """Asks for several things about an image, which is looked at once.

        ``texts`` are scored by probability; ``embed`` adds the image's features.
        """
        fields: dict[str, Any] = {
            "caption": caption,
            "questions": questions,
            "texts": texts,
            "embed": embed,
        }
        fields |= {"generation": generation, "min_confidence": min_confidence}
        return self._submit_request(DescribeRequest, image, fields, options)

    def search(
        self,
        index: str,
        text: str | None = None,
        *,
        image: ImageSource | None = None,
        top_k: int = 10,
        rerank: int = 128,
        filter: Mapping[str, str | Sequence[str]] | None = None,
        **options: Unpack[Fields],
    ) -> Job[SearchResult]:
        """Asks for the images of an index that are nearest to a text, or to an image.

        With a text the nearest ``rerank`` are looked at again, and ranked by matching. ``filter``
        names metadata that hits must have.
        """
        fields = {"index": index, "text": text, "top_k": top_k, "rerank": rerank, "filter": filter}
        return self._submit_request(SearchRequest, image, fields, options)

    # -- any kind --

    def submit(
        self,
        request: Asks[ResultT] | Submission,
        options: Options | None = None,
        *,
        id: str | None = None,
        tenant: str | None = None,
    ) -> Job[ResultT]:
        """Submits a request of any kind; when this returns, the job will reach an outcome.

        A ``Submission`` brings options and an id of its own.

        The same ``id`` or idempotency key with the same request is the same job, so a submit that
        raised QueueUnavailable can be repeated with its ``job_id``. A model that no worker serves
        now is logged as a warning: its jobs wait. ``tenant``: whose job it is; a ``Submission`` has
        its own. Raises IdempotencyConflict, UnknownModel, QueueFull, TenantLimited or
        QueueUnavailable.
        """
        submission = self._made(request, options or Options(), id, tenant)
        submission, span = traced(submission)
        with span:
            (recorded,) = self.ledger.submit_all([self._prepare(submission)])
            if isinstance(recorded, BlipqError):
                raise recorded
            if not isinstance(recorded, Message):
                return self._job(recorded)
            # A message that is not taken in time is published by the reconciler: the job is
            # recorded.
            self._publish([recorded])
        return self._job(recorded.id, submission.options)

    def submit_many(
        self,
        requests: Iterable[Asks[ResultT] | Submission],
        options: Options | None = None,
        *,
        timeout: float = 0.0,
        tenant: str | None = None,
    ) -> list[Job[ResultT]]:
        """Submits many requests, a chunk per round trip, and returns their jobs in order.

        The requests are taken as they are needed, so a generator of any length will do. A
        ``Submission`` brings options and an id of its own. For ``timeout`` seconds a chunk is tried
        again while the queue is full or Redis is away. Raises SubmitStopped, which has the jobs
        that are recorded and the submissions that may not be.
        """
        chosen = options or Options()
        submitting = Submitting(self._prepare, self._job, timeout)
        for request in requests:
            if submitting.add(self._made(request, chosen, None, tenant)):
                self._flush(submitting)
        self._flush(submitting)
        return submitting.jobs

    def job(self, id: str) -> Job[Result]:
        """A handle from a stored id. Looks nothing up."""
        return Job(id, self)

    # -- many jobs --

    def as_completed(
        self, jobs: Iterable[Job[ResultT]], timeout: float | None = None
    ) -> Iterator[Job[ResultT]]:
        """The jobs as they end, however they end; what they came to is read already.

        Thousands of jobs need one subscription and a poll of a few hundred of them a second.
        Raises ResultTimeout, JobNotFound and QueueUnavailable like ``Job.wait``.
        """
        jobs = list(jobs)
        ids = [job.id for job in jobs]
        for info in self.outcomes(ids, timeout, expires=last_expiry(jobs)):
            yield Job(info.id, self, info)

    def wait_all(
        self,
        jobs: Iterable[Job[ResultT]],
        timeout: float | None = None,
        *,
        progress: bool = False,
    ) -> list[Job[ResultT]]:
        """Waits until all jobs have ended, and returns them in their order.

        ``progress`` shows a bar on stderr. Raises like ``as_completed``.
        """
        jobs = list(jobs)
        ids = [job.id for job in jobs]
        ended = {}
        with Progress(len(set(ids)), shown=progress) as bar:
            for info in self.outcomes(ids, timeout, expires=last_expiry(jobs)):
                ended[info.id] = info
                bar.count(info)
        return [Job(id, self, ended[id]) for id in ids]

    def outcomes(
        self, ids: Iterable[str], timeout: float | None = None, *, expires: float | None = None
    ) -> Iterator[JobInfo]:
        """The jobs of these ids as they end, as the ledger has them.

        ``expires``: when the last of them does, on the clock of ``monotonic``, if that is known.
        """
        waiting = self._waiting(ids, timeout, expires)
        notifier = self.notifier
        with notifier.watch(waiting.open) as inbox:
            while waiting.open:
                if due := waiting.due(len(notifier), notifier.subscribed_since(inbox)):
                    found = self._poll(due)
                    if isinstance(found, Polled) and found.elsewhere:
                        notifier.listen(inbox, found.elsewhere.values())
                    yield from waiting.polled(due, found)
                if waiting.open:
                    waiting.notify(inbox.take(waiting.pause()))

    # -- queues, and many jobs, for operators --

    def pause(self, queue: str) -> int:
        """Lets no worker take a job from a queue, such as ``blipq.default.low``.

        Jobs that run end, others go on to come and wait, and their deadlines go on. Returns how
        many wait. Raises UnknownModel, and InvalidRequest for what is no queue.
        """
        return self.ledger.pause(queue)

    def resume(self, queue: str) -> int:
        """Lets workers take jobs from a queue again; how many wait."""
        return self.ledger.resume(queue)

    def limit(
        self, tenant: str, *, open_jobs: int | None = None, rate: float | None = None
    ) -> None:
        """Limits a tenant's open jobs, and how many it may submit a second.

        Both are replaced: one that is not given is none. Beyond them its submits raise
        TenantLimited, whatever process they come from; jobs that are open go on. Of a rate two
        seconds' jobs may come at once. The tenant ``*`` is all that have no limits of their own;
        without both limits it has none of its own. Raises InvalidRequest.
        """
        self.ledger.limit(tenant, open_jobs, rate)

    def count(self, where: JobFilter) -> int:
        """How many jobs match, open ones and those that are kept; some may be counted twice."""
        return self._change(Change.of("match", where))

    def cancel_all(self, which: JobFilter | Sequence[str], *, dry_run: bool = False) -> int:
        """Cancels jobs: all of a filter that have not ended, or those of these ids.

        Returns how many. A ``dry_run`` only counts them. The jobs are gone through in chunks: one
        that is submitted meanwhile may be missed.
        """
        return self._change(Change.of("cancel", which, dry_run=dry_run))

    def retry_all(self, which: JobFilter | Sequence[str], *, dry_run: bool = False) -> int:
        """Queues jobs again that failed, expired or were cancelled, with fresh attempts.

        Like ``cancel_all``. Their deadline is ``default_expires_in`` from now. Raises QueueFull
        where too many jobs are open for all of them, and TenantLimited at the end, when all others
        are queued, where some are of a tenant that has its open jobs.
        """
        return self._change(Change.of("retry", which, dry_run=dry_run))

    def expedite(
        self,
        which: JobFilter | Sequence[str],
        priority: Priority = Priority.HIGH,
        *,
        dry_run: bool = False,
    ) -> int:
        """Moves jobs that wait into the queue of another priority, like ``cancel_all``."""
        options = {"priority": Priority(priority), "dry_run": dry_run}
        return self._change(Change.of("move", which, **options))

    def forget(
        self,
        which: JobFilter | Sequence[str],
        *,
        unindex: Unindex | None = None,
        only_ended: bool = False,
    ) -> Forgotten:
        """Erases jobs: all of a filter, or those of these ids, and what they left.

        Open ones are cancelled first, without an event. Then go the images that clients uploaded
        for them, unless open jobs name them, their outputs, records, results, events and
        idempotency keys. ``unindex`` removes images from search indexes, such as
        ``blipq.index.store.Indexes(settings).remove``. Needs s3:DeleteObject for what is in S3.

        ``only_ended``: those that are open by then stay as they are.

        ``left`` lists what it may not delete. Raises QueueUnavailable: it can be repeated then.
        """
        forgetting = Forgetting(self.storage, unindex)
        changing = Changing(Change.of("match", which))
        with as_one(target_of(which)):
            while (chunk := changing.next()) is not None:
                changed = self.ledger.change(chunk)
                for at in range(0, len(changed.ids), ERASED_AT_ONCE):
                    ids = changed.ids[at : at + ERASED_AT_ONCE]
                    self._forget(forgetting, ids, only_ended)
                changing.took(changed)
        return forgetting.report

    def _forget(self, forgetting: Forgetting, ids: Sequence[str], only_ended: bool) -> None:
        jobs = self.ledger.forget(ids, erase=False, only_ended=only_ended)
        uploads = forgetting.uploads(jobs)
        named = self.ledger.named(uploads)
        forgetting.clear(jobs, uploads, named)
        closed = [job.id for job in jobs]
        forgetting.erased(self.ledger.forget(closed, erase=True))

    def _change(self, change: Change) -> int:
        changing = Changing(change)
        with as_one():
            while (chunk := changing.next()) is not None:
                changed = self.ledger.change(chunk)
                if changed.messages:
                    self.broker.publish_all(changed.messages)
                changing.took(changed)
        return changing.count

    def _poll(self, ids: list[str]) -> Polled | QueueUnavailable:
        try:
            return self.ledger.poll(ids, notify=self._id)
        except QueueUnavailable as error:
            return error

    def _made(
        self, request: Asks[Any] | Submission, options: Options, id: str | None, tenant: str | None
    ) -> Submission:
        """A submission with an id and a tenant, where it brings none."""
        self._check_cell(request, options, id)
        if isinstance(request, Submission):
            return request
        return self._submission(request, options, id or self.ledger.make_id(options), tenant)

    def _job(self, id: str, options: Options | None = None) -> Job[Any]:
        """A handle; ``options`` are those of a job that was recorded just now."""
        return Job(id, self, expires=self._expiry(options))

    def _submit_request(
        self,
        request: type[Asks[ResultT]],
        image: ImageSource | None,
        fields: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> Job[ResultT]:
        """Checks the options, uploads the image unless it is in S3, and submits."""
        given = dict(options)
        tenant = self._tenant(given.pop("tenant", None))
        chosen = options_of(fields, given)
        made = request_of(request, self._reference(image, folder_of(tenant)), fields)
        return self.submit(made, chosen, tenant=tenant)

    def _reference(self, image: ImageSource | None, folder: str) -> str | ImageRef | None:
        source = self._source(image)
        if source is None:
            return cast("str | ImageRef | None", image)
        return self.storage.upload(source, folder=folder)

    def _prepare(self, submission: Submission) -> Prepared:
        return self.broker.with_message(self.ledger.prepare(submission, notify=self._id))

    def _publish(self, messages: list[Message]) -> None:
        self.broker.publish_all(messages)
        self._unserved.warn(messages)

    def _flush(self, submitting: Submitting) -> None:
        while submitting.waiting:
            try:
                answers = self.ledger.submit_all(submitting.waiting)
            except (QueueUnavailable, QueueFull) as error:
                answers = [error]
            if messages := submitting.settle(answers):
                self._publish(messages)
            time.sleep(submitting.pause())
        submitting.check()
