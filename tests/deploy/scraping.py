"""A real Prometheus with the shipped rules, whose waits are short."""

import json
import re
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from blipq.local.stack import free_port
from blipq.local.supervisor import Service
from conftest import ROOT, wait_until
from guarantees.rig import Rig, named
from receivers import SECRET

RULES = ROOT / "deploy/prometheus"
#: Of a rule that waits for a time: what it is compared with, in seconds.
QUICK_S = 3
_SECONDS = re.compile(r"(_seconds) > \d+")


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
        command += [f"--web.listen-address=127.0.0.1:{port}"]
        command += ["--enable-feature=exemplar-storage"]  # as the compose file has it
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
    """The shipped rules, but for how long anything must last."""
    rules = yaml.safe_load((RULES / "blipq-alerts.yml").read_text())
    for rule in rules["groups"][0]["rules"]:
        rule["for"] = "2s"
        rule["expr"] = _SECONDS.sub(rf"\1 > {QUICK_S}", rule["expr"])
    file = folder / "rules.yml"
    file.write_text(yaml.safe_dump(rules))
    return file


class Fleet:
    """A rig, an exporter and a Prometheus that scrapes it, and a worker and a sender to come."""

    def __init__(self, rig: Rig, folder: Path) -> None:
        self.rig = rig
        self.worker_port, self.sender_port, exporter_port = free_port(), free_port(), free_port()
        self.exporter = rig.command("metrics", "--port", str(exporter_port))
        self.exporter.start()
        ports = exporter_port, self.worker_port, self.sender_port
        self.prometheus = Prometheus(folder, [f"127.0.0.1:{port}" for port in ports])
        self._services: list[Service] = []

    def start_worker(self, **options: object) -> Service:
        """The worker, once Prometheus has scraped it."""
        worker = self.rig.start_worker(health_port=self.worker_port, **options)
        self.sees("blipq_worker_jobs_held")
        return worker

    def sees(self, query: str) -> None:
        wait_until(lambda: self.prometheus.has(query), query, timeout=60)

    def start_sender(self, **options: object) -> None:
        command = [sys.executable, "-m", "blipq", "webhooks", "run"]
        command += ["--metrics-port", str(self.sender_port)]
        environment = self.rig.stack.environment() | named(options)
        environment["BLIPQ_WEBHOOK_SECRETS"] = SECRET
        sender = Service("sender", command, env=environment, log=self.rig.folder / "sender.log")
        sender.start()
        self._services.append(sender)

    def close(self) -> None:
        for service in (*self._services, self.prometheus.service, self.exporter):
            service.stop(timeout=10)
