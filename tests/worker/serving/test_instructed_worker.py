"""A worker that serves InstructBLIP with either kind of language model, from end to end."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from blipq import Client, JobFailed, Settings
from blipq.local.stack import LocalStack
from conftest import start_worker, wait_for_worker
from renders import distinct_scenes, png

SHORT = {"max_new_tokens": 6}
PROMPT = "What is in the picture?"


@pytest.fixture(scope="module")
def client(
    instructed_checkpoints: dict[str, Path],
    stack: LocalStack,
    settings: Settings,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Client]:
    """Of a worker with both models, which have passed its check."""
    models = ",".join(f"instructed-{name}={each}" for name, each in instructed_checkpoints.items())
    log = tmp_path_factory.mktemp("instructed") / "worker.log"
    worker = start_worker(stack, log, models=models, dtype="float32")
    try:
        wait_for_worker(worker, settings, "instructed-t5")
        with Client(settings) as client:
            yield client
    finally:
        worker.stop(timeout=30)


@pytest.fixture(scope="module")
def image(client: Client) -> str:
    (shown,) = distinct_scenes(1)
    return str(client.storage.upload(png(shown)).uri)


@pytest.mark.parametrize("model", ["instructed-t5", "instructed-llama"])
def test_a_worker_writes_answers_and_chats_with_an_instructblip(
    client: Client, image: str, model: str
) -> None:
    history = [("what is it?", "a circle")]
    captions = client.caption(image, PROMPT, generation=SHORT, model=model)
    answers = client.vqa(image, ["is it red?", "how many?"], generation=SHORT, model=model)
    chat = client.vqa(image, "is it red?", history=history, generation=SHORT, model=model)
    chosen = client.vqa(image, "is it red?", choices=["yes", "no"], model=model)
    described = client.describe(image, questions=["is it red?"], generation=SHORT, model=model)
    assert captions.result(timeout=90).text
    assert len(answers.result(timeout=90).answers) == 2
    assert len(chat.result(timeout=90).answers) == 1
    choices = chosen.result(timeout=90).answers[0].choices
    assert choices is not None
    assert {choice.text for choice in choices} == {"yes", "no"}
    both = described.result(timeout=90)
    assert both.caption is not None
    assert both.vqa is not None
    again = client.caption(image, "Is it red?", generation=SHORT, model=model)
    assert again.result(timeout=90).text
    receipt = again.info().receipt
    assert receipt is not None
    assert receipt.cache_hit, "another question about a picture that was looked at before"


@pytest.mark.parametrize("model", ["instructed-t5", "instructed-llama"])
def test_a_worker_refuses_what_an_instructblip_cannot_do(
    client: Client, image: str, model: str
) -> None:
    jobs = [
        client.match(image, "a red circle", model=model),
        client.match(image, "a red circle", explain=True, model=model),
        client.embed(image, model=model),
        client.describe(image, embed=True, model=model),
    ]
    for job in jobs:
        with pytest.raises(JobFailed) as caught:
            job.result(timeout=90)
        assert caught.value.code == "model_unavailable"
