"""The door, the doctor, the exporter and a sender serve all cells, and go on while one is away."""

import functools
import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from blipq import Client
from blipq.contract import CONTRACT
from blipq.ledger.connection import connect
from blipq.ledger.worker import WorkerLedger
from blipq.local.stack import LocalStack
from blipq.local.supervisor import Service
from blipq.ops.doctor import Finding, examine
from blipq.ops.outlook import work_page
from blipq.redis.cells import cell_of, ranked
from blipq.webhooks.cells import outbox_of
from conftest import wait_until
from guarantees.cells.fleet import RESULT, Fleet, finish
from guarantees.rig import named, run_command
from guarantees.stand_ins.forked import Forked
from receivers import SECRET, Receiver, receiving

IMAGE = "s3://photos/cat.jpg"
CAPTION = {"kind": "caption", "image": IMAGE}


class Processes:
    """Two cells, and commands that serve both."""

    def __init__(self, folder: Path, stack: LocalStack) -> None:
        fields = stack.settings_fields()
        self.s3 = {name: text for name, text in fields.items() if name.startswith("s3_")}
        self.fleet = Fleet(folder / "cells", "ab", webhook_allow="127.0.0.1", **self.s3)
        self._folder = folder
        self._services: list[Service] = []

    def start(self, *arguments: str, **options: str) -> Service:
        """A ``blipq`` command with these settings."""
        given = {"cells": self.fleet.cells, "cell_lists": "1=a,b", "timeout_s": "2", **self.s3}
        command = Forked(
            arguments[0],
            functools.partial(run_command, arguments),
            env=named(given | options),
            log=self._folder / f"{arguments[0]}.log",
        )
        command.start()
        self._services.append(command)
        return command

    def told(self, command: Service, pattern: str) -> str:
        """What a command says of itself."""
        found: list[str] = []

        def says() -> bool:
            assert command.exit_code is None, command.last_words(40)
            found[:] = re.findall(pattern, command.last_words(1000))
            return bool(found)

        wait_until(says, pattern, timeout=60)
        return found[0]

    def stop(self) -> None:
        for service in self._services:
            service.stop(timeout=30)
        self.fleet.stop()


@pytest.fixture
def processes(tmp_path: Path, stack: LocalStack) -> Iterator[Processes]:
    processes = Processes(tmp_path, stack)
    yield processes
    processes.stop()


@pytest.fixture
def client(processes: Processes) -> Iterator[Client]:
    with Client(processes.fleet.settings()) as client:
        yield client


def one_in_each(ids: list[str]) -> dict[str, str]:
    """A job of each cell."""
    found = {str(cell_of(id)): id for id in ids}
    assert found.keys() == {"a", "b"}
    return found


# --- the door -------------------------------------------------------------------------------------


@pytest.fixture
def http(processes: Processes) -> Iterator[httpx2.Client]:
    door = processes.start("api", "--port", "0", max_open_jobs="1000")
    url = processes.told(door, r" is (http://\S+)")
    with httpx2.Client(base_url=url, timeout=60, trust_env=False) as http:
        yield http


def submitted(http: httpx2.Client) -> str:
    answer = http.post("/v1/jobs", json=CAPTION)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def test_a_door_has_the_jobs_of_all_cells(processes: Processes, http: httpx2.Client) -> None:
    ids = [submitted(http) for _ in range(20)]
    lines = "\n".join(json.dumps(CAPTION) for _ in range(20))
    headers = {"Content-Type": "application/x-ndjson"}
    batch = http.post("/v1/batches", content=lines, headers=headers)
    ids += [json.loads(line)["id"] for line in batch.text.splitlines()]
    jobs = one_in_each(ids[:20])
    one_in_each(ids[20:])
    listed = http.get("/v1/jobs", params={"limit": "100"}).json()["jobs"]
    assert sorted(job["id"] for job in listed) == sorted(ids)
    assert http.get("/v1/queues").json()["open"] == 40
    for cell, id in jobs.items():
        assert http.get(f"/v1/jobs/{id}").json()["status"] == "queued"
        finish(processes.fleet, id, cell)
        assert http.get(f"/v1/jobs/{id}/result").json() == json.loads(RESULT)
    assert http.get("/v1/queues").json()["open"] == 38
    for _ in range(2):
        own = http.put("/v1/jobs/order-1001", json=CAPTION)
        assert own.json()["id"] == "order-1001", own.text
    assert http.get("/v1/queues").json()["open"] == 39


