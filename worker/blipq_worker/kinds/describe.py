"""Several kinds at once about one image: what each part needs and comes to is its kind's matter."""

from typing import Any

from blipq.contract import (
    CaptionRequest,
    DescribeRequest,
    DescribeResult,
    EmbedRequest,
    Kind,
    MatchRequest,
    VQARequest,
)
from blipq_worker.inference.requests import Feature, ImagePixels
from blipq_worker.kinds import caption, embed, match, vqa
from blipq_worker.kinds.spec import Ask, KindSpec, SinglePart


class DescribeSpec(KindSpec[DescribeRequest]):
    """A part of each kind that is requested, all sent at once."""

    kind = Kind.DESCRIBE

    def needs(self, request: DescribeRequest) -> frozenset[Feature]:
        """What any of the parts needs."""
        parts = _requests(request).values()
        return frozenset[Feature]().union(*(spec.needs(each) for spec, each in parts))

    def answer(
        self, request: DescribeRequest, image: ImagePixels | None, ask: Ask
    ) -> DescribeResult:
        """Sends all parts at once: they may run together, and one vision pass serves them."""
        requests = _requests(request)
        parts = [spec.part(each, image, ask) for spec, each in requests.values()]
        return DescribeResult(**dict(zip(requests, ask.all(parts), strict=True)))


def _requests(request: DescribeRequest) -> dict[str, tuple[SinglePart[Any], Any]]:
    """The requested parts, by their fields in the result, as their kinds' requests."""
    image, generation = request.image, request.generation
    least = request.min_confidence
    found: dict[str, tuple[SinglePart[Any], Any]] = {}
    if request.caption:
        found["caption"] = (
            caption.SPEC,
            CaptionRequest(image=image, generation=generation, min_confidence=least),
        )
    if request.questions:
        vqa_request = VQARequest(
            image=image,
            questions=request.questions,
            generation=generation,
            min_confidence=least,
        )
        found["vqa"] = vqa.SPEC, vqa_request
    if request.texts:
        found["match"] = match.SPEC, MatchRequest(image=image, texts=request.texts)
    if request.embed:
        found["embed"] = embed.SPEC, EmbedRequest(image=image)
    return found


SPEC = DescribeSpec()
