"""What keeps a worker from starting is one line and code 78: no supervisor tries for ever."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blipq.local.stack import LocalStack
from blipq_worker.catalog.s3.keys import environment_of
from worker.models_in_s3 import BUCKET, Bucket


def started(**settings: str) -> subprocess.CompletedProcess[str]:
    """A worker process as a supervisor starts it, until it ends."""
    environment = {f"BLIPQ_{name.upper()}": value for name, value in settings.items()}
    return subprocess.run(
        [sys.executable, "-m", "blipq_worker"],
        capture_output=True,
        text=True,
        env={**os.environ, "BLIPQ_LOG_LEVEL": "ERROR", **environment},
        timeout=90,
    )


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"lease_s": "0"}, "BLIPQ_LEASE_S: must be at least 2"),
        ({"models": "a b=demo"}, "BLIPQ_MODELS"),
        ({"redis_url": "http://localhost"}, "BLIPQ_REDIS_URL"),
        ({"log_level": "LOUD"}, "BLIPQ_LOG_LEVEL: 'LOUD'"),
        ({"s3_endpoint_url": "http://"}, "BLIPQ_S3_ENDPOINT_URL"),
        ({"s3_endpoint_url": "localhost:9000"}, "BLIPQ_S3_ENDPOINT_URL"),
    ],
)
def test_a_wrong_setting_is_one_line(settings: dict[str, str], told: str) -> None:
    ended = started(**settings)
    assert ended.returncode == 78, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert told in line


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("AWS_ENDPOINT_URL_S3", "localhost:9000", "Invalid endpoint: localhost:9000"),
        ("AWS_ENDPOINT_URL", "ftp://user:hidden@files", "http:// or https://"),
        ("AWS_ENDPOINT_URL", "http://files:port", "s3 is configured wrongly"),
        ("AWS_PROFILE", "nope", "The config profile (nope) could not be found"),
        ("AWS_CONFIG_FILE", "broken", "Unable to parse config file"),
        ("AWS_REGION", "not a region", "not a region"),
        ("AWS_REQUEST_CHECKSUM_CALCULATION", "sometimes", "sometimes"),
    ],
)
def test_a_wrong_setting_of_awss_own_is_one_line(
    name: str, value: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before models are loaded, and jobs taken that would all fail."""
    if name == "AWS_CONFIG_FILE":
        value = str(tmp_path / value)
        Path(value).write_text("no ini file")
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    ended = started()
    assert ended.returncode == 78, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert told in line
    assert "hidden" not in line


def test_a_health_port_that_is_taken_is_one_line_before_models_are_loaded() -> None:
    with socket.create_server(("0.0.0.0", 0)) as other:
        port = str(other.getsockname()[1])
        ended = started(health_port=port, models="default=/nowhere")
    assert ended.returncode == 1, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.endswith(f"BLIPQ_HEALTH_PORT: cannot listen on port {port}: Address already in use")


def _another_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["query_tokens"] = torch.cat([weights["query_tokens"]] * 2, dim=1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _with_a_mark(folder: Path) -> None:
    file = folder / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())


def _with_a_lie(folder: Path) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["num_attention_heads"] = 0
    file.write_text(json.dumps(config))


def _with_lists_for_objects(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vision_config": [1]}))


def _with_a_text_for_a_number(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_query_tokens": "x"}))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            _another_shape,
            "query_tokens has the shape (1, 64, 64), and config.json has (1, 32, 64)",
        ),
        (_with_a_mark, "config.json is unreadable: Unexpected UTF-8 BOM"),
        (_with_a_lie, "model 'default'"),
        (_with_lists_for_objects, "config.json is unusable: Validation error"),
        (_with_a_text_for_a_number, "'num_query_tokens' expected int, got str"),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded_is_one_line(
    checkpoints: dict[str, Path], tmp_path: Path, damage: Callable[[Path], None], told: str
) -> None:
    folder = Path(shutil.copytree(checkpoints["opt"], tmp_path / "mine"))
    damage(folder)
    ended = started(models=f"default={folder}", dtype="float32")
    assert ended.returncode == 78, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert told in line


def test_a_file_of_goldens_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "goldens.json").write_bytes(b"\xff\xfe{}")
    ended = started(goldens=str(tmp_path / "goldens.json"))
    assert ended.returncode == 78, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert "is no file of `blipq models record-golden`" in line


def test_a_device_that_is_not_there_is_one_line() -> None:
    ended = started(device="cuda:7")
    assert ended.returncode == 78, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert "BLIPQ_DEVICE=cuda:7: " in line


def test_a_model_that_is_not_in_s3_is_one_line(stack: LocalStack) -> None:
    Bucket(stack)
    reached = environment_of(stack.settings()).items()
    fields = {name.removeprefix("BLIPQ_").lower(): value for name, value in reached}
    ended = started(**fields, models=f"default=s3://{BUCKET}/nothing/here")
    assert ended.returncode == 78, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert "checkpoint_missing" in line
    assert f"s3://{BUCKET}/nothing/here/blipq-manifest.json" in line


def test_a_model_in_an_s3_that_is_away_is_worth_another_start() -> None:
    keys = {"model_s3_access_key_id": "key", "model_s3_secret_access_key": "secret"}
    ended = started(
        models="default=s3://models/opt", model_s3_endpoint_url="http://127.0.0.1:9", **keys
    )
    assert ended.returncode == 1, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert "checkpoint_unavailable" in line


def test_half_of_a_key_is_one_line() -> None:
    ended = started(models="default=s3://models/opt", model_s3_access_key_id="key")
    assert ended.returncode == 78, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert "BLIPQ_MODEL_S3_SECRET_ACCESS_KEY go together" in line
