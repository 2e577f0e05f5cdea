"""The bare model with its layers packed for the CPU's kernels, and as PyTorch runs it."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from benchmarks.engine import median
from benchmarks.models import mid_size
from benchmarks.photos import pictures
from blipq.images.decoding import decode
from blipq_worker.blip2 import Blip2, GenerateItem, Pixels
from blipq_worker.catalog.params import resolve
from blipq_worker.process.malloc import give_large_blocks_back

IMAGES = 16
LENGTH = {"num_beams": 1, "min_new_tokens": 20, "max_new_tokens": 20}


def packing(repeats: int) -> dict[str, Any]:
    """Seconds an image for a batch of captions, read and resized before; by precision."""
    give_large_blocks_back()
    photos = [decode(each) for each in pictures(10).take(IMAGES)]
    found = {}
    for dtype in ("float32", "bfloat16"):
        packed = median(_captions(_packed(dtype), photos), repeats) / IMAGES
        plain = median(_captions(_plain(dtype), photos), repeats) / IMAGES
        found[dtype] = {"packed_s": packed, "plain_s": plain, "ratio": plain / packed}
    return found


def _packed(dtype: Any) -> Blip2:
    return Blip2.load(mid_size().split("+")[0], dtype=dtype)


def _plain(dtype: Any) -> Blip2:
    with patch("blipq_worker.blip2.model.pack"):
        return Blip2.load(mid_size().split("+")[0], dtype=dtype, attention="sdpa")


def _captions(model: Blip2, photos: list[Any]) -> Callable[[], object]:
    params = resolve("caption", model.info, LENGTH)
    seen = [model.preprocess(each).generation for each in photos]

    def run() -> object:
        items = [GenerateItem(Pixels(each), ("a photo of",), params) for each in seen]
        return model.generate(items)

    run()
    return run
