"""Requests: one model for each kind of job."""

from typing import Annotated, Any, Generic, Literal

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, model_validator

from blipq.contract.base import Input, Kind, Metadata, MetadataName, MetadataValue, Name
from blipq.contract.generation import Confidence, Generation
from blipq.contract.images import Image
from blipq.contract.results import (
    CaptionResult,
    DescribeResult,
    EmbedDtype,
    EmbedResult,
    Head,
    MatchResult,
    ResultT,
    SearchResult,
    VQAResult,
)


class Asks(Generic[ResultT]):
    """Base of requests; its parameter is the type of the result."""


#: What metadata must hold; a list means any of its values.
Filter = Annotated[
    dict[
        MetadataName,
        MetadataValue | Annotated[tuple[MetadataValue, ...], Field(min_length=1, max_length=64)],
    ],
    Field(min_length=1, max_length=16),
]


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return text


Text = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_not_blank)]


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Texts = Annotated[tuple[Text, ...], BeforeValidator(_one_or_many), Field(min_length=1)]


#: Questions of one job whose answers may have ``logprobs``: a token takes 60 bytes of the result.
_MOST_LOGPROBS = 16


def _check_logprobs(generation: Generation | None, questions: tuple[str, ...]) -> None:
    if generation is not None and generation.logprobs and len(questions) > _MOST_LOGPROBS:
        raise ValueError(f"logprobs are for at most {_MOST_LOGPROBS} questions")


class CaptionRequest(Input, Asks[CaptionResult]):
    """Describe the image in words, optionally going on from ``prompt``.

    ``best_of`` n draws n captions and returns them ranked by image-text matching. A caption whose
    ``mean_token_probability`` is below ``min_confidence`` is marked as ``uncertain``.
    """

    kind: Literal[Kind.CAPTION] = Kind.CAPTION
    image: Image
    prompt: str | None = Field(default=None, max_length=4096)
    generation: Generation | None = None
    best_of: int | None = Field(default=None, ge=1, le=16)
    min_confidence: Confidence | None = None


class Turn(Input):
    """An earlier question about the same image and its answer."""

    question: Text
    answer: Text


class VQARequest(Input, Asks[VQAResult]):
    """Answer questions about the image; ``history`` holds earlier turns, oldest first.

    With ``choices`` nothing is generated: each question's answer is the one that the model finds
    most likely, and all are ranked. ``min_confidence`` is what the answer's
    ``mean_token_probability`` must reach, or the probability of the first choice, so that it is not
    marked as ``uncertain``.
    """

    kind: Literal[Kind.VQA] = Kind.VQA
    image: Image
    questions: Annotated[Texts, Field(max_length=64)]
    history: tuple[Turn, ...] = Field(default=(), max_length=32)
    choices: Annotated[tuple[Text, ...], Field(min_length=2, max_length=256)] | None = None
    generation: Generation | None = None
    min_confidence: Confidence | None = None

    @model_validator(mode="after")
    def _logprobs_are_few(self) -> "VQARequest":
        _check_logprobs(self.generation, self.questions)
        return self

    @model_validator(mode="after")
    def _choices_differ(self) -> "VQARequest":
        if self.choices is None:
            return self
        if self.generation is not None:
            raise ValueError("generation has no effect on choices: leave one of them out")
        if len({choice.strip() for choice in self.choices}) < len(self.choices):
            raise ValueError("choices must differ")
        return self


class MatchRequest(Input, Asks[MatchResult]):
    """Score texts against the image: ``itm`` is a probability, ``itc`` a cosine.

    ``explain`` adds where ``itm`` looked, for at most 16 texts.
    """

    kind: Literal[Kind.MATCH] = Kind.MATCH
    image: Image
    texts: Annotated[Texts, Field(max_length=256)]
    head: Head = "itm"
    explain: bool = False

    @model_validator(mode="after")
    def _explicable(self) -> "MatchRequest":
        if self.explain and (self.head != "itm" or len(self.texts) > 16):
            raise ValueError("explain is for head 'itm' and at most 16 texts")
        return self


EmbedMode = Literal["image", "text", "multimodal"]


class IndexEntry(Input):
    """Where an image goes in an index: under which id (by default its URI), with which metadata."""

    name: Name
    id: str | None = Field(default=None, min_length=1, max_length=1024)
    metadata: Metadata = Field(default_factory=dict)


def _entry_from_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class EmbedRequest(Input, Asks[EmbedResult]):
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
        if self.image is None and self.text is None:
            raise ValueError("needs an image, a text, or both")
        if self.mode != "text" and self.image is None:
            raise ValueError(f"mode {self.mode!r} needs an image")
        if self.mode != "image" and self.text is None:
            raise ValueError(f"mode {self.mode!r} needs a text")
        if self.index is not None and self.mode != "image":
            raise ValueError("an index holds images: mode must be 'image'")
        if self.index is not None and self.image is not None and self.image.is_part:
            raise ValueError("an index holds whole objects: leave offset and length out")
        return self


class DescribeRequest(Input, Asks[DescribeResult]):
    """Several things about one image from one vision pass.

    ``texts`` are scored by ``itm``; ``embed`` gives the image's features. ``generation`` is for the
    caption and the answers, and so is ``min_confidence``.
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
    min_confidence: Confidence | None = None

    @model_validator(mode="after")
    def _logprobs_are_few(self) -> "DescribeRequest":
        _check_logprobs(self.generation, self.questions)
        return self

    @model_validator(mode="after")
    def _something(self) -> "DescribeRequest":
        if not (self.caption or self.questions or self.texts or self.embed):
            raise ValueError("ask for a caption, questions, texts or embed")
        return self


class SearchRequest(Input, Asks[SearchResult]):
    """Find images in an index by a text or by an image.

    The ``top_k`` nearest by cosine are found first. For a text, the ``rerank`` nearest are then
    scored together with the text by the matching head, and come first, by matching logit plus
    cosine; 0 leaves that out. ``filter`` names metadata that a hit must have; a list means any of
    its values.
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
