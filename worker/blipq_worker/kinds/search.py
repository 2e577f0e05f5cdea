"""Search in two stages, as LAVIS evaluates retrieval: nearest by cosine, then looked at again.

Source: lavis/models/blip2_models/blip2.py, compute_sim_matrix.
"""

from collections.abc import Sequence
from typing import Protocol

from blipq.contract import Hit, ImageRef, SearchRequest, SearchResult, Skipped
from blipq.errors import PermanentError
from blipq.index.store import Filter, Found, Vectors
from blipq_worker.blip2 import EmbedItem, ModelInfo, Pixels
from blipq_worker.inference.engine import Embedded, Reranked
from blipq_worker.kinds.arrays import numbers
from blipq_worker.seam.requests import Embedded, ModelInfo, Reranked


class Ask(Protocol):
    """What a search asks of the model and of the indexes."""

    @property
    def info(self) -> ModelInfo:
        """The served model."""

    def embed(self, item: EmbedItem) -> Embedded:
        """Features by name. Raises PermanentError (invalid_request) for a text too long."""

    def nearest(
        self, index: str, queries: Vectors, limit: int, filter: Filter | None
    ) -> list[Found]:
        """The images of an index that are nearest to queries (n, 256)."""

    def rerank(self, images: Sequence[ImageRef], text: str) -> list[Reranked | PermanentError]:
        """Each image looked at together with a text, or why it cannot be read."""


def search(request: SearchRequest, pixels: Pixels | None, ask: Ask) -> SearchResult:
    """Runs a search. Raises WorkError."""
    text, count = request.text, request.top_k
    if text is None:
        queries = numbers(ask.embed(EmbedItem("image", pixels)).arrays["image_embeds_proj"])
    else:
        queries = numbers(ask.embed(EmbedItem("text", text=text)).arrays["text_embeds_proj"])[:1]
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
