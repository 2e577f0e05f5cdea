"""How a page is made: the templates, what all of them know, and the headers they are sent with."""

import functools
import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from jinja2 import Environment
from starlette.requests import Request
from starlette.responses import Response

import blipq
from blipq.pages import environment
from blipq.printable import printable
from blipq_api.access.sessions import Session

#: Nothing runs but the files of ``static/``, and nothing is loaded from or sent to elsewhere. The
#: referrer stays within the console: without one, browsers send forms with the origin "null".
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
_TYPES = {"svg": "image/svg+xml", "css": "text/css", "js": "text/javascript"}
_YEAR_S = 365 * 86400


def session_of(request: Request) -> Session | None:
    """Who is signed in, if anybody is."""
    return getattr(request.state, "session", None)


def rendered(
    request: Request,
    template: str,
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    **values: Any,
) -> Response:
    """A page."""
    session = session_of(request)
    text = (
        _environment()
        .get_template(template)
        .render(
            session=session,
            scopes=session.caller.scopes if session else (),
            signs_in=session is not None and session.caller.key is not None,
            now=datetime.now(UTC),
            version=blipq.__version__,
            **values,
        )
    )
    return Response(text, status, {**HEADERS, **(headers or {})}, "text/html")


@functools.cache
def _environment() -> Environment:
    made = environment(__package__)
    made.filters.update(
        clock=clock,
        count=count,
        digest=digest,
        percent=percent,
        plain=printable,
        seconds=seconds,
        since=since,
    )
    made.globals["static"] = {name: f"static/{name}?v={stamp}" for name, stamp in _stamps().items()}
    return made


# -- files --


@functools.cache
def files() -> dict[str, bytes]:
    """The files that pages use, by name: the console's own, and those of other projects."""
    folders = [resources.files(__package__) / name for name in ("static", "vendored")]
    found = {
        each.name: each.read_bytes()
        for folder in folders
        for each in folder.iterdir()
        if _ending(each.name) in _TYPES
    }
    made = environment(__package__, "static")
    found["console.css"] = made.get_template("console.css").render().encode()
    return found


@functools.cache
def _stamps() -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest()[:12] for name, data in files().items()}


def file_response(name: str) -> Response | None:
    """One of the files, which browsers keep: its address changes with its content."""
    if (data := files().get(name)) is None:
        return None
    headers = {"Cache-Control": f"public, max-age={_YEAR_S}, immutable"}
    return Response(data, 200, headers, _TYPES[_ending(name)])


def _ending(name: str) -> str:
    return name.rpartition(".")[2]


# -- numbers and times, as people read them --


def clock(at: datetime) -> str:
    """A time in UTC, as in ``27 Nov 14:05:09``."""
    return f"{at.astimezone(UTC):%d %b %H:%M:%S}".lstrip("0")


def since(at: datetime) -> str:
    """How long ago something was, or in how long it will be."""
    passed = (datetime.now(UTC) - at).total_seconds()
    return f"{seconds(passed)} ago" if passed >= 0 else f"in {seconds(-passed)}"


def seconds(value: float) -> str:
    """A duration in at most two units, as in ``42 ms``, ``3.1 s`` and ``2 h 5 min``."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    place = next(at for at, (_, size) in enumerate(units) if value >= size)
    (name, size), (next_name, next_size) = units[place], units[place + 1]
    whole, rest = divmod(int(value), size)
    return f"{whole} {name}" + (f" {rest // next_size} {next_name}" if rest >= next_size else "")


def count(value: float) -> str:
    """A number with its thousands apart."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def digest(text: str) -> str:
    """A text of a caller's as an element's id, by which htmx finds what had the focus."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def percent(share: float) -> str:
    """A share of one, as in ``97.3 %``."""
    return f"{100 * share:.1f} %"
