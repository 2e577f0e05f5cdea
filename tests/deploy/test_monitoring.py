"""Dashboards and alerts: their queries on a real Prometheus that scrapes a real stack."""

import json
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tools.deploy.alerts import ALERTS
from tools.deploy.monitoring import written
from tools.deploy.panels import DASHBOARDS

from blipq import Client, Settings
from blipq.ledger.connection import connect
from blipq.local.sample import red_square
from blipq.local.stack import LocalStack, free_port
from blipq.local.supervisor import Service
from conftest import ROOT, start_worker, wait_for_worker, wait_until

pytestmark = pytest.mark.programs

RULES = ROOT / "deploy/prometheus"
QUERIES = {
    f"{title}: {legend}": expr
    for _, panels in DASHBOARDS.values()
    for panel in panels
    for title in (panel.title,)
    for legend, expr in panel.queries.items()
}
#: What nothing in this stack brings about.
WITHOUT_SAMPLES = {"Webhook attempts a second"}


class Prometheus:
    """A real one, which scrapes every second; its alerts fire two seconds after their fault."""

    def __init__(self, folder: Path, targets: list[str]) -> None:
        self._url = f"http://127.0.0.1:{(port := free_port())}/api/v1"
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(_quick_rules(folder))],
            "scrape_configs": [{"job_name": "blipq", "static_configs": [{"targets": targets}]}],
        }
        file = folder / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        command = ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
        command.append(f"--web.listen-address=127.0.0.1:{port}")
        self.service = Service("prometheus", command, log=folder / "prometheus.log")
        self.service.start()

    def get(self, path: str, **arguments: str) -> Any:
        url = f"{self._url}/{path}?{urllib.parse.urlencode(arguments)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def samples(self, query: str) -> list[Any]:
        found: list[Any] = self.get("query", query=query)["result"]
        return found

    def has(self, query: str) -> bool:
        try:
            return bool(self.samples(query))
        except OSError:  # it has not started yet
            return False

    def fires(self, alert: str) -> bool:
        return self.has(f'ALERTS{{alertname="{alert}", alertstate="firing"}}')

    def names(self) -> set[str]:
        """All metrics of the targets, also those without a sample yet."""
        found = {each["metric"] for each in self.get("targets/metadata")}
        parts = ("", "_total", "_bucket", "_sum", "_count")
        return {f"{name}{part}" for name in found for part in parts}


def _quick_rules(folder: Path) -> Path:
    """The shipped rules, but for how long their expressions must hold."""
    rules = yaml.safe_load((RULES / "blipq-alerts.yml").read_text())
    for rule in rules["groups"][0]["rules"]:
        rule["for"] = "2s"
    file = folder / "rules.yml"
    file.write_text(yaml.safe_dump(rules))
    return file


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
    worker = start_worker(
        stack, folder / "worker.log", redis_url=settings.redis_url, canary="0", **options
    )
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


def test_jobs_that_no_worker_takes_fire_an_alert_until_they_are_gone(
    stack_with_work: tuple[Client, list[str]], prometheus: Prometheus
) -> None:
    client, _ = stack_with_work
    assert not prometheus.fires("BlipqNoWorkers")
    settings = client.settings.model_copy(update={"known_models": ("nobody",)})
    with Client(settings) as other:
        job = other.caption("s3://blipq-inbox/any.jpg", model="nobody")
        wait_until(lambda: prometheus.fires("BlipqNoWorkers"), "the alert")
        job.cancel()
        wait_until(lambda: not prometheus.fires("BlipqNoWorkers"), "its end")


def test_a_redis_that_fills_fires_an_alert_until_it_has_room(
    stack_with_work: tuple[Client, list[str]], prometheus: Prometheus
) -> None:
    client, _ = stack_with_work
    assert not prometheus.fires("BlipqRedisMemory")
    with connect(client.settings) as raw:
        before = raw.config_get("maxmemory")["maxmemory"]
        try:
            raw.config_set("maxmemory", int(raw.info("memory")["used_memory"] / 0.8))
            wait_until(lambda: prometheus.fires("BlipqRedisMemory"), "the alert")
        finally:
            raw.config_set("maxmemory", before)
    wait_until(lambda: not prometheus.fires("BlipqRedisMemory"), "its end")
