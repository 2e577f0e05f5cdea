"""What crosses the wire: requests, options, results and the job as everyone sees it.

Requests refuse unknown fields, so that a typing error is an error; results ignore them, so that an
older client can read a newer worker's answer. Changes are additive only. JSON always, never pickle.
"""

import base64
import math
import re
import struct
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    model_validator,
)

from blipq.ssrf import policy as guard

#: Goes up when a worker must know something new to run a job. A worker that meets a newer number
#: leaves the job in its queue, so workers are deployed before producers.
CONTRACT = 1


class Kind(StrEnum):
    """What a job asks of the model; also the verb in the CLI and on the client."""

    CAPTION = "caption"
    VQA = "vqa"
    MATCH = "match"
    EMBED = "embed"
    DESCRIBE = "describe"
    SEARCH = "search"


class Status(StrEnum):
    """Where a job is. An id that nobody submitted has no status: it is not found."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


TERMINAL_STATUSES = frozenset(
    {Status.SUCCEEDED, Status.FAILED, Status.CANCELLED, Status.EXPIRED},
)


class Priority(StrEnum):
    """Served round robin, so high never waits behind low and low never starves."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class ErrorCode(StrEnum):
    """Why a job failed. Stable: services switch on these."""

    INVALID_REQUEST = "invalid_request"
    IMAGE_NOT_FOUND = "image_not_found"
    IMAGE_FORBIDDEN = "image_forbidden"
    IMAGE_TOO_LARGE = "image_too_large"
    IMAGE_INVALID = "image_invalid"
    IMAGE_CHANGED = "image_changed"
    IMAGE_UNAVAILABLE = "image_unavailable"
    URL_FORBIDDEN = "url_forbidden"
    MODEL_UNAVAILABLE = "model_unavailable"
    OUT_OF_MEMORY = "out_of_memory"
    ATTEMPTS_EXHAUSTED = "attempts_exhausted"
    INTERNAL = "internal"


class _Asked(BaseModel):
    """Base of everything a caller writes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Told(BaseModel):
    """Base of everything a worker answers."""

    model_config = ConfigDict(extra="ignore", frozen=True)


#: Names of served models and indexes end up in queue names, keys and folders.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]

MetadataName = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]

#: At most 16 pairs.
Metadata = Annotated[dict[MetadataName, MetadataValue], Field(max_length=16)]

#: What metadata must hold; a list means any of its values.
Filter = Annotated[
    dict[
        MetadataName,
        MetadataValue | Annotated[tuple[MetadataValue, ...], Field(min_length=1, max_length=64)],
    ],
    Field(min_length=1, max_length=16),
]


# --- the image ------------------------------------------------------------------------------------

_S3_URI = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(?P<key>.+)", re.DOTALL)


def split_s3_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of ``s3://bucket/key``; ValueError says what is wrong with another text."""
    match = _S3_URI.fullmatch(uri)
    if match is None:
        raise ValueError(f"{uri!r} is not of the form s3://bucket/key")
    if len(match["key"].encode()) > 1024:
        raise ValueError("an S3 key has at most 1,024 bytes")
    return match["bucket"], match["key"]


def _checked_s3_uri(uri: str) -> str:
    split_s3_uri(uri)
    return uri


S3Uri = Annotated[str, AfterValidator(_checked_s3_uri)]


def _checked_image_uri(uri: str) -> str:
    if uri.lower().startswith(("https://", "http://")):
        guard.parse(uri)
        return uri
    return _checked_s3_uri(uri)


class ImageRef(_Asked):
    """An object in S3, or at a public https:// URL.

    With ``etag`` or ``version_id`` (S3 alone) the worker refuses any other bytes.
    """

    uri: Annotated[str, Field(max_length=4096), AfterValidator(_checked_image_uri)]
    version_id: str | None = Field(default=None, max_length=1024)
    etag: str | None = Field(default=None, max_length=256)

    @model_validator(mode="after")
    def _only_s3_has_versions(self) -> "ImageRef":
        if self.version_id is not None and not self.in_s3:
            raise ValueError("version_id is for s3:// references")
        return self

    @property
    def in_s3(self) -> bool:
        """Whether it has a bucket and a key; else it is a URL."""
        return self.uri.startswith("s3://")

    @property
    def bucket(self) -> str:
        """The bucket's name; ValueError for a URL."""
        return split_s3_uri(self.uri)[0]

    @property
    def key(self) -> str:
        """The object's key; ValueError for a URL."""
        return split_s3_uri(self.uri)[1]


