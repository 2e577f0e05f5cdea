"""Errors as people read them: what is wrong, and what to do."""

import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from blipq_api.console.pages import rendered
from blipq_api.problems import Problem, problem_of

#: What to do about a problem, by its code.
ADVICE = {
    "queue_unavailable": "Redis does not answer. Recorded jobs are kept: run “blipq doctor” on the "
    "door's machine, then try again.",
    "busy": "The door has too much to do. Try again in a few seconds.",
    "rate_limited": "Wait a moment, then try again.",
    "too_many_requests": "Close pages of the console that are open, then try again.",
    "too_many_sign_ins": "Wait a moment, then use a key that “blipq api keys new” printed.",
    "job_not_found": "Look for the job in the list of jobs. Its record may have been deleted: "
    "records are kept for a time after a job's end.",
    "event_not_found": "Look for the event in the list of webhooks.",
    "forbidden": "Sign in with a key that has this right: “blipq api keys new NAME --scope SCOPE” "
    "makes one.",
    "wrong_host": "Open the console by the name localhost, or start the door with keys.",
    "cross_origin": "Open the console itself, and repeat what you did there.",
    "stale_form": "Go back, load the page again, and repeat what you did.",
    "stale_selection": "Filter the list of jobs, and count again.",
    "queue_full": "Wait until open jobs have ended, or raise BLIPQ_MAX_OPEN_JOBS. What was done "
    "before this stays done.",
    "tenant_limited": "Wait until jobs of the tenant have ended, or raise its limits: “blipq queue "
    "limit”. What was done before this stays done.",
    "not_found": "Use the links above.",
    "internal": "The door's log has the reason, under the id of the request.",
}
_OTHERWISE = "Go back, and correct what the message names."
#: Pages that a form is sent to, and that nobody opens by their address alone.
_OF_FORMS = ("select", "bulk", "job", "logout")
#: An address behind the sign-in page is longer than this only by accident.
_LONGEST_NEXT = 500


class SignIn(Problem):
    """The page is for who has a session."""

    def __init__(self) -> None:
        super().__init__(401, "unauthorized", "sign in with a key of this door")


def path_in(scope: Mapping[str, Any]) -> str:
    """The path of a request, without the prefix under which the door lies."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def is_page(path: str) -> bool:
    """Whether a path belongs to the console."""
    return path in ("", "/", "/console") or path.startswith("/console/")


def answer(request: Request, error: Exception) -> Response:
    """An error: a page in the console, else JSON."""
    problem = problem_of(error)
    if not is_page(path_in(request.scope)):
        return problem.response(request.state.request_id)
    if isinstance(problem, SignIn):
        return _to_sign_in(request)
    headers = dict(problem.headers)
    if problem.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(problem.retry_after_s))
    if request.method == "POST":  # the address of a form is no page to load again
        headers["HX-Push-Url"] = "false"
    body = problem.body(request.state.request_id)
    advice = ADVICE.get(problem.code, _OTHERWISE)
    is_form = request.method == "POST" and path_in(request.scope).rpartition("/")[2] in _OF_FORMS
    return rendered(
        request,
        "error.html",
        status=problem.status,
        headers=headers,
        problem=body,
        advice=advice,
        again=not is_form,
    )


def _to_sign_in(request: Request) -> Response:
    """Leads a reader to where to sign in, and from there back; programs get a 401."""
    opened = request.headers.get("sec-fetch-dest", "document") == "document"
    by_htmx = "hx-request" in request.headers
    if not by_htmx and (request.method != "GET" or not opened):
        return Response("sign in: the session has ended", 401)
    here = path_in(request.scope).rpartition("/")[2]
    if request.url.query:
        here += f"?{request.url.query}"
    known = request.method == "GET" and 0 < len(here) <= _LONGEST_NEXT
    target = f"login?{urlencode({'next': here})}" if known else "login"
    if by_htmx:  # it would follow a redirect, and put the page behind that into this one
        return Response("sign in: the session has ended", 401, {"HX-Redirect": target})
    return RedirectResponse(target, 303)


async def handle(request: Request, error: Exception) -> Response:
    """Starlette's handler of exceptions."""
    return answer(request, error)
