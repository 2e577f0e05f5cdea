"""Items as fronts send them, made of those that a model takes."""

from concurrent.futures import Future
from typing import Any

import torch
from msgspec.structs import astuple

from blipq_worker.blip2 import (
    EmbedItem,
    GeneratedText,
    GenerateItem,
    MatchItem,
    Pixels,
    RankItem,
    RerankItem,
)
from blipq_worker.engine.backend import Engine
from blipq_worker.inference.local import LocalInference
from blipq_worker.inference.requests import (
    Answer,
    Embed,
    Generate,
    ImagePixels,
    Item,
    Match,
    Rank,
    Rerank,
)


def image_of(pixels: Pixels) -> ImagePixels:
    """The image that was made these pixels of; a view for each checkpoint's recipe."""
    views = [pixels.generation]
    if pixels.retrieval is not None and pixels.retrieval is not pixels.generation:
        views.append(pixels.retrieval)
    return ImagePixels(pixels.digest, pixels.whole, tuple(map(_bytes, views)))


def _bytes(pixels: torch.Tensor | None) -> memoryview:
    assert pixels is not None
    return memoryview(bytes(pixels.flatten().tolist()))


def as_sent(item: Any) -> Item:
    image = None if item.pixels is None else image_of(item.pixels)
    match item:
        case GenerateItem():
            return Generate(image, item.prompts, item.params)  # type: ignore[arg-type]
        case RankItem():
            return Rank(image, item.prompts, item.choices)  # type: ignore[arg-type]
        case MatchItem():
            return Match(image, item.texts, item.head)  # type: ignore[arg-type]
        case RerankItem():
            return Rerank(image, item.text)  # type: ignore[arg-type]
        case EmbedItem():
            return Embed(item.mode, image, item.text)
    raise TypeError(item)


class Asking(LocalInference):
    """An engine in this process, asked with the model's items."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.engine = engine

    def send(self, item: Any, model: str = "default") -> "Future[Answer]":
        return self.submit(model, as_sent(item), "normal")


def texts_of(answer: Answer) -> list[list[GeneratedText]]:
    """Texts per prompt, as the model gives them."""
    texts: Any = answer.value
    return [[GeneratedText(*astuple(each)) for each in row] for row in texts.texts]
