"""Schemathesis sends what the description allows, and what it does not."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from api.conftest import DoorProcess
from blipq import Client, Settings
from blipq.contract import JobFilter, Status

#: All operations together; ``ATTACK_CASES=5000`` makes it longer. BLIPQ_* do not reach a test.
CASES = int(os.environ.get("ATTACK_CASES", "500"))
TIMEOUT_S = max(590, CASES // 4)
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


@contextmanager
def jobs_that_end(settings: Settings) -> Iterator[None]:
    """Cancels what waits, again and again: a stream of an open job lasts for minutes."""
    done = threading.Event()

    def end() -> None:
        with Client(settings) as client:
            while not done.wait(0.5):
                client.cancel_all(JobFilter(status=Status.QUEUED))

    ending = threading.Thread(target=end)
    ending.start()
    try:
        yield
    finally:
        done.set()
        ending.join()


@pytest.mark.timeout(TIMEOUT_S + 10)
def test_no_case_of_schemathesis_breaks_the_door_or_its_description(
    door: DoorProcess, http: httpx2.Client, apart: Settings, tmp_path: Path
) -> None:
    told = http.get("/openapi.json").json()
    for methods in told["paths"].values():
        for operation in methods.values():  # a wait takes what it says: up to a minute
            kept = [each for each in operation.get("parameters", ()) if each["name"] != "wait"]
            operation["parameters"] = kept
    schema = tmp_path / "openapi.json"
    schema.write_text(json.dumps(told))
    operations = sum(map(len, told["paths"].values()))
    command = [
        *(sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"),
        *("run", str(schema), "--url", door.url, "--checks", ",".join(CHECKS)),
        *("--max-examples", str(-(-CASES // operations)), "--phases", "fuzzing"),
        *("--seed", "26", "--generation-database", "none", "--no-color"),
        *("--suppress-health-check", "all", "--request-timeout", "30"),
    ]
    with jobs_that_end(apart):
        ran = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    found = re.search(r"([\d,]+) generated", ran.stdout)
    assert found is not None, ran.stdout[-2000:]
    assert int(found[1].replace(",", "")) >= CASES / 2
    assert "Traceback" not in door.logged()
