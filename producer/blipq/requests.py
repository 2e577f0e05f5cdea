"""What a caller asks, made and checked: pure, so that every client shares it."""

import os
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from blipq.contract import ImageRef, Options, Request, Turn
from blipq.errors import InvalidRequest

ModelT = TypeVar("ModelT", bound=BaseModel)

#: An s3:// or https:// URI, a reference with version or etag, a local file, or the file's bytes.
ImageSource = str | Path | bytes | ImageRef


def new_id() -> str:
    """A job id: ``job_`` and a UUIDv7 (RFC 9562), so ids sort by the time they were made."""
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds << 80) | secrets.randbits(80)
    value = (value & ~(0xF << 76)) | (7 << 76)
    value = (value & ~(0x3 << 62)) | (2 << 62)
    text = f"{value:032x}"
    return "job_" + "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def checked(model: type[ModelT], /, **fields: Any) -> ModelT:
    """A request or options from keyword arguments; InvalidRequest names what is wrong."""
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise InvalidRequest(explain(error)) from None


def explain(error: ValidationError) -> str:
    """What is wrong, a field at a time, on one line."""
    wrong = []
    for item in error.errors(include_url=False, include_input=False):
        field = ".".join(str(part) for part in item["loc"]) or "request"
        wrong.append(f"{field}: {item['msg'].removeprefix('Value error, ')}")
    return "; ".join(wrong)


def uploadable(image: ImageSource | None, *, local_paths: bool) -> str | bytes | None:
    """What must be uploaded before a request can name it: a local file's path, or bytes.

    Raises InvalidRequest for a text that is a path, unless ``local_paths`` are allowed.
    """
    if image is None or isinstance(image, ImageRef) or (isinstance(image, str) and "://" in image):
        return None
    if isinstance(image, str) and not local_paths:
        raise InvalidRequest(f"image: {image!r} is no s3:// or https:// URI (BLIPQ_LOCAL_PATHS)")
    return os.fspath(image) if isinstance(image, Path) else image


def turns(history: Any) -> list[Turn] | None:
    """Earlier turns, which may be written as pairs."""
    return [_turn(turn) for turn in history] if history else None


def _turn(turn: Turn | tuple[str, str]) -> Turn:
    if isinstance(turn, Turn):
        return turn
    if len(turn) != 2:
        raise InvalidRequest("history: a turn is a question and its answer")
    question, answer = turn
    return checked(Turn, question=question, answer=answer)


@dataclass(frozen=True, slots=True)
class Submission:
    """A request with its options and its id: however often it is submitted, it is one job."""

    request: Request
    options: Options = field(default_factory=Options)
    id: str = field(default_factory=new_id)
