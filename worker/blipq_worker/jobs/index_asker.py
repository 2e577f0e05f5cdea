"""How a job asks for what is in an index, and puts images there."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar, cast

from blipq.contract import ErrorCode, ImageRef
from blipq.errors import (
    InvalidRequest,
    PermanentError,
    QueueUnavailable,
    TransientError,
    WorkError,
)
from blipq.index.store import Entry, Filter, Found, Indexes, Space, Vectors
from blipq.ledger.worker import Claim
from blipq.s3.refusals import OF_THE_ASKER, Refusal, S3Refused, S3Unavailable
from blipq_worker.blip2 import Pixels, RerankItem
from blipq_worker.claims import Held, Lost
from blipq_worker.engine.backend import Engine
from blipq_worker.images.s3_access import AccessRefused
from blipq_worker.index.writer import IndexWriter
from blipq_worker.jobs.asker import Asker, answer_of
from blipq_worker.receipt import Stopwatch
from blipq_worker.seam.requests import Reranked

#: Images that one search fetches and looks at side by side: they are what it takes in memory.
_IMAGES_AT_ONCE = 16

AnswerT = TypeVar("AnswerT")


class IndexAsker(Asker):
    """Also searches indexes and writes to them. ``load`` fetches an image that is in one."""

    def __init__(
        self,
        engine: Engine,
        claim: Claim,
        held: Held,
        watch: Stopwatch,
        timeout_s: float,
        *,
        indexes: Indexes,
        writer: IndexWriter,
        load: Callable[[ImageRef], Pixels],
    ) -> None:
        super().__init__(engine, claim, held, watch, timeout_s)
        self._indexes = indexes
        self._writer = writer
        self._load = load

    def nearest(
        self, index: str, queries: Vectors, limit: int, filter: Filter | None
    ) -> list[Found]:
        """The images of an index that are nearest to queries (n, 256)."""
        with self._watch.stage("index"), work_errors("index"):
            return self._indexes.open(index, self._space).search(queries, limit, filter)

    def rerank(self, images: Sequence[ImageRef], text: str) -> list[Reranked | PermanentError]:
        """Each image looked at together with a text, or why it cannot be read."""

        def look(image: ImageRef) -> Reranked | PermanentError:
            try:
                item = RerankItem(self._load(image), text)
            except PermanentError as error:
                return error
            future = self._engine.submit(self._claim.model, item, self._priority)
            return cast(Reranked, self._wait(future, "the model").value)

        pool = ThreadPoolExecutor(_IMAGES_AT_ONCE, thread_name_prefix="blipq-rerank")
        try:
            with self._watch.stage("rerank"):
                return list(pool.map(look, images))
        finally:
            pool.shutdown(cancel_futures=True)

    def add(self, index: str, entry: Entry) -> None:
        """Puts an image into an index."""
        with self._watch.stage("index"), work_errors("index"):
            error = self._wait(self._writer.submit(index, self._space, entry), "the index")
            if error is not None:
                raise error

    @property
    def _space(self) -> Space:
        info = self.info
        return Space(info.retrieval_checkpoint or "", info.retrieval_revision or "")

    def _wait(self, future: "Future[AnswerT]", who: str) -> AnswerT:
        """Waits for an answer; a claim that is lost meanwhile gives its place up."""
        lost: threading.Event = self._held.event(self._claim)
        self._held.on_lost(self._claim, future.cancel)
        try:
            deadline = time.monotonic() + self._timeout_s
            answer = answer_of(future, deadline, f"{who} did not answer {self._within}")
        finally:
            future.cancel()
        if lost.is_set():
            raise Lost
        return answer


@contextmanager
def work_errors(what: str) -> Iterator[None]:
    """A producer's errors as a worker's; ``what`` says where."""
    try:
        yield
    except (S3Refused, S3Unavailable) as error:
        raise _of_s3(f"{what}: {error}", error) from error
    except InvalidRequest as error:
        raise PermanentError(ErrorCode.INVALID_REQUEST, f"{what}: {error}") from error
    except QueueUnavailable as error:
        raise TransientError(ErrorCode.INTERNAL, f"{what}: {error}") from error


def _of_s3(message: str, error: S3Refused | S3Unavailable) -> WorkError:
    if error.refusal in OF_THE_ASKER:
        closed = error.refusal is Refusal.ACCOUNT
        return AccessRefused(message, ErrorCode.INVALID_REQUEST if closed else None)
    if isinstance(error, S3Unavailable):
        return TransientError(ErrorCode.INTERNAL, message)
    encrypted = error.refusal is Refusal.ENCRYPTION  # the place is at fault, not the request
    code = ErrorCode.INTERNAL if encrypted else ErrorCode.INVALID_REQUEST
    return PermanentError(code, message)
