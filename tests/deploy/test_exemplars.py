"""From a job's times to its trace: a real worker, scraped by a real Prometheus."""

import time
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from blipq.telemetry import tracing
from conftest import wait_until
from deploy.scraping import Fleet
from guarantees.traces.collector import Collector, collecting

pytestmark = [pytest.mark.programs, pytest.mark.timeout(240)]

#: Histograms of a worker that lead to traces.
NAMES = (
    "blipq_worker_job_seconds",
    "blipq_worker_first_token_seconds",
    "blipq_worker_stage_seconds",
)
OPENMETRICS = "application/openmetrics-text;version=1.0.0"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Where this process and those that it starts send their spans."""
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        tracing.reset()
        yield collector
        monkeypatch.undo()
        tracing.reset()


def scraped(port: int) -> dict[str, set[str]]:
    """The traces that the samples of each histogram lead to, as OpenMetrics has them."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/metrics", headers={"Accept": OPENMETRICS}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
        page = answer.read().decode()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.exemplar:
                found.setdefault(family.name, set()).add(sample.exemplar.labels["trace_id"])
    return found


def kept(fleet: Fleet, name: str) -> set[str]:
    """The same, as Prometheus has stored them."""
    now = time.time()
    found = fleet.prometheus.get(
        "query_exemplars", query=f"{name}_bucket", start=str(now - 600), end=str(now + 600)
    )
    return {each["labels"]["trace_id"] for series in found for each in series["exemplars"]}


def test_the_times_of_a_traced_job_lead_to_its_trace_where_prometheus_keeps_them(
    collector: Collector, fleet: Fleet
) -> None:
    fleet.rig.start_demo_worker(health_port=fleet.worker_port, fronts="0")
    job = fleet.rig.client.caption(fleet.rig.image)
    fleet.rig.all_succeed([job])
    wait_until(lambda: bool(collector.named("submit")), "the span of the submit", timeout=60)
    (submit,) = collector.named("submit")
    found = scraped(fleet.worker_port)
    assert {name: found.get(name) for name in NAMES} == {name: {submit.trace} for name in NAMES}
    for name in NAMES:
        wait_until(lambda name=name: kept(fleet, name) == {submit.trace}, name, timeout=60)
