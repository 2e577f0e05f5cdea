"""Signing in and out: a key is exchanged for a cookie."""

import re

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from blipq_api.access.sessions import COOKIE
from blipq_api.console.access import read_fields, read_form, to
from blipq_api.console.pages import rendered, session_of
from blipq_api.door import door_of

#: A page of the console, with its query: no host, no other folder.
_PAGE = re.compile(r"[a-z]{0,20}(\?[^\s\\]{0,500})?", re.ASCII)
_START = "."


async def home(request: Request) -> Response:
    """Leads to the console from the addresses before it."""
    at_root = request.scope["path"].endswith("/")
    return RedirectResponse("console/" if at_root else "./console/", 307)


async def login(request: Request) -> Response:
    """The page to sign in on. A door without keys has none."""
    if session_of(request) is not None:
        return to(_next(request.query_params.get("next", "")))
    return rendered(
        request, "login.html", next=_next(request.query_params.get("next", "")), wrong=False
    )


async def sign_in(request: Request) -> Response:
    """Exchanges a key for a cookie that no script can read, and no other site can send.

    The cookie has no path of its own: browsers take the console's, wherever that lies. Raises
    Problem for a wrong key after too many others, and for a right one that has signed in too often.
    """
    fields = await read_fields(request)
    next = _next(fields.get("next", ""))
    door = door_of(request)
    if door.sessions is None or door.keyring is None:
        return to(next)
    key = fields.get("key", "").strip()
    if (caller := door.keyring.find(key)) is None:
        # A right key is taken whatever else its address sent: a proxy's may be that of all.
        address = request.client.host if request.client is not None else ""
        door.sign_ins.check(address)
        door.sign_ins.wrong(address)
        return rendered(request, "login.html", status=401, next=next, wrong=True)
    door.sign_ins.right(caller.name)
    token, seconds = await door.sessions.begin(key)
    answer = to(next)
    secure = request.url.scheme == "https"
    answer.set_cookie(
        COOKIE, token, seconds, path=None, secure=secure, httponly=True, samesite="strict"
    )
    return answer


async def sign_out(request: Request) -> Response:
    """Ends the session, here and in Redis."""
    await read_form(request)
    if (sessions := door_of(request).sessions) is not None:
        await sessions.end(request.headers.get("cookie", ""))
    answer = to("login")
    secure = request.url.scheme == "https"
    answer.set_cookie(COOKIE, "", 0, path=None, secure=secure, httponly=True, samesite="strict")
    return answer


def _next(text: str) -> str:
    return text if text and _PAGE.fullmatch(text) else _START
