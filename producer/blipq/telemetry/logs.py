"""The log of a process of blipq's: lines for people, or a JSON object a line that names its job."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

from blipq.errors import InvalidRequest
from blipq.redaction import Redacting, log_to_stderr, redacted
from blipq.telemetry.trace import trace_id

_LINE = "%(asctime)s{process} %(levelname)s %(name)s: %(message)s"

#: The job that this thread, or this task, is at, and its place in a trace.
_job: ContextVar[tuple[str, str] | None] = ContextVar("blipq_job", default=None)


@contextmanager
def about(id: str, context: str = "") -> Iterator[None]:
    """What is logged meanwhile, on this thread or in this task, is about a job.

    context: a ``traceparent``, or "".
    """
    before = _job.set((id, context))
    try:
        yield
    finally:
        _job.reset(before)


class JsonLines(logging.Formatter):
    """A JSON object a line, without secrets. process: which of a worker's it is, or ""."""

    def __init__(self, process: str = "") -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """A record, with its job and its trace where it is about one."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": redacted(record.getMessage()),
        }
        if self._process:
            fields["process"] = self._process
        if (job := _job.get()) is not None:
            id, context = job
            fields |= {"job_id": id} | ({"trace_id": trace_id(context)} if context else {})
        if record.exc_info:
            fields["traceback"] = redacted(self.formatException(record.exc_info))
        return json.dumps(fields)


def set_up_logging(
    process: str = "", *, level: str | None = None, line: str = _LINE.format(process="")
) -> None:
    """The log of this process goes to stderr, as BLIPQ_LOG_LEVEL and BLIPQ_LOG_FORMAT say.

    process: named in each record. line: the format for people. Raises InvalidRequest.
    """
    level = level or os.environ.get("BLIPQ_LOG_LEVEL", "INFO")
    form = os.environ.get("BLIPQ_LOG_FORMAT", "text")
    if form not in ("text", "json"):
        raise InvalidRequest(f"BLIPQ_LOG_FORMAT: {form!r} is neither text nor json")
    if process:
        line = _LINE.format(process=f" {process}")
    try:
        log_to_stderr(level, JsonLines(process) if form == "json" else Redacting(line))
    except ValueError:
        raise InvalidRequest(f"BLIPQ_LOG_LEVEL: {level!r} is no level of logging") from None
