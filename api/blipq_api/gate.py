"""Before every request: its id, who sends it, whether it may; behind it, a line in the log."""

import ipaddress
import json
import logging
import re
import secrets
import time
from collections import Counter
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blipq.errors import BlipqError
from blipq_api.access.keys import LOCAL, Caller
from blipq_api.access.rates import BURST_S, Bucket
from blipq_api.console.errors import answer, is_page, path_in
from blipq_api.door import Door
from blipq_api.problems import Problem
from blipq_api.turns import KEY_SHARE, holder

access = logging.getLogger("blipq_api.access")

#: What needs no key.
OPEN_PATHS = ("/health", "/openapi.json", "/docs")
_HOST = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[\w.-]+))(?::\d{1,5})?", re.ASCII)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; frame-ancestors 'none'",
}
CORS_METHODS = "GET, POST, PUT, DELETE"
CORS_HEADERS = (
    "Authorization, Content-Type, Idempotency-Key, Last-Event-ID, Prefer, Traceparent, X-Request-ID"
)
CORS_EXPOSED = "Location, RateLimit-Limit, RateLimit-Remaining, Retry-After, X-Request-ID"


class Gate:
    """ASGI middleware. ``scope["state"]`` gets ``request_id`` and ``caller``."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door
        self._settings = door.settings
        self._buckets: dict[str, Bucket] = {}
        self._under_way = 0
        self._of_keys: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        passage = _Passage(given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8), send)
        state = scope.setdefault("state", {})
        state["request_id"] = passage.id
        self._under_way += 1
        try:
            if (origin := self._allowed_origin(headers)) is not None:
                passage.allow(origin)
            self._check_room()
            if _is_preflight(scope, headers):
                await _preflight(origin is not None)(scope, receive, passage.send)
                return
            await self._admit(scope, headers, passage)
            await self._app(scope, receive, passage.send)
        except (Problem, BlipqError) as error:
            await answer(Request(scope), error)(scope, receive, passage.send)
        finally:
            self._under_way -= 1
            self._leave(passage)
            passage.log(scope)

    def _check_room(self) -> None:
        if self._under_way > self._settings.api_concurrency:
            raise Problem(503, "busy", "the door answers too many requests", retry_after_s=1)

    async def _admit(self, scope: Scope, headers: Headers, passage: "_Passage") -> None:
        """Finds who sends a request. Raises Problem for one that goes no further."""
        path = path_in(scope)
        if self._door.keyring is None:
            self._check_is_local(headers, scope)
            scope["state"]["session"] = self._door.local
            scope["state"]["caller"] = passage.caller = LOCAL
        elif is_page(path):
            await self._admit_to_console(scope, headers, passage)
        elif not path.startswith(OPEN_PATHS):
            caller = self._caller(headers, _address(scope))
            scope["state"]["caller"] = passage.caller = caller
            self._count(caller, passage)

    async def _admit_to_console(self, scope: Scope, headers: Headers, passage: "_Passage") -> None:
        """A page is for who has a session; without one it shows where to sign in."""
        assert self._door.sessions is not None
        session = await self._door.sessions.find(headers.get("cookie", ""))
        if session is not None:
            scope["state"]["session"] = session
            scope["state"]["caller"] = passage.caller = session.caller
            self._count(session.caller, passage)
        else:
            self._enter("", "those who have not signed in have", passage)

    # -- with keys --

    def _caller(self, headers: Headers, address: str) -> Caller:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        secret = given.strip() if scheme.lower() == "bearer" else ""
        assert self._door.keyring is not None
        known = self._door.keyring.find(secret) if secret else None
        if known is not None:
            return known
        # A right key is taken whatever else its address sends: services may share a proxy's.
        if secret and (pause := self._door.wrong_keys.wrong(address)):
            text = "too many wrong keys came from here"
            close = {"Connection": "close"}
            raise Problem(429, "too_many_wrong_keys", text, retry_after_s=pause, headers=close)
        text = "no key, or none of this door's: send the header Authorization with Bearer and a key"
        raise Problem(401, "unauthorized", text, headers={"WWW-Authenticate": "Bearer"})

    def _count(self, caller: Caller, passage: "_Passage") -> None:
        """Raises Problem where the key has used up its rate."""
        rate = (caller.key and caller.key.rate) or self._settings.api_rate
        most = rate * BURST_S
        bucket = self._buckets.setdefault(caller.name, Bucket(most))
        bucket.most = most  # the file of keys may have changed
        pause = bucket.take(rate)
        passage.headers["RateLimit-Limit"] = f"{rate * BURST_S:.0f}"
        passage.headers["RateLimit-Remaining"] = f"{int(bucket.left)}"
        if pause:
            text = f"the key {caller.name!r} may send {rate:g} requests a second"
            raise Problem(429, "rate_limited", text, retry_after_s=pause)
        self._enter(caller.name, f"the key {caller.name!r} has", passage)

    def _enter(self, name: str, who: str, passage: "_Passage") -> None:
        """Raises Problem where a key has its share of the door: streams, waits, slow bodies.

        All who have no key share one, of the name "".
        """
        most = max(1, int(KEY_SHARE * self._settings.api_concurrency))
        if self._of_keys[name] >= most:
            text = (
                f"{who} {most:,} requests under way, streams and waits among them: no more at once"
            )
            raise Problem(429, "too_many_requests", text, retry_after_s=1)
        self._of_keys[name] += 1
        passage.counted = name
        if name:
            holder.set(name)  # of this request's task

    def _leave(self, passage: "_Passage") -> None:
        if (name := passage.counted) is not None:
            self._of_keys[name] -= 1
            if not self._of_keys[name]:
                del self._of_keys[name]

    # -- without keys --

    def _check_is_local(self, headers: Headers, scope: Scope) -> None:
        """Other sites' pages reach this machine too: by a name of theirs, or from their origin."""
        host = headers.get("host", "")
        if not (_is_loopback(host) or _name(host) in self._settings.api_hosts):
            text = "this door has no keys: it answers as localhost alone (BLIPQ_API_HOSTS)"
            raise Problem(421, "wrong_host", text)
        origin = headers.get("origin")
        own = origin is None or origin.partition("://")[2] == host
        if not own and origin not in self._settings.api_origins:
            raise _from_elsewhere()
        site = headers.get("sec-fetch-site", "none")
        opened = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if origin is None and site not in ("none", "same-origin") and not opened:
            raise _from_elsewhere()

    def _allowed_origin(self, headers: Headers) -> str | None:
        origin = headers.get("origin")
        return origin if origin in self._settings.api_origins else None


