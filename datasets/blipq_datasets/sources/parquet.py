"""Parquet: pictures as URIs or as bytes, columns of any type."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from blipq.errors import InvalidRequest
from blipq_datasets.fields import Fields
from blipq_datasets.sources.columns import Columns
from blipq_datasets.sources.places import Place, opened
from blipq_datasets.sources.rows import MOST_HELD, Cursor, Part, Row

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

    def columns(self) -> list[str] | None:
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
            yield Cursor(index, index + 1), Row(None, error=f"{self._place.name}: {error}")

    def parts(self, fields: Fields, *, pictures: bool) -> Iterator[Part]:
        """All rows again, with the types that they have there."""
        index = 0
        try:
            for batch in self._batches(0):
                yield Part(batch, self._pictures(batch, index, wanted=pictures))
                index += len(batch)
        except _DAMAGE:  # `rows` has a last row for it
            with self._file() as file:
                schema = file.schema_arrow
            nothing = [pa.nulls(1, column.type) for column in schema]
            yield Part(pa.RecordBatch.from_arrays(nothing, schema=schema), [None])

    def _rows(self, batch: pa.RecordBatch, index: int) -> Iterator[Row]:
        for number, columns in enumerate(batch.to_pylist(), index):
            yield self._wanted.row(columns, f"{self.stem}/{number}")

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
        """The rows behind the first ``index``; row groups before them are not read."""
        with self._file() as file:
            skipped, groups = 0, list(range(file.num_row_groups))
            while groups and skipped + file.metadata.row_group(groups[0]).num_rows <= index:
                skipped += file.metadata.row_group(groups.pop(0)).num_rows
            over = index - skipped
            for batch in file.iter_batches(MOST_HELD, row_groups=groups, columns=names):
                yield batch.slice(min(over, len(batch)))
                over = max(0, over - len(batch))
