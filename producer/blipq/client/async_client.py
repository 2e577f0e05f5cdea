"""The client for an event loop: the verbs of ``Client``, awaited."""

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from types import TracebackType
from typing import Any, Unpack, cast

from blipq.client.backend import Backend
from blipq.client.base import ClientBase, Fields, embed_fields, folder_of, options_of, request_of
from blipq.client.coalescing import PollsOfCells
from blipq.client.forgetting import Forgetting, Forgotten, Unindex
from blipq.client.job import AsyncJob, last_expiry
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
from blipq.ledger.protocols import AsyncProducer
from blipq.s3.storage import Storage
from blipq.settings import Settings
from blipq.submission import ImageSource, Submission, turns
from blipq.transport.async_notifications import AsyncNotifier
from blipq.transport.broker import Broker, patience_s


class AsyncClient(ClientBase):
    """Submits jobs and reads their results, in one event loop. Close it, or use it as a context.

        async with AsyncClient() as client:
            job = await client.caption("s3://uploads/cat.jpg")
            print((await job.result(timeout=30)).text)

    Verbs, arguments and errors are those of ``Client``. Nothing blocks the loop: files are read and
    uploaded on threads, and messages are published by one. A call that is cancelled has either
    recorded its job or not; an idempotency key makes it safe to repeat.
    """

    def __init__(
        self, settings: Settings | None = None, *, backend: Backend | None = None, **overrides: Any
    ) -> None:
        super().__init__(settings, overrides)
        self._services = (backend or Backend()).async_services(self.settings, self._id)
        cells = self.settings.cells if self.settings.is_fleet else ()
        self._polls = PollsOfCells(self._poll, cells)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the connections. Jobs go on."""
        await self._polls.aclose()
        await self._services.aclose()

    @property
    def ledger(self) -> AsyncProducer:
        """The job records."""
        return self._services.ledger

    @property
    def broker(self) -> Broker:
        """Publishes the ids of jobs."""
        return self._services.broker

    @property
    def storage(self) -> Storage:
        """Reads and writes objects in S3; its calls block."""
        return self._services.storage

    @property
    def notifier(self) -> AsyncNotifier:
        """Hears when jobs end."""
        return self._services.notifier

    # -- verbs --

    async def caption(
        self,
        image: ImageSource,
        prompt: str | None = None,
        *,
        generation: Generation | Mapping[str, Any] | None = None,
        best_of: int | None = None,
        min_confidence: float | None = None,
        **options: Unpack[Fields],
    ) -> AsyncJob[CaptionResult]:
        """Asks for a caption, like ``Client.caption``."""
        fields: dict[str, Any] = {"prompt": prompt, "generation": generation, "best_of": best_of}
        fields["min_confidence"] = min_confidence
        return await self._submit_request(CaptionRequest, image, fields, options)

    async def vqa(
        self,
        image: ImageSource,
        questions: str | Sequence[str],
        *,
        history: Sequence[Turn | tuple[str, str]] | None = None,
        choices: Sequence[str] | None = None,
        generation: Generation | Mapping[str, Any] | None = None,
        min_confidence: float | None = None,
        **options: Unpack[Fields],
    ) -> AsyncJob[VQAResult]:
        """Asks one or many questions about an image, like ``Client.vqa``."""
        fields: dict[str, Any] = {"questions": questions, "history": turns(history)}
        fields |= {"choices": choices, "generation": generation, "min_confidence": min_confidence}
        return await self._submit_request(VQARequest, image, fields, options)

    async def match(
        self,
        image: ImageSource,
        texts: str | Sequence[str],
        *,
        head: Head = "itm",
        explain: bool = False,
        **options: Unpack[Fields],
    ) -> AsyncJob[MatchResult]:
        """Asks how well each text matches, like ``Client.match``."""
        return await self._submit_request(
            MatchRequest, image, {"texts": texts, "head": head, "explain": explain}, options
        )

    async def embed(
        self,
        image: ImageSource | None = None,
        text: str | None = None,
        *,
        mode: EmbedMode | None = None,
        dtype: EmbedDtype = "float16",
        index: str | Mapping[str, Any] | IndexEntry | None = None,
        **options: Unpack[Fields],
    ) -> AsyncJob[EmbedResult]:
        """Asks for features of an image, a text or both, like ``Client.embed``."""
        return await self._submit_request(
            EmbedRequest, image, embed_fields(image, text, mode, dtype, index), options
        )

    async def describe(
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
    ) -> AsyncJob[DescribeResult]:
        """Asks for several things about an image, like ``Client.describe``."""
        fields: dict[str, Any] = {
            "caption": caption,
            "questions": questions,
            "texts": texts,
            "embed": embed,
        }
        fields |= {"generation": generation, "min_confidence": min_confidence}
        return await self._submit_request(DescribeRequest, image, fields, options)

    async def search(
        self,
        index: str,
        text: str | None = None,
        *,
        image: ImageSource | None = None,
        top_k: int = 10,
        rerank: int = 128,
        filter: Mapping[str, str | Sequence[str]] | None = None,
        **options: Unpack[Fields],
    ) -> AsyncJob[SearchResult]:
        """Asks for the images of an index that are nearest, like ``Client.search``."""
        fields = {"index": index, "text": text, "top_k": top_k, "rerank": rerank, "filter": filter}
        return await self._submit_request(SearchRequest, image, fields, options)

    # -- any kind --

    async def submit(
        self,
        request: Asks[ResultT] | Submission,
        options: Options | None = None,
        *,
        id: str | None = None,
        tenant: str | None = None,
    ) -> AsyncJob[ResultT]:
        """Submits a request of any kind, like ``Client.submit``."""
        submission = await self._made(request, options or Options(), id, tenant)
        submission, span = traced(submission)
        with span:
            (recorded,) = await self.ledger.submit_all([self._prepare(submission)])
            if isinstance(recorded, BlipqError):
                raise recorded
            if not isinstance(recorded, Message):
                return self._job(recorded)
            await self._publish([recorded])
        return self._job(recorded.id, submission.options)

    async def submit_many(
        self,
        requests: Iterable[Asks[ResultT] | Submission] | AsyncIterable[Asks[ResultT] | Submission],
        options: Options | None = None,
        *,
        timeout: float = 0.0,
        tenant: str | None = None,
    ) -> list[AsyncJob[ResultT]]:
        """Submits many requests, a chunk per round trip, like ``Client.submit_many``."""
        chosen = options or Options()
        submitting = Submitting(self._prepare, self._job, timeout)
        async for request in _each(requests):
            if submitting.add(await self._made(request, chosen, None, tenant)):
                await self._flush(submitting)
        await self._flush(submitting)
        return submitting.jobs

    def job(self, id: str) -> AsyncJob[Result]:
        """A handle from a stored id. Looks nothing up."""
        return AsyncJob(id, self)

    # -- many jobs --

    async def as_completed(
        self, jobs: Iterable[AsyncJob[ResultT]], timeout: float | None = None
    ) -> AsyncIterator[AsyncJob[ResultT]]:
        """The jobs as they end, however they end, like ``Client.as_completed``."""
        jobs = list(jobs)
        stream = self.outcomes([job.id for job in jobs], timeout, expires=last_expiry(jobs))
        async with aclosing(stream) as outcomes:
            async for info in outcomes:
                yield AsyncJob(info.id, self, info)

    async def wait_all(
        self,
        jobs: Iterable[AsyncJob[ResultT]],
        timeout: float | None = None,
        *,
        progress: bool = False,
    ) -> list[AsyncJob[ResultT]]:
        """Waits until all jobs have ended, like ``Client.wait_all``."""
        jobs = list(jobs)
        ids = [job.id for job in jobs]
        ended = {}
        with Progress(len(set(ids)), shown=progress) as bar:
            async for info in self.outcomes(ids, timeout, expires=last_expiry(jobs)):
                ended[info.id] = info
                bar.count(info)
        return [AsyncJob(id, self, ended[id]) for id in ids]

    async def outcomes(
        self, ids: Iterable[str], timeout: float | None = None, *, expires: float | None = None
    ) -> AsyncGenerator[JobInfo]:
        """The jobs of these ids as they end, like ``Client.outcomes``."""
        waiting = self._waiting(ids, timeout, expires)
        notifier = self.notifier
        async with notifier.watch(waiting.open) as inbox:
            while waiting.open:
                if due := waiting.due(len(notifier), notifier.subscribed_since(inbox)):
                    found = await self._polls.poll(due)
                    if isinstance(found, Polled) and found.elsewhere:
                        notifier.listen(inbox, found.elsewhere.values())
                    for info in waiting.polled(due, found):
                        yield info
                if waiting.open:
                    waiting.notify(await inbox.take(waiting.pause()))

    # -- queues, and many jobs, for operators --

    async def pause(self, queue: str) -> int:
        """Lets no worker take a job from a queue, like ``Client.pause``."""
        return await self.ledger.pause(queue)

    async def resume(self, queue: str) -> int:
        """Lets workers take jobs from a queue again; how many wait."""
        return await self.ledger.resume(queue)

    async def limit(
        self, tenant: str, *, open_jobs: int | None = None, rate: float | None = None
    ) -> None:
        """Limits a tenant, like ``Client.limit``."""
        await self.ledger.limit(tenant, open_jobs, rate)

    async def count(self, where: JobFilter) -> int:
        """How many jobs match, like ``Client.count``."""
        return await self._change(Change.of("match", where))

    async def cancel_all(self, which: JobFilter | Sequence[str], *, dry_run: bool = False) -> int:
        """Cancels jobs of a filter, or of ids, like ``Client.cancel_all``."""
        return await self._change(Change.of("cancel", which, dry_run=dry_run))

    async def retry_all(self, which: JobFilter | Sequence[str], *, dry_run: bool = False) -> int:
        """Queues jobs again that ended without a result, like ``Client.retry_all``."""
        return await self._change(Change.of("retry", which, dry_run=dry_run))

    async def expedite(
        self,
        which: JobFilter | Sequence[str],
        priority: Priority = Priority.HIGH,
        *,
        dry_run: bool = False,
    ) -> int:
        """Moves jobs that wait to another priority, like ``Client.expedite``."""
        options = {"priority": Priority(priority), "dry_run": dry_run}
        return await self._change(Change.of("move", which, **options))

    async def forget(
        self,
        which: JobFilter | Sequence[str],
        *,
        unindex: Unindex | None = None,
        only_ended: bool = False,
    ) -> Forgotten:
        """Erases jobs, and what they left, like ``Client.forget``."""
        forgetting = Forgetting(self.storage, unindex)
        changing = Changing(Change.of("match", which))
        with as_one(target_of(which)):
            while (chunk := changing.next()) is not None:
                changed = await self.ledger.change(chunk)
                for at in range(0, len(changed.ids), ERASED_AT_ONCE):
                    ids = changed.ids[at : at + ERASED_AT_ONCE]
                    await self._forget(forgetting, ids, only_ended)
                changing.took(changed)
        return forgetting.report

    async def _forget(self, forgetting: Forgetting, ids: Sequence[str], only_ended: bool) -> None:
        jobs = await self.ledger.forget(ids, erase=False, only_ended=only_ended)
        uploads = forgetting.uploads(jobs)
        named = await self.ledger.named(uploads)
        await asyncio.to_thread(forgetting.clear, jobs, uploads, named)
        closed = [job.id for job in jobs]
        forgetting.erased(await self.ledger.forget(closed, erase=True))

    async def _change(self, change: Change) -> int:
        changing = Changing(change)
        with as_one():
            while (chunk := changing.next()) is not None:
                changed = await self.ledger.change(chunk)
                if changed.messages:
                    await self._publish(changed.messages)
                changing.took(changed)
        return changing.count

    async def _poll(self, ids: list[str]) -> Polled | QueueUnavailable:
        try:
            return await self.ledger.poll(ids, notify=self._id)
        except QueueUnavailable as error:
            return error

    async def _made(
        self, request: Asks[Any] | Submission, options: Options, id: str | None, tenant: str | None
    ) -> Submission:
        """A submission with an id and a tenant, where it brings none."""
        self._check_cell(request, options, id)
        if isinstance(request, Submission):
            return request
        return self._submission(request, options, id or await self.ledger.make_id(options), tenant)

    def _job(self, id: str, options: Options | None = None) -> AsyncJob[Any]:
        """A handle; ``options`` are those of a job that was recorded just now."""
        return AsyncJob(id, self, expires=self._expiry(options))

    async def _submit_request(
        self,
        request: type[Asks[ResultT]],
        image: ImageSource | None,
        fields: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> AsyncJob[ResultT]:
        """Checks the options, uploads the image unless it is in S3, and submits."""
        given = dict(options)
        tenant = self._tenant(given.pop("tenant", None))
        chosen = options_of(fields, given)
        made = request_of(request, await self._reference(image, folder_of(tenant)), fields)
        return await self.submit(made, chosen, tenant=tenant)

    async def _reference(self, image: ImageSource | None, folder: str) -> str | ImageRef | None:
        source = self._source(image)
        if source is None:
            return cast("str | ImageRef | None", image)
        return await asyncio.to_thread(self.storage.upload, source, folder=folder)

    def _prepare(self, submission: Submission) -> Prepared:
        return self.broker.with_message(self.ledger.prepare(submission, notify=self._id))

    async def _publish(self, messages: list[Message]) -> None:
        """What is not taken in time is published by the reconciler: the jobs are recorded."""
        self._unserved.warn(messages)
        if all(message.published for message in messages):
            return
        sent = asyncio.wrap_future(self.broker.send(messages))
        sent.add_done_callback(self._on_sent)
        await asyncio.wait([sent], timeout=patience_s(messages))

    def _on_sent(self, sent: "asyncio.Future[None]") -> None:
        if not sent.cancelled() and (error := sent.exception()) is not None:
            self.broker.warn(error)

    async def _flush(self, submitting: Submitting) -> None:
        while submitting.waiting:
            try:
                answers = await self.ledger.submit_all(submitting.waiting)
            except (QueueUnavailable, QueueFull) as error:
                answers = [error]
            if messages := submitting.settle(answers):
                await self._publish(messages)
            await asyncio.sleep(submitting.pause())
        submitting.check()


async def _each(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
