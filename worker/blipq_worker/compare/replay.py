"""A model's answer to a case, and numbers that show more than the answer does.

Texts change long after the numbers behind them, and most jobs touch a part of the model only. So
every picture is also held against the whole of it: what the language model reads of it, how likely
that finds the served model's own words, the features of the retrieval checkpoint and its logits,
which do not saturate as probabilities do.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import numpy as np

from blipq.cli.terminal.output import lines_of
from blipq.contract import ErrorCode, ImageRef
from blipq.errors import PermanentError
from blipq.index.store import Entry, Filter, Found, Vectors
from blipq_worker.blip2 import Blip2, EmbedItem, MatchItem, Pixels, RankItem, RerankItem
from blipq_worker.compare.cases import Case
from blipq_worker.compare.pictures import Pictures
from blipq_worker.engine.verbs import as_model_item, verb_of
from blipq_worker.inference.requests import (
    Embedded,
    Generated,
    ImagePixels,
    Item,
    Matched,
    ModelInfo,
    Rank,
    Ranked,
    Reranked,
    Value,
)
from blipq_worker.kinds.arrays import Numbers, numbers
from blipq_worker.kinds.registry import spec_of
from blipq_worker.kinds.spec import Part
from blipq_worker.serving.canary import TEXTS

MadeT = TypeVar("MadeT")

LIKELIHOODS = "log-likelihoods"
SCORES = "match scores"
LOGITS = "match logits"
READ = "what the language model reads"


@dataclass(frozen=True, slots=True)
class Observed:
    """What a model made of a case.

    texts: all that it wrote or chose, in order. lines: its answer for people. numbers: by name, in
    one dimension. ms: until the answer, without fetching and decoding.
    """

    texts: tuple[str, ...]
    lines: tuple[str, ...]
    numbers: Mapping[str, Numbers]
    ms: float


@dataclass(slots=True)
class _Found:
    """What is found, piece by piece."""

    texts: list[str] = field(default_factory=list)
    numbers: defaultdict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))

    def add(self, name: str, values: Any) -> None:
        self.numbers[name].append(np.asarray(values, dtype=np.float32).ravel())

    def note(self, item: Item, value: Value) -> None:
        """Takes the texts and the numbers of an answer."""
        match value:
            case Generated(texts=texts):
                self.texts += [each.text for several in texts for each in several]
            case Ranked(likelihoods=rows):
                assert isinstance(item, Rank)
                self.texts += [item.choices[int(np.argmax(row))] for row in rows]
                self.add(LIKELIHOODS, rows)
            case Matched(scores=scores):
                self.add(SCORES, scores)
            case Reranked(logit=logit):
                self.add(LOGITS, logit)
            case Embedded(arrays=arrays):
                for name, array in arrays.items():
                    self.add(name, numbers(array))

    def all(self) -> dict[str, Numbers]:
        return {name: np.concatenate(pieces) for name, pieces in self.numbers.items()}


class Direct:
    """A job's way to a model that nobody else uses: an ``Ask`` without queue or batcher."""

    def __init__(self, model: Blip2, pixels: Pixels | None) -> None:
        self._model = model
        self._pixels = pixels
        self.found = _Found()

    @property
    def info(self) -> ModelInfo:
        """The model."""
        return self._model.info

    def one(self, part: Part[MadeT]) -> MadeT:
        """Runs a part, and makes its result."""
        made: MadeT = part.made(self._value(part.item))
        return made

    def all(self, parts: Sequence[Part[Any]]) -> list[Any]:
        """Runs parts one after the other."""
        return [self.one(part) for part in parts]

    def fits(self, item: Item) -> bool:
        """Whether the item's texts are short enough."""
        try:
            self._model.check(as_model_item(item))
        except PermanentError:
            return False
        return True

    def note(self, text: str) -> None:
        """Nothing: there is no receipt."""

    def add(self, index: str, entry: Entry) -> NoReturn:
        """Never: cases have no index."""
        raise self._no_index()

    def nearest(
        self, index: str, queries: Vectors, limit: int, filter: Filter | None
    ) -> list[Found]:
        """Never: cases have no index."""
        raise self._no_index()

    def rerank(self, images: Sequence[ImageRef], text: str) -> NoReturn:
        """Never: cases have no index."""
        raise self._no_index()

    def _no_index(self) -> PermanentError:
        return PermanentError(ErrorCode.INVALID_REQUEST, "indexes are not replayed")

    def _value(self, item: Item) -> Value:
        model_item = as_model_item(item, None if item.image is None else self._pixels)
        self._model.check(model_item)
        verb = verb_of(item)
        (answer,) = getattr(self._model, verb.name)([model_item])
        value = verb.value(answer)
        self.found.note(item, value)
        return value


def answered(model: Blip2, case: Case, pictures: Pictures) -> Observed:
    """What the served model makes of a case. Raises WorkError."""
    return _observed(model, case, pictures, None)


def answered_beside(model: Blip2, case: Case, pictures: Pictures, other: Observed) -> Observed:
    """What another model makes of it: how probable the first one's texts are. See above."""
    return _observed(model, case, pictures, other.texts)


def _observed(
    model: Blip2, case: Case, pictures: Pictures, texts: tuple[str, ...] | None
) -> Observed:
    spec = spec_of(case.request)
    ref = spec.image_of(case.request)
    image = None if ref is None else pictures.pixels(ref, model.info.recipes)
    direct = Direct(model, _pixels(model, image))
    started = time.monotonic()
    result = spec.answer(case.request, image, direct)
    ms = (time.monotonic() - started) * 1000
    found = direct.found
    if image is not None:
        _probe(model, _pixels(model, image), found, found.texts if texts is None else texts)
    return Observed(tuple(found.texts), tuple(lines_of(result)), found.all(), ms)


def _pixels(model: Blip2, image: ImagePixels | None) -> Pixels | None:
    """Pixels of their own each time: what was made of others is not known of these."""
    return None if image is None else model.pixels(image.pixels, whole=image.whole)


def _probe(model: Blip2, pixels: Pixels | None, found: _Found, texts: Sequence[str]) -> None:
    """Holds a picture against all parts of the model."""
    assert pixels is not None
    prompt = model.info.default_prompt
    rank = RankItem(pixels, (prompt,), (*TEXTS, *_scored(model, prompt, texts)))
    ((look,),) = model.generator.seen([rank])
    found.add(READ, look[None].float().cpu())
    found.add(LIKELIHOODS, model.rank([rank]))
    if not model.info.has_retrieval:
        return
    for item in (
        EmbedItem("image", pixels),
        EmbedItem("text", text=TEXTS[0]),
        EmbedItem("multimodal", pixels, TEXTS[0]),
    ):
        for name, array in model.embed([item])[0].items():
            found.add(name, array)
    for text in TEXTS:
        found.add(LOGITS, model.rerank([RerankItem(pixels, text)])[0][0])
        found.add(SCORES, model.match([MatchItem(pixels, (text,), "itc")]))


def _scored(model: Blip2, prompt: str, texts: Sequence[str]) -> Iterator[str]:
    """Of given texts those that the model can score: a long one may not fit a second time."""
    for text in dict.fromkeys(texts):
        try:
            model.ranker.check((prompt,), (text,))
        except PermanentError:
            continue
        yield text
