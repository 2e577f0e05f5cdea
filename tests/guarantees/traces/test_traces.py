"""One trace shows a job from its client to its webhook, whatever died in between."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from blipq import CaptionRequest, Job, Status
from blipq.local.supervisor import Service
from blipq.settings import Settings
from blipq.telemetry import tracing
from conftest import wait_until
from guarantees.fronts import parts
from guarantees.rig import Rig, both_forms
from guarantees.traces.collector import Collector, Span, collecting
from receivers import SECRET, receiving

QUEUE = "blipq.default.normal"


@pytest.fixture
def collector(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Where all processes of the rig, and its client, send their spans."""
    with collecting() as collector:
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "BLIPQ_WEBHOOK_SECRETS": SECRET,
            "BLIPQ_WEBHOOK_ALLOW": "127.0.0.1",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        of_stack = rig.stack.environment()
        monkeypatch.setattr(rig.stack, "environment", lambda: of_stack | environment)
        fields = {**rig.settings.model_dump(), "webhook_allow": "127.0.0.1"}
        rig.client.ledger.settings = Settings.model_validate(fields)
        tracing.reset()
        yield collector
        monkeypatch.undo()
        tracing.reset()


@pytest.fixture
def sender(rig: Rig, collector: Collector) -> Iterator[Service]:
    sender = rig.command("webhooks", "run")
    sender.start()
    yield sender
    with suppress(ProcessLookupError):
        sender.stop()


def trace_of(collector: Collector, job: Job[Any]) -> list[Span]:
    """The spans of a job's trace."""
    submit = next(
        span
        for span in collector.named("submit")
        if span.attributes["messaging.message.id"] == job.id
    )
    return [span for span in collector.spans if span.trace == submit.trace]


def kill_all(rig: Rig, worker: Service) -> None:
    """kill -9 of a worker with its fronts and its engine, which would hand its jobs back."""
    left = [*parts.processes(worker, "front"), *parts.processes(worker, "engine")]
    rig.kill(worker)
    for each in left:
        each.kill()


def below(collector: Collector, span: Span, *path: str) -> list[Span]:
    """The spans that a path of names leads to, by how these begin."""
    found = [span]
    for name in path:
        ids = {each.id for each in found}
        found = [each for each in collector.named(name) if each.parent in ids]
    return found


def names_below(collector: Collector, span: Span) -> set[str]:
    return {each.name for each in collector.spans if each.parent == span.id}


def succeeded(collector: Collector) -> list[Span]:
    """The runs that ended their job."""
    runs = collector.named("process")
    return [run for run in runs if run.attributes.get("blipq.outcome") == "succeeded"]


def waits(collector: Collector) -> list[Span]:
    return collector.named("queue")


@both_forms
def test_one_trace_shows_a_job_from_client_to_webhook_though_its_first_worker_was_killed(
    rig: Rig, collector: Collector, sender: Service
) -> None:
    with receiving() as receiver:
        first = rig.start_worker()
        job = rig.submit("sleep 4", webhook={"url": receiver.url})
        wait_until(lambda: rig.running() == 1, "the job to run")
        wait_until(lambda: bool(collector.named("queue")), "the span of its first wait")
        kill_all(rig, first)
        rig.start_worker()
        (info,) = rig.outcomes([job])
        assert info.status is Status.SUCCEEDED
        wait_until(lambda: bool(collector.named("webhook")), "the webhook's span")
        wait_until(lambda: bool(succeeded(collector)), "the spans of the worker")
        (run,) = succeeded(collector)
        wait_until(lambda: len(waits(collector)) == 2, "a wait before each run")
        wait_until(lambda: bool(below(collector, run, "model", "pass")), "the span of the pass")
    (submit,) = collector.named("submit")
    assert {span.trace for span in collector.spans} == {submit.trace}
    assert submit.name == f"submit {QUEUE}"
    assert names_below(collector, submit) == {"queue", f"process {QUEUE}", "webhook"}
    assert names_below(collector, run) == {"fetch", "decode_wait", "decode", "model", "finish"}
    (model,), (passed,) = below(collector, run, "model"), below(collector, run, "model", "pass")
    assert (model.links, passed.links) == ((passed.id,), (model.id,))
    assert run.attributes["blipq.attempt"] == info.attempts == 2
    assert run.attributes["messaging.message.id"] == job.id
    (webhook,) = collector.named("webhook")
    (got,) = receiver.got
    assert got.headers["traceparent"].split("-")[1:3] == [submit.trace, webhook.id]


def test_an_operators_retry_of_a_dead_letter_and_jobs_in_bulk_stay_in_their_traces(
    rig: Rig, collector: Collector
) -> None:
    rig.start_worker()
    failed, *others = rig.client.submit_many(
        CaptionRequest(image=rig.image, prompt=prompt) for prompt in ("raise", "fine", "well")
    )
    assert failed.wait(60).status is Status.FAILED
    assert {info.status for info in rig.outcomes(others)} == {Status.SUCCEEDED}
    assert rig.client.retry_all([failed.id]) == 1
    wait_until(lambda: len(collector.named("process")) == 4, "all runs")
    traces = [trace_of(collector, job) for job in (failed, *others)]
    runs = [[span for span in spans if span.name.startswith("process")] for spans in traces]
    assert [len(each) for each in runs] == [2, 1, 1]
    assert all(run.failed and run.message.startswith("internal") for run in runs[0])
    assert len({spans[0].trace for spans in traces}) == 3


def test_jobs_go_on_while_no_collector_answers(rig: Rig, collector: Collector) -> None:
    collector.close()
    worker = rig.start_worker()
    rig.all_succeed(rig.submit_all(["fine"] * 20))
    worker.stop(timeout=60)
    assert os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] == collector.url


def test_a_workers_log_as_json_names_its_jobs_and_their_traces(
    rig: Rig, collector: Collector
) -> None:
    worker = rig.start_demo_worker(log_format="json")
    job = rig.client.caption(rig.image)
    rig.all_succeed([job])
    wait_until(lambda: bool(collector.named("submit")), "the span of the submit")
    assert worker.log is not None
    lines = [json.loads(line) for line in worker.log.read_text().splitlines()]
    (line,) = [each for each in lines if each["message"] == f"{job.id}: succeeded"]
    (submit,) = collector.named("submit")
    assert (line["job_id"], line["trace_id"]) == (job.id, submit.trace)
    assert {each.get("job_id") for each in lines} == {None, job.id}
