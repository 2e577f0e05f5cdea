"""What stands around a job in a Celery message: judged before Celery parses it.

Anybody who can push to the broker can send anything. Celery takes much of that for a bug of its own
and exits, or keeps the message for ever, so that it ends one worker after another. A message that
is not one is refused instead: on the record of its job where it names one.
"""

import base64
import codecs
import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from kombu.serialization import loads
from kombu.utils.json import dumps
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from blipq.contract import Kind
from blipq.ledger.keys import task_name
from blipq.submission import explain

KINDS = {task_name(kind): kind for kind in Kind}
PARAMETERS = ("id", "request", "options")
#: What Celery would look at after a task. Any error there leaves the message in hand for ever.
AFTERWARDS = {"group", "stamped_headers", "stamps"}
MAX_ID = 255
MAX_DEPTH = 32
_OWN_HEADERS = {"lang", "task", "id", "contract"}
#: The header with the fault of a malformed message, once ``sound`` has made it well-formed.
WHY = "blipq-refused"


@dataclass(eq=False)
class Malformed(Exception):
    """A message that no Celery client sends. ``id`` is its job's, if it has one."""

    why: str
    id: str | None = None
    kind: Kind | None = None

    def __str__(self) -> str:
        return self.why


class _Headers(BaseModel):
    """The headers of Celery's protocol 2 that a worker looks at; it is shown no others."""

    model_config = ConfigDict(strict=True)

    task: str
    id: str = Field(min_length=1, max_length=MAX_ID)
    lang: str | None = None
    shadow: str | None = None
    root_id: str | None = None
    parent_id: str | None = None
    group: str | None = None
    argsrepr: str | None = None
    kwargsrepr: str | None = None
    origin: str | None = None
    eta: str | None = None
    expires: str | None = None
    retries: int | None = None
    ignore_result: bool | None = None
    timelimit: list[float | None] | None = Field(default=None, min_length=2, max_length=2)
    stamped_headers: list[str] | None = None
    stamps: dict[str, str | list[str] | None] | None = None
    redelivered: bool | None = None

    @model_validator(mode="after")
    def _judge(self) -> "_Headers":
        if self.task not in KINDS:
            raise ValueError(f"no task {self.task[:100]!r}")
        if not self.id.isprintable():
            raise ValueError("id: must be printable")
        self.eta, self.expires = _time(self.eta), _time(self.expires)
        if set(self.stamped_headers or ()) - set(self.stamps or ()):
            raise ValueError("stamps: lacks one of stamped_headers")
        return self


def _time(text: str | None) -> str | None:
    """A time as Celery writes it."""
    return None if text is None else datetime.fromisoformat(text).isoformat()


class _Embed(BaseModel):
    """What Celery would do after a task, if its sender wants that: judged, and never done."""

    model_config = ConfigDict(strict=True)

    callbacks: list[dict[str, Any]] | None = None
    errbacks: list[dict[str, Any]] | None = None
    chain: list[dict[str, Any]] | None = None
    chord: dict[str, Any] | None = None


class _Body(BaseModel):
    model_config = ConfigDict(strict=True)

    positional: list[Any] = Field(max_length=len(PARAMETERS))
    named: dict[str, Any]
    embed: _Embed

    @property
    def job(self) -> Any:
        """The id of the job."""
        return self.argument(0)

    def argument(self, place: int) -> Any:
        """An argument, named or not; None where there is none."""
        if place < len(self.positional):
            return self.positional[place]
        return self.named.get(PARAMETERS[place])

    @model_validator(mode="after")
    def _judge(self) -> "_Body":
        free = set(PARAMETERS[len(self.positional) :])
        if not set(self.named) <= free:
            raise ValueError(f"arguments must be {', '.join(PARAMETERS)}, each once")
        if not is_id(self.job):
            raise ValueError(f"the job's id must be a printable text of 1 to {MAX_ID} characters")
        return self


