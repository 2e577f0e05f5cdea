"""The Node.js example sends a job with `ioredis` alone, and reads what became of it."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from blipq import CaptionResult, Client, JobError, Settings
from blipq.local.sample import red_square
from conftest import ROOT

pytestmark = pytest.mark.usefixtures("worker")


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example beside npm's library."""
    if shutil.which("npm") is None:
        assert "CI" not in os.environ, "CI needs Node.js and npm"
        pytest.skip("Node.js is not installed here")
    folder = tmp_path_factory.mktemp("node")
    command = ["npm", "install", "--no-audit", "--no-fund", "--silent", "ioredis@5"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=100)
    return Path(shutil.copy(ROOT / "examples" / "nodejs" / "caption.mjs", folder))


def run(example: Path, settings: Settings, uri: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "BLIPQ_REDIS_URL": settings.redis_url}
    command = ["node", str(example), uri]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)


def test_a_job_from_node_comes_to_its_result(example: Path, settings: Settings) -> None:
    with Client(settings) as client:
        uri = client.storage.upload(red_square()).uri
    ran = run(example, settings, uri)
    assert ran.returncode == 0, ran
    assert CaptionResult.model_validate_json(ran.stdout).text


def test_a_job_from_node_that_fails_says_why(example: Path, settings: Settings) -> None:
    ran = run(example, settings, "s3://blipq-inbox/no-such-picture.png")
    assert ran.returncode == 1, ran
    assert JobError.model_validate(json.loads(ran.stdout)).code == "image_not_found"


def test_a_job_from_node_that_makes_no_sense_fails(example: Path, settings: Settings) -> None:
    ran = run(example, settings, "cat.jpg")
    assert ran.returncode == 1, ran
    assert JobError.model_validate(json.loads(ran.stdout)).code == "invalid_request"
