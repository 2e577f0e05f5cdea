"""A batch too large for the device is answered in parts; only what does not fit alone fails.

The device is a stand-in: it raises what torch raises on a GPU that is full.
"""

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from blipq_worker.blip2 import MatchItem
from blipq_worker.engine.backend import Engine
from blipq_worker.inference.interface import ItemFailed
from worker.asking import Asking

if TYPE_CHECKING:
    from blipq_worker.blip2 import Blip2


class SmallDevice:
    """Holds a tensor for each text that is matched in a pass, and has room for ``room``."""

    def __init__(self, match: Callable[..., Any], room: int) -> None:
        self._match = match
        self._room = room
        self._kept: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self.passes: list[int] = []
        self.held: list[int] = []

    def __call__(self, items: Sequence[MatchItem], *args: Any) -> Any:
        self.passes.append(len(items))
        gc.collect()
        self.held.append(len(self._kept))
        states = [torch.zeros(1) for item in items for _ in item.texts]
        self._kept.update(states)
        if len(states) > self._room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self._match(items, *args)


@contextmanager
def engine(model: "Blip2", match: Callable[..., Any]) -> Iterator[Asking]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "match", match)
        made = Engine(
            {"default": model}, max_batch_size=8, batch_wait_timeout_s=1.0, max_waiting=64
        )
        made.batcher.start()
        yield Asking(made)
        made.batcher.close(timeout=10)


def asked(engine: Asking, items: Sequence[MatchItem]) -> list[Any]:
    """The scores of each item, or what it failed with."""
    futures = [engine.send(item) for item in items]
    return [
        future.exception(timeout=60) or list(future.result().value.scores) for future in futures
    ]


@pytest.fixture
def items(opt: "Blip2", pictures: list[Image.Image]) -> list[MatchItem]:
    """Eight, with one text each."""
    pixels = [opt.preprocess(picture) for picture in pictures] * 2
    return [MatchItem(each, ("a red circle",), "itm") for each in pixels]


def test_a_batch_is_halved_until_it_fits(opt: "Blip2", items: list[MatchItem]) -> None:
    alone = [opt.match([item])[0] for item in items]
    device = SmallDevice(opt.match, room=2)
    with engine(opt, device) as made:
        together = asked(made, items)
    assert [pytest.approx(scores, abs=1e-5) for scores in alone] == together
    assert device.passes == [8, 4, 2, 2, 4, 2, 2]


def test_what_the_failed_pass_held_is_free_for_the_next(
    opt: "Blip2", items: list[MatchItem]
) -> None:
    """An exception that is being handled keeps every frame that it came through."""
    device = SmallDevice(opt.match, room=2)
    with engine(opt, device) as made:
        asked(made, items)
    assert set(device.held) == {0}


def test_an_item_that_does_not_fit_alone_fails_alone(opt: "Blip2", items: list[MatchItem]) -> None:
    items[5] = MatchItem(items[5].pixels, ("a", "b", "c"), "itm")
    device = SmallDevice(opt.match, room=2)
    with engine(opt, device) as made:
        answers = asked(made, items)
    failed = [number for number, each in enumerate(answers) if isinstance(each, Exception)]
    assert failed == [5]
    assert answers[5].failure.code == "out_of_memory"


def test_any_other_error_is_bisected_too(opt: "Blip2", items: list[MatchItem]) -> None:
    match = opt.match

    def refusing(batch: Sequence[MatchItem], *args: Any) -> Any:
        if any(item.texts == ("poison",) for item in batch):
            raise RuntimeError("CUDA error: device-side assert")
        return match(batch, *args)

    items[2] = MatchItem(items[2].pixels, ("poison",), "itm")
    with engine(opt, refusing) as made:
        answers = asked(made, items)
    assert [isinstance(each, ItemFailed) for each in answers] == [n == 2 for n in range(8)]
