"""Which URLs a caller may make us connect to: nothing inside, and nothing that only looks outside.

Three steps, each for what is known at its time. ``parse`` knows only the text. ``Policy`` knows the
settings. ``Guard`` knows the addresses: it resolves a name once, judges every answer, and hands out
only what it judged, so that whoever connects cannot be given another address in between.
"""

import ipaddress
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

#: Name and port to addresses. Raises Unresolved.
Resolver = Callable[[str, int], Awaitable[Iterable[str]]]

DEFAULT_PORTS = {"https": 443, "http": 80}
#: Of DNS; an error repeats no more of what stands there.
LONGEST_NAME = 253

_URL = re.compile(r"(?P<scheme>[a-z]+)://(?P<authority>[^/?]*)(?P<path>.*)", re.I)
# What URL parsers disagree about: all but printable ASCII, and these two.
_TROUBLE = re.compile(r"[^!-~]|[\\#]")
_AUTHORITY = re.compile(r"(?P<host>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?", re.I)
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
# inet_aton reads all of these as an address: 127.1, 2130706433, 0x7f.0.0.1
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")

# Our own list: the one behind Python's ``is_global`` differs between releases. Source: IANA's
# registries of special addresses. What is global there but stands for whatever is near is inside.
_INSIDE_4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared by a provider's customers
        "127.0.0.0/8",  # this machine
        "168.63.129.16/32",  # Azure's own services, beside each machine there
        "169.254.0.0/16",  # link-local, and the metadata of clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments: the nearest NAT, the nearest TURN server
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # the nearest AS112 name server
        "192.52.193.0/24",  # the nearest multicast relay
        "192.88.99.0/24",  # the nearest 6to4 relay
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # the nearest AS112 name server
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and the broadcast address
    )
)
# All else of IPv6 is reserved, local or multicast.
_UNICAST_6 = IPv6Network("2000::/3")
_INSIDE_6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",  # documentation
        "2620:4f:8000::/48",  # the nearest AS112 name server
        "3fff::/20",  # documentation
    )
)
_NAT64 = IPv6Network("64:ff9b::/96")


class Forbidden(ValueError):
    """A URL that may not be connected to; the message has the reason."""


class Unresolved(OSError):
    """The host has no address now."""


@dataclass(frozen=True, slots=True)
class Target:
    """The parts of a URL. ``host`` is a lower-case name, or an address without brackets."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def address(self) -> Address | None:
        """The address that the URL names, if it names one."""
        try:
            return ipaddress.ip_address(self.host)
        except ValueError:
            return None

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def parse(url: str) -> Target:
    """The parts of an http or https URL, if its text can be read in one way only.

    Raises Forbidden for everything that parsers are known to read differently.
    """
    if _TROUBLE.search(url):
        raise Forbidden("only printable ASCII, without spaces, '\\' and '#'; names as xn--...")
    match = _URL.fullmatch(url)
    if match is None or match["scheme"].lower() not in DEFAULT_PORTS:
        raise Forbidden("not an https:// URL")
    if "@" in match["authority"]:
        raise Forbidden("a user name or password in the URL is not taken")
    authority = _AUTHORITY.fullmatch(match["authority"])
    if authority is None:
        # Not repeated: with a raw slash in it, a password ends up here.
        raise Forbidden("what stands before the path is not a host and port")
    scheme, path = match["scheme"].lower(), match["path"]
    return Target(
        scheme=scheme,
        host=_host(authority["host"].lower()),
        port=_port(authority["port"], scheme),
        path=path if path.startswith("/") else f"/{path}",
    )


def _host(text: str) -> str:
    if text.startswith("["):
        try:
            return str(IPv6Address(text[1:-1]))
        except ValueError:
            raise Forbidden(f"{text[:LONGEST_NAME]} is not an IPv6 address") from None
    name = text.removesuffix(".")
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return str(IPv4Address(name))
        except ValueError:
            raise Forbidden(f"{text[:LONGEST_NAME]} is no address in the form 192.0.2.1") from None
    if len(name) > LONGEST_NAME or not all(_LABEL.fullmatch(label) for label in labels):
        raise Forbidden(f"{text[:LONGEST_NAME]} is not a host name")
    return name


def _port(text: str | None, scheme: str) -> int:
    port = int(text) if text else DEFAULT_PORTS[scheme]
    if not 0 < port < 65536:
        raise Forbidden(f"{port} is not a port")
    return port


@dataclass(frozen=True)
class Policy:
    """What the settings allow.

    allow: names, addresses and networks that may be inside, over http and on any port. A name that
    is not listed itself may resolve into a listed network, but stays bound to https and ``ports``.
    ``options`` is how the names of these two settings begin.
    """

    allow: tuple[str, ...] = ()
    ports: tuple[int, ...] = (443,)
    options: str = "BLIPQ_WEBHOOK"
    _names: frozenset[str] = field(init=False, repr=False)
    _networks: tuple[Network, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        networks = {each: as_network(each) for each in self.allow}
        names = {each.lower() for each, network in networks.items() if network is None}
        object.__setattr__(self, "_names", frozenset(names))
        object.__setattr__(self, "_networks", tuple(filter(None, networks.values())))

    def check(self, url: str) -> Target:
        """The URL's parts; Forbidden if the text alone shows that it may not be connected to."""
        target = parse(url)
        if self._lists_host(target):
            return target
        if target.scheme != "https":
            raise Forbidden(f"only https ({self.options}_ALLOW lists hosts that may use http)")
        if target.port not in self.ports:
            raise Forbidden(f"port {target.port} is not allowed ({self.options}_PORTS)")
        return target

    def judge(self, host: str, addresses: Iterable[str]) -> list[Address]:
        """The addresses of a host, if every one of them may be connected to; Forbidden if not."""
        judged = [ipaddress.ip_address(address) for address in addresses]
        if not judged:
            raise Unresolved(f"{host} has no address")
        if host not in self._names:
            for address in judged:
                if not is_public(address) and not self._lists(address):
                    raise Forbidden(
                        f"{host} is at {address}, which is not a public address "
                        f"({self.options}_ALLOW lists hosts that are inside)"
                    )
        return judged

    def _lists_host(self, target: Target) -> bool:
        address = target.address
        return target.host in self._names or (address is not None and self._lists(address))

    def _lists(self, address: Address) -> bool:
        return any(address in network for network in self._networks)


def as_network(text: str) -> Network | None:
    """An address or network in CIDR notation; None for a name."""
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        return None


def is_public(address: Address) -> bool:
    """Whether packets to the address leave for the public internet, however it is wrapped."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _INSIDE_4)
    wrapped = _wrapped(address)
    if wrapped is not None:
        return is_public(wrapped)
    return address in _UNICAST_6 and not any(address in network for network in _INSIDE_6)


def _wrapped(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that packets to this one are for in the end (mapped, NAT64 or 6to4)."""
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour


class Guard:
    """Addresses that may be connected to."""

    def __init__(self, policy: Policy, resolve: Resolver) -> None:
        self.policy = policy
        self._resolve = resolve

    async def addresses(self, host: str, port: int) -> list[Address]:
        """The judged addresses of a host: connect to these, and look nothing up again.

        Raises Forbidden or Unresolved.
        """
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return self.policy.judge(host, await self._resolve(host, port))
        return self.policy.judge(host, [host])
