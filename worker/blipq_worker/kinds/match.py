"""How well texts match an image."""

from functools import partial

from blipq.contract import Array, Kind, MatchRequest, MatchResult, TextScore
from blipq_worker.catalog.prompts import match_text
from blipq_worker.inference.requests import (
    Embedded,
    Explain,
    Feature,
    ImagePixels,
    Match,
    Matched,
)
from blipq_worker.kinds.arrays import numbers, stored
from blipq_worker.kinds.spec import Ask, Part, SinglePart


class MatchSpec(SinglePart[MatchRequest]):
    """One ``Match`` of all texts; with ``explain`` an ``Explain`` beside it."""

    kind = Kind.MATCH

    def needs(self, request: MatchRequest) -> frozenset[Feature]:
        """The matching head reads the tower's output, the contrastive one queries."""
        return frozenset({"patches" if request.head == "itm" else "retrieval"})

    def part(self, request: MatchRequest, image: ImagePixels | None, ask: Ask) -> Part[MatchResult]:
        """A score per text, in their order."""
        assert image is not None
        item = Match(image, request.texts, request.head)
        return Part("match", item, partial(_scores, request))

    def answer(self, request: MatchRequest, image: ImagePixels | None, ask: Ask) -> MatchResult:
        """Scores, and the maps that explain them where the request wants them."""
        part = self.part(request, image, ask)
        if not request.explain:
            return ask.one(part)
        assert image is not None
        maps = Part("match", Explain(image, request.texts), _maps)
        matched, drawn = ask.all([part, maps])
        scores = zip(matched.scores, drawn, strict=True)
        return MatchResult(
            head=request.head,
            scores=tuple(
                TextScore(text=each.text, score=each.score, map=map_, words=_words(each.text, map_))
                for each, map_ in scores
            ),
        )


def _maps(embedded: Embedded) -> list[Array]:
    maps = embedded.arrays
    return [stored(numbers(maps[str(number)]), "float16") for number in range(len(maps))]


def _words(text: str, map_: Array) -> tuple[str, ...]:
    """The words that have maps: all but those behind what the head reads."""
    return tuple(match_text(text).split()[: map_.shape[0] - 1])


def _scores(request: MatchRequest, matched: Matched) -> MatchResult:
    return MatchResult(
        head=request.head,
        scores=tuple(
            TextScore(text=text, score=score)
            for text, score in zip(request.texts, matched.scores, strict=True)
        ),
    )


SPEC = MatchSpec()
