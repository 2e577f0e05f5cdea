"""What `blipq env` prints is all that other programs need."""

import json
import os
import subprocess
import sys

import pytest
import redis

from blipq import InvalidRequest, Settings
from blipq.local.exports import as_shell, exports
from blipq.local.stack import LocalStack
from blipq.transport.broker import make_app
from conftest import blipq

OTHERS = """
import boto3, os, redis, uuid
from celery import Celery

buckets = boto3.client("s3").list_buckets()["Buckets"]
assert "blipq-inbox" in [bucket["Name"] for bucket in buckets]
queue = f"test.{uuid.uuid4()}"
Celery().send_task("some.task", queue=queue, ignore_result=True)
with redis.Redis.from_url(os.environ["BLIPQ_REDIS_URL"]) as raw:
    assert raw.llen(queue) == 1
    raw.delete(queue, f"_kombu.binding.{queue}")
"""


def test_boto3_and_a_celery_of_ones_own_find_the_services_by_it(stack: LocalStack) -> None:
    command = f'eval "$({sys.executable} -m blipq env)" && exec {sys.executable} -'
    environment = {**os.environ, **stack.environment()}
    ran = subprocess.run(
        ["sh", "-c", command],
        input=OTHERS,
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert ran.returncode == 0, ran.stderr


def test_another_accounts_session_does_not_spoil_the_keys(stack: LocalStack) -> None:
    others = {
        "AWS_SESSION_TOKEN": "of-an-account",
        "AWS_SECURITY_TOKEN": "of-an-account",
        "AWS_PROFILE": "work",
        "AWS_DEFAULT_PROFILE": "work",
    }
    asked = "import boto3; print(len(boto3.client('s3').list_buckets()['Buckets']))"
    command = f'eval "$({sys.executable} -m blipq env)" && exec {sys.executable} -c "{asked}"'
    ran = subprocess.run(
        ["sh", "-euc", command],
        env={**os.environ, **stack.environment(), **others},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > 0


def test_a_session_is_left_alone_where_no_keys_take_its_place() -> None:
    assert "unset" not in as_shell(exports(Settings(redis_url="redis://h/0")))


def test_programs_read_it_as_json(stack: LocalStack) -> None:
    ran = blipq("env", "--json", stack=stack)
    assert ran.returncode == 0, ran
    told = json.loads(ran.stdout)
    assert told.items() >= stack.environment().items()
    assert told["AWS_SECRET_ACCESS_KEY"] == told["BLIPQ_S3_SECRET_ACCESS_KEY"]
    assert ran.stderr == ""


def test_a_shell_reads_back_what_was_meant() -> None:
    settings = Settings(
        redis_url="redis://:a%27b%24c@h/0", s3_access_key_id="k", s3_secret_access_key="s'p $x"
    )
    printed = as_shell(exports(settings)) + "\nprintf '%s' \"$AWS_SECRET_ACCESS_KEY\""
    ran = subprocess.run(
        ["sh", "-c", printed], capture_output=True, text=True, check=True, timeout=30
    )
    assert ran.stdout == "s'p $x"


def test_without_any_service_it_says_what_to_do() -> None:
    with pytest.raises(InvalidRequest, match="blipq up"):
        exports(Settings())
    ran = blipq("env")
    assert (ran.returncode, ran.stdout) == (2, "")


def test_a_broker_that_a_url_cannot_tell_is_left_out() -> None:
    """A Celery of one's own would trust anybody over TLS, and does not find a sentinel's master."""
    for url in ("rediss://:pw@h/0", "sentinel://h/0"):
        assert "CELERY_BROKER_URL" not in exports(Settings(redis_url=url))
    assert exports(Settings(broker_url="amqp://h//"))["CELERY_BROKER_URL"] == "amqp://h//"


def test_celerys_own_variable_does_not_lead_our_messages_elsewhere(
    apart: Settings, raw_redis: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that uses Celery has it set for its own broker."""
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://127.0.0.1:1/0")
    with make_app(apart) as app:
        app.send_task("blipq.caption", queue="blipq.default.normal", ignore_result=True)
        for connection in (app.connection_for_read(), app.connection_for_write()):
            assert connection.as_uri(include_password=True) == apart.redis_url
    assert raw_redis.llen("blipq.default.normal") == 1
