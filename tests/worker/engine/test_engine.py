"""An engine behind its interface: what it knows of images, and what answers say of their times."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blipq_worker.blip2 import Blip2, EmbedItem, FeatureCache, MatchItem
from blipq_worker.engine.backend import Engine
from blipq_worker.images.preprocess import pixels_of
from blipq_worker.inference.interface import ItemFailed
from blipq_worker.inference.local import LocalInference
from blipq_worker.inference.requests import (
    Answer,
    Embed,
    Explain,
    Feature,
    Generate,
    GenerationParams,
    ImagePixels,
    Item,
    Load,
    Match,
    Rank,
    Rerank,
)
from conftest import wait_until

TEXTS = ("a red circle", "a dog")
WRITTEN = GenerationParams(num_beams=1, max_new_tokens=4)


class Asked(LocalInference):
    """A real model whose cache holds what a test leaves in it."""

    def __init__(self, model: Blip2, cache: FeatureCache) -> None:
        self.engine = Engine(
            {"default": model}, max_batch_size=8, batch_wait_timeout_s=0.2, max_waiting=64
        )
        super().__init__(self.engine)
        self.model_, self.cache = model, cache

    def image(self, picture: Image.Image, *, pixels: bool = True) -> ImagePixels:
        digest = hashlib.sha256(picture.tobytes()).hexdigest()
        views = pixels_of(picture, self.model_.info.recipes) if pixels else ()
        return ImagePixels(digest, whole=True, pixels=views)

    def ask(self, *items: Item) -> list[Answer]:
        futures = [self.submit("default", item, "normal") for item in items]
        return [future.result(timeout=60) for future in futures]

    def forget(self) -> None:
        self.cache._tensors.clear()
        self.cache.bytes = 0


@pytest.fixture
def asked(checkpoints: dict[str, Path]) -> Iterator[Asked]:
    cache = FeatureCache(2**24)
    model = Blip2.load(
        str(checkpoints["opt"]), str(checkpoints["itm"]), dtype="float32", cache=cache
    )
    asked = Asked(model, cache)
    asked.engine.batcher.start()
    yield asked
    asked.engine.batcher.close(timeout=10)


def items(image: ImagePixels) -> list[Item]:
    """One of each type that has an image."""
    return [
        Generate(image, ("a photo of",), WRITTEN),
        Generate(image, ("a photo of",), GenerationParams(num_beams=2, max_new_tokens=4)),
        Rank(image, ("a photo of",), TEXTS),
        Match(image, TEXTS, "itm"),
        Match(image, TEXTS, "itc"),
        Rerank(image, TEXTS[0]),
        Embed("image", image),
        Embed("multimodal", image, TEXTS[0]),
    ]


def numbers(answer: Answer) -> Any:
    """The numbers of an answer, or its texts."""
    value: Any = answer.value
    fields = {name: getattr(value, name) for name in value.__struct_fields__}
    if "arrays" in fields:
        return [np.frombuffer(each.data, "<f4") for each in fields["arrays"].values()]
    return list(fields.values())


@pytest.mark.parametrize("number", range(8))
def test_an_image_that_is_known_needs_no_pixels_and_no_pass(
    asked: Asked, pictures: list[Image.Image], number: int
) -> None:
    first = asked.ask(items(asked.image(pictures[0]))[number])[0]
    again = asked.ask(items(asked.image(pictures[0], pixels=False))[number])[0]
    assert first.pass_ms > first.vision_ms > 0
    assert again.vision_ms == 0
    for one, other in zip(numbers(first), numbers(again), strict=True):
        if isinstance(one, (np.ndarray, float)):
            np.testing.assert_allclose(one, other, atol=1e-5)
        else:
            assert str(one)[:40] == str(other)[:40]


@pytest.mark.parametrize("number", range(8))
def test_an_image_that_was_forgotten_is_asked_for_again(
    asked: Asked, pictures: list[Image.Image], number: int
) -> None:
    asked.ask(*items(asked.image(pictures[0])))
    known = asked.image(pictures[0], pixels=False)
    features: tuple[Feature, ...] = ("generation", "retrieval", "patches")
    assert asked.knows("default", [str(known.digest), "f" * 64], features) == (True, False)
    asked.forget()
    # The thread that ran the last item may still hold it for a moment.
    wait_until(
        lambda: (
            not any(asked.knows("default", [str(known.digest)], [each])[0] for each in features)
        ),
        "the model to forget",
    )
    with pytest.raises(ItemFailed) as caught:
        asked.ask(items(known)[number])
    assert caught.value.failure.kind == "image_unknown"


def test_what_an_item_was_promised_is_not_forgotten_before_its_pass(
    asked: Asked, pictures: list[Image.Image]
) -> None:
    asked.ask(Match(asked.image(pictures[0]), TEXTS))
    waiting = asked.submit("default", Match(asked.image(pictures[0], pixels=False), TEXTS), "low")
    asked.forget()
    assert waiting.result(timeout=60).vision_ms == 0


def test_items_in_one_pass_are_encoded_once_and_each_says_how_long_it_was(
    asked: Asked, pictures: list[Image.Image]
) -> None:
    """Whatever fronts they come from: each brings its own copy of the pixels."""
    sent = [Match(asked.image(pictures[0]), (text,)) for text in TEXTS]
    one, other = asked.ask(*sent)
    assert one.batch_size == other.batch_size == 2
    assert one.vision_ms == other.vision_ms > 0
    assert one.pass_ms >= one.vision_ms


def test_items_that_are_there_together_are_encoded_once_without_a_cache(
    checkpoints: dict[str, Path], pictures: list[Image.Image]
) -> None:
    cache = FeatureCache(0)
    model = Blip2.load(
        str(checkpoints["opt"]), str(checkpoints["itm"]), dtype="float32", cache=cache
    )
    image = pictures[0], "a" * 64
    one, other = (model.preprocess(image[0], digest=image[1], whole=True) for _ in range(2))
    encoded: list[int] = []
    model.on_encode(lambda images, ms: encoded.append(len(images)))
    model.match([MatchItem(one, TEXTS)])
    model.embed([EmbedItem("multimodal", other, TEXTS[0])])
    assert encoded == [1]
    assert (len(cache), cache.bytes) == (0, 0)
    del one, other
    model.match([MatchItem(model.preprocess(image[0], digest=image[1], whole=True), TEXTS)])
    assert encoded == [1, 1], "nothing is kept longer than the items"


def test_a_text_that_is_too_long_is_refused_before_it_is_sent(asked: Asked) -> None:
    for item in (
        Embed("text", text="word " * 500),
        Generate(ImagePixels("a" * 64), ("word " * 500,), WRITTEN),
        Rank(ImagePixels("a" * 64), ("word " * 500,), TEXTS),
    ):
        with pytest.raises(ItemFailed) as caught:
            asked.check("default", item)
        assert (caught.value.failure.kind, caught.value.failure.code) == (
            "permanent",
            "invalid_request",
        )
    asked.check("default", Match(ImagePixels("a" * 64), ("word " * 500,)))  # it is cut


def test_a_model_without_retrieval_refuses_what_needs_it(
    t5: Blip2, pictures: list[Image.Image]
) -> None:
    asked = Asked(t5, FeatureCache(0))
    image = asked.image(pictures[0])
    for item in (Match(image, TEXTS), Rerank(image, TEXTS[0]), Embed("image", image)):
        with pytest.raises(ItemFailed) as caught:
            asked.check("default", item)
        assert caught.value.failure.code == "model_unavailable"


def test_a_front_hears_how_much_there_is_to_do(asked: Asked, pictures: list[Image.Image]) -> None:
    assert asked.engine.load() == Load(0, 0)
    asked.engine.batcher._window = 60.0
    futures = [
        asked.submit("default", Match(asked.image(picture), TEXTS), "normal")
        for picture in pictures[:2]
    ]
    assert asked.engine.load() == Load(2, 0)
    for future in futures:
        future.cancel()


@pytest.mark.parametrize("at_once", [True, False])
def test_all_items_of_one_job_are_encoded_once_without_a_cache(
    checkpoints: dict[str, Path], pictures: list[Image.Image], at_once: bool
) -> None:
    """Items of four batches; sent one after the other, as those of a caption with best_of."""
    cache = FeatureCache(0)
    model = Blip2.load(
        str(checkpoints["opt"]), str(checkpoints["itm"]), dtype="float32", cache=cache
    )
    asked = Asked(model, cache)
    encoded: list[int] = []
    tower = model.matcher.model.vision_model  # type: ignore[union-attr]
    tower.register_forward_hook(lambda *_: encoded.append(1))
    asked.engine.batcher.start()
    try:
        image = asked.image(pictures[0])
        sent: list[Item] = [
            Match(image, TEXTS, "itm"),
            Match(image, TEXTS, "itc"),
            Embed("image", image),
            Embed("multimodal", image, TEXTS[0]),
            Rerank(image, TEXTS[0]),
        ]
        answers = asked.ask(*sent) if at_once else [asked.ask(item)[0] for item in sent]
        assert len(encoded) == 1
        assert any(answer.vision_ms == 0 for answer in answers)
    finally:
        asked.engine.batcher.close(timeout=10)


def test_an_urgent_job_runs_between_two_that_are_explained(
    checkpoints: dict[str, Path], pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Blip2.load(str(checkpoints["opt"]), str(checkpoints["itm"]), dtype="float32")
    asked = Asked(model, FeatureCache(0))
    urgent = Match(asked.image(pictures[2]), TEXTS)
    ran: list[tuple[str, int]] = []
    sent: list[Any] = []
    explain, match = model.explain, model.match

    def explaining(items: Any) -> Any:
        ran.append(("explain", len(items)))
        if not sent:
            sent.append(asked.submit("default", urgent, "high"))
        return explain(items)

    def matching(items: Any) -> Any:
        ran.append(("match", len(items)))
        return match(items)

    monkeypatch.setattr(model, "explain", explaining)
    monkeypatch.setattr(model, "match", matching)
    both = [Explain(asked.image(picture), TEXTS) for picture in pictures[:2]]
    waiting = [asked.submit("default", item, "normal") for item in both]
    asked.engine.batcher.start()
    try:
        for future in (*waiting, *sent):
            future.result(timeout=30)
    finally:
        asked.engine.batcher.close(timeout=10)
    assert ran == [("explain", 1), ("match", 1), ("explain", 1)]
