"""Search in two stages, as LAVIS evaluates retrieval: nearest by cosine, then looked at again.

Source: lavis/models/blip2_models/blip2.py, compute_sim_matrix.
"""

from collections.abc import Sequence

from blipq.contract import Hit, ImageRef, Kind, SearchRequest, SearchResult, Skipped
from blipq.errors import PermanentError
from blipq.index.store import Found, Vectors
from blipq_worker.inference.requests import Embed, Embedded, Feature, ImagePixels
from blipq_worker.kinds.arrays import numbers
from blipq_worker.kinds.spec import Ask, KindSpec, Part


class SearchSpec(KindSpec[SearchRequest]):
    """An ``Embed``, a search of the index, and for a text a rerank of the nearest."""

    kind = Kind.SEARCH

    def needs(self, request: SearchRequest) -> frozenset[Feature]:
        """The queries of the retrieval checkpoint."""
        return frozenset({"retrieval"})

    def answer(self, request: SearchRequest, image: ImagePixels | None, ask: Ask) -> SearchResult:
        """Searches an index, and ranks the first hits anew where a rerank is requested."""
        text, count = request.text, request.top_k
        if text is None:
            queries = ask.one(Part("embed", Embed("image", image), _of_image))
        else:
            queries = ask.one(Part("embed", Embed("text", text=text), _of_text))
            count = max(count, request.rerank)
        near = ask.nearest(request.index, queries, count, request.filter)
        hits = [_hit(found) for found in near]
        skipped: tuple[Skipped, ...] = ()
        if text is not None and request.rerank:
            first, skipped = _again(near[: request.rerank], text, ask)
            hits = [*first, *hits[request.rerank :]]
        return SearchResult(
            hits=tuple(hits[: request.top_k]),
            skipped=skipped,
            checkpoint=ask.info.retrieval_checkpoint,
            revision=ask.info.retrieval_revision,
        )


def _of_image(embedded: Embedded) -> Vectors:
    return numbers(embedded.arrays["image_embeds_proj"])


def _of_text(embedded: Embedded) -> Vectors:
    """The row that stands for the whole text."""
    return numbers(embedded.arrays["text_embeds_proj"])[:1]


def _again(near: Sequence[Found], text: str, ask: Ask) -> tuple[list[Hit], tuple[Skipped, ...]]:
    """The images in the order of matching logit plus cosine, and those that cannot be read."""
    images = [ImageRef(uri=found.uri, etag=found.etag or None) for found in near]
    ranked: list[tuple[float, Hit]] = []
    skipped: list[Skipped] = []
    for found, answer in zip(near, ask.rerank(images, text), strict=True):
        if isinstance(answer, PermanentError):
            skipped.append(Skipped(id=found.id, code=answer.code, message=str(answer)))
        else:
            ranked.append((answer.logit + found.cosine, _hit(found, answer.probability)))
    ranked.sort(key=lambda each: -each[0])
    return [hit for _, hit in ranked], tuple(skipped)


def _hit(found: Found, probability: float | None = None) -> Hit:
    return Hit(
        id=found.id,
        itc=round(found.cosine, 6),
        itm=None if probability is None else round(probability, 6),
        uri=found.uri,
        metadata=found.metadata,
    )


SPEC = SearchSpec()
