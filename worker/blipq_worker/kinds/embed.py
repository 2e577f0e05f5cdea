"""Features of an image, of a text, or of both read together; of an image also into an index."""

from functools import partial

from blipq.contract import (
    EmbedDtype,
    EmbedRequest,
    EmbedResult,
    ImageRef,
    IndexEntry,
    Kind,
)
from blipq.index.store import Entry, Vectors
from blipq_worker.inference.requests import Embed, Embedded, Feature, ImagePixels
from blipq_worker.kinds.arrays import numbers, stored
from blipq_worker.kinds.spec import Ask, Part, SinglePart


class EmbedSpec(SinglePart[EmbedRequest]):
    """One ``Embed``; with ``index`` its features go there, and not into the answer."""

    kind = Kind.EMBED

    def image_of(self, request: EmbedRequest) -> ImageRef | None:
        """The image, unless a text is embedded."""
        return None if request.mode == "text" else request.image

    def needs(self, request: EmbedRequest) -> frozenset[Feature]:
        """An image is embedded as queries; with a text it is read anew."""
        return frozenset({"retrieval" if request.mode == "image" else "patches"})

    def part(self, request: EmbedRequest, image: ImagePixels | None, ask: Ask) -> Part[EmbedResult]:
        """The features by name."""
        return Part("embed", _item(request, image), partial(_features, request.dtype))

    def answer(self, request: EmbedRequest, image: ImagePixels | None, ask: Ask) -> EmbedResult:
        """Embeds, and stores what is for an index there."""
        if request.index is None or request.image is None:
            return ask.one(self.part(request, image, ask))
        vectors = ask.one(Part("embed", _item(request, image), _projected))
        entry = _entry(request.index, request.image, vectors)
        ask.add(request.index.name, entry)
        return EmbedResult(arrays={}, indexed=entry.id)


def _item(request: EmbedRequest, image: ImagePixels | None) -> Embed:
    return Embed(request.mode, image, None if request.mode == "image" else request.text)


def _projected(embedded: Embedded) -> Vectors:
    return numbers(embedded.arrays["image_embeds_proj"])


def _features(dtype: EmbedDtype, embedded: Embedded) -> EmbedResult:
    return EmbedResult(
        arrays={name: stored(numbers(array), dtype) for name, array in embedded.arrays.items()}
    )


def _entry(target: IndexEntry, image: ImageRef, vectors: Vectors) -> Entry:
    return Entry(
        id=target.id or image.uri,
        uri=image.uri,
        etag=image.etag or "",
        vectors=vectors,
        metadata=target.metadata,
    )


SPEC = EmbedSpec()
