"""The log as JSON: one object a line, which names the job and the trace that it is about."""

import json
import logging
import threading

import pytest

from blipq import InvalidRequest
from blipq.telemetry.logs import JsonLines, about, set_up_logging

TRACE = "0af7651916cd43dd8448eb211c80319c"


def logged(message: str, *arguments: object, error: BaseException | None = None) -> dict[str, str]:
    info = None if error is None else (type(error), error, error.__traceback__)
    record = logging.LogRecord("blipq.x", logging.ERROR, "x.py", 1, message, arguments, info)
    line = JsonLines("front-1").format(record)
    assert "\n" not in line
    found: dict[str, str] = json.loads(line)
    return found


def test_a_line_names_the_job_and_the_trace_that_this_thread_is_at() -> None:
    others: list[dict[str, str]] = []
    with about("job_1", f"00-{TRACE}-b7ad6b7169203331-01"):
        found = logged("%s: failed", "it")
        thread = threading.Thread(target=lambda: others.append(logged("elsewhere")))
        thread.start()
        thread.join(10)
        with about("job_2"):
            inner = logged("another")
    assert found.pop("time").endswith("Z")
    assert found == {
        "level": "ERROR",
        "logger": "blipq.x",
        "message": "it: failed",
        "process": "front-1",
        "job_id": "job_1",
        "trace_id": TRACE,
    }
    assert (inner["job_id"], "trace_id" in inner) == ("job_2", False)
    assert "job_id" not in others[0]
    assert "job_id" not in logged("afterwards")


def test_a_line_has_its_traceback_and_no_secrets() -> None:
    try:
        raise RuntimeError("redis://:hunter2@127.0.0.1:1/0\nforged line")
    except RuntimeError as error:
        found = logged("at s3://x/\x1b[2Jkey of redis://:hunter2@h/0", error=error)
    assert found["traceback"].startswith("Traceback (most recent call last)")
    assert "hunter2" not in str(found)


@pytest.mark.parametrize("name", ["BLIPQ_LOG_FORMAT", "BLIPQ_LOG_LEVEL"])
def test_a_format_or_a_level_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "xml")
    # Else the root logger, which pytest has set up, would be left as it is.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with pytest.raises(InvalidRequest, match=f"{name}: 'xml'"):
        set_up_logging()