def _from_elsewhere() -> Problem:
    text = "a page of another site sent this: BLIPQ_API_ORIGINS lists none such"
    return Problem(403, "cross_origin", text)


def _is_preflight(scope: Scope, headers: Headers) -> bool:
    return scope["method"] == "OPTIONS" and "access-control-request-method" in headers


def _preflight(allowed: bool) -> Response:
    """The answer to a browser's preflight request, which has no key yet."""
    if not allowed:
        return Response(status_code=403)
    headers = {
        "Access-Control-Max-Age": "600",
        "Access-Control-Allow-Methods": CORS_METHODS,
        "Access-Control-Allow-Headers": CORS_HEADERS,
    }
    return Response(status_code=204, headers=headers)


def _address(scope: Scope) -> str:
    """Where a request comes from, or "" from a socket file."""
    return str((scope.get("client") or ("",))[0])


def _name(host: str) -> str:
    """A Host header without its port."""
    match = _HOST.fullmatch(host)
    return (match["address"] or match["name"]).lower() if match else ""


def _is_loopback(host: str) -> bool:
    name = _name(host)
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class _Passage:
    """One request on its way: headers that its answer gets, and what the log has about it."""

    def __init__(self, id: str, send: Send) -> None:
        self.id = id
        self.headers = MutableHeaders({**SECURITY_HEADERS, "X-Request-ID": id})
        self.caller: Caller | None = None
        #: The key whose share of the door this request takes.
        self.counted: str | None = None
        self._send = send
        self._started = time.monotonic()
        self._status = 0
        self._bytes = 0

    def allow(self, origin: str) -> None:
        self.headers["Access-Control-Allow-Origin"] = origin
        self.headers["Access-Control-Expose-Headers"] = CORS_EXPOSED
        self.headers["Vary"] = "Origin"

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            answer = MutableHeaders(scope=message)
            for name, value in self.headers.items():
                if name not in answer:
                    answer[name] = value
        elif message["type"] == "http.response.body":
            self._bytes += len(message.get("body", b""))
        await self._send(message)

    def log(self, scope: Scope) -> None:
        """A line of JSON. No query, no header and no body: they may hold what is secret."""
        line: dict[str, Any] = {
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": self.id,
            "method": scope["method"],
            "path": scope["path"][:512],
            "status": self._status or 499,
            "ms": round(1000 * (time.monotonic() - self._started), 1),
            "bytes": self._bytes,
            "client": _address(scope),
        }
        if self.caller is not None:
            line |= {"key": self.caller.name, "tenant": self.caller.tenant}
        access.info(json.dumps(line))
