"""No password, key or signature is shown, however badly its URL is written."""

import json
import logging
import os
import subprocess
import sys
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blipq import Client, InvalidRequest, Settings
from blipq.errors import QueueUnavailable
from blipq.local.stack import free_port
from blipq.redaction import Redacting, place_of, redacted
from blipq.submission import checked
from blocking import BlockingClient
from conftest import blipq, wait_until
from refusing_redis import refusing_redis, repeating

RAW = ["Hunter2#secret", "Hunter2/secret", "Hunter2?secret", "Hunter2/se#cr?et", "Hunter2 secret"]
SCHEMES = ["redis", "rediss", "sentinel", "sentinels", "unix"]


@pytest.mark.parametrize("password", RAW)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_raw_password_is_refused_at_the_settings_and_not_repeated(
    scheme: str, password: str
) -> None:
    with pytest.raises(InvalidRequest, match="redis_url") as refused:
        checked(Settings, redis_url=f"{scheme}://user:{password}@127.0.0.1:6379/0")
    assert "ecret" not in str(refused.value)
    assert "Hunter" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "amqp://user:Hunter2/secret@rabbit:5672//",
        "amqps://user:Hunter2#secret@rabbit//",
        "amqp://user:x@one//;amqp://user:Hunter2?secret@two//",
        "amqp://user:Hunter2;secret@rabbit//",
        "sqs://AKIAX:Hunter2/secret@",
    ],
)
def test_a_raw_password_of_another_broker_is_refused_as_well(url: str) -> None:
    with pytest.raises(InvalidRequest, match="broker_url") as refused:
        checked(Settings, broker_url=url)
    assert "ecret" not in str(refused.value)
    assert "Hunter" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:Hunter2secret",  # the host was forgotten: it would be the port
        "redis://:Hunter2secret@host:port/0",
        "redis://:Hunter2secret@[host/0",
        "redis://:Hunter2secret@ho\u2100st/0",  # urllib's error would repeat all of it
        "redis://:Hunter2secret@host/0?bogus=1",
        "redis://:Hunter2secret@host/first",
        "redis://host/0?password=Hunter2secret",
        "redis://host/0?client_name=a&Hunter2secret",
        "sentinel://host/0?sentinel_password=first&Hunter2secret",
        "http://:Hunter2secret@host/0",
    ],
)
def test_no_refusal_of_a_redis_url_repeats_its_password(url: str) -> None:
    with pytest.raises(InvalidRequest, match="redis_url") as refused:
        checked(Settings, redis_url=url)
    assert "Hunter2" not in str(refused.value)


def test_settings_show_no_password_themselves() -> None:
    settings = Settings(
        redis_url="redis://:hush@a/0",
        broker_url="amqp://u:hush@b//",
        s3_endpoint_url="http://u:hush@c",
    )
    assert "hush" not in repr(settings)
    assert "hush" not in settings.endpoints
    with pytest.raises(ValueError, match="redis_url") as refused:  # not through our own wording
        Settings(redis_url="redis://:hu#sh@a/0")
    assert "hu#sh" not in str(refused.value)


@pytest.mark.parametrize("password", ["Hunter2#secret", "Hunter2/secret", "Hunter2?secret"])
def test_the_commands_show_nothing_of_a_raw_password(password: str) -> None:
    url = f"redis://:{password}@127.0.0.1:1/0"
    for command in (["caption", "s3://photos/1.jpg", "--no-wait"], ["doctor", "--no-canary"]):
        ran = blipq(*command, BLIPQ_REDIS_URL=url)
        assert ran.returncode == 2, ran
        told = ran.stdout + ran.stderr
        assert "percent-encode" in told
        assert "ecret" not in told
        assert "Hunter" not in told
        assert "Traceback" not in told


