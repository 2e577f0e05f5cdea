"""What the ledger returns of jobs that are to be erased. Pure, for every client."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from blipq.contract import Kind, Status, heat_map_place

#: Jobs that one script erases, and open ones that one goes through.
CHUNK, PAGE = 50, 500


@dataclass(frozen=True, slots=True)
class Erased:
    """A job as it was: what it named that lies elsewhere, and how many events it had.

    ``entry``: name and id of the image that it put into a search index. ``is_part``: its image is a
    part of an object, which may hold others. heat_map: what lies beside its output.
    """

    id: str
    status: Status
    image: str | None
    output: str | None
    result_uri: str | None
    entry: tuple[str, str] | None
    events: int
    tenant: str | None = None
    is_part: bool = False
    heat_map: str | None = None


def erased(answer: Iterable[Sequence[Any]]) -> list[Erased]:
    """The forget script's reply."""
    return [_erased(*each) for each in answer]


def _erased(
    id: str, status: str, request: str, output: str, result_uri: str, events: int, tenant: str
) -> Erased:
    fields = json.loads(request) if request else {}
    image = fields.get("image") or {}
    index = fields.get("index")
    uri: str | None = image.get("uri")
    entry = None
    if isinstance(index, dict):  # a search names its index by a text
        entry = (str(index["name"]), str(index.get("id") or uri))
    return Erased(
        id,
        Status(status),
        uri,
        output or None,
        result_uri or None,
        entry,
        events,
        tenant or None,
        image.get("offset") is not None,
        _heat_map(fields, output),
    )


def _heat_map(request: dict[str, Any], output: str) -> str | None:
    is_drawn = output and request.get("kind") == Kind.MATCH and request.get("explain")
    return heat_map_place(output) if is_drawn else None


def named_arguments(cursor: str, uris: Iterable[str]) -> Iterator[str | int]:
    """The named script's arguments."""
    yield cursor
    yield PAGE
    yield from map(json.dumps, uris)


def named(answer: Sequence[Any]) -> tuple[str, set[str]]:
    """The named script's reply: the next cursor, and the URIs that are named."""
    cursor, *uris = answer
    return str(cursor), set(map(json.loads, uris))
