"""Cells: several Redis servers by name, and which of them has a job. Pure.

A job with an idempotency key, or with an id that its caller chose, belongs to the cell that
rendezvous hashing gives for that text: a cell that joins or leaves a list moves only its own share.
Each list has a version. While an earlier list counts beside the newest, its cell is consulted
first (see ``Cells.path``). An id that a client made says its cell itself.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

CELL_PATTERN = r"[a-z][a-z0-9]{0,15}"

_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_SAYS = re.compile(rf"(?P<bare>job_{_UUID})_(?P<cell>{CELL_PATTERN})")
_CELL = re.compile(CELL_PATTERN)
#: Before the next NAME= : hosts of sentinels have commas between them, too.
_BETWEEN = re.compile(r"[\s,]+(?=[^\s,=:/@?]+=)")


def cell_of(id: str) -> str | None:
    """The cell that an id says, if it says one."""
    match = _SAYS.fullmatch(id)
    return match and match["cell"]


def id_in(id: str, cell: str) -> str:
    """An id that a client made, as one that says its cell; another one as it is."""
    match = _SAYS.fullmatch(id)
    bare = match["bare"] if match else id
    said = f"{bare}_{cell}"
    return said if _SAYS.fullmatch(said) else id


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
        return cls(tuple(urls), found or ((1, tuple(urls)),))

    @property
    def version(self) -> int:
        """The newest list's."""
        return self.lists[-1][0]

    @property
    def current(self) -> tuple[str, ...]:
        """The cells that take new jobs."""
        return self.lists[-1][1]

    def likely(self, id: str) -> list[str]:
        """Where a job is: the cell that its id says; else all, the likeliest first."""
        said = cell_of(id)
        if said is not None:
            return [said]
        owners = [ranked(id, names)[0] for _, names in reversed(self.lists)]
        return list(dict.fromkeys([*owners, *self.names]))

    def path(self, text: str, serves: Callable[[str], bool]) -> list[str]:
        """The cells to consult about a key or an id, in order: the last one records the job.

        Of each list, the oldest first: the cell of the highest rank that serves the model, behind
        those of higher ranks that do not. All clients take the same way, each from its oldest list
        on, so no two of them record a job in two cells.
        """
        found: list[str] = []
        for _, names in self.lists:
            for cell in ranked(text, names):
                found.append(cell)
                if serves(cell):
                    break
        # The last of each: it comes back to a cell that an earlier list had, too.
        return list(dict.fromkeys(reversed(found)))[::-1]


def ranked(text: str, names: Iterable[str]) -> list[str]:
    """Cells by rendezvous hashing: for each text in an order of its own, which all clients find."""

    def weight(name: str) -> bytes:
        return hashlib.blake2b(f"{name}\n{text}".encode(), digest_size=8).digest()

    return sorted(names, key=weight, reverse=True)
