"""What each kind of job asks of the model: a request in, a result out.

A handler turns a request into items for the batcher and their answers into a result. ``Ask`` sends
one item and waits for its answer; handlers know nothing of queues, leases or batches.
"""

import math
from base64 import b64encode
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from blipq.contract import (
    Answer,
    Array,
    Caption,
    CaptionRequest,
    CaptionResult,
    Choice,
    DescribeRequest,
    DescribeResult,
    EmbedDtype,
    EmbedRequest,
    EmbedResult,
    Generation,
    ImageRef,
    IndexEntry,
    MatchRequest,
    MatchResult,
    Request,
    Result,
    SearchRequest,
    TextScore,
    VQARequest,
    VQAResult,
)
from blipq.index.store import Entry, Vectors
from blipq_worker.blip2 import EmbedItem, GenerateItem, Item, MatchItem, Pixels, RankItem
from blipq_worker.catalog.params import resolve
from blipq_worker.catalog.prompts import caption_prompt, vqa_prompt
from blipq_worker.inference.engine import Embedded, Generated, Matched, Ranked
from blipq_worker.kinds import search
from blipq_worker.kinds.arrays import numbers
from blipq_worker.seam.requests import (
    Embedded,
    Feature,
    Generated,
    GenerationParams,
    Matched,
    ModelInfo,
    Ranked,
)

Turns = tuple[tuple[str, str], ...]


class Ask(search.Ask, Protocol):
    """Sends items to the model and waits for what it says.

    Raises PermanentError: invalid_request for a text that is too long, model_unavailable for what
    the served model has no checkpoint for.
    """

    @property
    def info(self) -> ModelInfo:
        """The served model."""

    def generate(self, item: GenerateItem) -> Generated:
        """Texts per prompt."""

    def rank(self, item: RankItem) -> Ranked:
        """A log-likelihood per choice and prompt."""

    def match(self, item: MatchItem) -> Matched:
        """A score per text."""

    def embed(self, item: EmbedItem) -> Embedded:
        """Features by name."""

    def all(self, items: Sequence[Item]) -> list[Any]:
        """The answers to several items, which may run together."""

    def fits(self, item: Item) -> bool:
        """Whether the item's texts are short enough."""

    def note(self, text: str) -> None:
        """Tells the caller something about the answer."""

    def add(self, index: str, entry: Entry) -> None:
        """Puts an image into an index."""


def image_of(request: Request) -> ImageRef | None:
    """The image that must be fetched for a request, if any."""
    if isinstance(request, EmbedRequest) and request.mode == "text":
        return None
    return request.image


def needed(request: Request) -> frozenset[Feature]:
    """What must be known of the image, so that it need not be looked at."""
    match request:
        case CaptionRequest(best_of=None) | VQARequest():
            return frozenset({"generation"})
        case CaptionRequest():
            return frozenset({"generation", "patches"})
        case MatchRequest():
            return frozenset({"patches" if request.head == "itm" else "retrieval"})
        case EmbedRequest():
            return frozenset({"retrieval" if request.mode == "image" else "patches"})
        case SearchRequest():
            return frozenset({"retrieval"})
        case DescribeRequest():
            return frozenset(_needed_to_describe(request))


def is_repeatable(request: Request) -> bool:
    """Whether an equal request about an equal image has the same answer, and no other effect."""
    if isinstance(request, SearchRequest):
        return False  # the index changes
    if isinstance(request, EmbedRequest):
        return request.index is None
    generation = None if isinstance(request, MatchRequest) else request.generation
    return generation is None or not generation.do_sample or generation.seed is not None


def answer(request: Request, pixels: Pixels | None, ask: Ask) -> Result:
    """Runs a request on the model; ``pixels`` are those of ``image_of``.

    Raises PermanentError (invalid_request, model_unavailable).
    """
    return _HANDLERS[type(request)](request, pixels, ask)


# -- caption --


def _caption(request: CaptionRequest, pixels: Pixels, ask: Ask) -> CaptionResult:
    said = ask.generate(_caption_item(request, pixels, ask))
    if request.best_of is None:
        return _captions(said)
    texts = [text.text for text in said.texts[0]]
    scores = ask.match(MatchItem(pixels, tuple(texts), "itm")).scores
    ranked = sorted(zip(texts, scores, strict=True), key=lambda pair: -pair[1])
    return CaptionResult(captions=tuple(Caption(text=text, score=score) for text, score in ranked))


def _caption_item(request: CaptionRequest, pixels: Pixels, ask: Ask) -> GenerateItem:
    params = _params("caption", ask.info, request.generation, **_best_of(request))
    prompt = caption_prompt(request.prompt, ask.info.default_prompt)
    return GenerateItem(pixels, (prompt,), params)


def _captions(said: Generated) -> CaptionResult:
    return CaptionResult(captions=tuple(Caption(text=text.text) for text in said.texts[0]))


def _best_of(request: CaptionRequest) -> dict[str, Any]:
    """Enough beams, or samples, for ``best_of`` different captions."""
    if request.best_of is None:
        return {}
    generation = request.generation or Generation()
    if generation.do_sample:
        return {"num_return_sequences": request.best_of}
    beams = max(generation.num_beams or 5, request.best_of)
    return {"num_return_sequences": request.best_of, "num_beams": beams}


