"""How many requests are at each address, and of each group: many names may lead to one server that
never answers, and many such servers may be named by one submitter.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address
#: Of IPv6, one customer has at least so much: its addresses count as one.
_CUSTOMER = 64


class Crowded(Exception):
    """There is no room at any address of the host now. Nothing was connected to."""


class Visit:
    """The places that one request takes; at each address and port, ``most`` are taken at most."""

    def __init__(self, places: Counter[object], most: int) -> None:
        self._places = places
        self._most = most
        self._taken: list[object] = []

    def enter(self, address: Address, port: int) -> bool:
        """Takes a place at an address, if there is one."""
        return self._take((_place(address), port), self._most)

    def enter_for(self, group: object, most: int) -> bool:
        """Takes one of the ``most`` places of a group, such as a submitter, wherever it leads."""
        return self._take(group, most)

    def _take(self, place: object, most: int) -> bool:
        if self._places[place] >= most:
            return False
        self._places[place] += 1
        self._taken.append(place)
        return True

    def leave(self) -> None:
        """Gives the places back."""
        self._places.subtract(self._taken)
        for place in self._taken:
            if not self._places[place]:
                del self._places[place]
        self._taken.clear()


class Crowd:
    """The places of all requests of one event loop."""

    def __init__(self) -> None:
        self._places: Counter[object] = Counter()

    @contextmanager
    def visit(self, most: int) -> Iterator[Visit]:
        """A request, which leaves at the end."""
        visit = Visit(self._places, most)
        try:
            yield visit
        finally:
            visit.leave()

    def __len__(self) -> int:
        return self._places.total()


def _place(address: Address) -> object:
    if isinstance(address, IPv4Address):
        return address
    return IPv6Network((address, _CUSTOMER), strict=False)
