"""What each kind of job asks of the model: a request in, a result out.

A handler turns a request into items for the batcher and their answers into a result. ``Ask`` sends
one item and waits for its answer; handlers know nothing of queues, leases or batches.
"""

import math
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from blipq.contract import (
    Answer,
    Array,
    Caption,
    CaptionRequest,
    CaptionResult,
    Choice,
    EmbedDtype,
    EmbedRequest,
    EmbedResult,
    ErrorCode,
    Generation,
    ImageRef,
    MatchRequest,
    MatchResult,
    Request,
    Result,
    TextScore,
    VQARequest,
    VQAResult,
)
from blipq.errors import PermanentError
from blipq_worker.blip2 import (
    EmbedItem,
    GenerateItem,
    GenerationParams,
    MatchItem,
    ModelInfo,
    Pixels,
    RankItem,
    caption_prompt,
    resolve,
    vqa_prompt,
)
from blipq_worker.engine import Embedded, Generated, Matched, Ranked


class Ask(Protocol):
    """Sends one item to the model and waits for what it says."""

    @property
    def info(self) -> ModelInfo:
        """The served model."""

    def generate(self, item: GenerateItem) -> Generated:
        """Texts per prompt. Raises PermanentError (invalid_request) for a prompt too long."""

    def rank(self, item: RankItem) -> Ranked:
        """A log-likelihood per choice and prompt.

        Raises PermanentError (invalid_request) for a prompt too long.
        """

    def match(self, item: MatchItem) -> Matched:
        """A score per text."""

    def embed(self, item: EmbedItem) -> Embedded:
        """Features by name. Raises PermanentError (invalid_request) for a text too long."""


def image_of(request: Request) -> ImageRef | None:
    """The image that must be fetched for a request, if any."""
    if isinstance(request, EmbedRequest) and request.mode == "text":
        return None
    return request.image


def answer(request: Request, pixels: Pixels | None, ask: Ask) -> Result:
    """Runs a request on the model; ``pixels`` are those of ``image_of``.

    Raises PermanentError (invalid_request, model_unavailable).
    """
    handler = _HANDLERS.get(type(request))
    if handler is None:
        message = f"this worker does not serve {request.kind} jobs"
        raise PermanentError(ErrorCode.INVALID_REQUEST, message)
    return handler(request, pixels, ask)


def _caption(request: CaptionRequest, pixels: Pixels, ask: Ask) -> CaptionResult:
    params = _params("caption", ask.info, request.generation, **_best_of(request))
    item = GenerateItem(pixels, (caption_prompt(request.prompt, ask.info.default_prompt),), params)
    texts = [text.text for text in ask.generate(item).texts[0]]
    if request.best_of is None:
        return CaptionResult(captions=tuple(Caption(text=text) for text in texts))
    scores = ask.match(MatchItem(pixels, tuple(texts), "itm")).scores
    ranked = sorted(zip(texts, scores, strict=True), key=lambda pair: -pair[1])
    return CaptionResult(captions=tuple(Caption(text=text, score=score) for text, score in ranked))


def _best_of(request: CaptionRequest) -> dict[str, Any]:
    """Enough beams, or samples, for ``best_of`` different captions."""
    if request.best_of is None:
        return {}
    generation = request.generation or Generation()
    if generation.do_sample:
        return {"num_return_sequences": request.best_of}
    beams = max(generation.num_beams or 5, request.best_of)
    return {"num_return_sequences": request.best_of, "num_beams": beams}


def _vqa(request: VQARequest, pixels: Pixels, ask: Ask) -> VQAResult:
    history = tuple((turn.question, turn.answer) for turn in request.history)
    prompts = tuple(vqa_prompt(question, history) for question in request.questions)
    if request.choices is not None:
        ranked = ask.rank(RankItem(pixels, prompts, request.choices)).likelihoods
        return VQAResult(
            answers=tuple(
                _chosen(question, request.choices, likelihoods)
                for question, likelihoods in zip(request.questions, ranked, strict=True)
            )
        )
    params = _params("vqa", ask.info, request.generation)
    said = ask.generate(GenerateItem(pixels, prompts, params)).texts
    return VQAResult(
        answers=tuple(
            Answer(question=question, text=texts[0].text)
            for question, texts in zip(request.questions, said, strict=True)
        )
    )


def _chosen(question: str, texts: Sequence[str], likelihoods: Sequence[float]) -> Answer:
    """The choices, most likely first, with probabilities that add up to 1."""
    greatest = max(likelihoods)
    weights = [math.exp(likelihood - greatest) for likelihood in likelihoods]
    choices = [
        Choice(text=text, probability=weight / sum(weights), log_likelihood=likelihood)
        for text, weight, likelihood in zip(texts, weights, likelihoods, strict=True)
    ]
    choices.sort(key=lambda choice: -choice.probability)
    return Answer(question=question, text=choices[0].text, choices=tuple(choices))


def _match(request: MatchRequest, pixels: Pixels, ask: Ask) -> MatchResult:
    scores = ask.match(MatchItem(pixels, request.texts, request.head)).scores
    return MatchResult(
        head=request.head,
        scores=tuple(
            TextScore(text=text, score=score)
            for text, score in zip(request.texts, scores, strict=True)
        ),
    )


def _embed(request: EmbedRequest, pixels: Pixels | None, ask: Ask) -> EmbedResult:
    text = None if request.mode == "image" else request.text
    arrays = ask.embed(EmbedItem(request.mode, pixels, text)).arrays
    return EmbedResult(
        arrays={name: _array(values, request.dtype) for name, values in arrays.items()}
    )


def _array(values: Any, dtype: EmbedDtype) -> Array:
    data = np.asarray(values, dtype=np.dtype(dtype).newbyteorder("<")).tobytes()
    return Array(shape=values.shape, dtype=dtype, data=b64encode(data).decode())


def _params(
    kind: Any, info: ModelInfo, generation: Generation | None, **forced: Any
) -> GenerationParams:
    given = generation.model_dump(exclude_none=True) if generation else {}
    return resolve(kind, info, {**given, **forced})


_HANDLERS: Mapping[type, Callable[[Any, Any, Ask], Result]] = {
    CaptionRequest: _caption,
    VQARequest: _vqa,
    MatchRequest: _match,
    EmbedRequest: _embed,
}