def test_a_worker_says_in_one_line_what_is_wrong_with_its_settings() -> None:
    command = [sys.executable, "-m", "blipq_worker"]
    environment = {"BLIPQ_REDIS_URL": "redis://:Hunter2#secret@127.0.0.1:1/0"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
    assert ran.returncode == 78
    assert ran.stderr.startswith("blipq worker: BLIPQ_REDIS_URL: ")
    assert ran.stderr.count("\n") == 1
    assert "ecret" not in ran.stderr


SHOWN = {
    "redis://:p%40ss@host:6379/0": "redis://***@host:6379/0",
    "at amqp://user:pa/s#s@host:5672//": "at amqp://***@host:5672//",
    "sqs://AKIA:se/cret@ is away": "sqs://***@ is away",
    "https://user:pw@hooks.example/x": "https://***@hooks.example/x",
    "https://user:p/w@hooks.example/x": "https://***@hooks.example/x",
    "https://us:p@w@hooks.example/x": "https://***@hooks.example/x",
    "https://h/x?token=abc&page=2": "https://h/x?token=***&page=2",
    "https://b.s3.example/k?X-Amz-Credential=AKIA%2F1&X-Amz-Expires=60&X-Amz-Signature=ab12": (
        "https://b.s3.example/k?X-Amz-Credential=***&X-Amz-Expires=60&X-Amz-Signature=***"
    ),
    "/k?AWSAccessKeyId=AKIA&Signature=a%3D&x=1": "/k?AWSAccessKeyId=***&Signature=***&x=1",
    "Authorization: AWS4-HMAC-SHA256 Credential=AKIA/x, Signature=abc": "Authorization: ***",
    "sent Credential=AKIA/20261127/x, Signature=abc": "sent Credential=***, Signature=***",
    "unknown command 'AUTH', with args beginning with: 'hush' ": (
        "unknown command 'AUTH', with args beginning with: ***"
    ),
    "secret whsec_bGV0IG1lIGlu+/=": "secret whsec_***",
}


@pytest.mark.parametrize("text", SHOWN)
def test_secrets_are_taken_out_where_they_usually_stand(text: str) -> None:
    assert redacted(text) == SHOWN[text]
    assert redacted(redacted(text)) == redacted(text)


@pytest.mark.parametrize(
    "text",
    [
        "s3://photos/logo@2x.png",
        "https://cdn.example/logo@2x.png",
        "https://cdn.example:8443/logo@2x.png",
        "https://medium.example/@alice/1.jpg?design=new&author=me",
        "a cat@home",
        "redis does not answer: Error 111 connecting to 127.0.0.1:6379. Connection refused.",
        "unix:///run/redis.sock",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("redis://:a@b/c?d#e@host:1/0?x=1", "redis://host:1/0"),
        ("unix:///run/redis@1.sock?db=1", "unix:///run/redis@1.sock"),
        ("unix://:pw@/run/redis.sock", "unix:///run/redis.sock"),
        ("https://s3.example/", "https://s3.example/"),
    ],
)
def test_the_place_of_a_url_has_no_user_and_no_query(url: str, place: str) -> None:
    assert place_of(url) == place


def test_errors_of_blipq_have_no_secrets_in_them() -> None:
    assert "hush" not in str(QueueUnavailable("amqp://u:hush@host// is away", "job_1"))


def test_a_log_has_no_secrets_in_it_tracebacks_included() -> None:
    try:
        raise ValueError("cannot connect to redis://:hush@host/0")
    except ValueError:
        record = logging.LogRecord("x", 40, "x", 1, "at %s", ("amqp://u:hush@h",), sys.exc_info())
    line = Redacting("%(message)s").format(record)
    assert "ValueError: cannot connect to redis://***@host/0" in line
    assert "hush" not in line


def test_a_log_has_no_controls_of_a_terminal_in_it() -> None:
    shown = Redacting("%(message)s").format(
        logging.makeLogRecord({"msg": "\x1b[2Jone\r\n\ttwo\x9b"})
    )
    assert shown == "\\x1b[2Jone\\x0d\n    \ttwo\\x9b"


@pytest.mark.parametrize(
    "part",
    ["a.", "a", "a://", "http://", "https://a:", "https://a:1", "?token", "?a.", "&x-", "whsec_"],
)
@pytest.mark.parametrize("before", ["", "@", "redis://u:hush@h/ "])
def test_a_long_text_of_a_strangers_is_looked_through_in_linear_time(
    before: str, part: str
) -> None:
    """Hours otherwise, in which no thread of the process runs: neither do its leases."""
    text = before + part * (500_000 // len(part))
    assert "hush" not in redacted(text)


def test_a_token_is_a_long_password() -> None:
    for scheme in ("redis", "https"):
        assert "ey" not in redacted(f"{scheme}://u:{'ey/' * 1000}@host/")


def test_no_text_in_a_log_passes_for_a_record_of_its_own() -> None:
    """An object's key may hold ends of lines, which Unicode has more of than files of text do."""
    forged = "2026-01-01 00:00:00 ERROR blipq: all is lost"
    key = f"a.jpg\n{forged}\r\n{forged}\x85{forged}\u2028{forged}\u2029{forged}\x0b{forged}"
    try:
        raise ValueError(key)
    except ValueError:
        record = logging.LogRecord("x", 40, "x", 1, "no image %s", (key,), sys.exc_info())
    shown = Redacting("%(levelname)s %(message)s").format(record)
    first, *others = shown.splitlines()
    assert first == "ERROR no image a.jpg"
    assert others
    assert all(line.startswith("    ") for line in others)


def test_no_text_in_a_log_turns_its_direction() -> None:
    shown = Redacting("%(message)s").format(logging.makeLogRecord({"msg": "a\u202egpj.\u2066b"}))
    assert shown == "a\\u202egpj.\\u2066b"


def test_a_webhook_with_a_password_is_refused_without_repeating_it() -> None:
    with Client() as client:
        for url in ("https://u:hush@h.example/x", "https://u:hu/sh@h.example/x"):
            with pytest.raises(InvalidRequest, match="webhook") as refused:
                client.caption("s3://photos/1.jpg", webhook={"url": url})
            assert "hu" not in str(refused.value).replace("https", "")


@pytest.mark.parametrize("call", ["fail()", "threading.Thread(target=fail).start()"])
def test_an_exception_that_ends_a_process_or_a_thread_shows_no_secrets(call: str) -> None:
    code = (
        "import threading\n"
        "from blipq.redaction import redact_tracebacks\n"
        "def fail(): raise RuntimeError('cannot reach amqp://user:hu/sh@host//\\nall is lost')\n"
        f"redact_tracebacks()\n{call}"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "RuntimeError: cannot reach amqp://***@host//" in ran.stderr
    assert "Traceback" in ran.stderr
    assert "hu/sh" not in ran.stderr
    assert "\n    all is lost" in ran.stderr


@pytest.mark.parametrize("opened", [Client, BlockingClient])
@pytest.mark.parametrize(
    "parts", ["redis://:hunter2@{}/0", "sentinel://{}/0?sentinel_password=hunter2"]
)
def test_a_server_that_repeats_the_login_in_its_error_gives_no_password_away(
    parts: str, opened: Callable[..., Any]
) -> None:
    """Redis repeats the arguments of a command that it does not know, such as HELLO."""
    with (
        refusing_redis() as port,
        opened(redis_url=parts.format(f"127.0.0.1:{port}")) as client,
        pytest.raises(QueueUnavailable, match="HELLO") as refused,
    ):
        client.caption("s3://photos/1.jpg")
    assert "hunter2" not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize(
    ("reply", "code", "told"),
    [
        (repeating, 7, "blipq: Redis refuses"),
        # No error that is expected: its traceback is shown.
        (lambda _: "-WRONGTYPE of redis://:hunter2@host/0", 1, "WRONGTYPE of redis://***@host/0"),
    ],
)
def test_no_command_shows_the_password_that_an_error_of_redis_repeats(
    reply: Callable[[list[str]], str], code: int, told: str
) -> None:
    with refusing_redis(reply) as port:
        ran = subprocess.run(
            [Path(sys.executable).with_name("blipq"), "caption", "s3://photos/1.jpg"],
            env={**os.environ, "BLIPQ_REDIS_URL": f"redis://:hunter2@127.0.0.1:{port}/0"},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert told in ran.stderr
    assert ran.returncode == code
    assert "hunter2" not in ran.stdout + ran.stderr


def test_a_worker_shows_no_password_that_redis_repeats_on_its_health_port_or_in_its_log() -> None:
    port = free_port()
    with refusing_redis() as redis_port:
        worker = subprocess.Popen(
            [sys.executable, "-m", "blipq_worker"],
            env={
                **os.environ,
                "BLIPQ_REDIS_URL": f"redis://:hunter2@127.0.0.1:{redis_port}/0",
                "BLIPQ_HEALTH_PORT": str(port),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            wait_until(
                lambda: "not connected" in _ready(port).get("broker loop", ""),
                "the broker's error",
                timeout=120,
            )
            found = _ready(port)
        finally:
            worker.kill()
            _, log = worker.communicate(timeout=30)
    assert "args beginning with: ***" in found["redis"]
    assert found["broker loop"].startswith("not connected")
    assert "hunter2" not in str(found)
    assert "the broker is away" in log
    assert "hunter2" not in log


def _ready(port: int) -> dict[str, str]:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10).close()
    except urllib.error.HTTPError as unready:
        with unready:
            found: dict[str, str] = json.load(unready)
            return found
    except OSError:  # the model is being loaded
        pass
    return {}
