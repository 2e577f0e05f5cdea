"""Who may open which page, and what the forms on them send."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from blipq.ledger.acting import acting
from blipq_api.access.keys import Scope
from blipq_api.console.errors import SignIn
from blipq_api.console.pages import session_of
from blipq_api.door import media_type, read_body
from blipq_api.problems import Problem

MOST_FORM_BYTES = 64 * 1024
MOST_FIELDS = 40
FORM = "application/x-www-form-urlencoded"
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Page:
    """One method on one path. Without a scope everybody may."""

    method: str
    path: str
    handler: Handler
    scope: Scope | None

    async def answer(self, request: Request) -> Response:
        """Raises Problem for who may not."""
        if self.method != "GET":
            check_origin(request)
        if self.scope is not None:
            session = session_of(request)
            if session is None:
                raise SignIn
            session.caller.require(self.scope)
            with acting(session.caller.name, "api"):
                return await self.handler(request)
        return await self.handler(request)


def check_origin(request: Request) -> None:
    """Raises Problem for a form on a page of another site. Programs say nothing of this."""
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    if site is not None:
        own = site in ("same-origin", "none")
    else:
        own = origin is None or urlsplit(origin).netloc == request.headers.get("host")
    if not own:
        raise Problem(403, "cross_origin", "a page of another site sent this form")


async def read_form(request: Request) -> dict[str, str]:
    """The fields of a form of this session. Raises Problem."""
    fields = await read_fields(request)
    check_token(request, fields.pop("form_token", ""))
    return fields


async def read_fields(request: Request) -> dict[str, str]:
    """The fields of a form: the last of each name. Raises Problem."""
    if media_type(request) != FORM:
        raise Problem(415, "unsupported_media_type", "a form is expected")
    body = await read_body(request, MOST_FORM_BYTES)
    try:
        pairs = parse_qsl(
            body.decode(), keep_blank_values=True, max_num_fields=MOST_FIELDS, errors="strict"
        )
    except ValueError:
        raise Problem(400, "invalid_form", "the form cannot be read") from None
    return dict(pairs)


def check_token(request: Request, token: str) -> None:
    """Raises Problem for a form that no page of this session sent."""
    session = session_of(request)
    if session is None:
        raise SignIn
    if not session.sent(token):
        text = "this form belongs to another session: you have signed in again since it was loaded"
        raise Problem(403, "stale_form", text)


async def call(
    request: Request, handler: Handler, scope: Scope, *, id: str | None = None, **query: str
) -> Any:
    """What one of the door's operations answers to the reader, as JSON. Raises what it raises.

    So a page shows to each key what that key could ask for, and acts as it could.
    """
    return await parsed(about(request, id, **query), handler, scope)


async def parsed(request: Request, handler: Handler, scope: Scope) -> Any:
    session = session_of(request)
    assert session is not None
    session.caller.require(scope)
    body = bytes((await handler(request)).body)
    return from_json(body) if body else None


def about(request: Request, id: str | None = None, **query: str) -> Request:
    """The same request with this id in its path, and this query."""
    given = {name: value for name, value in query.items() if value}
    scope = {
        **request.scope,
        "path_params": {} if id is None else {"id": id},
        "query_string": urlencode(given).encode(),
    }
    return Request(scope, request.receive)


def id_of(request: Request) -> str:
    """The id in the query. Raises Problem."""
    id = request.query_params.get("id", "")
    if not id:
        raise Problem(422, "invalid_request", "id: the address of this page lacks it")
    return id


def to(page: str, **query: str) -> Response:
    """Leads the browser to another page, which it then loads with GET."""
    given = {name: value for name, value in query.items() if value}
    return RedirectResponse(f"{page}?{urlencode(given)}" if given else page, 303)
