"""A row of a dataset, and what every shard of rows can do."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from blipq.contract import ImageRef
from blipq_datasets.fields import Fields, cell, schema_of

#: Rows that are held at once, and the bytes of pictures after which no more are taken.
MOST_HELD, MOST_HELD_BYTES = 64, 32 * 2**20


#: The offset behind the last row of a shard that cannot be read any further.
END = -1


class Damaged(Exception):
    """The rest of a shard cannot be read."""


class Cursor(NamedTuple):
    """Where a shard is read on: an offset in its own unit, and how many rows come before it.

    With the offset END nothing more is read, or the same damage would be a row again.
    """

    offset: int = 0
    rows: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """A row, or with ``error`` why it is none.

    image: where its picture lies for workers. data: the picture's bytes, where they pass through
    here anyway; without ``image`` they must be uploaded. suffix: the ending of the picture's name.
    """

    key: str | None
    columns: Mapping[str, Any] = field(default_factory=dict)
    image: ImageRef | None = None
    data: bytes | None = None
    suffix: str = ""
    error: str | None = None


class Part(NamedTuple):
    """Some rows in order: their columns, and the pictures where those were wanted."""

    columns: pa.RecordBatch
    pictures: list[tuple[bytes, str] | None]


class Shard(Protocol):
    """A file of rows. Its content must not change while a bulk works on it."""

    #: Its name without ending, from the source's folder on.
    stem: str

    @property
    def version(self) -> str:
        """Changes with the content."""

    @property
    def size(self) -> int:
        """Bytes of its file."""

    def share(self, cursor: Cursor) -> float:
        """How much of it lies before a cursor, 0 to 1. Of a gzip this is a guess."""

    def rows(self, start: Cursor) -> Iterator[tuple[Cursor, Row]]:
        """The rows from ``start`` on, each with where the next one begins.

        What cannot be read any further is a last row with an ``error``, behind which the offset is
        END. Raises S3Unavailable.
        """

    def parts(self, fields: Fields, *, pictures: bool, lines: int) -> Iterator[Part]:
        """All rows again, for the output, as columns of these kinds. lines: how many there were."""


def held(rows: Iterable[tuple[Cursor, Row]]) -> Iterator[list[tuple[Cursor, Row]]]:
    """The rows in groups that fit into memory."""
    group: list[tuple[Cursor, Row]] = []
    size = 0
    for each in rows:
        group.append(each)
        size += len(each[1].data or b"")
        if len(group) >= MOST_HELD or size >= MOST_HELD_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def parts_of(shard: Shard, fields: Fields, *, pictures: bool) -> Iterator[Part]:
    """The parts of a shard whose rows are objects."""
    schema = schema_of(fields)
    for group in held(shard.rows(Cursor())):
        rows = [row for _, row in group]
        found = [
            {name: cell(row.columns.get(name), kind) for name, kind in fields.items()}
            for row in rows
        ]
        batch = pa.RecordBatch.from_pylist(found, schema=schema) if fields else _empty(len(rows))
        yield Part(batch, [_picture(row) if pictures else None for row in rows])


def _picture(row: Row) -> tuple[bytes, str] | None:
    return None if row.data is None else (row.data, row.suffix)


def _empty(rows: int) -> pa.RecordBatch:
    """A batch without columns would have no rows."""
    return pa.RecordBatch.from_pydict({NO_COLUMN: pa.nulls(rows)})


#: The name of the one column of rows that have none; it is not written.
NO_COLUMN = "blipq_"