def _image_from_text(value: Any) -> Any:
    return {"uri": value} if isinstance(value, str) else value


Image = Annotated[ImageRef, BeforeValidator(_image_from_text)]


# --- requests -------------------------------------------------------------------------------------

ResultT = TypeVar("ResultT", bound="Result", covariant=True)


class Asks(Generic[ResultT]):
    """Base of requests: its parameter is the type of the result."""


class Generation(_Asked):
    """Generation parameters under Hugging Face's names. Unset means LAVIS's default for the kind.

    Lengths count new tokens only. Captions default to 5 beams and 30 tokens, answers to 5 beams
    and 10 tokens. Sampling defaults to top_p 0.9 and top_k 50; top_k 0 is off.
    """

    max_new_tokens: int | None = Field(default=None, ge=1, le=512)
    min_new_tokens: int | None = Field(default=None, ge=0, le=512)
    num_beams: int | None = Field(default=None, ge=1, le=16)
    do_sample: bool | None = None
    temperature: float | None = Field(default=None, gt=0, le=10)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=1000)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    no_repeat_ngram_size: int | None = Field(default=None, ge=0, le=32)
    length_penalty: float | None = Field(default=None, ge=-10, le=10)
    num_return_sequences: int | None = Field(default=None, ge=1, le=16)
    seed: int | None = Field(default=None, ge=0, lt=2**63)


Text = Annotated[str, Field(min_length=1, max_length=4096)]


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Texts = Annotated[tuple[Text, ...], BeforeValidator(_one_or_many), Field(min_length=1)]


class CaptionRequest(_Asked, Asks["CaptionResult"]):
    """Describe the image in words, optionally going on from ``prompt``.

    ``best_of`` n draws n captions and returns them ranked by image-text matching.
    """

    kind: Literal[Kind.CAPTION] = Kind.CAPTION
    image: Image
    prompt: str | None = Field(default=None, max_length=4096)
    generation: Generation | None = None
    best_of: int | None = Field(default=None, ge=1, le=16)


class Turn(_Asked):
    """An earlier question about the same image and its answer."""

    question: Text
    answer: Text


class VQARequest(_Asked, Asks["VQAResult"]):
    """Answer questions about the image; ``history`` holds earlier turns, oldest first.

    With ``choices`` nothing is generated: each question's answer is the one that the model finds
    most likely, and all are ranked.
    """

    kind: Literal[Kind.VQA] = Kind.VQA
    image: Image
    questions: Annotated[Texts, Field(max_length=64)]
    history: tuple[Turn, ...] = Field(default=(), max_length=32)
    choices: Annotated[tuple[Text, ...], Field(min_length=2, max_length=256)] | None = None
    generation: Generation | None = None

    @model_validator(mode="after")
    def _choices_differ(self) -> "VQARequest":
        if self.choices is None:
            return self
        if self.generation is not None:
            raise ValueError("generation has no effect on choices: leave one of them out")
        different = {choice.strip() for choice in self.choices} - {""}
        if len(different) < len(self.choices):
            raise ValueError("choices must differ, and none may be blank")
        return self


Head = Literal["itm", "itc"]


class MatchRequest(_Asked, Asks["MatchResult"]):
    """Score texts against the image: ``itm`` is a probability, ``itc`` a cosine."""

    kind: Literal[Kind.MATCH] = Kind.MATCH
    image: Image
    texts: Annotated[Texts, Field(max_length=256)]
    head: Head = "itm"


EmbedMode = Literal["image", "text", "multimodal"]
EmbedDtype = Literal["float16", "float32"]


