"""One look at an image, whatever is asked: against a call of the model for each question."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.models import mid_size
from benchmarks.photos import pictures
from benchmarks.throughput import environment
from blipq.contract import CaptionRequest, EmbedRequest, ImageRef, MatchRequest, Request, VQARequest
from blipq.images.decoding import decode
from blipq_worker.bench.stack import running
from blipq_worker.bench.workloads import QUESTIONS
from blipq_worker.blip2 import Blip2, EmbedItem, GenerateItem, MatchItem, Pixels
from blipq_worker.catalog.params import resolve
from blipq_worker.catalog.prompts import vqa_prompt

TEXTS = ("a red circle", "a dog on a beach", "a rocket", "a cup of coffee")
ASKED = QUESTIONS[:4]


class Calls:
    """The model in this process, a call at a time."""

    def __init__(self) -> None:
        generation, retrieval = mid_size().split("+")
        self.model = Blip2.load(generation, retrieval, dtype="auto")

    def pixels(self, data: bytes) -> Pixels:
        return self.model.preprocess(decode(data), whole=True)

    def caption(self, pixels: Pixels) -> None:
        self.model.generate([GenerateItem(pixels, ("",), resolve("caption", self.model.info))])

    def answer(self, pixels: Pixels, questions: Sequence[str]) -> None:
        params = resolve("vqa", self.model.info, {"num_beams": 1})
        prompts = tuple(vqa_prompt(each) for each in questions)
        self.model.generate([GenerateItem(pixels, prompts, params)])

    def match(self, pixels: Pixels) -> None:
        self.model.match([MatchItem(pixels, TEXTS, "itm")])

    def embed(self, pixels: Pixels) -> None:
        self.model.embed([EmbedItem("image", pixels)])


def engine(repeats: int) -> dict[str, Any]:
    """Seconds together and apart, the median of ``repeats``, and their ratio."""
    calls, data = Calls(), pictures(8).take(1)[0]
    parts: list[Callable[[Pixels], None]] = [
        calls.caption,
        lambda pixels: calls.answer(pixels, ASKED),
        calls.match,
        calls.embed,
    ]
    return {
        "ten questions about an image": _compare(
            lambda: calls.answer(calls.pixels(data), QUESTIONS),
            lambda: [calls.answer(calls.pixels(data), (each,)) for each in QUESTIONS],
            repeats,
        ),
        "describe": _compare(
            lambda: [part(pixels) for pixels in [calls.pixels(data)] for part in parts],
            lambda: [part(calls.pixels(data)) for part in parts],
            repeats,
        ),
        "64 mixed jobs on 8 images": _mixed(calls, repeats),
    }


def _mixed(calls: Calls, repeats: int) -> dict[str, float]:
    """Through the whole service, against one call each in this process."""
    source = pictures(9)
    together = []
    with running() as stack:
        stack.start_workers(environment())
        for _ in range(repeats + 1):
            through = stack.backlog(_requests(stack.upload(source.take(8))))
            together.append(through.seconds)
    apart = median(lambda: _one_call_each(calls, source.take(8)), repeats)
    middle = sorted(together[1:])[repeats // 2]
    return {"together_s": middle, "apart_s": apart, "ratio": apart / middle}


def _requests(images: Sequence[ImageRef]) -> list[Request]:
    greedy = {"num_beams": 1}
    return [
        request
        for image in images
        for request in (
            CaptionRequest(image=image),
            *(VQARequest(image=image, questions=(each,), generation=greedy) for each in ASKED),
            MatchRequest(image=image, texts=TEXTS[:2]),
            MatchRequest(image=image, texts=TEXTS),
            EmbedRequest(image=image),
        )
    ]


def _one_call_each(calls: Calls, photos: Sequence[bytes]) -> None:
    for data in photos:
        calls.caption(calls.pixels(data))
        for question in ASKED:
            calls.answer(calls.pixels(data), (question,))
        calls.match(calls.pixels(data))
        calls.match(calls.pixels(data))
        calls.embed(calls.pixels(data))


def _compare(
    together: Callable[[], object], apart: Callable[[], object], repeats: int
) -> dict[str, float]:
    together()
    apart()
    times = {"together_s": median(together, repeats), "apart_s": median(apart, repeats)}
    return {**times, "ratio": times["apart_s"] / times["together_s"]}


def median(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.monotonic()
        run()
        times.append(time.monotonic() - started)
    return sorted(times)[repeats // 2]
