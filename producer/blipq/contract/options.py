"""What every job can be given beside its request."""

import re
from collections.abc import Mapping
from datetime import timedelta
from enum import StrEnum
from typing import Annotated, Any, Literal, TypedDict

from pydantic import AfterValidator, BeforeValidator, Field

from blipq.contract.base import Input, Metadata, Name
from blipq.contract.images import S3Uri
from blipq.ssrf import policy as guard


class Priority(StrEnum):
    """Served round robin, so high never waits behind low and low never starves."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>ms|s|m|h|d|)")
_UNIT_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _duration(value: Any) -> Any:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, str):
        match = _DURATION.fullmatch(value.strip())
        if match is None:
            raise ValueError(f"{value!r} is not a duration such as 90, '90s', '10m', '2h' or '7d'")
        return float(match["number"]) * _UNIT_SECONDS[match["unit"]]
    return value


#: Seconds; also written "500ms", "90s", "10m", "2h" or "7d".
Seconds = Annotated[float, BeforeValidator(_duration)]

#: The longest a job may stay open: its record must outlive it in Redis.
LONGEST_DEADLINE_S = 30 * 86400

JobEvent = Literal["job.running", "job.succeeded", "job.failed", "job.cancelled", "job.expired"]
_TERMINAL_EVENTS: tuple[JobEvent, ...] = (
    "job.succeeded",
    "job.failed",
    "job.cancelled",
    "job.expired",
)


def _checked_webhook_url(url: str) -> str:
    guard.parse(url)
    return url


class Webhook(Input):
    """Where to post the job's events; by default the one that ends it."""

    url: Annotated[str, Field(max_length=2048), AfterValidator(_checked_webhook_url)]
    events: tuple[JobEvent, ...] = Field(default=_TERMINAL_EVENTS, min_length=1)


class OptionFields(TypedDict, total=False):
    """What ``Options`` takes, as keyword arguments: see there."""

    model: str
    priority: Priority | Literal["high", "normal", "low"]
    expires_in: float | str | timedelta | None
    idempotency_key: str | None
    webhook: Webhook | Mapping[str, Any] | None
    output: str | None
    keep: float | str | timedelta | None
    metadata: Mapping[str, str] | None


class Options(Input):
    """What every job can be given beside its request.

    model: the served model that runs it. expires_in: after this nobody wants the answer.
    idempotency_key: the same key with the same request gives the same job.
    output: an s3:// object that the result is written to before the job ends.
    keep: how long the job is kept once it has ended, where that is shorter than the deployment's
    own times. Until then its id and idempotency key mean this job.
    metadata: at most 16 pairs that come back with the job.
    """

    model: Name = "default"
    priority: Priority = Priority.NORMAL
    expires_in: Annotated[Seconds, Field(gt=0, le=LONGEST_DEADLINE_S)] | None = None
    idempotency_key: str | None = Field(default=None, min_length=1, max_length=255)
    webhook: Webhook | None = None
    output: S3Uri | None = None
    keep: Annotated[Seconds, Field(gt=0, le=LONGEST_DEADLINE_S)] | None = None
    metadata: Metadata = Field(default_factory=dict)


def heat_map_place(output: str) -> str:
    """Where heat maps are drawn of a job with this ``output``: 1.json.heat.png beside 1.json."""
    return f"{output}.heat.png"
