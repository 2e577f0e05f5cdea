"""Dashboards and alerts: their queries on a real Prometheus that scrapes a real stack."""

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from tools.deploy.alerts import ALERTS
from tools.deploy.monitoring import written
from tools.deploy.panels import DASHBOARDS

from blipq import Client, Settings
from blipq.local.sample import red_square
from blipq.local.stack import LocalStack, free_port
from blipq.local.supervisor import Service
from conftest import start_worker, wait_for_worker, wait_until
from deploy.scraping import RULES, Prometheus

pytestmark = pytest.mark.programs

QUERIES = {
    f"{title}: {legend}": expr
    for _, panels in DASHBOARDS.values()
    for panel in panels
    for title in (panel.title,)
    for legend, expr in panel.queries.items()
}
#: What nothing in this stack brings about.
WITHOUT_SAMPLES = {"Webhook attempts a second", "GPU utilization", "GPU memory"}


@pytest.fixture(scope="module")
def stack_with_work(
    stack: LocalStack, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Client, list[str]]]:
    """A client, and the addresses of a split worker, an exporter and a sender."""
    folder = tmp_path_factory.mktemp("monitored")
    fields = stack.settings_fields()
    fields["redis_url"] = fields["redis_url"].removesuffix("/0") + "/3"
    settings = Settings.model_validate(fields)
    health, exported, sent = free_port(), free_port(), free_port()
    options = {"dtype": "float32", "fronts": "1", "health_port": str(health)}
    worker = start_worker(stack, folder / "worker.log", redis_url=settings.redis_url, **options)
    environment = stack.environment() | {"BLIPQ_REDIS_URL": settings.redis_url}
    environment["BLIPQ_WEBHOOK_SECRETS"] = "whsec_" + "QUJD" * 8
    blipq = [sys.executable, "-m", "blipq"]
    commands = {
        "exporter": [*blipq, "metrics", "--port", str(exported)],
        "sender": [*blipq, "webhooks", "run", "--metrics-port", str(sent)],
    }
    services = [
        Service(name, command, env=environment, log=folder / f"{name}.log")
        for name, command in commands.items()
    ]
    for service in services:
        service.start()
    try:
        wait_for_worker(worker, settings)
        with Client(settings) as client:
            yield client, [f"127.0.0.1:{port}" for port in (health, exported, sent)]
    finally:
        for service in (worker, *services):
            service.stop(timeout=30)


@pytest.fixture(scope="module")
def prometheus(
    stack_with_work: tuple[Client, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """It has seen jobs that succeeded, and one that failed."""
    client, targets = stack_with_work
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), targets)
    try:
        for _ in range(3):
            client.caption(red_square()).result(timeout=60)
        missing = client.caption("s3://blipq-inbox/missing.jpg")
        wait_until(lambda: missing.info().ended, "the job without an image")
        for name in ("blipq_ledger_up", "blipq_worker_stage_seconds_bucket"):
            wait_until(lambda name=name: prometheus.has(f"rate({name}[1m])"), name)
        wait_until(lambda: prometheus.has("blipq_gpu_seconds_total"), "what jobs took")
        wait_until(lambda: prometheus.has("rate(blipq_gpu_seconds_total[5m])"), "a rate of it")
        client.caption(red_square()).result(timeout=60)  # what the others took predicts it
        wait_until(lambda: prometheus.has("blipq_prediction_error_ratio"), "a prediction")
        yield prometheus
    finally:
        prometheus.service.stop(timeout=10)


def test_what_is_generated_is_fresh() -> None:
    stale = [path.name for path, text in written().items() if path.read_text() != text]
    assert not stale, "python -m tools.deploy.monitoring"


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES.keys())
def test_every_panel_shows_what_a_real_stack_says(prometheus: Prometheus, query: str) -> None:
    title = next(name for name, each in QUERIES.items() if each == query).partition(":")[0]
    assert prometheus.samples(query) or title in WITHOUT_SAMPLES


def test_every_name_in_queries_and_rules_is_scraped(prometheus: Prometheus) -> None:
    series = " ".join(name for alert in ALERTS for name in alert.series)
    texts = [*QUERIES.values(), *(alert.expr for alert in ALERTS), series]
    used = {name for text in texts for name in re.findall(r"\bblipq_\w+", text)}
    assert not used - prometheus.names()


def test_the_rules_are_loaded_and_none_is_broken(prometheus: Prometheus) -> None:
    (group,) = prometheus.get("rules")["groups"]
    wait_until(
        lambda: all(
            rule["health"] == "ok" for rule in prometheus.get("rules")["groups"][0]["rules"]
        ),
        "an evaluation of each rule",
    )
    assert {rule["name"] for rule in group["rules"]} == {alert.name for alert in ALERTS}


def test_each_alert_fires_where_it_should() -> None:
    for command in ("check", "test"):
        file = "blipq-alerts.yml" if command == "check" else "blipq-alerts-test.yml"
        ran = subprocess.run(
            ["promtool", command, "rules", file],
            cwd=RULES,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_config_for_the_compose_file_is_one_that_prometheus_takes() -> None:
    command = ["promtool", "check", "config", str(RULES / "blipq.yml")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr
