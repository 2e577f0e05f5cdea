"""Parquet: pictures as URIs or as bytes, columns of any type."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq

from blipq.errors import InvalidRequest
from blipq_datasets.fields import Fields, objects_of
from blipq_datasets.sources.columns import Columns
from blipq_datasets.sources.places import Place, opened
from blipq_datasets.sources.rows import END, MOST_HELD, Cursor, Part, Row

#: Columns are decoded through buffers of this size, not by whole row groups.
BUFFER_BYTES = 2**20
#: What Arrow raises for bytes that make no sense; none of our own errors is one of these.
_DAMAGE = (pa.ArrowException, OSError)


class Parquet:
    """A Parquet file; a cursor counts its rows. Of a row's columns only those wanted are read."""

    def __init__(self, stem: str, place: Place, wanted: Columns) -> None:
        self.stem = stem
        self.version = place.version
        self._place = place
        self._wanted = wanted

    def columns(self) -> list[str]:
        """The names in its schema. Raises InvalidRequest for another file."""
        try:
            with self._file() as file:
                return list(file.schema_arrow.names)
        except _DAMAGE as error:
            raise InvalidRequest(f"{self._place.name} is no Parquet: {error}") from None

    def rows(self, start: Cursor) -> Iterator[tuple[Cursor, Row]]:
        """The rows from ``start`` on."""
        index = start.rows
        try:
            for batch in self._batches(index, sorted(self._wanted.names)):
                for row in self._rows(batch, index):
                    index += 1
                    yield Cursor(index, index), row
        except _DAMAGE as error:
            yield Cursor(END, index + 1), Row(None, error=f"{self._place.name}: {error}")

    @property
    def size(self) -> int:
        """Bytes of its file."""
        return self._place.size

    @cached_property
    def count(self) -> int:
        """The rows that its footer tells of; none where that cannot be read."""
        try:
            with self._file() as file:
                return int(file.metadata.num_rows)
        except _DAMAGE:
            return 0

    def share(self, cursor: Cursor) -> float:
        """How much of it lies before a cursor."""
        if cursor.offset == END:
            return 1.0
        return min(1.0, cursor.rows / self.count) if self.count else 1.0

    def parts(self, fields: Fields, *, pictures: bool, lines: int) -> Iterator[Part]:
        """All rows again, with the types that they have there.

        A damaged column has nulls from its damage on: rows may have been made of the others.
        """
        index = 0
        for batch in self._whole_or_salvaged(lines):
            yield Part(batch, self._pictures(batch, index, wanted=pictures))
            index += len(batch)

    def _whole_or_salvaged(self, lines: int) -> Iterator[pa.RecordBatch]:
        index = 0
        try:
            for batch in self._batches(0):
                yield _nullable(batch)
                index += len(batch)
        except _DAMAGE:
            with self._file() as file:
                schema = file.schema_arrow
            columns = [self._salvaged(field, index, lines) for field in schema]
            for arrays in zip(*columns, strict=True):
                yield _nullable(pa.RecordBatch.from_arrays(list(arrays), schema=schema))

    def _salvaged(self, field: pa.Field, index: int, lines: int) -> Iterator[pa.Array]:
        """A column from row ``index`` on, as long as batches are, with nulls from its damage on."""
        batches = self._batches(index, [field.name])
        for size in self._sizes(index, lines):
            try:
                yield next(batches).column(0).slice(0, size)
            except (*_DAMAGE, StopIteration):  # the latter ever after the former
                yield pa.nulls(size, field.type)

    def _rows(self, batch: pa.RecordBatch, index: int) -> Iterator[Row]:
        for number, (columns, bad) in enumerate(objects_of(batch), index):
            key = f"{self.stem}/{number}"
            if bad:
                yield Row(key, columns, error=f"{bad[0]}: the text is not UTF-8")
            else:
                yield self._wanted.row(columns, key)

    def _pictures(
        self, batch: pa.RecordBatch, index: int, *, wanted: bool
    ) -> list[tuple[bytes, str] | None]:
        if not wanted:
            return [None] * len(batch)
        names = [name for name in batch.schema.names if name in self._wanted.names]
        found = self._rows(batch.select(names), index)
        return [None if row.data is None else (row.data, row.suffix) for row in found]

    @contextmanager
    def _file(self) -> Iterator[pq.ParquetFile]:
        with (
            closing(opened(self._place)) as source,
            closing(pq.ParquetFile(source, buffer_size=BUFFER_BYTES, pre_buffer=False)) as file,
        ):
            yield file

    def _batches(self, index: int, names: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows behind the first ``index``; row groups before them are not read.

        Each group has batches of its own, so that they are the same from wherever they are read.
        """
        with self._file() as file:
            for group, rows in enumerate(_groups(file)):
                if index >= rows:
                    index -= rows
                    continue
                for batch in file.iter_batches(MOST_HELD, row_groups=[group], columns=names):
                    if index < len(batch):
                        yield batch.slice(index)
                    index = max(0, index - len(batch))

    def _sizes(self, index: int, lines: int) -> Iterator[int]:
        """How many rows the batches behind the first ``index`` have, up to ``lines``."""
        with self._file() as file:
            groups = _groups(file)
        begin = 0
        for rows in groups:
            for start in range(begin, begin + rows, MOST_HELD):
                size = min(start + MOST_HELD, begin + rows, lines) - start
                if start >= index and size > 0:
                    yield size
            begin += rows


def _groups(file: pq.ParquetFile) -> list[int]:
    """The rows of each row group."""
    return [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]


def _nullable(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same columns, any of which may have nulls."""
    fields = [field.with_nullable(True) for field in batch.schema]
    schema = pa.schema(fields, metadata=batch.schema.metadata)
    return pa.RecordBatch.from_arrays(batch.columns, schema=schema)
