"""Where a job's spans come from, and that there are none, and no cost, without a configuration."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from blipq import CaptionRequest, Client, Options, QueueFull, SubmitStopped
from blipq.client.submitting import traced
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.submission import Submission
from blipq.telemetry import tracing
from blipq.telemetry.trace import NOTHING, Trace, parsed
from blipq.testing import FakeBlipq
from conftest import ROOT, wait_until
from guarantees.traces.collector import Collector, collecting

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
REQUEST = CaptionRequest.model_validate({"kind": "caption", "image": "s3://photos/cat.jpg"})
CONSUMER = 5
VARIABLES = ("OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Without a configuration, and read again after the test."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    tracing.reset()
    yield monkeypatch
    monkeypatch.undo()
    tracing.reset()


@pytest.fixture
def collector(environment: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collecting() as collector:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        yield collector


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints; its last words are the error's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    ran = subprocess.run(
        command, env=kept | environment, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


SUBMITS = """
import sys
from blipq import Client
from blipq.testing import FakeBlipq

with Client(backend=FakeBlipq()) as client:
    client.caption("s3://photos/cat.jpg")
parts = ("blipq.telemetry.otel", "opentelemetry.exporter", "opentelemetry.sdk.trace.export")
print([name for name in parts if name in sys.modules])
"""


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_SERVICE_NAME": "shop"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "TRUE"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
    ],
    ids=["nothing", "a name alone", "disabled", "no exporter"],
)
def test_what_makes_spans_is_not_even_imported_where_nothing_asks_for_it(
    variables: dict[str, str],
) -> None:
    """redis-py imports OpenTelemetry's metrics wherever it is installed."""
    assert python(SUBMITS, **variables) == "[]\n"


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "no traces: OTEL_TRACES_EXPORTER=zipkin"),
        ({"OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "many"}, "the OTEL_* variables are refused"),
    ],
)
def test_variables_that_make_no_sense_cost_the_traces_and_no_job(
    variables: dict[str, str], problem: str
) -> None:
    given = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"} | variables
    printed = python(SUBMITS, **given)
    assert printed.count("no traces") == 1
    assert problem in printed


