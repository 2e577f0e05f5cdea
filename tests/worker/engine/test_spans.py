"""The spans of an engine: one of each pass, with links to those that wait for it."""

from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from blipq.telemetry import tracing
from blipq_worker.engine.backend import Engine
from blipq_worker.inference.local import LocalInference
from blipq_worker.inference.requests import Answer, ImagePixels, Match
from conftest import wait_until
from guarantees.stand_ins.faulty_model import FaultyModel
from guarantees.traces.collector import Collector, collecting


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        tracing.reset()
        yield collector
    monkeypatch.undo()
    tracing.reset()


@pytest.fixture
def inference(collector: Collector) -> Iterator[LocalInference]:
    model = FaultyModel()
    engine = Engine(
        {"default": model},  # type: ignore[dict-item]
        max_batch_size=3,
        batch_wait_timeout_s=30,  # a batch runs when it is full
        max_waiting=64,
    )
    engine.batcher.start()
    yield LocalInference(engine)
    engine.batcher.close(timeout=10)


def submitted(inference: LocalInference, text: str, trace: str) -> "Future[Answer]":
    pixels = tuple(memoryview(bytes(recipe.size)) for recipe in FaultyModel.info.recipes)
    item = Match(ImagePixels("0" * 64, pixels=pixels), (text,))
    return inference.submit("default", item, "normal", trace=trace)


def test_a_pass_has_one_span_with_links_to_all_sampled_jobs_in_it(
    collector: Collector, inference: LocalInference
) -> None:
    first, second = tracing.begun("job"), tracing.begun("job")
    unsampled = f"00-{'1' * 32}-{'2' * 16}-00"
    contexts = [first.context, unsampled, second.context]
    futures = [submitted(inference, f"text {n}", context) for n, context in enumerate(contexts)]
    answers = [future.result(timeout=30) for future in futures]
    wait_until(lambda: bool(collector.named("pass")), "the span of the pass")
    (span,) = collector.named("pass")
    ids = [context.split("-")[2] for context in contexts]
    assert span.name == "pass match"
    assert (span.parent, span.links) == (ids[0], (ids[0], ids[2]))
    assert span.attributes == {"blipq.model": "default", "messaging.batch.message_count": 3}
    assert {answer.span.split("-")[2] for answer in answers} == {span.id}


def test_a_pass_of_jobs_that_are_not_sampled_has_no_span(
    collector: Collector, inference: LocalInference
) -> None:
    unsampled = f"00-{'1' * 32}-{'2' * 16}-00"
    futures = [
        submitted(inference, f"text {n}", trace) for n, trace in enumerate(["", "", unsampled])
    ]
    assert {future.result(timeout=30).span for future in futures} == {""}


def test_the_span_of_a_pass_that_raises_has_failed(
    collector: Collector, inference: LocalInference
) -> None:
    job = tracing.begun("job")
    futures = [submitted(inference, text, job.context) for text in ("raise", "fine", "well")]
    assert futures[0].exception(timeout=30) is not None
    assert futures[2].result(timeout=30)
    wait_until(lambda: len(collector.named("pass")) == 3, "the spans of the batch and its halves")
    assert sorted(span.failed for span in collector.named("pass")) == [False, True, True]