class IndexEntry(_Asked):
    """Where an image goes in an index: under which id (by default its URI), with which metadata."""

    name: Name
    id: str | None = Field(default=None, min_length=1, max_length=1024)
    metadata: Metadata = Field(default_factory=dict)


def _entry_from_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class EmbedRequest(_Asked, Asks["EmbedResult"]):
    """Features of an image, a text or both, as LAVIS's ``extract_features`` defines them.

    image: ``image_embeds`` (32, 768) and ``image_embeds_proj`` (32, 256). text: ``text_embeds``
    (tokens, 768) and ``text_embeds_proj`` (tokens, 256), of which row 0 stands for the text.
    multimodal: ``multimodal_embeds`` (32, 768). Each row of a ``_proj`` has length 1; the cosine
    of image and text is the best of the 32 rows against row 0.

    With ``index`` (a name or more) the image is put into a search index, which is made if there is
    none, and the result holds its id there instead of arrays.
    """

    kind: Literal[Kind.EMBED] = Kind.EMBED
    image: Image | None = None
    text: Text | None = None
    mode: EmbedMode = "image"
    dtype: EmbedDtype = "float16"
    index: Annotated[IndexEntry, BeforeValidator(_entry_from_name)] | None = None

    @model_validator(mode="after")
    def _mode_has_its_inputs(self) -> "EmbedRequest":
        if self.mode != "text" and self.image is None:
            raise ValueError(f"mode {self.mode!r} needs an image")
        if self.mode != "image" and self.text is None:
            raise ValueError(f"mode {self.mode!r} needs a text")
        if self.index is not None and self.mode != "image":
            raise ValueError("an index holds images: mode must be 'image'")
        return self


class DescribeRequest(_Asked, Asks["DescribeResult"]):
    """Several things about one image from one vision pass.

    ``texts`` are scored by ``itm``; ``embed`` gives the image's features. ``generation`` is for the
    caption and the answers.
    """

    kind: Literal[Kind.DESCRIBE] = Kind.DESCRIBE
    image: Image
    caption: bool = True
    questions: Annotated[tuple[Text, ...], BeforeValidator(_one_or_many)] = Field(
        default=(), max_length=64
    )
    texts: Annotated[tuple[Text, ...], BeforeValidator(_one_or_many)] = Field(
        default=(), max_length=256
    )
    embed: bool = False
    generation: Generation | None = None

    @model_validator(mode="after")
    def _something(self) -> "DescribeRequest":
        if not (self.caption or self.questions or self.texts or self.embed):
            raise ValueError("ask for a caption, questions, texts or embed")
        return self


class SearchRequest(_Asked, Asks["SearchResult"]):
    """Find images in an index by a text or by an image.

    The ``top_k`` nearest by cosine are found first. For a text, the ``rerank`` nearest are then
    looked at again together with the text, and come first, by matching logit plus cosine; 0 leaves
    that out. ``filter`` names metadata that a hit must have; a list means any of its values.
    """

    kind: Literal[Kind.SEARCH] = Kind.SEARCH
    index: Name
    text: Text | None = None
    image: Image | None = None
    top_k: int = Field(default=10, ge=1, le=1000)
    rerank: int = Field(default=128, ge=0, le=1000)
    filter: Filter | None = None

    @model_validator(mode="after")
    def _one_query(self) -> "SearchRequest":
        if (self.text is None) == (self.image is None):
            raise ValueError("give either a text or an image to search by")
        return self


Request = Annotated[
    CaptionRequest | VQARequest | MatchRequest | EmbedRequest | DescribeRequest | SearchRequest,
    Field(discriminator="kind"),
]
request_adapter: TypeAdapter[Request] = TypeAdapter(Request)


# --- options --------------------------------------------------------------------------------------

_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>ms|s|m|h|d|)")
_UNIT_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _duration(value: Any) -> Any:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, str):
        match = _DURATION.fullmatch(value.strip())
        if match is None:
            raise ValueError(f"{value!r} is not a duration such as 90, '90s', '10m', '2h' or '7d'")
        return float(match["number"]) * _UNIT_SECONDS[match["unit"]]
    return value


