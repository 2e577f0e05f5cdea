"""How well texts match an image."""

from functools import partial

from blipq.contract import Kind, MatchRequest, MatchResult, TextScore
from blipq_worker.inference.requests import Feature, ImagePixels, Match, Matched
from blipq_worker.kinds.spec import Ask, Part, SinglePart


class MatchSpec(SinglePart[MatchRequest]):
    """One ``Match`` of all texts."""

    kind = Kind.MATCH

    def needs(self, request: MatchRequest) -> frozenset[Feature]:
        """The matching head reads the tower's output, the contrastive one queries."""
        return frozenset({"patches" if request.head == "itm" else "retrieval"})

    def part(self, request: MatchRequest, image: ImagePixels | None, ask: Ask) -> Part[MatchResult]:
        """A score per text, in their order."""
        assert image is not None
        item = Match(image, request.texts, request.head)
        return Part("match", item, partial(_scores, request))


def _scores(request: MatchRequest, matched: Matched) -> MatchResult:
    return MatchResult(
        head=request.head,
        scores=tuple(
            TextScore(text=text, score=score)
            for text, score in zip(request.texts, matched.scores, strict=True)
        ),
    )


SPEC = MatchSpec()
