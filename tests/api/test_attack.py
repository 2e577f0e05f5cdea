"""Schemathesis sends what the description allows, and what it does not."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from api.conftest import DoorProcess

#: All operations together; ``ATTACK_CASES=5000`` makes it longer. BLIPQ_* do not reach a test.
CASES = int(os.environ.get("ATTACK_CASES", "500"))
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


@pytest.mark.timeout(600)
def test_no_case_of_schemathesis_breaks_the_door_or_its_description(
    door: DoorProcess, http: httpx2.Client, tmp_path: Path
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
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=590)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    found = re.search(r"([\d,]+) generated", ran.stdout)
    assert found is not None, ran.stdout[-2000:]
    assert int(found[1].replace(",", "")) >= CASES / 2
    assert "Traceback" not in door.logged()