#: Seconds; also written "500ms", "90s", "10m", "2h" or "7d".
Seconds = Annotated[float, BeforeValidator(_duration)]

#: The longest a job may stay open: its record must outlive it in Redis.
LONGEST_DEADLINE_S = 30 * 86400

JobEvent = Literal["job.running", "job.succeeded", "job.failed", "job.cancelled", "job.expired"]
_TERMINAL_EVENTS: tuple[JobEvent, ...] = (
    "job.succeeded",
    "job.failed",
    "job.cancelled",
    "job.expired",
)


def _checked_webhook_url(url: str) -> str:
    guard.parse(url)
    return url


class Webhook(_Asked):
    """Where to post the job's events; by default the one that ends it."""

    url: Annotated[str, Field(max_length=2048), AfterValidator(_checked_webhook_url)]
    events: tuple[JobEvent, ...] = Field(default=_TERMINAL_EVENTS, min_length=1)


class Options(_Asked):
    """What every job can be given beside its request.

    model: the served model that runs it. expires_in: after this nobody wants the answer.
    idempotency_key: the same key with the same request gives the same job.
    output: an s3:// object that the result is written to before the job ends.
    metadata: at most 16 pairs that come back with the job.
    """

    model: Name = "default"
    priority: Priority = Priority.NORMAL
    expires_in: Annotated[Seconds, Field(gt=0, le=LONGEST_DEADLINE_S)] | None = None
    idempotency_key: str | None = Field(default=None, min_length=1, max_length=255)
    webhook: Webhook | None = None
    output: S3Uri | None = None
    metadata: Metadata = Field(default_factory=dict)


# --- results --------------------------------------------------------------------------------------


class Caption(_Told):
    """One caption; ``score`` is its image-text matching probability where that was asked for."""

    text: str
    score: float | None = None


class CaptionResult(_Told):
    """Captions, best first."""

    kind: Literal[Kind.CAPTION] = Kind.CAPTION
    captions: tuple[Caption, ...]

    @property
    def text(self) -> str:
        """The best caption."""
        return self.captions[0].text


class Choice(_Told):
    """One of the offered answers and its probability among them.

    ``log_likelihood`` is the sum of the natural logarithms of its tokens' probabilities, its end
    token included; ``probability`` is the softmax of these over the choices of one question.
    """

    text: str
    probability: float
    log_likelihood: float | None = None


class Answer(_Told):
    """The answer to one question; ``choices`` ranks the offered answers, best first."""

    question: str
    text: str
    choices: tuple[Choice, ...] | None = None


class VQAResult(_Told):
    """An answer per question, in the order asked."""

    kind: Literal[Kind.VQA] = Kind.VQA
    answers: tuple[Answer, ...]

    @property
    def text(self) -> str:
        """The answer to the first question."""
        return self.answers[0].text


class TextScore(_Told):
    """A text and how well it matches: a probability (itm) or a cosine (itc)."""

    text: str
    score: float


class MatchResult(_Told):
    """A score per text, in the order given."""

    kind: Literal[Kind.MATCH] = Kind.MATCH
    head: Head
    scores: tuple[TextScore, ...]

    @property
    def best(self) -> TextScore:
        """The text that matches best."""
        return max(self.scores, key=lambda scored: scored.score)


class Array(_Told):
    """Numbers in row-major order: little-endian ``dtype``, base64.

    ``tolist`` needs nothing; ``numpy.asarray`` takes it as it is, without a copy of the numbers.
    """

    shape: tuple[int, ...]
    dtype: EmbedDtype
    data: str

    def tobytes(self) -> bytes:
        """The numbers as they lie in memory."""
        return base64.b64decode(self.data, validate=True)

    def tolist(self) -> list[Any]:
        """The numbers as floats, in lists nested like ``shape``."""
        code = "e" if self.dtype == "float16" else "f"
        values: list[Any] = list(struct.unpack(f"<{math.prod(self.shape)}{code}", self.tobytes()))
        for size in reversed(self.shape[1:]):
            values = [values[at : at + size] for at in range(0, len(values), size)]
        return values

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """What NumPy reads an array from."""
        typestr = "<f2" if self.dtype == "float16" else "<f4"
        return {"version": 3, "shape": self.shape, "typestr": typestr, "data": self.tobytes()}


