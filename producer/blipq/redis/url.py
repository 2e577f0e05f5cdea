"""URLs of Redis, parsed once, for redis-py and Celery alike.

``redis://[USER:PASSWORD@]HOST[:PORT][/DB]``, ``rediss://`` for TLS, ``unix://[:PASSWORD@]/PATH``,
and ``sentinel://`` or, for TLS, ``sentinels://`` (see ``sentinel``). Over TLS the certificate and
the host's name are checked unless the query turns that off. An error never repeats a part of a URL:
it may be a part of the password.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

import redis
import redis.asyncio

SCHEMES = ("redis", "rediss", "unix", "sentinel", "sentinels")
DEFAULT_PORTS = {"redis": 6379, "rediss": 6379, "sentinel": 26379, "sentinels": 26379}
DEFAULT_MASTER = "mymaster"  # of the example in Redis' own sentinel.conf

ESCAPES = (
    "percent-encode user and password: '/' is %2F, '?' is %3F, '#' is %23, '@' is %40, ':' is %3A"
)

_URL = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?:\?(?P<query>[^#]*))?",
    re.I,
)
_HOST = re.compile(r"(?P<host>\[[0-9a-f:.]+\]|[a-z0-9._%-]*)(?::(?P<port>[0-9]{1,5}))?", re.I)

_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
TLS_OPTIONS = (*_TLS_FILES, "ssl_cert_reqs", "ssl_check_hostname")


@dataclass(frozen=True, slots=True)
class Parts:
    """What every URL of a service has. ``hosts`` is as it was written."""

    scheme: str
    username: str | None
    password: str | None
    hosts: str
    path: str
    query: Mapping[str, str]


def take_apart(url: str) -> Parts:
    """The parts of a URL that may hold a password. Raises ValueError, which repeats none of it."""
    if re.search(r"[\s\x00-\x1f\x7f]", url):
        raise ValueError("there is white space in it, perhaps at its end")
    if "://" not in url:
        raise ValueError(f"it begins with a scheme, such as redis://; {ESCAPES}, ';' is %3B")
    match = _URL.fullmatch(url)
    # Nothing behind the authority may hold an @: else the password was cut off by a raw character.
    if match is None or (match["authority"] and "@" in match["path"] + (match["query"] or "")):
        raise ValueError(f"it cannot be read: {ESCAPES}")
    userinfo, _, hosts = match["authority"].rpartition("@")
    username, _, password = userinfo.partition(":")
    return Parts(
        scheme=match["scheme"].lower(),
        username=unquote(username) or None,
        password=unquote(password) or None,
        hosts=hosts,
        path=match["path"],
        query=dict(parse_qsl(match["query"] or "", keep_blank_values=True)),
    )


@dataclass(frozen=True, slots=True)
class Tls:
    """How a server is verified."""

    verified: bool = True
    names_checked: bool = True
    files: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, query: Mapping[str, str]) -> "Tls":
        """The options of a URL's query. Raises ValueError."""
        required = query.get("ssl_cert_reqs", "required").lower().removeprefix("cert_")
        if required not in ("required", "none"):
            raise ValueError("ssl_cert_reqs is 'required' or 'none'")
        checked = query.get("ssl_check_hostname", "true").lower()
        if checked not in ("true", "false", "1", "0"):
            raise ValueError("ssl_check_hostname is 'true' or 'false'")
        verified = required == "required"
        return cls(
            verified=verified,
            names_checked=verified and checked in ("true", "1"),
            files=tuple((name, query[name]) for name in _TLS_FILES if query.get(name)),
        )

    def for_redis(self) -> dict[str, Any]:
        """Arguments of redis-py's connections over TLS, which kombu passes on to them, too."""
        return {
            "ssl_cert_reqs": "required" if self.verified else "none",
            "ssl_check_hostname": self.names_checked,
            **dict(self.files),
        }

    def for_amqp(self) -> dict[str, Any]:
        """Arguments of py-amqp's connections over TLS."""
        import ssl

        files = {name.removeprefix("ssl_"): path for name, path in self.files}
        required = ssl.CERT_REQUIRED if self.verified else ssl.CERT_NONE
        # None stands for the host that is connected to; kombu fills it in.
        named = {"server_hostname": None} if self.names_checked else {}
        return {"cert_reqs": required, **files, **named}


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """A URL of a Redis, taken apart. ``hosts`` are the sentinels' where there are some."""

    scheme: str
    hosts: tuple[tuple[str, int], ...]
    path: str = ""
    database: int = 0
    username: str | None = None
    password: str | None = None
    client_name: str | None = None
    tls: Tls | None = None
    master: str = DEFAULT_MASTER
    sentinel_password: str | None = None

    @classmethod
    def of(cls, url: str) -> "RedisUrl":
        """What a URL names. Raises ValueError, which repeats none of it."""
        parts = take_apart(url)
        if parts.scheme not in SCHEMES:
            raise ValueError(f"it begins with one of {', '.join(f'{name}://' for name in SCHEMES)}")
        unix = parts.scheme == "unix"
        if unix and (parts.hosts or not parts.path):
            raise ValueError("a unix:// URL names a path: unix:///run/redis.sock")
        hosts = () if unix else tuple(_address(each, parts) for each in _hosts(parts))
        _check_options(parts)
        database = parts.query.get("db") or ("" if unix else parts.path.strip("/")) or "0"
        if not database.isdecimal():
            raise ValueError("the database is a number, such as 0 in redis://HOST:6379/0")
        return cls(
            scheme=parts.scheme,
            hosts=hosts,
            path=unquote(parts.path) if unix else "",
            database=int(database),
            username=parts.username,
            password=parts.password,
            client_name=parts.query.get("client_name"),
            tls=Tls.of(parts.query) if parts.scheme in ("rediss", "sentinels") else None,
            master=parts.query.get("master", DEFAULT_MASTER),
            sentinel_password=parts.query.get("sentinel_password"),
        )

    @property
    def has_sentinels(self) -> bool:
        """Whether sentinels say where the server is."""
        return self.scheme.startswith("sentinel")

    @property
    def login(self) -> dict[str, Any]:
        """redis-py's options for every connection to the server, wherever that is."""
        return {
            "db": self.database,
            "username": self.username,
            "password": self.password,
            "client_name": self.client_name,
        }

    def pool(self, **options: Any) -> "redis.ConnectionPool":
        """Connections to the one server that is named; ``options`` as of ``redis.Redis``."""
        kind: Any = redis.SSLConnection if self.tls else redis.Connection
        if self.path:
            kind = redis.UnixDomainSocketConnection
        return redis.ConnectionPool(connection_class=kind, **self._arguments(options))

    def async_pool(self, **options: Any) -> "redis.asyncio.BlockingConnectionPool":
        """The same for an event loop; ``timeout`` is the longest wait for a free connection."""
        kind: Any = redis.asyncio.SSLConnection if self.tls else redis.asyncio.Connection
        if self.path:
            kind = redis.asyncio.UnixDomainSocketConnection
        return redis.asyncio.BlockingConnectionPool(
            connection_class=kind, **self._arguments(options)
        )

    def _arguments(self, options: Mapping[str, Any]) -> dict[str, Any]:
        if self.path:
            of_tcp = ("socket_keepalive", "socket_connect_timeout")
            given = {name: value for name, value in options.items() if name not in of_tcp}
            return {**given, **self.login, "path": self.path}
        host, port = self.hosts[0]
        tls = self.tls.for_redis() if self.tls else {}
        return {**options, **self.login, "host": host, "port": port, **tls}

    @property
    def celery_url(self) -> str:
        """The URL as Celery's transports write it."""
        name, password = (quote(part or "", safe="") for part in (self.username, self.password))
        userinfo = f"{name}:{password}@" if name or password else ""
        if self.path:
            return f"redis+socket://{userinfo}{quote(self.path)}?virtual_host={self.database}"
        scheme = "sentinel" if self.has_sentinels else self.scheme
        return ";".join(
            f"{scheme}://{userinfo}{f'[{host}]' if ':' in host else host}:{port}/{self.database}"
            for host, port in self.hosts
        )


