"""The time of a job in a dashboard leads to its trace."""

import time

import pytest

from blipq.telemetry import tracing
from conftest import wait_until
from deploy.scraping import Fleet
from guarantees.traces.collector import collecting

pytestmark = [pytest.mark.programs, pytest.mark.timeout(240)]


def test_prometheus_knows_the_trace_of_a_job(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting() as collector:
        traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        for name, value in traced.items():
            monkeypatch.setenv(name, value)
        of_stack = fleet.rig.stack.environment()
        monkeypatch.setattr(fleet.rig.stack, "environment", lambda: of_stack | traced)
        tracing.reset()
        try:
            fleet.start_worker()
            fleet.rig.all_succeed([fleet.rig.submit("did")])
            wait_until(lambda: collector.named("submit"), "the span of its submit")
            (submit,) = collector.named("submit")
            wait_until(lambda: submit.trace in traces(fleet), "its exemplar")
        finally:
            monkeypatch.undo()
            tracing.reset()


def traces(fleet: Fleet) -> set[str]:
    """The traces that samples of the times of jobs lead to."""
    now = time.time()
    found = fleet.prometheus.get(
        "query_exemplars",
        query="blipq_worker_job_seconds_bucket",
        start=str(now - 60),
        end=str(now + 1),
    )
    return {each["labels"]["trace_id"] for series in found for each in series["exemplars"]}
