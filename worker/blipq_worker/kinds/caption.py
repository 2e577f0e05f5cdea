"""Captions; with ``best_of`` the best of several, ranked by how well they match the image."""

from functools import partial
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
from blipq_worker.kinds.generation import confidence, params_of, remark
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
        made = partial(_captions, request, ask)
        return Part("generate", Generate(image, (prompt,), params), made)

    def answer(self, request: CaptionRequest, image: ImagePixels | None, ask: Ask) -> CaptionResult:
        """Writes captions, and ranks them where ``best_of`` is set."""
        assert image is not None
        written = ask.one(self.part(request, image, ask))
        if request.best_of is None:
            return written
        texts = tuple(caption.text for caption in written.captions)
        scores = ask.one(Part("match", Match(image, texts, "itm"), _scores))
        ranked = sorted(zip(written.captions, scores, strict=True), key=lambda pair: -pair[1])
        return CaptionResult(
            captions=tuple(each.model_copy(update={"score": score}) for each, score in ranked)
        )


def _captions(request: CaptionRequest, ask: Ask, generated: Generated) -> CaptionResult:
    texts = generated.texts[0]
    remark(texts, ask.note)
    least = request.min_confidence
    return CaptionResult(
        captions=tuple(Caption(text=each.text, **confidence(each, least)) for each in texts)
    )


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
