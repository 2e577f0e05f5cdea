"""Company changes no answer: jobs in batches against the same jobs one at a time, in fp32."""

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from blipq import CaptionRequest, MatchRequest, VQARequest
from blipq_worker.engine.backend import Engine
from blipq_worker.images.preprocess import pixels_of
from blipq_worker.inference.local import LocalInference
from blipq_worker.inference.requests import ImagePixels, ModelInfo
from blipq_worker.kinds.registry import spec_of
from blipq_worker.kinds.spec import Part

if TYPE_CHECKING:
    from blipq_worker.blip2 import Blip2

JOBS = 200
QUESTIONS = ["what is this?", "how many?", "where is the red circle?", "what color is the cat?"]
TEXTS = ["a cat", "a red circle above a blue square", "two dogs", "a photo of the green square"]


class Direct:
    """Asks an engine."""

    def __init__(self, engine: Engine) -> None:
        self.inference = LocalInference(engine)
        self.batch_sizes: list[int] = []

    @property
    def info(self) -> ModelInfo:
        return self.inference.model("default")

    def one(self, part: Part[Any]) -> Any:
        answer = self.inference.submit("default", part.item, "normal").result(timeout=60)
        self.batch_sizes.append(answer.batch_size)
        return part.made(answer.value)

    def note(self, text: str) -> None:
        """Remarks are not compared here."""


def request(number: int) -> Any:
    """Captions, questions and matches of all lengths, four generation parameters among them."""
    fields: dict[str, Any] = {"image": "s3://uploads/a.png"}
    generation = {"num_beams": 1 + number // 3 % 2, "max_new_tokens": 8 + number % 2}
    several = 1 + number // 5 % 3
    match number % 3:
        case 0:
            prompt = [None, "a photo of", "a red"][number // 3 % 3]
            return CaptionRequest(**fields, prompt=prompt, generation=generation)
        case 1:
            return VQARequest(**fields, questions=QUESTIONS[:several], generation=generation)
        case _:
            head = "itm" if number % 2 else "itc"
            return MatchRequest(**fields, texts=TEXTS[:several], head=head)


def answers(model: "Blip2", pictures: list[Image.Image], size: int) -> tuple[list[Any], list[int]]:
    engine = Engine(
        {"default": model}, max_batch_size=size, batch_wait_timeout_s=0.01, max_waiting=64
    )
    engine.batcher.start()
    ask = Direct(engine)
    recipes = model.info.recipes
    images = [ImagePixels(pixels=pixels_of(picture, recipes)) for picture in pictures]

    def run(number: int) -> Any:
        asked = request(number)
        return spec_of(asked).answer(asked, images[number // 7 % len(images)], ask)

    with ThreadPoolExecutor(2 * size if size > 1 else 1) as threads:
        found = list(threads.map(run, range(JOBS)))
    engine.batcher.close(timeout=10)
    return found, ask.batch_sizes


@pytest.fixture(scope="module")
def alone_and_together(
    opt: "Blip2", pictures: list[Image.Image]
) -> tuple[tuple[list[Any], list[int]], tuple[list[Any], list[int]]]:
    return answers(opt, pictures, 1), answers(opt, pictures, 16)


def written(found: list[Any]) -> list[Any]:
    """The captions and answers of all jobs, in order."""
    return [
        text
        for each in found
        if each.kind != "match"
        for text in (each.captions if each.kind == "caption" else each.answers)
    ]


def test_200_mixed_jobs_in_batches_are_answered_as_one_at_a_time(alone_and_together: Any) -> None:
    alone, together = (written(found) for found, _ in alone_and_together)
    texts = [(each.text, each.tokens, each.finish_reason) for each in alone]
    assert [(each.text, each.tokens, each.finish_reason) for each in together] == texts
    assert len(set(texts)) > 10, "the model says the same to everything"
    sure = [each.log_likelihood for each in alone]
    assert [each.log_likelihood for each in together] == pytest.approx(sure, abs=1e-4)


def test_200_mixed_jobs_in_batches_are_scored_as_one_at_a_time(alone_and_together: Any) -> None:
    alone, together = (
        [scored.score for each in found if each.kind == "match" for scored in each.scores]
        for found, _ in alone_and_together
    )
    assert together == pytest.approx(alone, abs=1e-5)


def test_the_jobs_did_run_in_batches(alone_and_together: Any) -> None:
    (_, alone), (_, together) = alone_and_together
    assert max(alone) == 1
    assert max(together) > 2
