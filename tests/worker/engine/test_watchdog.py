"""The watchdog hears of every pass, and of none that hangs."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from blipq_worker.blip2 import Blip2, EmbedItem, GenerateItem, MatchItem, RankItem, RerankItem
from blipq_worker.catalog.params import resolve
from blipq_worker.engine.backend import Engine
from conftest import wait_until
from worker.asking import Asking


def item_of(kind: str, model: Blip2, picture: Image.Image) -> Any:
    pixels = model.preprocess(picture)
    match kind:
        case "generate" | "beams":
            beams = 3 if kind == "beams" else 1
            params = resolve("caption", model.info, {"num_beams": beams, "max_new_tokens": 3})
            return GenerateItem(pixels, ("a photo of",), params)
        case "rank":
            return RankItem(pixels, ("a photo of",), ("a cat", "a dog"))
        case "itm" | "itc":
            return MatchItem(pixels, ("a cat",), kind)
        case "rerank":
            return RerankItem(pixels, "a cat")
        case "embed":
            return EmbedItem("image", pixels)
        case _:
            return EmbedItem("multimodal", pixels, "a cat")


KINDS = ["generate", "beams", "rank", "itm", "itc", "rerank", "embed", "multimodal"]


@pytest.fixture
def model(checkpoints: dict[str, Path]) -> Blip2:
    """A model whose vision tower looks at one image a pass, as a large one does on a CPU."""
    model = Blip2.load(str(checkpoints["opt"]), str(checkpoints["itm"]), dtype="float32")
    assert model.matcher is not None
    for vision in (model.generator.vision, model.matcher.vision):
        vision._images_per_pass = 1
    return model


@pytest.fixture
def engine(model: Blip2) -> Iterator[Asking]:
    engine = Engine({"default": model}, max_batch_size=4, batch_wait_timeout_s=0.5, max_waiting=8)
    engine.batcher.start()
    yield Asking(engine)
    engine.batcher.close(timeout=10)


def on_looks(model: Blip2, call: Callable[[], object]) -> None:
    """Has ``call`` called before each pass of a vision tower."""
    assert model.matcher is not None
    for tower in {model.generator.model.vision_model, model.matcher.model.vision_model}:
        tower.register_forward_pre_hook(lambda tower, args: call() and None)


@pytest.mark.parametrize("kind", KINDS)
def test_each_pass_of_the_vision_tower_is_progress(
    engine: Asking, model: Blip2, pictures: list[Image.Image], kind: str
) -> None:
    """Else a long batch on a slow machine would be taken for a hung one, and its worker killed."""
    heard: list[float | None] = []
    on_looks(model, lambda: heard.append(engine.engine.batcher._busy_since))
    items = [item_of(kind, model, picture) for picture in pictures]
    futures = [engine.send(item) for item in items]
    for future in futures:
        future.result(30)
    assert len(heard) == len(pictures)
    assert None not in heard
    assert heard == sorted(set(heard)), "no progress between two passes"  # type: ignore[type-var]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_that_hangs_is_noticed(
    engine: Asking, model: Blip2, pictures: list[Image.Image], kind: str
) -> None:
    goes_on = threading.Event()
    on_looks(model, lambda: goes_on.wait(30))
    future = engine.send(item_of(kind, model, pictures[0]))
    try:
        wait_until(lambda: engine.engine.batcher.stalled_for() > 0.3, "the watchdog's notice")
        assert not future.done()
    finally:
        goes_on.set()
    future.result(30)
    wait_until(lambda: engine.engine.batcher.stalled_for() == 0, "the end of the pass")


def test_texts_alone_are_progress_too(model: Blip2) -> None:
    heard: list[str] = []
    model.on_step(lambda: heard.append("step"))
    model.embed([EmbedItem("text", text="a cat")])
    assert heard == ["step"]