# -- vqa --


def _vqa(request: VQARequest, pixels: Pixels, ask: Ask) -> VQAResult:
    item = _questions(request, pixels, ask)
    if isinstance(item, RankItem):
        return _choices(request, ask.rank(item))
    return _answers(request, ask.generate(item))


def _questions(request: VQARequest, pixels: Pixels, ask: Ask) -> GenerateItem | RankItem:
    """One prompt per question, each with as many earlier turns as there is room for."""
    params = _params("vqa", ask.info, request.generation)

    def item(*prompts: str) -> GenerateItem | RankItem:
        if request.choices is not None:
            return RankItem(pixels, prompts, request.choices)
        return GenerateItem(pixels, prompts, params)

    turns = tuple((turn.question, turn.answer) for turn in request.history)
    kept = [
        _newest(turns, lambda rest, asked=asked: ask.fits(item(vqa_prompt(asked, rest))))  # type: ignore[misc]
        for asked in request.questions
    ]
    dropped = len(turns) - min(map(len, kept))
    if dropped:
        ask.note(f"{dropped} of {len(turns)} earlier turns were left out: there was no room")
    return item(*map(vqa_prompt, request.questions, kept))


def _newest(turns: Turns, fits: Callable[[Turns], bool]) -> Turns:
    """The turns without the oldest ones, so that the rest fits; none if even the last does not.

    The fewer turns, the shorter the prompt: what to leave out is found by halving.
    """
    first = bisect_left(range(len(turns)), True, key=lambda first: fits(turns[first:]))
    return turns[first:]


def _answers(request: VQARequest, said: Generated) -> VQAResult:
    return VQAResult(
        answers=tuple(
            Answer(question=question, text=texts[0].text)
            for question, texts in zip(request.questions, said.texts, strict=True)
        )
    )


def _choices(request: VQARequest, ranked: Ranked) -> VQAResult:
    choices = request.choices or ()
    return VQAResult(
        answers=tuple(
            _chosen(question, choices, likelihoods)
            for question, likelihoods in zip(request.questions, ranked.likelihoods, strict=True)
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


# -- match, embed --


def _match(request: MatchRequest, pixels: Pixels, ask: Ask) -> MatchResult:
    return _scores(request, ask.match(MatchItem(pixels, request.texts, request.head)))


def _scores(request: MatchRequest, matched: Matched) -> MatchResult:
    return MatchResult(
        head=request.head,
        scores=tuple(
            TextScore(text=text, score=score)
            for text, score in zip(request.texts, matched.scores, strict=True)
        ),
    )


def _embed(request: EmbedRequest, pixels: Pixels | None, ask: Ask) -> EmbedResult:
    text = None if request.mode == "image" else request.text
    embedded = ask.embed(EmbedItem(request.mode, pixels, text))
    if request.index is None or request.image is None:
        return _features(request, embedded)
    vectors = numbers(embedded.arrays["image_embeds_proj"])
    entry = _entry(request.index, request.image, vectors)
    ask.add(request.index.name, entry)
    return EmbedResult(arrays={}, indexed=entry.id)


def _features(request: EmbedRequest, embedded: Embedded) -> EmbedResult:
    return EmbedResult(
        arrays={
            name: _array(numbers(array), request.dtype) for name, array in embedded.arrays.items()
        }
    )


def _entry(target: IndexEntry, image: ImageRef, vectors: Vectors) -> Entry:
    return Entry(
        id=target.id or image.uri,
        uri=image.uri,
        etag=image.etag or "",
        vectors=vectors,
        metadata=target.metadata,
    )


def _array(values: Any, dtype: EmbedDtype) -> Array:
    data = np.asarray(values, dtype=np.dtype(dtype).newbyteorder("<")).tobytes()
    return Array(shape=values.shape, dtype=dtype, data=b64encode(data).decode())


# -- describe --


def _describe(request: DescribeRequest, pixels: Pixels, ask: Ask) -> DescribeResult:
    """All parts are asked at once: they may run together, and one vision pass serves them."""
    caption = CaptionRequest(image=request.image, generation=request.generation)
    parts: dict[str, tuple[Item, Callable[[Any], Any]]] = {}
    if request.caption:
        parts["caption"] = (_caption_item(caption, pixels, ask), _captions)
    if request.questions:
        vqa = VQARequest(
            image=request.image, questions=request.questions, generation=request.generation
        )
        parts["vqa"] = (_questions(vqa, pixels, ask), partial(_answers, vqa))
    if request.texts:
        match = MatchRequest(image=request.image, texts=request.texts)
        parts["match"] = (MatchItem(pixels, match.texts, match.head), partial(_scores, match))
    if request.embed:
        embed = EmbedRequest(image=request.image)
        parts["embed"] = (EmbedItem(embed.mode, pixels), partial(_features, embed))
    answers = ask.all([item for item, _ in parts.values()])
    told = zip(parts, parts.values(), answers, strict=True)
    return DescribeResult(**{name: result(said) for name, (_, result), said in told})


def _needed_to_describe(request: DescribeRequest) -> Iterator[Feature]:
    if request.caption or request.questions:
        yield "generation"
    if request.texts:
        yield "patches"
    if request.embed:
        yield "retrieval"


# -- all --


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
    DescribeRequest: _describe,
    SearchRequest: search.search,
}
