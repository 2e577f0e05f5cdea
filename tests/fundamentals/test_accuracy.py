"""Many jobs at once, on pictures that nobody has seen: nearly all come back right."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest

from blipq import Client, Job
from blipq_worker.demo import world
from fundamentals.pictures import png

Checked = tuple[Job[Any], Callable[[Any], bool]]


def asked(client: Client, number: int) -> Checked:
    """One job of one of three kinds, and whether a result is right."""
    scene = world.scene(world.DEMO_SEEDS[1000 + number])
    rng = random.Random(number)
    match number % 3:
        case 0:
            return client.caption(png(scene)), lambda result: result.text == scene.caption
        case 1:
            question = rng.choice(scene.questions())
            job = client.vqa(png(scene), question.question)
            return job, lambda result: result.text == question.answer
        case _:
            texts = [scene.caption, *scene.non_matching_texts(rng, 2)]
            rng.shuffle(texts)
            return client.match(png(scene), texts), lambda result: result.best.text == scene.caption


@pytest.mark.usefixtures("worker")
def test_64_mixed_jobs_are_answered_right(client: Client) -> None:
    jobs = [asked(client, number) for number in range(64)]
    right = [is_right(job.result(timeout=90)) for job, is_right in jobs]
    assert len(list(itertools.compress(jobs, right))) >= 61
