"""Files of answered rows: Parquet, JSON lines, CSV and WebDataset tars."""

import csv
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from blipq_datasets.fields import is_json, objects_of
from blipq_datasets.output.answers import SCHEMA
from blipq_datasets.recipe import Format

#: Rows of a row group, and the bytes after which it is written in any case.
GROUP_ROWS, GROUP_BYTES = 10_000, 32 * 2**20

ENDINGS: dict[Format, str] = {
    "parquet": ".parquet",
    "jsonl": ".jsonl",
    "csv": ".csv",
    "webdataset": ".tar",
}
#: What a spreadsheet takes for the beginning of a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")

#: The column with a sample's key in its tar.
KEY = "__key__"
#: Folders of a key, its last part among them, and bytes of each.
_FOLDERS, _PART_BYTES = 8, 200
#: Keys that were made here.
_MADE = re.compile(r".*-[0-9a-f]{8}-\d{9}", re.S)

Pictures = Sequence[tuple[bytes, str] | None]


class Writer(Protocol):
    """Writes the rows of a shard, some at a time."""

    def write(self, rows: pa.RecordBatch, pictures: Pictures) -> None:
        """Rows with their answers."""

    def close(self) -> None:
        """The file is whole."""


def writer_of(format: Format, path: Path, *, name: str, escape_formulas: bool) -> Writer:
    """A writer of a new file. name: the shard's, for keys in tars."""
    if format == "parquet":
        return ParquetWriter(path)
    if format == "jsonl":
        return JsonLinesWriter(path)
    return CsvWriter(path, escape_formulas) if format == "csv" else TarWriter(path, name)


class ParquetWriter:
    """The columns with the types that they have in the source."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: pq.ParquetWriter | None = None
        self._waiting: list[pa.RecordBatch] = []

    def write(self, rows: pa.RecordBatch, pictures: Pictures) -> None:
        self._waiting.append(rows)
        held = sum(batch.nbytes for batch in self._waiting)
        if held >= GROUP_BYTES or sum(map(len, self._waiting)) >= GROUP_ROWS:
            self._write()

    def close(self) -> None:
        if self._waiting or self._file is None:
            self._write()
        assert self._file is not None
        self._file.close()

    def _write(self) -> None:
        table = pa.Table.from_batches(self._waiting, None if self._waiting else SCHEMA)
        if self._file is None:
            self._file = pq.ParquetWriter(self._path, table.schema, compression="zstd")
        self._file.write_table(table)
        self._waiting = []


class JsonLinesWriter:
    """An object per row. Bytes, such as pictures, are left out."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def write(self, rows: pa.RecordBatch, pictures: Pictures) -> None:
        for row in _objects(rows):
            self._file.write(_json(row) + b"\n")

    def close(self) -> None:
        self._file.close()


class CsvWriter:
    """A heading and a line per row; lists and objects are JSON. Bytes are left out.

    escape_formulas: a text that a spreadsheet would run gets ``'`` before it.
    """

    def __init__(self, path: Path, escape_formulas: bool) -> None:
        self._file = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file)
        self._escape = escape_formulas
        self._begun = False

    def write(self, rows: pa.RecordBatch, pictures: Pictures) -> None:
        if not self._begun:
            names = [field.name for field in rows.schema if not _is_bytes(field.type)]
            self._writer.writerow(map(self._cell, names))
            self._begun = True
        for row in _objects(rows):
            self._writer.writerow(map(self._cell, row.values()))

    def close(self) -> None:
        self._file.close()

    def _cell(self, value: Any) -> Any:
        if isinstance(value, dict | list):
            return _json(value).decode()
        if self._escape and isinstance(value, str) and value.startswith(_FORMULA):
            return f"'{value}"
        return value


class TarWriter:
    """WebDataset: the picture, where there is one, and all columns as ``.json``.

    A row keeps the key that it had in a tar. Others, and keys that no tar should have, become the
    shard's name and the row's number, which no other shard has.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._file: Any = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        digest = hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
        self._shard = f"{re.sub(r'[^A-Za-z0-9_-]', '_', name)[:100]}-{digest}"
        self._number = 0
        self._before = ""

    def write(self, rows: pa.RecordBatch, pictures: Pictures) -> None:
        for row, picture in zip(_objects(rows), pictures, strict=True):
            name = self._before = self._key(row)
            if picture is not None:
                self._add(f"{name}{picture[1] or '.jpg'}", picture[0])
            self._add(f"{name}.json", _json(row))
            self._add(f"{name}.txt", (row.get("blipq_text") or "").encode())
            # Members are kept for access by name, which nobody needs here.
            self._file.members.clear()

    def close(self) -> None:
        self._file.close()

    def _key(self, row: Mapping[str, Any]) -> str:
        key, number = row.get(KEY), self._number
        self._number += 1
        if isinstance(key, str):
            key = key.removeprefix("./")
            # Readers take neighbours with one key for one sample.
            if _is_key(key) and key != self._before:
                return key
        return f"{self._shard}-{number:09}"

    def _add(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._file.addfile(member, io.BytesIO(data))


def _is_key(key: str) -> bool:
    """Whether a tar may have a key: no path out of a folder, and readers end it at no dot."""
    parts = key.split("/")
    return (
        len(parts) <= _FOLDERS
        and all(part not in ("", ".", "..") and part.isprintable() for part in parts)
        and all(len(part.encode()) <= _PART_BYTES for part in parts)
        and "." not in parts[-1]
        and not _MADE.fullmatch(key)
    )


def _objects(rows: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """The rows as objects of JSON, without bytes and without texts that are not UTF-8."""
    shown = [field for field in rows.schema if not _is_bytes(field.type)]
    nested = [field.name for field in shown if is_json(field)]
    for row, _ in objects_of(rows.select([field.name for field in shown])):
        for name in nested:
            row[name] = None if row[name] is None else json.loads(row[name])
        yield row


def _is_bytes(kind: pa.DataType) -> bool:
    """Whether values are bytes, or hold bytes, which no JSON has."""
    if pa.types.is_struct(kind):
        return any(_is_bytes(field.type) for field in kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_bytes(kind.value_type)
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, default=str).encode()