def tls_of(url: str) -> Tls | None:
    """How the servers of a URL of any broker are verified; None where TLS is not blipq's to set.

    Celery takes a list of URLs with ``;`` between them, and passes its TLS options on from
    one to the next: so it must be the same for all. Raises ValueError, which repeats none of them.
    """
    if url.partition("://")[0].lower() in SCHEMES:
        return RedisUrl.of(url).tls
    all_parts = [take_apart(each) for each in url.split(";")]
    if len({parts.scheme for parts in all_parts}) > 1:
        raise ValueError("all URLs of a list must have the same scheme")
    found = {_tls_of(parts) for parts in all_parts}
    if len(found) > 1:
        raise ValueError("all URLs of a list must have the same ssl_ options")
    return found.pop()


def _tls_of(parts: Parts) -> Tls | None:
    """Any other option would have kombu set TLS up itself, without verifying the host's name."""
    given = {name for name in parts.query if name == "ssl" or name.startswith("ssl_")}
    if parts.scheme == "amqps" and given <= set(TLS_OPTIONS):
        return Tls.of(parts.query)
    if given:
        known = ", ".join(TLS_OPTIONS)
        raise ValueError(f"only amqps:// takes ssl options, and of them {known} alone")
    return None


def _check_options(parts: Parts) -> None:
    """Refuses options that only one of redis-py and Celery would apply."""
    known = ["db", "client_name"]
    if parts.scheme in ("rediss", "sentinels"):
        known += TLS_OPTIONS
    if parts.scheme.startswith("sentinel"):
        known += ["master", "sentinel_password"]
    if wrong := set(parts.query) - set(known):
        tls = " (rediss:// is Redis over TLS)" if wrong.intersection(TLS_OPTIONS) else ""
        # Unnamed: behind a raw & it is a part of a password.
        raise ValueError(f"its query takes {', '.join(known)} alone{tls}; in a password & is %26")


def _hosts(parts: Parts) -> list[str]:
    return parts.hosts.split(",") if parts.scheme.startswith("sentinel") else [parts.hosts]


def _address(text: str, parts: Parts) -> tuple[str, int]:
    match = _HOST.fullmatch(text)
    if match is None or int(match["port"] or 1) not in range(1, 65536):
        raise ValueError(f"host and port are written HOST:PORT; and {ESCAPES}")
    host = unquote(match["host"]).strip("[]")
    if not host and parts.scheme.startswith("sentinel"):
        raise ValueError("a sentinel URL needs a host")
    return host or "localhost", int(match["port"] or DEFAULT_PORTS[parts.scheme])
