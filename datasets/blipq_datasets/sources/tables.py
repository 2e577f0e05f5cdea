"""Tables of texts: CSV, TSV and JSON lines, plain or as gzip."""

import codecs
import csv
import io
import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from blipq.errors import InvalidRequest
from blipq_datasets.fields import MOST_FIELDS, Fields
from blipq_datasets.sources.columns import Columns
from blipq_datasets.sources.places import Place, opened, share_of
from blipq_datasets.sources.rows import END, Cursor, Damaged, Part, Row, parts_of

#: Bytes of a line, and of a row of CSV, which quotes may stretch over several lines.
LONGEST_LINE, LONGEST_ROW = 2**20, 4 * 2**20

csv.field_size_limit(LONGEST_LINE)


class _Lines:
    """The lines of a file from an offset on; ``at`` is where the next one begins."""

    def __init__(self, file: io.BufferedReader, at: int) -> None:
        self.at = self.row_began = at
        self._file = file

    def __iter__(self) -> Iterator[bytes]:
        while line := self._file.readline(LONGEST_LINE + 1):
            if len(line) > LONGEST_LINE or self.at - self.row_began > LONGEST_ROW:
                raise Damaged(f"the line at byte {self.at:,} has more than {LONGEST_LINE:,} bytes")
            first, self.at = self.at == 0, self.at + len(line)
            yield line.removeprefix(codecs.BOM_UTF8) if first else line


class _Table:
    """What both kinds share: a subclass says what its rows hold."""

    def __init__(self, stem: str, place: Place, wanted: Columns, *, packed: bool) -> None:
        self.stem = stem
        self.version = place.version
        self._place = place
        self._wanted = wanted
        self._packed = packed

    def rows(self, start: Cursor) -> Iterator[tuple[Cursor, Row]]:
        """The rows from ``start`` on; an offset counts unpacked bytes."""
        index, at = start.rows, start.offset
        try:
            with closing(opened(self._place, packed=self._packed, at=at)) as file:
                for after, found in self._found(_Lines(file, at)):
                    row = self._row(f"{self.stem}/{index}", found)
                    index, at = index + 1, after
                    yield Cursor(at, index), row
        except Damaged as error:
            yield Cursor(END, index + 1), Row(None, error=f"{self._place.name}: {error}")

    @property
    def size(self) -> int:
        """Bytes of its file."""
        return self._place.size

    def share(self, cursor: Cursor) -> float:
        """How much of it lies before a cursor."""
        return share_of(self._place, cursor, packed=self._packed)

    def parts(self, fields: Fields, *, pictures: bool, lines: int) -> Iterator[Part]:
        """All rows again."""
        return parts_of(self, fields, pictures=pictures)

    def _row(self, key: str, found: dict[str, Any] | str) -> Row:
        return Row(key, error=found) if isinstance(found, str) else self._wanted.row(found, key)

    def _found(self, lines: _Lines) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """Where each row ends, and its columns or what is wrong with it."""
        raise NotImplementedError


class JsonLines(_Table):
    """An object per line."""

    def check(self) -> None:
        """Raises InvalidRequest for columns that the first object lacks."""
        _, row = next(self.rows(Cursor()), (None, None))
        if row is not None and row.columns:
            self._wanted.within(self._place.name, row.columns)

    def _found(self, lines: _Lines) -> Iterator[tuple[int, dict[str, Any] | str]]:
        for line in lines:
            if line.strip():
                yield lines.at, _object(line)


def _object(line: bytes) -> dict[str, Any] | str:
    try:
        found = json.loads(line)
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        return f"not one JSON object: {error}"
    if not isinstance(found, dict):
        return "not a JSON object"
    return found if len(found) <= MOST_FIELDS else f"more than {MOST_FIELDS} fields"


class Csv(_Table):
    """Comma-, semicolon- or tab-separated values below a heading; all values are texts."""

    def columns(self) -> list[str]:
        """The heading. Raises InvalidRequest."""
        try:
            with closing(opened(self._place, packed=self._packed)) as file:
                heading, _ = self._heading(_Lines(file, 0))
        except Damaged as error:
            raise InvalidRequest(f"{self._place.name}: {error}") from None
        return heading

    def _found(self, lines: _Lines) -> Iterator[tuple[int, dict[str, Any] | str]]:
        if lines.at == 0:
            heading, separator = self._heading(lines)
        else:
            with closing(opened(self._place, packed=self._packed)) as file:
                heading, separator = self._heading(_Lines(file, 0))
        reader = csv.reader(map(_text, lines), delimiter=separator, strict=True)
        while True:
            lines.row_began = lines.at
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if lines.at - lines.row_began > LONGEST_LINE:  # a quote that nothing closes
                    raise Damaged(f"the row at byte {lines.row_began:,}: {error}") from None
                yield lines.at, f"not CSV: {error}"
                continue
            if values:  # else the line is empty
                yield lines.at, _columns(heading, values)

    def _heading(self, lines: _Lines) -> tuple[list[str], str]:
        """The names of the columns, and what separates them."""
        first = next(iter(lines), b"")
        text = _text(first)
        separator = "\t" if "\t" in text else ";" if ";" in text and "," not in text else ","
        try:
            (heading,) = csv.reader([text], delimiter=separator, strict=True)
            text.encode()
        except (csv.Error, ValueError):
            raise InvalidRequest(
                f"{self._place.name}: its first line is no heading of columns in UTF-8"
            ) from None
        if twice := {name for name in heading if heading.count(name) > 1}:
            raise InvalidRequest(f"{self._place.name}: two columns are {sorted(twice)[0]!r}")
        if len(heading) > MOST_FIELDS:
            raise InvalidRequest(f"{self._place.name}: more than {MOST_FIELDS} columns")
        return heading, separator


def _text(line: bytes) -> str:
    return line.decode("utf-8", "surrogateescape")


def _columns(heading: list[str], values: list[str]) -> dict[str, Any] | str:
    if len(values) != len(heading):
        return f"{len(values)} values for {len(heading)} columns"
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return "not UTF-8"
    return dict(zip(heading, values, strict=True))
