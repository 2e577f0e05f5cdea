"""One attempt at a webhook: what is posted, and what the answer means."""

import email.utils
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import httpcore2

from blipq.ssrf.crowd import Visit
from blipq.ssrf.http import FAILURES, GuardedHttp, header
from blipq.ssrf.policy import Forbidden, Unresolved

#: More of an answer is not read: its status is all that counts.
MAX_ANSWER_BYTES = 64 * 1024
LONGEST_RETRY_AFTER_S = 86400.0

Outcome = Literal[
    "delivered",  # 2xx
    "refused",  # any other status
    "redirected",  # 3xx: never followed
    "gone",  # 410: this URL wants no more
    "throttled",  # 429 or 503
    "timeout",
    "unreachable",
    "unresolved",
    "url_forbidden",
    "crowded",  # too many requests are at its address: nothing was sent, no attempt is counted
]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one request. ``detail`` is a line for people, with nothing of the body."""

    outcome: Outcome
    detail: str
    retry_after: float = 0.0

    @property
    def final(self) -> bool:
        """Whether asking again cannot help."""
        return self.outcome in ("gone", "url_forbidden")


async def post(
    http: GuardedHttp,
    url: str,
    headers: Mapping[str, str],
    body: bytes,
    *,
    visit: Visit | None = None,
) -> Answer:
    """Posts once; whatever happens is an answer, unless there is no room: Crowded."""
    answer: Answer | None = None
    try:
        async with http.response("POST", url, headers, body, visit=visit) as response:
            answer = _answer(response)
            await _drain(response)
    except (Forbidden, *FAILURES) as error:
        # Once the status is here, the rest of the answer changes nothing.
        return answer or _failure(error, http.timeout_s)
    return answer


async def _drain(response: httpcore2.Response) -> None:
    """Reads the rest of an answer, so that a receiver can finish it, up to a limit."""
    read = 0
    async for part in response.aiter_stream():
        read += len(part)
        if read > MAX_ANSWER_BYTES:
            break


def _failure(error: Exception, timeout_s: float) -> Answer:
    if isinstance(error, (TimeoutError, httpcore2.TimeoutException)):
        return Answer("timeout", f"no answer within {timeout_s:g} s")
    if isinstance(error, Forbidden):
        return Answer("url_forbidden", str(error))
    if isinstance(error, Unresolved):
        return Answer("unresolved", str(error))
    return Answer("unreachable", f"{type(error).__name__}: {error}"[:200])


def _answer(response: httpcore2.Response) -> Answer:
    status, shown = response.status, f"HTTP {response.status}"
    if 200 <= status < 300:
        return Answer("delivered", shown)
    if 300 <= status < 400:
        return Answer("redirected", f"{shown}: redirects are not followed")
    if status == 410:
        return Answer("gone", shown)
    if status in (429, 503):
        return Answer("throttled", shown, _retry_after(header(response, b"retry-after") or ""))
    return Answer("refused", shown)


def _retry_after(text: str) -> float:
    """Seconds, from a number or a date; 0 if it makes no sense."""
    if text.isascii() and text.isdigit():
        seconds = float(text)
    else:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S)
