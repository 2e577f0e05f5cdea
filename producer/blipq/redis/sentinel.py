"""Redis behind Sentinel: the master is looked up again for each new connection.

``sentinel://[USER:PASSWORD@]HOST[:PORT],HOST[:PORT].../[DB][?master=NAME&sentinel_password=...]``.
User and password are the Redis servers'. ``sentinels://`` speaks TLS with the sentinels and with
the servers. After a failover, what the old master had not passed on to the new one is gone.
"""

from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.asyncio.sentinel import SentinelConnectionPool as AsyncSentinelConnectionPool
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool

from blipq.redis.url import RedisUrl


def master_pool(url: RedisUrl, **options: Any) -> SentinelConnectionPool:
    """Connections to whichever server is the master; ``options`` as of ``redis.Redis``."""
    sentinels = sentinel_options(url, options["socket_timeout"]) | {"retry": Retry(NoBackoff(), 0)}
    manager = Sentinel(url.hosts, sentinel_kwargs=sentinels)  # type: ignore[no-untyped-call]
    return _Pool(url.master, manager, **url.login, **_tls(url), **options)  # type: ignore[no-untyped-call]


def async_master_pool(url: RedisUrl, **options: Any) -> AsyncSentinelConnectionPool:
    """The same for an event loop; ``timeout`` is the longest wait for a free connection."""
    sentinels = sentinel_options(url, options["socket_timeout"]) | {
        "retry": AsyncRetry(NoBackoff(), 0)
    }
    manager = AsyncSentinel(url.hosts, sentinel_kwargs=sentinels)  # type: ignore[no-untyped-call]
    return _AsyncPool(url.master, manager, **url.login, **_tls(url), **options)  # type: ignore[no-untyped-call]


def sentinel_options(url: RedisUrl, timeout_s: float) -> dict[str, Any]:
    """Options of connections to sentinels: all together they take ``timeout_s`` at most."""
    each = timeout_s / (len(url.hosts) + 1)
    options = {"socket_timeout": each, "socket_connect_timeout": each}
    return options | {"password": url.sentinel_password} | _tls(url)


def _tls(url: RedisUrl) -> dict[str, Any]:
    return {"ssl": True, **url.tls.for_redis()} if url.tls else {}


class _Pool(SentinelConnectionPool):
    """Closes the connections to the sentinels, too."""

    sentinel_manager: Any

    def close(self) -> None:
        super().close()
        for sentinel in self.sentinel_manager.sentinels:
            sentinel.close()


class _AsyncPool(AsyncSentinelConnectionPool, redis.asyncio.BlockingConnectionPool):
    """Finds the master as the one does, and waits for a free connection as the other."""

    sentinel_manager: Any

    async def aclose(self) -> None:
        await super().aclose()
        for sentinel in self.sentinel_manager.sentinels:
            await sentinel.aclose()