def test_a_missing_package_is_named_once_and_costs_no_job() -> None:
    missing = "import sys; sys.modules['opentelemetry'] = None\n"
    printed = python(missing + SUBMITS, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1")
    assert printed.count("is not installed: no traces (blipq[otel])") == 1


@pytest.mark.parametrize(
    ("header", "read"),
    [
        (SAMPLED, SAMPLED),
        (UNSAMPLED, UNSAMPLED),
        (f"cc-{TRACE}-{PARENT}-01-what-comes-later", SAMPLED),
        (f"ff-{TRACE}-{PARENT}-01", ""),
        (f"00-{'0' * 32}-{PARENT}-01", ""),
        (f"00-{TRACE}-{'0' * 16}-01", ""),
        (f"00-{TRACE.upper()}-{PARENT}-01", ""),
        (f"00-{TRACE}-{PARENT}-01\n", ""),
        (f"00-{TRACE}-{PARENT}", ""),
        ("x" * 10_000, ""),
        ("", ""),
        (None, ""),
    ],
)
def test_a_traceparent_of_a_stranger_is_read_or_taken_for_none(
    header: str | None, read: str
) -> None:
    assert parsed(header) == read


def test_without_tracing_a_submission_is_left_as_it_is() -> None:
    submission = Submission(REQUEST)
    assert traced(submission) == (submission, NOTHING)


def test_a_job_that_is_not_sampled_gets_no_field_and_no_span(
    collector: Collector, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("OTEL_TRACES_SAMPLER", "always_off")
    submission, span = traced(Submission(REQUEST))
    assert submission.traceparent is None
    assert (type(span), span.context) == (Trace, "")
    below = tracing.continued("process", UNSAMPLED)
    assert (type(below), below.child("fetch"), below.context) == (Trace, below, UNSAMPLED)


def test_a_sampler_of_a_share_decides_for_each_job_of_a_bulk_submit(
    collector: Collector, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    environment.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    with Client(backend=FakeBlipq()) as client:
        client.submit_many([REQUEST] * 200)
    wait_until(lambda: len(collector.spans) > 40, "the spans of about a half")
    assert len({span.trace for span in collector.spans}) == len(collector.spans) < 160


def test_a_share_in_all_processes_decides_below_a_parent_that_is_sampled_too(
    collector: Collector, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    environment.setenv("OTEL_TRACES_SAMPLER_ARG", "0.0")
    below = tracing.continued("process", SAMPLED)
    assert (type(below), below.context) == (Trace, SAMPLED)


def test_a_span_is_sent_as_it_was_when_it_ended(collector: Collector) -> None:
    span = tracing.begun(
        "process", SAMPLED, kind="consumer", attributes={"a": 1}, links=[UNSAMPLED], since_ns=7
    )
    span.set_attributes({"a": 2, "b": "two"})
    child = span.child("fetch")
    child.link(span.context)
    child.end()
    span.end()
    span.set_attributes({"a": 3})
    span.end(RuntimeError("ended already"))
    tracing.begun("later").end()
    wait_until(lambda: bool(collector.named("later")), "the last span")
    fetch, process, later = collector.spans
    assert (process.name, process.trace, process.parent) == ("process", TRACE, PARENT)
    assert (process.kind, process.start_ns, process.failed) == (CONSUMER, 7, False)
    assert (process.attributes, process.links) == ({"a": 2, "b": "two"}, (PARENT,))
    assert (fetch.trace, fetch.parent, fetch.links) == (TRACE, process.id, (process.id,))
    assert process.start_ns < fetch.start_ns <= fetch.end_ns <= process.end_ns
    assert (later.parent, later.trace != TRACE) == ("", True)


@pytest.mark.parametrize(
    ("variable", "kept"),
    [
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", {"b": "word"}),
        ("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", {"a": "w", "b": "w"}),
    ],
)
def test_limits_that_the_environment_sets_are_kept(
    collector: Collector, environment: pytest.MonkeyPatch, variable: str, kept: dict[str, str]
) -> None:
    environment.setenv(variable, "1")
    tracing.begun("submit", attributes={"a": "word", "b": "word"}).end()
    wait_until(lambda: bool(collector.spans), "the span")
    assert collector.spans[0].attributes == kept


def test_an_applications_own_provider_and_current_span_are_used() -> None:
    code = """
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from blipq import Client
    from blipq.testing import FakeBlipq

    with Client(backend=FakeBlipq()) as client:
        client.caption("s3://photos/before.jpg")
        kept = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(kept))
        trace.set_tracer_provider(provider)
        with trace.get_tracer("shop").start_as_current_span("order"):
            client.caption("s3://photos/cat.jpg")
    submit, order = kept.get_finished_spans()
    assert submit.parent.span_id == order.context.span_id
    print(submit.name, order.name)
    """
    assert python(code) == "submit blipq.default.normal order\n"


def test_a_forked_process_sends_its_own_spans(collector: Collector) -> None:
    code = """
    import os
    from blipq.telemetry import tracing

    tracing.begun("parent").end()
    child = os.fork()
    tracing.begun("child" if child == 0 else "still the parent").end()
    if child:
        assert os.waitpid(child, 0)[1] == 0
    """
    given = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_SERVICE_NAME": "forks"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    # Python 3.12 warns of any fork beside threads, which is what this is about.
    command = [sys.executable, "-c", textwrap.dedent(code)]
    subprocess.run(command, env=kept | given, check=True, timeout=60)
    names = sorted(span.name for span in collector.spans)
    assert names == ["child", "parent", "still the parent"]
    assert {span.service for span in collector.spans} == {"forks"}


def test_an_error_with_half_a_character_costs_no_span(collector: Collector) -> None:
    for number, text in enumerate(("before", "\udcff is no text", "after")):
        tracing.begun(f"span {number}").end(ValueError(text))
    wait_until(lambda: len(collector.spans) == 3, "all spans")
    assert collector.named("span 1")[0].failed


def test_an_error_is_recorded_without_its_secrets(collector: Collector) -> None:
    with pytest.raises(RuntimeError), tracing.begun("fetch"):
        raise RuntimeError("no answer from redis://:hunter2@127.0.0.1:1/0")
    wait_until(lambda: bool(collector.spans), "the span")
    (span,) = collector.spans
    assert span.failed
    assert span.attributes["error.type"] == "RuntimeError"
    assert "no answer" in span.message
    assert "hunter2" not in span.message


# --- the record -----------------------------------------------------------------------------------


def submitted(ledger: WorkerLedger, traceparent: str | None, **options: Any) -> str:
    submission = Submission(REQUEST, Options(**options), traceparent=traceparent)
    ledger.submit(submission, notify="c")
    return submission.id


def claimed(ledger: WorkerLedger, id: str) -> Claim:
    claim = ledger.claim(id, "w1")
    assert isinstance(claim, Claim)
    return claim


def test_a_record_keeps_its_place_in_a_trace_until_nobody_can_need_it(
    ledger: WorkerLedger, raw_redis: redis.Redis
) -> None:
    id = submitted(ledger, SAMPLED, webhook={"url": "https://example.org/hook"})
    claim = claimed(ledger, id)
    assert (claim.traceparent, claim.waited_ms >= 0) == (SAMPLED, True)
    ledger.retry(claim, 0.001)
    wait_until(lambda: ledger.reconcile().messages, "the retry")
    claim = claimed(ledger, id)
    assert claim.traceparent == SAMPLED
    assert claim.waited_ms < claim.queue_ms, "it counts from the retry"
    assert ledger.succeed(claim, '{"kind": "caption", "captions": [{"text": "a"}]}', "{}")
    assert raw_redis.hget(f"blipq:event:{id}/job.succeeded", "traceparent") == SAMPLED
    assert not raw_redis.hexists(f"blipq:job:{id}", "traceparent")


@pytest.mark.parametrize("given", [None, "", "nonsense"])
def test_a_record_without_a_trace_has_no_field_for_one(
    ledger: WorkerLedger, raw_redis: redis.Redis, given: str | None
) -> None:
    id = submitted(ledger, given)
    assert not raw_redis.hexists(f"blipq:job:{id}", "traceparent")
    claim = claimed(ledger, id)
    assert (claim.traceparent, claim.waited_ms) == ("", 0.0)


def test_the_same_job_in_another_trace_is_the_same_job(ledger: WorkerLedger) -> None:
    id = submitted(ledger, SAMPLED, idempotency_key="order-42")
    other = Submission(REQUEST, Options(idempotency_key="order-42"), traceparent=UNSAMPLED)
    assert ledger.submit(other, notify="c") == id


def test_the_documented_collector_prints_the_span_of_a_submit() -> None:
    example = ROOT / "examples" / "tracing" / "collector.py"
    command = [sys.executable, str(example), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as collector:
        try:
            assert collector.stdout is not None
            url = collector.stdout.readline().strip()
            python(SUBMITS, OTEL_EXPORTER_OTLP_ENDPOINT=url)
            line = collector.stdout.readline()
        finally:
            collector.kill()
    assert line.endswith("ms blipq submit blipq.default.normal\n")


def test_submits_that_are_refused_end_their_spans_with_the_reason(collector: Collector) -> None:
    fake = FakeBlipq()
    fake.stop_worker()
    with Client(backend=fake, max_open_jobs=2) as client:
        with pytest.raises(SubmitStopped):
            client.submit_many([REQUEST] * 4)
        with pytest.raises(QueueFull):
            client.submit(REQUEST)
    wait_until(lambda: len(collector.spans) == 5, "a span of each submit")
    failed = [span for span in collector.spans if span.failed]
    assert {span.attributes["error.type"] for span in failed} == {"QueueFull"}
    assert len(failed) == 3
