"""What a kind of job is to a worker. Specs know nothing of queues, leases or batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

from blipq.contract import ImageRef, Kind, Request, Result
from blipq.errors import PermanentError
from blipq.index.store import Entry, Filter, Found, Vectors
from blipq_worker.inference.requests import Feature, ImagePixels, Item, ModelInfo, Reranked

#: Where the time of a pass is found in the receipt, as ``generate_ms`` for "generate".
Stage = Literal["generate", "match", "embed"]

RequestT = TypeVar("RequestT", bound=Request, contravariant=True)
MadeT = TypeVar("MadeT")
MadeOut = TypeVar("MadeOut", covariant=True)


@dataclass(frozen=True, slots=True)
class Part(Generic[MadeOut]):
    """An item to send, the stage that its pass is part of, and what its answer's value becomes."""

    stage: Stage
    item: Item
    made: Callable[[Any], MadeOut]


class Ask(Protocol):
    """How a job reaches the model and the indexes.

    Raises PermanentError: invalid_request for a text that is too long, model_unavailable for what
    the served model has no checkpoint for; TransientError where it may work later.
    """

    @property
    def info(self) -> ModelInfo:
        """The served model."""

    def one(self, part: Part[MadeT]) -> MadeT:
        """Runs a part, and makes its result."""

    def all(self, parts: Sequence[Part[Any]]) -> list[Any]:
        """Runs several parts, together where that is possible; their results in order."""

    def fits(self, item: Item) -> bool:
        """Whether the item's texts are short enough."""

    def note(self, text: str) -> None:
        """Adds to the receipt what a person should know about the answer."""

    def add(self, index: str, entry: Entry) -> None:
        """Puts an image into an index."""

    def nearest(
        self, index: str, queries: Vectors, limit: int, filter: Filter | None
    ) -> list[Found]:
        """The images of an index that are nearest to queries (n, 256)."""

    def rerank(self, images: Sequence[ImageRef], text: str) -> list[Reranked | PermanentError]:
        """How well a text matches each image, or why that cannot be read."""


class KindSpec(ABC, Generic[RequestT]):
    """A kind of job. Its module is named as the kind, and has the spec as ``SPEC``."""

    kind: ClassVar[Kind]

    def image_of(self, request: RequestT) -> ImageRef | None:
        """The image that must be fetched, if any."""
        return request.image

    @abstractmethod
    def needs(self, request: RequestT) -> frozenset[Feature]:
        """What must be known of the image, so that no pixels are needed."""

    @abstractmethod
    def answer(self, request: RequestT, image: ImagePixels | None, ask: Ask) -> Result:
        """Runs a request; ``image``: that of ``image_of``. Raises WorkError."""


class SinglePart(KindSpec[RequestT]):
    """A kind whose result comes of one item."""

    @abstractmethod
    def part(self, request: RequestT, image: ImagePixels | None, ask: Ask) -> Part[Result]:
        """The item, and how its answer becomes the result."""

    def answer(self, request: RequestT, image: ImagePixels | None, ask: Ask) -> Result:
        """Runs the request's one part."""
        return ask.one(self.part(request, image, ask))
