"""Cells: several Redis servers by name, and which of them has a job. Pure.

A job with an idempotency key, or with an id that its caller chose, belongs to the cell that
rendezvous hashing gives for that text: a cell that joins or leaves a list moves only its own share.
Each list has a version. While an earlier list counts beside the newest, its cell is consulted
first (see ``Cells.path``). An id that a client made ends with its cell's name.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

CELL_PATTERN = r"[a-z][a-z0-9]{0,15}"
#: Places of one list on the way of a job.
MOST_PLACES = 1024

_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_WITH_CELL = re.compile(rf"(?P<bare>job_{_UUID})_(?P<cell>{CELL_PATTERN})")
_CELL = re.compile(CELL_PATTERN)
#: Before the next NAME= : hosts of sentinels have commas between them, too.
_BETWEEN = re.compile(r"[\s,]+(?=[^\s,=:/@?]+=)")


def cell_of(id: str) -> str | None:
    """The cell with which an id ends, if it does."""
    match = _WITH_CELL.fullmatch(id)
    return match and match["cell"]


def is_clients(id: str) -> bool:
    """Whether an id has the form of those that clients make."""
    return cell_of(id_in(id, "a")) is not None


def id_in(id: str, cell: str) -> str:
    """An id that a client made, with its cell at the end; another one as it is."""
    match = _WITH_CELL.fullmatch(id)
    bare = match["bare"] if match else id
    placed = f"{bare}_{cell}"
    return placed if _WITH_CELL.fullmatch(placed) else id


def named_urls(value: object) -> object:
    """``a=URL b=URL`` as a mapping, with white space or commas between. Raises ValueError."""
    if not isinstance(value, str):
        return value
    found: dict[str, str] = {}
    for part in _BETWEEN.split(value.strip()) if value.strip() else ():
        name, _, url = part.partition("=")
        if not _CELL.fullmatch(name) or not url:  # unnamed: it may be a part of a password
            raise ValueError(
                "write NAME=URL of each cell, with spaces between; a name has at most 16 "
                "small letters and digits, a letter first"
            )
        if name in found:
            raise ValueError(f"the cell {name} is named twice")
        found[name] = url
    return found


def versioned_lists(value: object) -> object:
    """``1=a,b 2=a,b,c`` as pairs of a version and names, in order. Raises ValueError."""
    if not isinstance(value, str):
        return value
    parts = [part.partition("=") for part in value.split()]
    if not all(version.isdecimal() and names for version, _, names in parts):
        raise ValueError("write VERSION=NAME,NAME of each list, the newest last: 1=a,b 2=a,b,c")
    return tuple((int(version), tuple(names.split(","))) for version, _, names in parts)


@dataclass(frozen=True, slots=True)
class Cells:
    """The cells of a deployment, and the lists that say which of them take new jobs.

    names: of all cells, those that drain among them. lists: version and names, the newest last;
    the earlier ones count until one retention has passed since the change.
    """

    names: tuple[str, ...]
    lists: tuple[tuple[int, tuple[str, ...]], ...]

    @classmethod
    def of(
        cls, urls: Mapping[str, str], lists: Sequence[tuple[int, Sequence[str]]] = ()
    ) -> "Cells":
        """The cells of these URLs; without lists all of them take jobs. Raises ValueError."""
        found = tuple((version, tuple(names)) for version, names in lists)
        versions = [version for version, _ in found]
        if versions != sorted(set(versions)):
            raise ValueError("versions of lists go up, the newest last")
        for version, names in found:
            if unknown := set(names) - set(urls):
                raise ValueError(f"list {version}: no such cell: {', '.join(sorted(unknown))}")
            if len(set(names)) < len(names):
                raise ValueError(f"list {version} names a cell twice")
            if len(names) > MOST_PLACES:
                raise ValueError(f"list {version} has more than {MOST_PLACES} cells")
        return cls(tuple(urls), found or ((1, tuple(urls)),))

    @property
    def current(self) -> tuple[str, ...]:
        """The cells that take new jobs."""
        return self.lists[-1][1]

    def likely(self, id: str) -> list[str]:
        """Where a job is: the cell in its id; else all, the likeliest first."""
        named = cell_of(id)
        if named is not None:
            return [named]
        owners = [ranked(id, names)[0] for _, names in reversed(self.lists)]
        return list(dict.fromkeys([*owners, *self.names]))

    def path(
        self, text: str, serves: Callable[[str], bool], start: tuple[int, str] | None = None
    ) -> list[tuple[int, str]]:
        """The cells to consult about a key or an id, each with its place: the last one records it.

        Of each list, the oldest first: the cell of the highest rank that serves the model, behind
        those of higher ranks that do not. A place is a list's version and a rank, so it is the same
        for all clients, whatever they believe is served where, and each job goes up alone.

        start: where another client sent the job.
        """
        found = [] if start is None else [start]
        at = -1 if start is None else start[0]
        for version, names in self.lists:
            for rank, cell in enumerate(ranked(text, names)):
                place = version * MOST_PLACES + rank
                if place > at and (not found or found[-1][1] != cell):
                    found.append((place, cell))
                if serves(cell):
                    break
        if len(found) == 1 and start is not None and not serves(start[1]):
            found += self._around(text, serves, start[0])
        return found

    def _around(self, text: str, serves: Callable[[str], bool], at: int) -> list[tuple[int, str]]:
        """The way on behind the last place: through the newest list's ranks once more."""
        version, names = self.lists[-1]
        order, last = ranked(text, names), at % MOST_PLACES
        found: list[tuple[int, str]] = []
        if at // MOST_PLACES != version:  # a list that this client lacks
            return found
        for rank in range(last + 1, min(last + len(order), MOST_PLACES)):
            cell = order[rank % len(order)]
            found.append((version * MOST_PLACES + rank, cell))
            if serves(cell):
                return found
        return []


def ranked(text: str, names: Iterable[str]) -> list[str]:
    """Cells by rendezvous hashing: for each text in an order of its own, which all clients find."""
    return list(_ranked(text, tuple(names)))


@lru_cache(maxsize=1024)  # an id or a key is looked up several times on its way
def _ranked(text: str, names: tuple[str, ...]) -> list[str]:
    behind = f"\n{text}".encode()

    def weight(name: str) -> bytes:
        return hashlib.blake2b(name.encode() + behind, digest_size=8).digest()

    return sorted(names, key=weight, reverse=True)