@dataclass(frozen=True, slots=True)
class WholeJob:
    """A job that a message of another client brings whole. delay_s: until it may begin."""

    kind: Kind
    id: str
    request: Any
    options: Any
    delay_s: float


class Received(NamedTuple):
    """The job that a message is about, and the job itself where the message brings it whole."""

    id: str
    kind: Kind
    whole: WholeJob | None = None


def rewrite(message: Any) -> Received:
    """Leaves in a message only the job and what Celery needs to run it, in its protocol 2.

    The job that it is about; it is not whole where it has expired. Raises Malformed.
    """
    if _is_own(message):
        del message.headers["contract"]
        return Received(message.headers["id"], KINDS[message.headers["task"]])
    headers, body = _taken_apart(message)
    has_expired = _seconds_to(headers.expires, never=1.0) <= 0
    if not has_expired:
        headers.expires = None  # judged once: a job on record must not lose its message later
    message.headers = headers.model_dump(exclude_none=True, exclude=AFTERWARDS)
    # A text, as it would be kept in a list of Redis if the message goes back.
    message.body = dumps([body.positional, body.named, {}])
    message.content_type, message.content_encoding = "application/json", "utf-8"
    kind, request, options = KINDS[headers.task], body.argument(1), body.argument(2)
    if request is None or has_expired:
        return Received(body.job, kind)
    delay_s = max(0.0, _seconds_to(headers.eta, never=0.0))
    return Received(body.job, kind, WholeJob(kind, body.job, request, options, delay_s))


def _is_own(message: Any) -> bool:
    """Whether it is to the letter what this project publishes: nothing is left to judge."""
    headers = message.headers
    if not isinstance(headers, dict) or headers.keys() != _OWN_HEADERS:
        return False
    lang, task, id = headers["lang"], headers["task"], headers["id"]
    if not (lang == "py" and isinstance(task, str) and task in KINDS and is_id(id)):
        return False
    kind = message.content_type, message.content_encoding
    body = message.body if isinstance(message.body, bytes) else str(message.body).encode()
    return kind == ("application/json", "utf-8") and body == json.dumps([[id], {}, {}]).encode()


def _seconds_to(time: str | None, *, never: float) -> float:
    """Seconds until a time as Celery writes it, in UTC unless it has another zone."""
    if time is None:
        return never
    at = datetime.fromisoformat(time)
    at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    return (at - datetime.now(UTC)).total_seconds()


def _taken_apart(message: Any) -> tuple[_Headers, _Body]:
    headers: Any = message.headers
    payload: Any = None
    try:
        if WHY in headers:
            raise ValueError(str(headers[WHY]))
        payload = loads(
            message.body,
            message.content_type,
            message.content_encoding,
            accept={"application/json"},
        )
        codecs.lookup(message.content_encoding or "utf-8")
        check_depth([headers, payload])
        if "task" not in headers and isinstance(payload, dict):  # Celery's protocol 1
            headers, payload = payload, [payload.get("args", []), payload.get("kwargs", {}), {}]
        if not isinstance(payload, list) or len(payload) != 3:
            raise ValueError("the body must be [arguments, named arguments, options of Celery]")
        names = ("positional", "named", "embed")
        body = _Body.model_validate(dict(zip(names, payload, strict=True)))
        return _Headers.model_validate(headers), body
    except Exception as error:  # whatever it is, it is the message's fault
        payload = _parsed(message.body) if payload is None else payload
        raise malformed(error, headers, payload) from error


def malformed(error: BaseException, headers: Any, payload: Any = None) -> Malformed:
    """What is wrong with a message, and whose it is, as far as that can be read."""
    why = explain(error) if isinstance(error, ValidationError) else str(error) or repr(error)
    named = headers if isinstance(headers, dict) else {}
    task = named.get("task")
    kind = KINDS.get(task) if isinstance(task, str) else None
    id = next((id for id in _ids(named, payload) if is_id(id)), None)
    return Malformed(f"malformed message: {encodable(why[:500])}", id, kind)


