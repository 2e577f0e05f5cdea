"""Captions; with ``best_of`` the best of several, ranked by how well they match the image."""

from typing import Any

from blipq.contract import Caption, CaptionRequest, CaptionResult, Generation, Kind
from blipq_worker.catalog.prompts import caption_prompt
from blipq_worker.inference.requests import (
    Feature,
    Generate,
    Generated,
    ImagePixels,
    Match,
    Matched,
)
from blipq_worker.kinds.generation import params_of
from blipq_worker.kinds.spec import Ask, Part, SinglePart


class CaptionSpec(SinglePart[CaptionRequest]):
    """One ``Generate``; with ``best_of`` a ``Match`` of its captions ranks them."""

    kind = Kind.CAPTION

    def needs(self, request: CaptionRequest) -> frozenset[Feature]:
        """Captions are written from queries and ranked by the tower's output."""
        if request.best_of is None:
            return frozenset({"generation"})
        return frozenset({"generation", "patches"})

    def part(
        self, request: CaptionRequest, image: ImagePixels | None, ask: Ask
    ) -> Part[CaptionResult]:
        """The captions, in the order of the beam search, without scores."""
        assert image is not None
        params = params_of("caption", ask.info, request.generation, **_best_of(request))
        prompt = caption_prompt(request.prompt, ask.info.default_prompt)
        return Part("generate", Generate(image, (prompt,), params), _captions)

    def answer(self, request: CaptionRequest, image: ImagePixels | None, ask: Ask) -> CaptionResult:
        """Writes captions, and ranks them where ``best_of`` is set."""
        assert image is not None
        written = ask.one(self.part(request, image, ask))
        if request.best_of is None:
            return written
        texts = tuple(caption.text for caption in written.captions)
        scores = ask.one(Part("match", Match(image, texts, "itm"), _scores))
        ranked = sorted(zip(texts, scores, strict=True), key=lambda pair: -pair[1])
        captions = tuple(Caption(text=text, score=score) for text, score in ranked)
        return CaptionResult(captions=captions)


def _captions(generated: Generated) -> CaptionResult:
    return CaptionResult(captions=tuple(Caption(text=each.text) for each in generated.texts[0]))


def _scores(matched: Matched) -> tuple[float, ...]:
    return matched.scores


def _best_of(request: CaptionRequest) -> dict[str, Any]:
    """Enough beams, or samples, for ``best_of`` different captions."""
    if request.best_of is None:
        return {}
    generation = request.generation or Generation()
    if generation.do_sample:
        return {"num_return_sequences": request.best_of}
    beams = max(generation.num_beams or 5, request.best_of)
    return {"num_return_sequences": request.best_of, "num_beams": beams}


SPEC = CaptionSpec()
