"""Results: one model for each kind of job."""

import base64
import math
import struct
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter

from blipq.contract.base import Kind, Output
from blipq.contract.errors import ErrorCode

Head = Literal["itm", "itc"]
EmbedDtype = Literal["float16", "float32"]


FinishReason = Literal["stop", "length", "loop"]


class TokenLogprob(Output):
    """A token of a text, and the natural logarithm of its probability."""

    id: int
    token: str
    logprob: float


class Written(Output):
    """How sure a model was of a text that it wrote.

    ``log_likelihood`` is the sum of the natural logarithms of its tokens' probabilities, its end
    token included; ``mean_token_probability`` the arithmetic mean of these probabilities. Both are
    of the model's own distribution: before temperature, penalties and bans. ``tokens`` is their
    number.
    ``finish_reason``: ``stop``, the model ended the text; ``length``, it is as long as allowed;
    ``loop``, it repeated itself and was ended there. ``logprobs`` has each token, if requested.
    ``uncertain`` is true below the job's ``min_confidence``.
    """

    log_likelihood: float | None = None
    mean_token_probability: float | None = None
    tokens: int | None = None
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    uncertain: bool | None = None


class Caption(Written):
    """One caption; ``score`` is its image-text matching probability if requested."""

    text: str
    score: float | None = None


class CaptionResult(Output):
    """Captions, best first."""

    kind: Literal[Kind.CAPTION] = Kind.CAPTION
    captions: tuple[Caption, ...]

    @property
    def text(self) -> str:
        """The best caption."""
        return self.captions[0].text


class Choice(Output):
    """One of the offered answers and its probability among them.

    ``log_likelihood`` is the sum of the natural logarithms of its tokens' probabilities, its end
    token included; ``probability`` is the softmax of these over the choices of one question.
    """

    text: str
    probability: float
    log_likelihood: float | None = None


class Answer(Written):
    """The answer to one question; ``choices`` ranks the offered answers, best first.

    With ``choices`` nothing is written: ``uncertain`` is about the probability of the first one.
    """

    question: str
    text: str
    choices: tuple[Choice, ...] | None = None


class VQAResult(Output):
    """An answer per question, in the order of the request."""

    kind: Literal[Kind.VQA] = Kind.VQA
    answers: tuple[Answer, ...]

    @property
    def text(self) -> str:
        """The answer to the first question."""
        return self.answers[0].text


class Array(Output):
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


class TextScore(Output):
    """A text and how well it matches: a probability (itm) or a cosine (itc).

    With ``explain``, ``map`` (1 + words, rows, columns) has heat maps of the image, from 0 to 1:
    row 0 is that of the whole text, the others are those of ``words``.
    """

    text: str
    score: float
    map: Array | None = None
    words: tuple[str, ...] | None = None


class MatchResult(Output):
    """A score per text, in the order given."""

    kind: Literal[Kind.MATCH] = Kind.MATCH
    head: Head
    scores: tuple[TextScore, ...]

    @property
    def best(self) -> TextScore:
        """The text that matches best."""
        return max(self.scores, key=lambda scored: scored.score)


class EmbedResult(Output):
    """Features by name, e.g. ``image_embeds_proj`` of shape (32, 256).

    ``indexed`` is the image's id in an index, where it went there instead.
    """

    kind: Literal[Kind.EMBED] = Kind.EMBED
    arrays: dict[str, Array]
    indexed: str | None = None

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]


class DescribeResult(Output):
    """The parts that were requested."""

    kind: Literal[Kind.DESCRIBE] = Kind.DESCRIBE
    caption: CaptionResult | None = None
    vqa: VQAResult | None = None
    match: MatchResult | None = None
    embed: EmbedResult | None = None


class Hit(Output):
    """One image found.

    itc: the cosine with the query, of the best of the image's 32 vectors (with an image as query:
    the mean of that over the query's 32). itm: the probability that image and text match, where
    the matching head scored them together.
    """

    id: str
    itc: float
    itm: float | None = None
    uri: str | None = None
    metadata: dict[str, str] = Field(default_factory=dict)


class Skipped(Output):
    """An image of the index that could not be read again to be reranked, and why."""

    id: str
    code: ErrorCode
    message: str


class SearchResult(Output):
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
ResultT = TypeVar("ResultT", bound="Result", covariant=True)
