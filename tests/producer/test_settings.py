"""Where the services are: by hand first, then the running local stack, then the defaults."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blipq import Client, InvalidRequest, Settings
from blipq.settings import read_stack_file
from blipq.submission import checked

STACK_REDIS = "redis://:secret@127.0.0.1:7777/0"


@pytest.fixture
def stack_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a local stack whose process lives: this one."""
    path = tmp_path / "stack.json"
    monkeypatch.setenv("BLIPQ_STACK_FILE", str(path))
    announce(path, os.getpid())
    return path


def announce(path: Path, pid: int) -> None:
    found = {"redis_url": STACK_REDIS, "s3_endpoint_url": "http://127.0.0.1:7778"}
    path.write_text(json.dumps({"pid": pid, "settings": found}))


def test_without_anything_the_defaults_count() -> None:
    settings = Settings()
    assert settings.redis_url == "redis://localhost:6379/0"
    assert settings.s3_endpoint_url is None
    assert settings.endpoint_source == "settings"


@pytest.mark.usefixtures("stack_file")
def test_a_running_local_stack_is_found() -> None:
    settings = Settings()
    assert settings.redis_url == STACK_REDIS
    assert settings.endpoint_source == "local stack"


@pytest.mark.usefixtures("stack_file")
def test_the_environment_beats_the_local_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIPQ_REDIS_URL", "redis://queue.example.org/0")
    assert Settings().redis_url == "redis://queue.example.org/0"


@pytest.mark.usefixtures("stack_file")
def test_an_argument_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIPQ_REDIS_URL", "redis://queue.example.org/0")
    assert Settings(redis_url="redis://other/0").redis_url == "redis://other/0"


@pytest.mark.usefixtures("stack_file")
def test_one_service_named_by_hand_switches_discovery_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIPQ_REDIS_URL", "redis://queue.example.org/0")
    assert Settings().s3_endpoint_url is None, "half of one stack and half of another"


@pytest.mark.usefixtures("stack_file")
def test_other_options_leave_discovery_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIPQ_RESULT_TTL", "2h")
    settings = Settings()
    assert (settings.redis_url, settings.result_ttl) == (STACK_REDIS, 7200)


def test_the_file_of_a_dead_stack_is_ignored(stack_file: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    announce(stack_file, gone.pid)
    assert read_stack_file() is None
    assert Settings().redis_url == "redis://localhost:6379/0"


def test_a_process_that_got_the_pid_of_a_dead_stack_is_no_stack(stack_file: Path) -> None:
    """`blipq down` would end a process that has nothing to do with it."""
    stack = json.loads(stack_file.read_text()) | {"born": "1"}
    stack_file.write_text(json.dumps(stack))
    assert read_stack_file() is None


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"settings": {}}', '{"pid": "x"}'])
def test_a_damaged_stack_file_is_ignored(stack_file: Path, text: str) -> None:
    stack_file.write_text(text)
    assert read_stack_file() is None


@pytest.mark.parametrize("field", ["s3_endpoint_url", "broker_url"])
def test_a_url_without_a_scheme_is_told_so(field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{field}: it begins with "):
        checked(Settings, **{field: "minio:9000"})


def test_an_endpoint_of_s3_speaks_http() -> None:
    with pytest.raises(InvalidRequest, match="it begins with http:// or https://"):
        checked(Settings, s3_endpoint_url="ftp://minio:9000")
    assert Settings(s3_endpoint_url="HTTPS://minio:9000").s3_endpoint == "HTTPS://minio:9000"


@pytest.mark.parametrize("name", ["BLIPQ_S3_REGION", "AWS_REGION", "AWS_DEFAULT_REGION"])
def test_the_region_is_aws_own_unless_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "eu-central-1")
    assert Settings().s3_region == "eu-central-1"


def test_the_broker_is_the_same_redis_unless_named() -> None:
    assert Settings(redis_url="redis://a/0").effective_broker_url == "redis://a/0"
    assert Settings(broker_url="amqp://b").effective_broker_url == "amqp://b"


def test_the_endpoints_are_told_without_credentials() -> None:
    told = Settings(redis_url=STACK_REDIS, s3_secret_access_key="hidden").endpoints
    assert "127.0.0.1:7777" in told
    assert "secret" not in told


def test_a_password_in_a_tls_url_is_not_told_either() -> None:
    told = Settings(redis_url="rediss://user:secret@queue.example.org:6380/0").endpoints
    assert "queue.example.org" in told
    assert "secret" not in told


def test_the_secret_key_is_not_printed() -> None:
    assert "hidden" not in repr(Settings(s3_secret_access_key="hidden"))


def test_a_wrong_option_is_an_invalid_request_that_names_it() -> None:
    with pytest.raises(InvalidRequest, match="timeout_s"):
        Client(timeout_s=-1)


def test_a_wrong_redis_url_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest, match="redis_url"):
        Client(redis_url="queue.example.org")


HOMELESS = """
import os, pathlib
def nowhere(): raise RuntimeError("Could not determine home directory.")
pathlib.Path.home = nowhere
os.path.expanduser = lambda path: path
from blipq.cli import app
app()
"""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["env"], "no service is named"),
        (["caption", "s3://photos/cat.jpg"], "Redis does not answer"),
        (["up"], "no home folder: set HOME or XDG_CACHE_HOME"),
        (["models", "list"], "demo"),
    ],
)
def test_a_user_without_a_home_gets_answers(arguments: list[str], told: str) -> None:
    """A container's user may be a number that no file knows."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    if "caption" in arguments:
        kept["BLIPQ_REDIS_URL"] = "redis://127.0.0.1:1/0"
    ran = subprocess.run(
        [sys.executable, "-c", HOMELESS, *arguments],
        env=kept,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert told in ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr
