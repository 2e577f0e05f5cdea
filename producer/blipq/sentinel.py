"""Redis behind Sentinel: who the master is, is asked again for each new connection.

``sentinel://[USER:PASSWORD@]HOST[:PORT],HOST[:PORT].../[DB][?master=NAME&sentinel_password=...]``.
User and password are the Redis servers'. After a failover, what the old master had not passed on
to the new one is gone.
"""

from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.asyncio.sentinel import SentinelConnectionPool as AsyncSentinelConnectionPool
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool

SCHEME = "sentinel://"
DEFAULT_PORT = 26379
DEFAULT_MASTER = "mymaster"  # of the example in Redis' own sentinel.conf


@dataclass(frozen=True, slots=True)
class Sentinels:
    """A sentinel URL, taken apart."""

    addresses: tuple[tuple[str, int], ...]
    master: str
    database: int
    username: str | None = None
    password: str | None = None
    sentinel_password: str | None = None

    @classmethod
    def of(cls, url: str) -> "Sentinels":
        """What a URL names. Raises ValueError."""
        parts = urlsplit(url)
        userinfo, _, hosts = parts.netloc.rpartition("@")
        username, _, password = userinfo.partition(":")
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        return cls(
            addresses=tuple(_address(host) for host in hosts.split(",")),
            master=query.get("master", DEFAULT_MASTER),
            database=int(parts.path.strip("/") or 0),
            username=unquote(username) or None,
            password=unquote(password) or None,
            sentinel_password=query.get("sentinel_password"),
        )

    @property
    def celery_url(self) -> str:
        """The URL as Celery's transport writes it."""
        userinfo = ""
        if self.password:
            userinfo = f"{quote(self.username or '', safe='')}:{quote(self.password, safe='')}@"
        return ";".join(
            f"{SCHEME}{userinfo}{host}:{port}/{self.database}" for host, port in self.addresses
        )

    def client(self, **options: Any) -> "redis.Redis":
        """A client of whichever server is the master; ``options`` as of ``redis.Redis``."""
        asked = self.options(options["socket_timeout"]) | {"retry": Retry(NoBackoff(), 0)}
        manager = Sentinel(self.addresses, sentinel_kwargs=asked)  # type: ignore[no-untyped-call]
        pool = _Pool(self.master, manager, **self._credentials, **options)  # type: ignore[no-untyped-call]
        return redis.Redis.from_pool(pool)

    def async_client(self, **options: Any) -> "redis.asyncio.Redis":
        """The same for an event loop; ``timeout`` is the longest wait for a free connection."""
        asked = self.options(options["socket_timeout"]) | {"retry": AsyncRetry(NoBackoff(), 0)}
        manager = AsyncSentinel(self.addresses, sentinel_kwargs=asked)  # type: ignore[no-untyped-call]
        pool = _AsyncPool(self.master, manager, **self._credentials, **options)  # type: ignore[no-untyped-call]
        return redis.asyncio.Redis.from_pool(pool)

    def options(self, timeout_s: float) -> dict[str, Any]:
        """How a sentinel is asked: all of them together take no longer than ``timeout_s``."""
        each = timeout_s / (len(self.addresses) + 1)
        options = {"socket_timeout": each, "socket_connect_timeout": each}
        return options | {"password": self.sentinel_password}

    @property
    def _credentials(self) -> dict[str, Any]:
        return {"db": self.database, "username": self.username, "password": self.password}


class _Pool(SentinelConnectionPool):
    """Closes the connections to the sentinels, too."""

    sentinel_manager: Any

    def close(self) -> None:
        super().close()
        for sentinel in self.sentinel_manager.sentinels:
            sentinel.close()


class _AsyncPool(AsyncSentinelConnectionPool, redis.asyncio.BlockingConnectionPool):
    """Asks for the master as the one does, and waits for a free connection as the other."""

    sentinel_manager: Any

    async def aclose(self) -> None:
        await super().aclose()
        for sentinel in self.sentinel_manager.sentinels:
            await sentinel.aclose()


def _address(host: str) -> tuple[str, int]:
    parts = urlsplit(f"//{host}")
    if not parts.hostname:
        raise ValueError("a sentinel URL needs a host")
    return parts.hostname, parts.port or DEFAULT_PORT
