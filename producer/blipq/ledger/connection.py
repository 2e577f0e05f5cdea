"""Connections to the ledger's Redis, and its errors as blipq's."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from blipq.errors import InvalidRequest, QueueFull, QueueUnavailable
from blipq.program import blipq
from blipq.redis.sentinel import async_master_pool, master_pool
from blipq.redis.url import RedisUrl
from blipq.settings import Settings

#: Threads that use one client at the same time, at most; redis-py's own limit is 100.
MAX_CONNECTIONS = 4096
#: In an event loop, more calls at the same time wait for one of these, up to the timeout.
MAX_ASYNC_CONNECTIONS = 32
#: ``hash-max-listpack-value`` in bytes, as Redis should have it. A record whose fields are all so
#: short takes half the memory of one with a longer field.
COMPACT_FIELD = 1024

#: As redis-py names it where nothing listens there.
_DEFAULT_PLACE = urlsplit(Settings.model_fields["redis_url"].default).netloc

_NO_MASTER = re.compile(r"No master found for '[^']*'")
#: What redis-py says where no connection was made, of other places, too.
_NOT_REACHED = re.compile(r"\bconnecting to\b")

#: An error reply begins with a code. These mean that the command is wrong, and any other that the
#: server cannot serve it now: READONLY, NOREPLICAS, MISCONF, BUSY, UNBLOCKED, TRYAGAIN and so on.
MISTAKES = {"ERR", "WRONGTYPE", "NOSCRIPT", "NOPROTO", "EXECABORT"}
#: In front, or where a server before Redis 7 puts it when a script met it.
_CODE = re.compile(r"(?:^|: -)([A-Z]{3,})\b")
#: The server lacks a command, or cannot read a login. It may repeat the arguments: a password.
_UNKNOWN = re.compile(r"unknown command|\b(?:hello|auth)\b", re.I)
#: A script met a key of another node.
_OF_CLUSTER = re.compile(r"non local key|in a cluster", re.I)
#: redis-py has classes for some codes, and takes them off the text.
REFUSALS = (
    redis.exceptions.ReadOnlyError,
    redis.exceptions.NoPermissionError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.TryAgainError,
    redis.exceptions.AskError,
)

NO_REDIS = (
    "Redis refuses: it lacks a command that blipq needs, such as HELLO with AUTH: redis_url must "
    "name a Redis 6.2 or later that knows all commands by their own names, not a proxy"
)
A_CLUSTER = (
    "Redis refuses: it is a Redis Cluster, which blipq does not work with: BLIPQ_REDIS_URL must "
    "name a single Redis, or sentinels"
)
NOT_REDIS = (
    "Redis does not answer: what answers in its place is no Redis, perhaps HTTP: check the host "
    "and the port of BLIPQ_REDIS_URL"
)


def connection_options(timeout_s: float) -> dict[str, Any]:
    """Options of every connection: it answers or raises in time, and retries nothing silently."""
    return {
        "decode_responses": True,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "socket_keepalive": True,
        "health_check_interval": 30,
    }


def check_one_cell(settings: Settings) -> None:
    """Raises InvalidRequest where the settings are of several cells."""
    if settings.is_fleet:
        names = ", ".join(settings.cells)
        raise InvalidRequest(f"this serves one cell: set BLIPQ_CELL to one of {names}")


def _url_of(settings: Settings) -> RedisUrl:
    check_one_cell(settings)
    return RedisUrl.of(settings.redis_url)


def connect(settings: Settings, *, timeout_s: float | None = None) -> "redis.Redis":
    """A Redis client that answers or raises within its timeout."""
    options = connection_options(timeout_s or settings.timeout_s) | {
        "max_connections": MAX_CONNECTIONS,
        # A dropped connection is opened again once; a timeout is final, or it would double.
        "retry": Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
    }
    url = _url_of(settings)
    pool = master_pool(url, **options) if url.has_sentinels else url.pool(**options)
    return redis.Redis.from_pool(pool)


def connect_async(settings: Settings, *, reconnects: bool = True) -> "redis.asyncio.Redis":
    """The same for an event loop.

    ``reconnects``: a command that meets a dropped connection opens it again, once.
    """
    dropped = (redis.ConnectionError,) if reconnects else ()
    options = connection_options(settings.timeout_s) | {
        "max_connections": MAX_ASYNC_CONNECTIONS,
        "timeout": settings.timeout_s,
        "retry": AsyncRetry(NoBackoff(), 1, supported_errors=dropped),
    }
    url = _url_of(settings)
    if url.has_sentinels:
        return redis.asyncio.Redis.from_pool(async_master_pool(url, **options))
    return redis.asyncio.Redis.from_pool(url.async_pool(**options))


def _hint(error: Exception) -> str:
    """Redis does not name the key or channel that its ACL denies."""
    # redis-py's own class is for the first of Redis' sentences alone, and not for scripts.
    denied = "permission" in str(error).lower() or "NOPERM" in str(error)
    return " (`ACL LOG` on the server names what was denied)" if denied else ""


def _with_way(error: Exception) -> str:
    """Whoever named no Redis may have meant to start one; another place may be a wrong one."""
    why = str(error)
    if found := _NO_MASTER.match(why):  # what follows is what each sentinel's client is made of
        return f"{found[0]}: check the sentinels' places and ?master= in BLIPQ_REDIS_URL"
    if _DEFAULT_PLACE in why:
        way = f"start a local stack with {blipq('up')}, or set BLIPQ_REDIS_URL"
    elif _NOT_REACHED.search(why):
        way = "start it, or correct its place in BLIPQ_REDIS_URL or BLIPQ_CELLS"
    else:
        return why
    return f"{why.rstrip('.')}; {way}"


def _login(error: Exception) -> str:
    """What is wrong with a login. Of a missing one, Redis says that HELLO needs it."""
    if "HELLO must be" in str(error) or "Authentication required" in str(error):
        return "a login without a password: put a colon, it and an @ before BLIPQ_REDIS_URL's host"
    return f"the user or password of BLIPQ_REDIS_URL or BLIPQ_CELLS: {error}"


def _wrong_server(error: Exception) -> str | None:
    """Why blipq cannot work with this server at all; None for a mistake of ours."""
    if _OF_CLUSTER.search(str(error)):
        return A_CLUSTER
    return NO_REDIS if _UNKNOWN.search(str(error)) else None


@contextmanager
def redis_errors(job_id: str | None = None) -> Iterator[None]:
    """Raises Redis' exceptions as blipq's, but for replies that a command of ours is wrong."""
    try:
        yield
    except redis.exceptions.OutOfMemoryError as error:
        raise QueueFull("Redis has no memory left (maxmemory)") from error
    except redis.AuthenticationError as error:  # a ConnectionError, but it did answer
        raise QueueUnavailable(f"Redis refuses {_login(error)}", job_id) from error
    except redis.exceptions.InvalidResponse:  # which repeats what came
        raise QueueUnavailable(NOT_REDIS, job_id) from None
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise QueueUnavailable(f"Redis does not answer: {_with_way(error)}", job_id) from error
    except redis.exceptions.ResponseError as error:
        if "DB index" in str(error):
            raise InvalidRequest(f"BLIPQ_REDIS_URL: {error}: name a smaller database") from None
        code = _CODE.search(str(error))
        if code and code[1] == "OOM":
            raise QueueFull("Redis has no memory left (maxmemory)") from error
        if isinstance(error, REFUSALS) or (code and code[1] not in MISTAKES):
            raise QueueUnavailable(f"Redis refuses: {error}{_hint(error)}", job_id) from error
        if (why := _wrong_server(error)) is not None:
            raise QueueUnavailable(why, job_id) from None
        raise
