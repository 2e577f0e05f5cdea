"""One HTTP request to a URL that a stranger chose, through the guard."""

import asyncio
import math
import socket
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import httpcore2

from blipq.ssrf.crowd import Crowded, Visit
from blipq.ssrf.policy import Address, Guard, Policy, Resolver, Target, Unresolved

#: One address of several that does not answer must not use up the whole time.
CONNECT_TIMEOUT_S = 5.0

#: A name that takes longer has no address now: its servers do not answer.
RESOLVE_TIMEOUT_S = 5.0
#: The longest that the resolver of the system takes over a name whose servers do not answer.
LONGEST_LOOK_UP_S = 30.0
#: Look-ups at a time, whatever the settings: each is a thread, of which a container may have few.
MOST_LOOK_UPS = 1024

#: What a request may raise beside Forbidden. TimeoutError is an OSError.
FAILURES = (
    OSError,
    httpcore2.TimeoutException,
    httpcore2.NetworkError,
    httpcore2.ProtocolError,
)


class _Pinned(httpcore2.AsyncNetworkBackend):
    """Connects to what the guard judged; SNI, certificate and Host stay those of the name."""

    def __init__(self, guard: Guard, visit: Visit | None) -> None:
        self._guard = guard
        self._visit = visit
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
        for address in await self._addresses(host, port):
            if self._visit is not None and not self._visit.enter(address, port):
                continue
            try:
                return await self._network.connect_tcp(
                    str(address), port, timeout, local_address, socket_options
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failed = error
        raise failed or Crowded(host)

    async def _addresses(self, host: str, port: int) -> list[Address]:
        try:
            async with asyncio.timeout(RESOLVE_TIMEOUT_S):
                return await self._guard.addresses(host, port)
        except TimeoutError:
            message = f"{host}: not resolved within {RESOLVE_TIMEOUT_S:g} s"
            raise Unresolved(message) from None


class GuardedHttp:
    """Requests to strangers' URLs: no redirects, no proxies, bounded in time.

    A connection is never used twice, so every request is judged by the addresses of its own time.
    ``at_a_time``: how many requests are under way at the most.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        timeout_s: float,
        at_a_time: int = 64,
        resolve: Resolver | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.timeout_s = timeout_s
        self._policy = policy
        # Threads of its own, started as needed, and enough of them: a look-up goes on when its
        # request is given up, and names that do not resolve must not hold up anything else.
        most = at_a_time * (1 + math.ceil(LONGEST_LOOK_UP_S / timeout_s))
        self._threads = ThreadPoolExecutor(min(most, MOST_LOOK_UPS), "blipq-resolve")
        self._guard = Guard(policy, resolve or self._look_up)
        self._tls = tls

    def close(self) -> None:
        """Waits for nothing: a name that still resolves is forgotten."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def response(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes = b"",
        *,
        visit: Visit | None = None,
    ) -> AsyncIterator[httpcore2.Response]:
        """The answer to one request, its body still to be read; ``timeout_s`` covers that too.

        ``visit``: whom to ask for a place at each address. Raises Forbidden, Crowded, or one of
        FAILURES.
        """
        target = self._policy.check(url)
        request = _request(method, target, headers, body)
        backend = _Pinned(self._guard, visit)
        connection = httpcore2.AsyncHTTPConnection(
            request.url.origin, ssl_context=self._trust(target), network_backend=backend
        )
        async with asyncio.timeout(self.timeout_s), connection:
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
        except (OSError, UnicodeError, RuntimeError) as error:  # RuntimeError: no further thread
            raise Unresolved(f"{host}: {error}") from None


def _request(
    method: str, target: Target, headers: Mapping[str, str], body: bytes
) -> httpcore2.Request:
    url = httpcore2.URL(
        scheme=target.scheme, host=target.host, port=target.port, target=target.path
    )
    own = {"Host": target.authority, "Connection": "close"}
    if body:
        own["Content-Length"] = str(len(body))
    lines = [(name.encode(), value.encode()) for name, value in {**own, **headers}.items()]
    timeouts = {"timeout": {"connect": CONNECT_TIMEOUT_S}}
    return httpcore2.Request(method, url, headers=lines, content=body, extensions=timeouts)


def header(response: httpcore2.Response, name: bytes) -> str | None:
    """A header's value, or None. ``name`` is in lower case."""
    found = (value for key, value in response.headers if key.lower() == name)
    value = next(found, None)
    return None if value is None else value.decode("latin-1").strip()
