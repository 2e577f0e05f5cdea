"""Redis and another broker: whether they answer, are verified, and keep what jobs need."""

import time
from typing import Any, cast

import redis

from blipq.ledger.connection import COMPACT_FIELD, connect
from blipq.ops.doctor.findings import Finding, Findings, skew
from blipq.ops.forecast import Forecast, forecast
from blipq.program import blipq
from blipq.redaction import place_of
from blipq.redis.url import tls_of
from blipq.settings import Settings
from blipq.transport.broker import broker_address

OLDEST_REDIS = (6, 2)


def check_tls(settings: Settings) -> Findings:
    """Only what the URLs say: a server that cannot be verified does not answer below."""
    for option, url in (("redis_url", settings.redis_url), ("broker_url", settings.broker_url)):
        tls = tls_of(url) if url else None
        if tls and not tls.names_checked:
            what = "the host's name" if tls.verified else "the server"
            message = f"{option}: {what} is not verified: who is in between can read the password"
            advice = "name its authority with ssl_ca_certs, and leave the other ssl_ options out"
            yield Finding("warn", "tls", message, advice)


def check_redis(settings: Settings) -> Findings:
    option = "BLIPQ_CELLS" if settings.cells else "BLIPQ_REDIS_URL"
    with connect(settings) as client:
        before = time.time()
        try:
            client.ping()
        except redis.AuthenticationError as error:
            advice = f"set {option} with its password; `{blipq('env')}` has a local stack's"
            yield Finding("bad", "redis", f"it refuses the user or password: {error}", advice)
            return
        except redis.ResponseError as error:
            advice = f"set {option} to a database and a user that it has"
            yield Finding("bad", "redis", f"it refuses: {error}", advice)
            return
        except redis.RedisError as error:
            advice = f"start Redis or `{blipq('up')}`, or set {option}"
            yield Finding("bad", "redis", f"it does not answer: {error}", advice)
            return
        took = time.time() - before
        info = cast("dict[str, Any]", client.info())
        yield _redis_version(info, took)
        yield from _redis_settings(info)
        yield from _redis_memory(info)
        yield from _redis_encoding(client)
        yield from _redis_forecast(forecast(client))
        before = time.time()
        seconds, microseconds = cast("tuple[int, int]", client.time())
        here = (before + time.time()) / 2
        yield skew("redis clock", seconds + microseconds / 1e6 - here)


def _redis_version(info: dict[str, Any], took: float) -> Finding:
    name = "valkey" if "valkey_version" in info else "redis"
    version = str(info.get("valkey_version") or info.get("redis_version"))
    message = f"{name} {version} answers in {took * 1000:.1f} ms"
    if info.get("role") not in (None, "master"):
        return Finding("bad", "redis", f"{message}, as a replica", "name the primary")
    if info.get("cluster_enabled"):
        advice = "take one Redis with replicas: neither the ledger nor Celery run on a cluster"
        return Finding("bad", "redis", f"{message}, as a cluster", advice)
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < OLDEST_REDIS:
        return Finding("warn", "redis", message, "blipq is tested on 6.2 and later: upgrade")
    return Finding("ok", "redis", message)


def _redis_settings(info: dict[str, Any]) -> Findings:
    policy = info.get("maxmemory_policy")
    if policy == "noeviction":
        yield Finding("ok", "redis eviction", "noeviction")
    else:
        message = f"maxmemory-policy is {policy}: a full Redis would silently drop jobs"
        advice = "redis-cli CONFIG SET maxmemory-policy noeviction, and in redis.conf"
        yield Finding("bad", "redis eviction", message, advice)
    if info.get("aof_enabled"):
        yield Finding("ok", "redis persistence", "append-only file on")
    else:
        message = "append-only file off: open jobs are lost when Redis restarts"
        advice = "redis-cli CONFIG SET appendonly yes, and in redis.conf"
        yield Finding("warn", "redis persistence", message, advice)


def _redis_memory(info: dict[str, Any]) -> Findings:
    used, most = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    message = f"{used / 2**20:.0f} MiB used"
    if most == 0:
        yield Finding("ok", "redis memory", f"{message}, no limit set")
    elif used > 0.7 * most:
        message = f"{message} of {most / 2**20:.0f} MiB: at 100 % submits raise QueueFull"
        yield Finding("warn", "redis memory", message, "add workers, or raise maxmemory")
    else:
        yield Finding("ok", "redis memory", f"{message} of {most / 2**20:.0f} MiB")


def _redis_encoding(client: "redis.Redis") -> Findings:
    """Whether records of jobs are kept compactly. Managed servers may not let it be read."""
    try:
        found = cast("dict[str, str]", client.config_get("hash-max-*-value"))
    except redis.ResponseError:
        return
    if any(int(size) < COMPACT_FIELD for size in found.values()):
        message = "records of ended jobs take twice the memory that they need"
        name = next(iter(found))  # it depends on the version
        advice = f"redis-cli CONFIG SET {name} {COMPACT_FIELD}, and in redis.conf"
        yield Finding("warn", "redis memory", message, advice)


def _redis_forecast(found: Forecast | None) -> Findings:
    if found is None:
        return
    jobs = (
        f"{found.rate:.1f} jobs/s of {found.size:,.0f} bytes, kept for {found.kept_s / 3600:.1f} h"
    )
    message = f"{jobs}: {found.later / 2**20:,.0f} MiB in the end"
    if found.limit:
        message += f", of {found.limit / 2**20:,.0f} MiB"
    advice = (
        "shorten BLIPQ_RESULT_TTL or the jobs' keep, set BLIPQ_KEEP_DELIVERED=0 or BLIPQ_RESULTS, "
        "or give Redis more memory"
    )
    yield Finding("warn" if found.too_much else "ok", "redis forecast", message, advice)


def check_broker(settings: Settings) -> Findings:
    from kombu import Connection

    timeout = max(1, round(settings.timeout_s))
    address = broker_address(settings)
    where = "; ".join(place_of(each) for each in address.url.split(";"))
    with Connection(
        address.url,
        ssl=address.tls,
        connect_timeout=timeout,
        transport_options=address.options,
    ) as connection:
        try:
            connection.ensure_connection(max_retries=1, timeout=timeout)
        except Exception as error:  # each transport has exceptions of its own
            advice = "check BLIPQ_BROKER_URL, and that the transport's library is installed"
            yield Finding("bad", "broker", f"{where} does not answer: {error}", advice)
            return
    yield Finding("ok", "broker", f"{where} answers")
