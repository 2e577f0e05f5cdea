"""The client: one verb per kind of job.

``_Base`` holds what is pure (requests, options, ids); ``Client`` does the I/O.
"""

import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError

from blipq.broker import Broker
from blipq.contract import (
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
    MatchRequest,
    MatchResult,
    Options,
    Request,
    Result,
    SearchRequest,
    SearchResult,
    Turn,
    VQARequest,
    VQAResult,
)
from blipq.errors import InvalidRequest
from blipq.job import Job
from blipq.ledger import Ledger, Message, connect, notify_channel
from blipq.notifier import Notifier
from blipq.settings import Settings
from blipq.storage import Storage

ModelT = TypeVar("ModelT", bound=BaseModel)

#: An s3:// or https:// URI, a reference with version or etag, a local file, or the file's bytes.
ImageSource = str | Path | bytes | ImageRef


def new_id() -> str:
    """A job id: ``job_`` and a UUIDv7 (RFC 9562), so ids sort by the time they were made."""
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds << 80) | secrets.randbits(80)
    value = (value & ~(0xF << 76)) | (7 << 76)
    value = (value & ~(0x3 << 62)) | (2 << 62)
    text = f"{value:032x}"
    return "job_" + "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def checked(model: type[ModelT], /, **fields: Any) -> ModelT:
    """A request or options from keyword arguments; InvalidRequest names what is wrong."""
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise InvalidRequest(explain(error)) from None


def explain(error: ValidationError) -> str:
    """What is wrong, a field at a time, on one line."""
    wrong = []
    for item in error.errors(include_url=False, include_input=False):
        field = ".".join(str(part) for part in item["loc"]) or "request"
        wrong.append(f"{field}: {item['msg'].removeprefix('Value error, ')}")
    return "; ".join(wrong)


