"""A caller's requests and options, made and checked: pure, so that every client shares it."""

import os
import secrets
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from blipq.contract import ImageRef, Options, Request, Turn, s3_form
from blipq.contract.wording import sentence
from blipq.errors import InvalidRequest

ModelT = TypeVar("ModelT", bound=BaseModel)

#: An error is for a person, and goes into logs and Redis: so many problems of a request are listed,
#: and so many characters of a name and of a message.
MOST_NAMED, LONGEST_NAME, LONGEST_MESSAGE = 10, 100, 500

#: Of more names than these, only the nearest is named.
MOST_ACCEPTED = 20

_MEMBER = "constrained-str"
#: pydantic's types of errors where a model was expected.
_NO_OBJECT = {"model_type", "model_attributes_type"}

#: An s3:// or https:// URI, a reference with version or etag, a local file, or the file's bytes.
ImageSource = str | Path | bytes | ImageRef


def new_id() -> str:
    """A job id with a UUIDv7, so ids sort by the time they were made."""
    milliseconds = time.time_ns() // 1_000_000
    return id_of((milliseconds << 80) | secrets.randbits(80), version=7)


def id_of(bits: int, *, version: int) -> str:
    """A job id: ``job_`` and the UUID (RFC 9562) of 128 bits, six of which its version replaces."""
    # uuid.UUID() takes versions above 5 from Python 3.14 on.
    bits = (bits & ~(0xF << 76)) | (version << 76)
    bits = (bits & ~(0x3 << 62)) | (0x2 << 62)
    return f"job_{uuid.UUID(int=bits)}"


def checked(model: type[ModelT], /, **fields: Any) -> ModelT:
    """A request or options from keyword arguments; InvalidRequest names what is wrong."""
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise InvalidRequest(explain(error, model, given)) from None


def check_names(given: Iterable[str], known: Sequence[str]) -> None:
    """Raises InvalidRequest for the first name that is not known."""
    for name in given:
        if name not in known:
            raise InvalidRequest(f"{shortened(name)}: {_unknown(name, known)}")


def explain(
    error: ValidationError, model: Any = None, given: Collection[str] = (), *, under: str = ""
) -> str:
    """What is wrong, a field at a time, on one line.

    ``model``: the type that was expected. A setting that is not among the ``given`` arguments came
    from its variable, and is named by it. ``under``: what stands before each field.
    """
    found = _own(error.errors(include_url=False, include_input=False))
    wrong = [f"{under}{_described(item, model, given)}" for item in found[:MOST_NAMED]]
    if len(found) > MOST_NAMED:
        wrong.append(f"and {len(found) - MOST_NAMED:,} more")
    return "; ".join(wrong)


def _own(found: list[Any]) -> list[Any]:
    """Without lists that are too short only because what they hold is wrong."""
    places = [item["loc"] for item in found]

    def follows(item: Any) -> bool:
        size = len(item["loc"])
        return any(len(place) > size and place[:size] == item["loc"] for place in places)

    return [item for item in found if item["type"] != "too_short" or not follows(item)]


def _described(item: Any, model: Any, given: Collection[str]) -> str:
    """One of pydantic's errors. Names of fields and tags are the caller's: of any length."""
    field = _place(item["loc"], model, given)
    if item["type"] == "extra_forbidden":
        return f"{field}: {_unknown(str(item['loc'][-1]), _fields(model, item['loc'][:-1]))}"
    told = shortened(sentence(item), LONGEST_MESSAGE)
    if item["type"] in _NO_OBJECT and (known := _fields(model, item["loc"])):
        told += f": {', '.join(known)}"
    return f"{field}: {told}"


def _place(loc: Sequence[int | str], model: Any, given: Collection[str]) -> str:
    """A field by its path, or a setting by its variable."""
    # Of a union without tags pydantic names the members, too: constrained-str, tuple[...].
    named = (str(part) for part in loc)
    parts = [shortened(part) for part in named if not part.endswith((_MEMBER, "]"))]
    prefix = getattr(model, "model_config", {}).get("env_prefix")
    if prefix and parts and parts[0] not in given:
        parts[0] = f"{prefix}{parts[0].removeprefix(prefix)}".upper()
    return ".".join(parts) or ("settings" if prefix else "request")


def shortened(text: str, most: int = LONGEST_NAME) -> str:
    """A text of a caller's, as an error may repeat it."""
    return text if len(text) <= most else f"{text[:most]}..."


def _unknown(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1) if len(name) <= LONGEST_NAME else ()
    hint = f"; did you mean {near[0]}?" if near else ""
    accepted = f" (accepted: {', '.join(known)})" if 0 < len(known) <= MOST_ACCEPTED else ""
    return f"unknown{hint}{accepted}"


def _fields(model: Any, place: Sequence[int | str]) -> list[str]:
    """The fields of a model's part at a place, as pydantic has it; empty where that is unclear."""
    found = list(_models(model))
    for step in place:
        if tagged := [each for each in found if _tag(each) == step]:
            found = tagged  # pydantic names a union's member by its tag
        elif isinstance(step, str):
            fields = [each.model_fields[step] for each in found if step in each.model_fields]
            found = [part for field in fields for part in _models(field.annotation)]
    return list(found[0].model_fields) if len(found) == 1 else []


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _tag(model: type[BaseModel]) -> Any:
    kind = model.model_fields.get("kind")
    return kind.default if kind else None


def uploadable(image: ImageSource | None, *, local_paths: bool) -> str | bytes | None:
    """What must be uploaded before a request can name it: a local file's path, or bytes.

    Raises InvalidRequest for a text that is a path, unless ``local_paths`` are allowed.
    """
    if image is None or isinstance(image, ImageRef) or (isinstance(image, str) and "://" in image):
        return None
    if isinstance(image, str):
        _check_path(image, local_paths=local_paths)
    elif not isinstance(image, Path | bytes):
        raise InvalidRequest(
            f"image: a text, a Path, bytes or an ImageRef, not {type(image).__name__}"
        )
    return os.fspath(image) if isinstance(image, Path) else image


def _check_path(image: str, *, local_paths: bool) -> None:
    if not image.strip():
        raise InvalidRequest("image: must not be empty")
    if image.lower().startswith("data:"):
        raise InvalidRequest("image: a data: URL is not read: decode it, and give its bytes")
    if (form := s3_form(image)) is not None:
        raise InvalidRequest(f"image: {shortened(image)!r} is an ARN: write {shortened(form)}")
    if not local_paths:
        shown = shortened(image)
        raise InvalidRequest(f"image: {shown!r} is no s3:// or https:// URI (BLIPQ_LOCAL_PATHS)")


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
    """A request with its options and its id: however often it is submitted, it is one job.

    tenant: whose job it is, which is written into its record. Idempotency keys are the tenant's.
    rights: what the job may name (see ``Rights.text``), for its worker to check; None is anything.
    traceparent: where the job belongs in a trace (W3C); without it, below the caller's own span.
    """

    request: Request
    options: Options = field(default_factory=Options)
    id: str = field(default_factory=new_id)
    tenant: str | None = None
    rights: str | None = None
    traceparent: str | None = None