def test_a_door_goes_on_with_other_cells_while_one_is_away(
    processes: Processes, http: httpx2.Client
) -> None:
    jobs = one_in_each([submitted(http) for _ in range(20)])
    own = next(f"order-{n}" for n in range(1000, 1100) if ranked(f"order-{n}", "ab")[0] == "b")
    processes.fleet.kill("b")
    assert {cell_of(submitted(http)) for _ in range(10)} == {"a"}
    assert http.get(f"/v1/jobs/{jobs['a']}").status_code == 202
    assert http.get("/health").status_code == 200
    for answer in (
        http.get(f"/v1/jobs/{jobs['b']}"),
        http.put(f"/v1/jobs/{own}", json=CAPTION),
        http.get("/v1/jobs"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (503, "queue_unavailable")
    processes.fleet.start("b")
    wait_until(lambda: http.get(f"/v1/jobs/{jobs['b']}").status_code == 202, "the cell")
    wait_until(lambda: http.put(f"/v1/jobs/{own}", json=CAPTION).status_code < 300, "its job")


# --- the doctor -----------------------------------------------------------------------------------


def found(processes: Processes) -> dict[tuple[str, str], Finding]:
    """The first finding of each check in each cell; of no cell under ""."""
    findings: dict[tuple[str, str], Finding] = {}
    for finding in examine(processes.fleet.settings(), canary=False):
        said = re.match(r"cell (\w+): ", finding.message)
        findings.setdefault((finding.check, said[1] if said else ""), finding)
    return findings


def test_the_doctor_examines_each_cell(processes: Processes) -> None:
    own = processes.fleet.settings().in_cell("a")
    report = {"models": ["default"], "active": 0, "contract": CONTRACT}
    with connect(own) as raw:
        ledger = WorkerLedger(raw, own)
        ledger.register("w", ["default"], json.dumps(report), ttl_s=60, spare=False)
    findings = found(processes)
    assert [findings["redis", cell].state for cell in "ab"] == ["ok", "ok"]
    assert [findings["workers", cell].state for cell in "ab"] == ["ok", "warn"]
    assert [findings["webhooks", cell].state for cell in "ab"] == ["ok", "ok"]
    assert ("s3 credentials", "") in findings
    processes.fleet.kill("b")
    findings = found(processes)
    assert [findings["redis", cell].state for cell in "ab"] == ["ok", "bad"]
    assert "BLIPQ_CELLS" in str(findings["redis", "b"].advice)
    assert findings["workers", "a"].state == "ok"
    assert ("workers", "b") not in findings, "what does not answer is asked no more"


# --- the exporter ---------------------------------------------------------------------------------


def scraped(url: str) -> dict[tuple[str, str], float]:
    """Samples by name and cell."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {
            (sample.name, sample.labels["cell"]): sample.value
            for family in families
            for sample in family.samples
        }


def test_the_exporter_tells_of_each_cell_and_of_the_work_in_all(
    processes: Processes, client: Client
) -> None:
    exporter = processes.start("metrics", "--port", "0", "--host", "127.0.0.1")
    port = processes.told(exporter, r"on port (\d+)")
    url = f"http://127.0.0.1:{port}"
    jobs = [client.caption(IMAGE) for _ in range(20)]
    counts = {cell: sum(cell_of(job.id) == cell for job in jobs) for cell in "ab"}
    told = scraped(url)
    for cell, count in counts.items():
        assert told["blipq_ledger_up", cell] == 1
        assert told["blipq_jobs_open", cell] == told["blipq_jobs_queued", cell] == count
    page = f"{url}/work/default"
    with urllib.request.urlopen(page, timeout=30) as answer:
        everywhere = json.load(answer)["total_s"]
    with connect(processes.fleet.settings().in_cell("a")) as raw:
        assert everywhere > work_page([raw], "default")["total_s"] > 0
    processes.fleet.kill("b")
    told = scraped(url)
    assert (told["blipq_ledger_up", "a"], told["blipq_ledger_up", "b"]) == (1, 0)
    assert told["blipq_jobs_open", "a"] == counts["a"]
    assert ("blipq_jobs_open", "b") not in told
    with pytest.raises(HTTPError, match="503"):  # a sum without b's would scale workers down
        urllib.request.urlopen(page, timeout=30)


# --- a sender -------------------------------------------------------------------------------------


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def told_of(receiver: Receiver) -> set[str]:
    """The jobs whose events have reached a receiver."""
    return {json.loads(got.body)["data"]["id"] for got in receiver.got}


def test_one_sender_sends_what_all_cells_have_and_goes_on_while_one_is_away(
    processes: Processes, client: Client, receiver: Receiver
) -> None:
    sender = processes.start("webhooks", "run", webhook_secrets=SECRET, webhook_allow="127.0.0.1")
    ids = [client.caption(IMAGE, webhook={"url": receiver.url}).id for _ in range(20)]
    first = one_in_each(ids)
    second = one_in_each([id for id in ids if id not in first.values()])
    for cell, id in first.items():
        finish(processes.fleet, id, cell)
    wait_until(lambda: told_of(receiver) == {*first.values()}, "events of both cells", 60)
    assert len(outbox_of(client.ledger).senders()) == 2
    processes.fleet.kill("b")
    finish(processes.fleet, second["a"], "a")
    wait_until(lambda: second["a"] in told_of(receiver), "an event while a cell is away")
    processes.fleet.start("b")
    finish(processes.fleet, second["b"], "b")
    wait_until(lambda: second["b"] in told_of(receiver), "an event of the cell that is back", 60)
    sender.stop(timeout=30)
    assert sender.exit_code == 0, sender.last_words(40)