class Client:
    """Submits jobs and reads their results. Thread-safe; close it, or use it as a context.

        with Client() as client:
            job = client.caption("s3://uploads/cat.jpg")
            print(job.result(timeout=30).text)

    Without arguments it finds the services by ``BLIPQ_*`` variables, then a running local stack,
    then the defaults. Every verb takes the options of ``Options`` as keyword arguments. A local
    path or bytes are uploaded first.
    """

    def __init__(self, settings: Settings | None = None, **overrides: Any) -> None:
        self.settings = settings or checked(Settings, **overrides)
        self._id = secrets.token_hex(8)
        self._redis = connect(self.settings)
        self.ledger = Ledger(self._redis, self.settings)
        self.broker = Broker(self.settings)
        self.storage = Storage(self.settings)
        self.notifier = Notifier(lambda: connect(self.settings), notify_channel(self._id))

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
        self.notifier.close()
        self.broker.close()
        self._redis.close()

    # -- verbs --

    def caption(
        self,
        image: ImageSource,
        prompt: str | None = None,
        *,
        generation: Generation | Mapping[str, Any] | None = None,
        best_of: int | None = None,
        **options: Any,
    ) -> Job[CaptionResult]:
        """Asks for a caption, optionally one that goes on from ``prompt``.

        ``best_of`` n: n captions ranked by image-text matching.
        """
        checked_options = checked(Options, **options)
        request = checked(
            CaptionRequest,
            image=self._reference(image),
            prompt=prompt,
            generation=generation,
            best_of=best_of,
        )
        return cast("Job[CaptionResult]", self.submit(request, checked_options))

    def vqa(
        self,
        image: ImageSource,
        questions: str | Sequence[str],
        *,
        history: Sequence[Turn | tuple[str, str]] | None = None,
        choices: Sequence[str] | None = None,
        generation: Generation | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Job[VQAResult]:
        """Asks one or many questions about an image.

        ``history`` holds earlier (question, answer) turns, oldest first. ``choices`` are the only
        answers allowed: they come back ranked, with probabilities.
        """
        checked_options = checked(Options, **options)
        request = checked(
            VQARequest,
            image=self._reference(image),
            questions=questions,
            history=[_turn(turn) for turn in history] if history else None,
            choices=choices,
            generation=generation,
        )
        return cast("Job[VQAResult]", self.submit(request, checked_options))

    def match(
        self,
        image: ImageSource,
        texts: str | Sequence[str],
        *,
        head: Head = "itm",
        **options: Any,
    ) -> Job[MatchResult]:
        """Asks how well each text matches: ``itm`` is a probability, ``itc`` a cosine."""
        checked_options = checked(Options, **options)
        request = checked(MatchRequest, image=self._reference(image), texts=texts, head=head)
        return cast("Job[MatchResult]", self.submit(request, checked_options))

    def embed(
        self,
        image: ImageSource | None = None,
        text: str | None = None,
        *,
        mode: EmbedMode | None = None,
        dtype: EmbedDtype = "float16",
        index: str | Mapping[str, Any] | IndexEntry | None = None,
        **options: Any,
    ) -> Job[EmbedResult]:
        """Asks for features of an image, a text, or both read together (``multimodal``).

        Without ``mode``, what is given decides. With ``index`` the image goes into a search index.
        """
        checked_options = checked(Options, **options)
        if mode is None:
            mode = "image" if text is None else "text" if image is None else "multimodal"
        request = checked(
            EmbedRequest,
            image=None if image is None else self._reference(image),
            text=text,
            mode=mode,
            dtype=dtype,
            index=index,
        )
        return cast("Job[EmbedResult]", self.submit(request, checked_options))

    def describe(
        self,
        image: ImageSource,
        *,
        caption: bool = True,
        questions: str | Sequence[str] = (),
        texts: str | Sequence[str] = (),
        embed: bool = False,
        generation: Generation | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Job[DescribeResult]:
        """Asks for several things about an image, which is looked at once.

        ``texts`` are scored by probability; ``embed`` asks for the image's features.
        """
        checked_options = checked(Options, **options)
        request = checked(
            DescribeRequest,
            image=self._reference(image),
            caption=caption,
            questions=questions,
            texts=texts,
            embed=embed,
            generation=generation,
        )
        return cast("Job[DescribeResult]", self.submit(request, checked_options))

    def search(
        self,
        index: str,
        text: str | None = None,
        *,
        image: ImageSource | None = None,
        top_k: int = 10,
        rerank: int = 128,
        filter: Mapping[str, str | Sequence[str]] | None = None,
        **options: Any,
    ) -> Job[SearchResult]:
        """Asks for the images of an index that are nearest to a text, or to an image.

        With a text the nearest ``rerank`` are looked at again, and ranked by matching. ``filter``
        names metadata that hits must have.
        """
        checked_options = checked(Options, **options)
        request = checked(
            SearchRequest,
            index=index,
            text=text,
            image=None if image is None else self._reference(image),
            top_k=top_k,
            rerank=rerank,
            filter=filter,
        )
        return cast("Job[SearchResult]", self.submit(request, checked_options))

    # -- any kind --

    def submit(
        self, request: Request, options: Options | None = None, *, id: str | None = None
    ) -> Job[Result]:
        """Submits a request of any kind; when this returns, the job will reach an outcome.

        The same ``id`` or idempotency key with the same request is the same job, so a submit that
        raised QueueUnavailable can be repeated with its ``job_id``. Raises IdempotencyConflict,
        QueueFull or QueueUnavailable.
        """
        options = options or Options()
        recorded = self.ledger.submit(id or new_id(), request, options, notify=self._id)
        if not isinstance(recorded, Message):
            return Job(recorded, self)
        # A message that is not taken in time is published by the reconciler: the job is recorded.
        self.broker.publish(recorded)
        return Job(recorded.id, self)

    def job(self, id: str) -> Job[Result]:
        """A handle from a stored id. Looks nothing up."""
        return Job(id, self)

    def _reference(self, image: ImageSource) -> Any:
        """Uploads what is not in S3 yet."""
        if isinstance(image, ImageRef):
            return image
        if isinstance(image, str) and "://" in image:
            return image
        return self.storage.upload(os.fspath(image) if isinstance(image, Path) else image)


def _turn(turn: Turn | tuple[str, str]) -> Turn:
    if isinstance(turn, Turn):
        return turn
    if len(turn) != 2:
        raise InvalidRequest("history: a turn is a question and its answer")
    question, answer = turn
    return checked(Turn, question=question, answer=answer)