class EmbedResult(_Told):
    """Features by name, e.g. ``image_embeds_proj`` of shape (32, 256).

    ``indexed`` is the image's id in an index, where it went there instead.
    """

    kind: Literal[Kind.EMBED] = Kind.EMBED
    arrays: dict[str, Array]
    indexed: str | None = None

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]


class DescribeResult(_Told):
    """The parts that were asked for."""

    kind: Literal[Kind.DESCRIBE] = Kind.DESCRIBE
    caption: CaptionResult | None = None
    vqa: VQAResult | None = None
    match: MatchResult | None = None
    embed: EmbedResult | None = None


class Hit(_Told):
    """One image found.

    itc: the cosine with the query, of the best of the image's 32 vectors (with an image as query:
    the mean of that over the query's 32). itm: the probability that image and text match, where
    they were looked at together.
    """

    id: str
    itc: float
    itm: float | None = None
    uri: str | None = None
    metadata: dict[str, str] = Field(default_factory=dict)


class Skipped(_Told):
    """An image of the index that could not be looked at again, and why."""

    id: str
    code: ErrorCode
    message: str


class SearchResult(_Told):
    """Hits, best first; ``skipped`` were near, but have gone or changed since they were indexed.

    ``checkpoint`` and ``revision`` are the model's that the index was made with.
    """

    kind: Literal[Kind.SEARCH] = Kind.SEARCH
    hits: tuple[Hit, ...]
    skipped: tuple[Skipped, ...] = ()
    checkpoint: str | None = None
    revision: str | None = None


Result = Annotated[
    CaptionResult | VQAResult | MatchResult | EmbedResult | DescribeResult | SearchResult,
    Field(discriminator="kind"),
]
result_adapter: TypeAdapter[Result] = TypeAdapter(Result)


# --- the job --------------------------------------------------------------------------------------


class JobError(_Told):
    """Why a job failed; ``retryable`` says whether the same request may pass later."""

    code: ErrorCode
    message: str
    retryable: bool = False


class Receipt(_Told):
    """What the work took and who did it. Times in milliseconds.

    ``vision_ms`` is part of the passes that it is told beside: of ``generate_ms`` and the like. It
    is 0, and ``cache_hit`` true, where the model had seen the image before and need not look again;
    then ``decode_ms`` is missing. ``shared``: an equal job computed the answer at the same time, so
    this one's own passes are missing. ``note`` says what a person should know about the answer.
    """

    queue_ms: float | None = None
    fetch_ms: float | None = None
    decode_ms: float | None = None
    wait_ms: float | None = None
    vision_ms: float | None = None
    generate_ms: float | None = None
    match_ms: float | None = None
    embed_ms: float | None = None
    index_ms: float | None = None
    rerank_ms: float | None = None
    tokens: int | None = None
    batch_size: int | None = None
    cache_hit: bool | None = None
    shared: bool | None = None
    checkpoint: str | None = None
    revision: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    worker: str | None = None
    note: str | None = None


class JobInfo(_Told):
    """A job as the ledger has it. Times are UTC; ``attempts`` counts deliveries to a worker.

    While the job is open, ``live_workers`` says how many live workers serve its model, ``note``
    what keeps it from being run, if that is known, and ``last_error`` why it is run again.
    """

    id: str
    kind: Kind
    model: str
    status: Status
    created_at: datetime
    started_at: datetime | None = None
    completed_at: datetime | None = None
    expires_at: datetime
    attempts: int = 0
    result: Result | None = None
    error: JobError | None = None
    receipt: Receipt | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    live_workers: int | None = None
    note: str | None = None
    last_error: JobError | None = None

    @property
    def ended(self) -> bool:
        """Whether the status is terminal: it will never change again."""
        return self.status in TERMINAL_STATUSES
