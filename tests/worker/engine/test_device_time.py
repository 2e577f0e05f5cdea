"""The device time of items: over all of them it comes to what the engine's thread was at work."""

import time
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from blipq_worker.engine.backend import Engine
from blipq_worker.images.preprocess import pixels_of
from blipq_worker.inference.local import LocalInference
from blipq_worker.inference.requests import (
    Generate,
    GenerationParams,
    ImagePixels,
    Item,
    Match,
)

if TYPE_CHECKING:
    from blipq_worker.blip2 import Blip2


def test_items_that_run_together_share_the_devices_time(
    opt: "Blip2", pictures: list[Image.Image]
) -> None:
    engine = Engine({"default": opt}, max_batch_size=8, batch_wait_timeout_s=0.05, max_waiting=64)
    inference = LocalInference(engine)
    images = [ImagePixels(pixels=pixels_of(picture, opt.info.recipes)) for picture in pictures[:4]]
    items: list[Item] = [
        Generate(image, ("",), GenerationParams(num_beams=1, max_new_tokens=12, min_new_tokens=12))
        for image in images
    ]
    items += [Match(image, ("a cat",), "itm") for image in images]
    futures = [inference.submit("default", item, "normal") for item in items]
    started = time.monotonic()
    engine.batcher.start()
    answers = [future.result(timeout=60) for future in futures]
    took = (time.monotonic() - started) * 1000
    engine.batcher.close(timeout=10)
    shares = [answer.device_ms for answer in answers]
    assert all(share > 0 for share in shares)
    # The times of whole passes, added up, count each of them once for each of its items.
    assert sum(shares) < took * 1.05
    assert sum(answer.pass_ms for answer in answers) > 2 * sum(shares)


def test_an_items_share_goes_by_its_rows(opt: "Blip2", pictures: list[Image.Image]) -> None:
    engine = Engine({"default": opt}, max_batch_size=8, batch_wait_timeout_s=0.05, max_waiting=64)
    image = ImagePixels(pixels=pixels_of(pictures[0], opt.info.recipes))
    params = GenerationParams(num_beams=1, max_new_tokens=12, min_new_tokens=12)
    inference = LocalInference(engine)
    futures = [
        inference.submit("default", Generate(image, ("a",) * prompts, params), "normal")
        for prompts in (1, 3)
    ]
    engine.batcher.start()
    one, three = (future.result(timeout=60).device_ms for future in futures)
    engine.batcher.close(timeout=10)
    assert three == pytest.approx(3 * one, rel=0.01)


def test_the_first_token_is_there_before_the_text(
    opt: "Blip2", pictures: list[Image.Image]
) -> None:
    engine = Engine({"default": opt}, max_batch_size=8, batch_wait_timeout_s=0.05, max_waiting=64)
    image = ImagePixels(pixels=pixels_of(pictures[0], opt.info.recipes))
    inference = LocalInference(engine)

    def written(tokens: int, beams: int) -> GenerationParams:
        return GenerationParams(num_beams=beams, max_new_tokens=tokens, min_new_tokens=tokens)

    items: list[Item] = [
        Generate(image, ("", "a"), written(12, 1)),
        Generate(image, ("",), written(12, 3)),
        Generate(image, ("",), written(1, 1)),
        Match(image, ("a cat",), "itm"),
    ]
    futures = [inference.submit("default", item, "normal") for item in items]
    engine.batcher.start()
    long, beams, short, match = (future.result(timeout=60) for future in futures)
    engine.batcher.close(timeout=10)
    for answer in (long, beams):
        assert 0 < answer.first_token_ms < answer.pass_ms
    assert short.first_token_ms == short.pass_ms
    assert match.first_token_ms == 0
