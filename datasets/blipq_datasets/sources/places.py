"""Files and objects, read by ranges: no connection waits while jobs run, none is held whole."""

import gzip
import io
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from blipq.contract import split_s3_uri
from blipq.errors import InvalidRequest
from blipq.s3.refusals import s3_errors
from blipq.s3.storage import Storage
from blipq_datasets.sources.rows import END, Cursor, Damaged

BLOCK_BYTES = 2 * 2**20
#: Unpacked bytes that are let pass, and beyond them the most per packed byte.
FREE_BYTES, MOST_RATIO = 64 * 2**20, 200


class Place(Protocol):
    """A file or an object that does not change."""

    name: str
    size: int
    version: str

    def __hash__(self) -> int: ...

    def read(self, offset: int, size: int) -> bytes:
        """Bytes from ``offset`` on, fewer at the end. Raises InvalidRequest once it has changed."""


class LocalPlace:
    """A local file. Raises InvalidRequest if it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.path = path
        self.size, self.version = self._found()

    def read(self, offset: int, size: int) -> bytes:
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise InvalidRequest(f"cannot read {self.path}: {error.strerror}") from None
        if self._found() != (self.size, self.version):
            raise InvalidRequest(f"{self.path} has changed meanwhile")
        return data

    def _found(self) -> tuple[int, str]:
        try:
            found = self.path.stat()
        except OSError as error:
            raise InvalidRequest(f"cannot read {self.path}: {error.strerror}") from None
        return found.st_size, f"{found.st_size}-{found.st_mtime_ns}"


class S3Place:
    """An object, pinned by its ETag; ``etag`` and ``size`` may be known from a listing."""

    def __init__(
        self, uri: str, storage: Storage, etag: str | None = None, size: int | None = None
    ) -> None:
        self.name = uri
        self._storage = storage
        try:
            self._bucket, self._key = split_s3_uri(uri)
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        if etag is None or size is None:
            found = storage.head(self._bucket, self._key)
            if found is None:
                raise InvalidRequest(f"S3 refuses: there is no {uri}")
            etag, size = found["ETag"].strip('"'), found["ContentLength"]
        assert etag is not None
        assert size is not None
        self.version, self.size = etag, size

    def read(self, offset: int, size: int) -> bytes:
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        with s3_errors(self.name):
            answer = self._storage.client.get_object(
                Bucket=self._bucket,
                Key=self._key,
                Range=f"bytes={offset}-{offset + size - 1}",
                IfMatch=f'"{self.version}"',
            )
            return answer["Body"].read()


class _Raw(io.RawIOBase):
    """A place as a file of Python's."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._place.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        # Far behind the end, where a header of strangers may point, some file systems cannot seek.
        within = self._at < self._place.size
        data = self._place.read(self._at, len(buffer)) if within else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Inflated(io.RawIOBase):
    """What a gzip holds, in order. Raises Damaged, also where it unpacks to far too much."""

    def __init__(self, packed: io.BufferedReader) -> None:
        self._packed = packed
        self._file = gzip.GzipFile(fileobj=packed)
        self._found = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise Damaged(f"the gzip is damaged: {error}") from None
        self._found += len(data)
        if self._found > FREE_BYTES + MOST_RATIO * self._packed.tell():
            raise Damaged(f"the gzip unpacks to more than {MOST_RATIO} times its size")
        buffer[: len(data)] = data
        return len(data)


def opened(place: Place, *, packed: bool = False, at: int = 0) -> io.BufferedReader:
    """A place to read from an offset on; of a gzip, an offset in what it unpacks to."""
    raw: Any = _Raw(place)
    file = io.BufferedReader(raw, BLOCK_BYTES)
    if packed:
        inflated: Any = _Inflated(file)
        file = io.BufferedReader(inflated, BLOCK_BYTES)
    skip(file, at)
    return file


def skip(file: io.BufferedReader, size: int) -> None:
    """Passes over bytes; those of a gzip must be unpacked for that."""
    if file.seekable():
        file.seek(size, io.SEEK_CUR)
        return
    while size > 0 and (data := file.read(min(size, BLOCK_BYTES))):
        size -= len(data)


def share_of(place: Place, cursor: Cursor, *, packed: bool) -> float:
    """How much of a file lies before a cursor whose offset counts bytes, 0 to 1.

    A gzip ends with how many bytes it unpacks to, modulo 4 GiB and of its last part alone: less
    than its own size it is taken for wrong.
    """
    if cursor.offset == END:
        return 1.0
    size = _unpacked(place) if packed else place.size
    return min(1.0, cursor.offset / size) if size else 1.0


@lru_cache(maxsize=1024)
def _unpacked(place: Place) -> int:
    last = place.read(max(0, place.size - 4), 4)
    return max(place.size, int.from_bytes(last, "little"))
