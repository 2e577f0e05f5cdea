"""Checks that a model sees and speaks before its worker takes jobs.

Quantization, a wrong library version or a damaged checkpoint can leave a model that loads and
answers nonsense; such a worker must refuse work.
"""

import logging

import torch
from PIL import Image, ImageDraw

from blipq.errors import BlipqError
from blipq_worker.blip2 import Blip2, GenerateItem, MatchItem, resolve

log = logging.getLogger(__name__)


class CanaryError(BlipqError):
    """The model answers nonsense; the message says what it got wrong."""


def check(model: Blip2) -> None:
    """Raises CanaryError unless the model tells two pictures apart and writes something."""
    pixels = [model.preprocess(picture) for picture in _pictures()]
    with torch.inference_mode():
        queries = model.generator.project(pixels)
    if not bool(torch.isfinite(queries).all()):
        raise CanaryError("its features of a picture are not finite numbers")
    if torch.equal(queries[0], queries[1]):
        raise CanaryError("two different pictures look the same to it")
    params = resolve("caption", model.info, {"num_beams": 1, "max_new_tokens": 12})
    items = [GenerateItem(each, (model.info.default_prompt,), params) for each in pixels]
    texts = [alternatives[0].text for said in model.generate(items) for alternatives in said]
    if not any(texts):
        raise CanaryError("it writes nothing about a picture")
    if model.info.has_retrieval:
        scores = model.match([MatchItem(each, ("a red circle",), "itm") for each in pixels])
        if not all(0.0 <= score <= 1.0 for (score,) in scores):
            raise CanaryError(f"its matching probabilities are {scores}")
    log.info("canary: %s", "; ".join(texts))


def _pictures() -> list[Image.Image]:
    """A red circle and a blue square."""
    pictures = []
    for shape, color in (("ellipse", (220, 30, 30)), ("rectangle", (40, 60, 210))):
        picture = Image.new("RGB", (128, 128), (255, 255, 255))
        getattr(ImageDraw.Draw(picture), shape)((44, 44, 84, 84), fill=color)
        pictures.append(picture)
    return pictures