def encodable(text: str) -> str:
    """The text with each half of a character escaped: JSON can bring one, UTF-8 has none."""
    return text.encode("utf-8", "backslashreplace").decode()


def _ids(headers: dict[str, Any], payload: Any) -> Iterable[Any]:
    """Where the id of the job may stand, the likeliest first."""
    if isinstance(payload, list):
        for part in payload[:2]:
            if isinstance(part, list):
                yield from part[:1]
            if isinstance(part, dict):
                yield part.get("id")
    elif isinstance(payload, dict):
        yield payload.get("id")
    yield headers.get("id")


def is_id(id: Any) -> bool:
    """Whether it can be the id of a job."""
    return isinstance(id, str) and 1 <= len(id) <= MAX_ID and id.isprintable()


# --- before kombu has made a message of it --------------------------------------------------------


def sound(raw: Any, queue: str) -> dict[str, Any]:
    """A message as kombu's transports without AMQP keep it: as it came if it is sound, and else one
    with the fault in a header, for ``rewrite`` to refuse. Raises Malformed if nothing can be kept.
    """
    if not isinstance(raw, dict):
        raise Malformed("malformed message: it is no JSON object")
    try:
        _check_raw(raw)
        # The queue it came from is certain, its own header is not: a hand-back goes to that queue.
        raw["properties"]["delivery_info"].update(exchange="", routing_key=queue)
        return raw
    except Exception as error:
        return _substitute(
            raw, queue, malformed(error, raw.get("headers"), _parsed(raw.get("body")))
        )


def _check_raw(raw: dict[str, Any]) -> None:
    properties, headers, body = raw.get("properties"), raw.get("headers"), raw.get("body")
    check_depth(raw)
    if not isinstance(properties, dict):
        raise ValueError("properties: must be an object")
    if not is_id(properties.get("delivery_tag")):
        raise ValueError("delivery_tag: must be a printable text")
    if not isinstance(properties.get("delivery_info"), dict):
        raise ValueError("delivery_info: must be an object")
    if not isinstance(headers, dict):
        raise ValueError("headers: must be an object")
    if not isinstance(body, str):
        raise ValueError("body: must be a text")
    for name in ("content-type", "content-encoding"):
        if not isinstance(raw.get(name), str | None):
            raise ValueError(f"{name}: must be a text")
    _check_encoding(body, properties.get("body_encoding"))


def _check_encoding(body: str, encoding: Any) -> None:
    if encoding == "base64":
        base64.b64decode(body, validate=True)
    elif encoding not in (None, "", "utf-8"):
        raise ValueError(f"body_encoding: {str(encoding)[:50]!r} is not known")


def _parsed(body: Any) -> Any:
    """A body as plain JSON, or None: for the id in a message that is refused anyway."""
    try:
        return json.loads(body)
    except Exception:
        return None


def _substitute(raw: dict[str, Any], queue: str, found: Malformed) -> dict[str, Any]:
    properties = raw.get("properties")
    tag = properties.get("delivery_tag") if isinstance(properties, dict) else None
    info = {"exchange": "", "routing_key": queue}
    headers = {WHY: found.why.removeprefix("malformed message: "), "id": found.id}
    if found.kind is not None:
        headers["task"] = task_name(found.kind)
    return {
        "body": "",
        "headers": headers,
        "properties": {
            "delivery_tag": tag if is_id(tag) else str(uuid.uuid4()),
            "delivery_info": info,
        },
    }


def check_depth(value: Any) -> None:
    """Raises ValueError for what is nested too deep: it parses, and cannot be written again."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += each.values()
            elif isinstance(each, list | tuple):
                inner += each
        if not inner:
            return
        level = inner
    raise ValueError("it is nested too deep")
