"""How a job reaches indexes, beside the model."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

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
from blipq_worker.claims import Held
from blipq_worker.images.s3_access import AccessRefused
from blipq_worker.index.writer import IndexWriter
from blipq_worker.inference.interface import Inference
from blipq_worker.inference.requests import ImagePixels, Rerank, Reranked
from blipq_worker.jobs.asker import Asker, Reload, engine_errors
from blipq_worker.jobs.errors import EngineLost
from blipq_worker.receipt import Stopwatch

#: Images that one search fetches and looks at side by side: they are what it takes in memory.
_IMAGES_AT_ONCE = 16


class _Unreadable(Exception):
    """An image of an index cannot be read: no error of the model, which would fail the search."""

    def __init__(self, reason: PermanentError) -> None:
        super().__init__(str(reason))
        self.reason = reason


@dataclass(frozen=True, slots=True)
class IndexAccess:
    """The indexes of a worker, and the thread that writes to them."""

    readers: Indexes
    writer: IndexWriter


class IndexAsker(Asker):
    """Also searches indexes and writes to them.

    load: fetches an image that is in an index; with ``spare=False`` its pixels in any case.
    """

    def __init__(
        self,
        inference: Inference,
        claim: Claim,
        held: Held,
        watch: Stopwatch,
        timeout_s: float,
        *,
        reload: Reload,
        indexes: IndexAccess,
        load: Callable[[ImageRef, bool], ImagePixels],
    ) -> None:
        super().__init__(inference, claim, held, watch, timeout_s, reload=reload)
        self._indexes = indexes
        self._load = load

    def nearest(
        self, index: str, queries: Vectors, limit: int, filter: Filter | None
    ) -> list[Found]:
        """The images of an index that are nearest to queries (n, 256)."""
        with self._watch.stage("index"), work_errors("index"):
            return self._indexes.readers.open(index, self._space).search(queries, limit, filter)

    def rerank(self, images: Sequence[ImageRef], text: str) -> list[Reranked | PermanentError]:
        """How well a text matches each image, or why that cannot be read."""

        def score(image: ImageRef) -> Reranked | PermanentError | EngineLost:
            try:
                item = Rerank(self._read(image, True), text)
                deadline = time.monotonic() + self._timeout_s
                with engine_errors():
                    future = self._submitted(item)
                    answer = self._answer(item, future, deadline, lambda: self._read(image, False))
            except _Unreadable as error:
                return error.reason
            except EngineLost as error:  # another image may be the one whose pass had begun
                return error
            return cast(Reranked, answer.value)

        pool = ThreadPoolExecutor(_IMAGES_AT_ONCE, thread_name_prefix="blipq-rerank")
        try:
            with self._watch.stage("rerank"):
                scores = list(pool.map(score, images))
        finally:
            pool.shutdown(cancel_futures=True)
        lost = [each for each in scores if isinstance(each, EngineLost)]
        if lost:
            raise max(lost, key=lambda each: each.started)
        return [each for each in scores if not isinstance(each, EngineLost)]

    def _read(self, image: ImageRef, spare: bool) -> ImagePixels:
        """An image of an index; it may be gone when it is read, also when it is read again."""
        try:
            return self._load(image, spare)
        except PermanentError as error:
            raise _Unreadable(error) from error

    def add(self, index: str, entry: Entry) -> None:
        """Puts an image into an index."""
        with self._watch.stage("index"), work_errors("index"):
            future = self._indexes.writer.submit(index, self._space, entry)
            self._held.on_lost(self._claim, future.cancel)
            error = self._waited(future, time.monotonic() + self._timeout_s, "the index")
            if error is not None:
                raise error

    @property
    def _space(self) -> Space:
        info = self.info
        return Space(info.retrieval_checkpoint or "", info.retrieval_revision or "")


@contextmanager
def work_errors(what: str) -> Iterator[None]:
    """A producer's errors as a worker's; ``what`` is the operation."""
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
