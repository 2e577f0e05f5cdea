"""One HTTP request to a URL that a stranger chose: through the guard, bounded in time and bytes."""

import asyncio
import email.utils
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

import httpcore2

from blipq.webhooks.guard import Forbidden, Guard, Policy, Resolver, Target, Unresolved

#: More of an answer is not read: its status is all that counts.
MAX_ANSWER_BYTES = 64 * 1024
#: One address of several that does not answer must not use up the whole time.
CONNECT_TIMEOUT_S = 5.0
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


class _Pinned(httpcore2.AsyncNetworkBackend):
    """Connects to what the guard judged; SNI, certificate and Host stay those of the name."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._network = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        failed: Exception | None = None
        for address in await self._guard.addresses(host, port):
            try:
                return await self._network.connect_tcp(
                    str(address), port, timeout, local_address, socket_options
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failed = error
        assert failed is not None, "the guard gives at least one address"
        raise failed


class GuardedHttp:
    """Requests to strangers' URLs: no redirects, no proxies, and each on a connection of its own.

    A connection is never used twice, so every request is judged by the addresses of its own time.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        timeout_s: float,
        resolve: Resolver | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._policy = policy
        self._timeout_s = timeout_s
        # Threads of its own: names that do not resolve must not hold up anything else.
        self._threads = ThreadPoolExecutor(32, "blipq-resolve")
        self._backend = _Pinned(Guard(policy, resolve or self._look_up))
        self._tls = tls

    def close(self) -> None:
        """Waits for nothing: a name that still resolves is forgotten."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Posts once; whatever happens is an answer."""
        told: Answer | None = None
        try:
            target = self._policy.check(url)
            async with (
                asyncio.timeout(self._timeout_s),
                self._response(target, headers, body) as response,
            ):
                told = _answer(response.status, response.headers)
                await _drain(response)
        except (TimeoutError, httpcore2.TimeoutException):
            # Once the status is told, the rest of the answer changes nothing.
            return told or Answer("timeout", f"no answer within {self._timeout_s:g} s")
        except (Forbidden, OSError, httpcore2.NetworkError, httpcore2.ProtocolError) as error:
            return told or _failure(error)
        return told

    @asynccontextmanager
    async def _response(
        self, target: Target, headers: Mapping[str, str], body: bytes
    ) -> AsyncIterator[httpcore2.Response]:
        url = httpcore2.URL(
            scheme=target.scheme, host=target.host, port=target.port, target=target.path
        )
        own = {"Host": target.authority, "Content-Length": str(len(body)), "Connection": "close"}
        lines = [(name.encode(), value.encode()) for name, value in {**own, **headers}.items()]
        request = httpcore2.Request(
            "POST",
            url,
            headers=lines,
            content=body,
            extensions={"timeout": {"connect": CONNECT_TIMEOUT_S}},
        )
        async with httpcore2.AsyncHTTPConnection(
            url.origin, ssl_context=self._trust(target), network_backend=self._backend
        ) as connection:
            response = await connection.handle_async_request(request)
            try:
                yield response
            finally:
                await response.aclose()

    def _trust(self, target: Target) -> ssl.SSLContext | None:
        if target.scheme == "https" and self._tls is None:
            self._tls = httpcore2.default_ssl_context()
        return self._tls

    async def _look_up(self, host: str, port: int) -> list[str]:
        loop = asyncio.get_running_loop()

        def ask() -> list[str]:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return list(dict.fromkeys(str(each[4][0]) for each in found))

        try:
            return await loop.run_in_executor(self._threads, ask)
        except (OSError, UnicodeError) as error:
            raise Unresolved(f"{host}: {error}") from None


async def _drain(response: httpcore2.Response) -> None:
    """Reads the rest of an answer, so that a receiver can finish it, up to a limit."""
    read = 0
    async for part in response.aiter_stream():
        read += len(part)
        if read > MAX_ANSWER_BYTES:
            break


def _failure(error: Exception) -> Answer:
    if isinstance(error, Forbidden):
        return Answer("url_forbidden", str(error))
    if isinstance(error, Unresolved):
        return Answer("unresolved", str(error))
    return Answer("unreachable", f"{type(error).__name__}: {error}"[:200])


def _answer(status: int, headers: Iterable[tuple[bytes, bytes]]) -> Answer:
    told = f"HTTP {status}"
    if 200 <= status < 300:
        return Answer("delivered", told)
    if 300 <= status < 400:
        return Answer("redirected", f"{told}: redirects are not followed")
    if status == 410:
        return Answer("gone", told)
    if status in (429, 503):
        wait = next((value for name, value in headers if name.lower() == b"retry-after"), b"")
        return Answer("throttled", told, _retry_after(wait))
    return Answer("refused", told)


def _retry_after(value: bytes) -> float:
    """Seconds, from a number or a date; 0 if it makes no sense."""
    text = value.decode("latin-1").strip()
    if text.isascii() and text.isdigit():
        seconds = float(text)
    else:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S)
