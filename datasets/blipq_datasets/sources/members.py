r"""Members of a tar, one after the other: names, places and the bytes of those that are wanted.

The standard library's ``tarfile`` keeps every member in memory and reads extension records of any
size, so it only parses single headers here. Nothing is ever extracted: a name is no path. Bytes of
a name that are not UTF-8 are written as ``\xe9``: names become keys, which are texts.
"""

import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from blipq_datasets.sources.places import skip
from blipq_datasets.sources.rows import Damaged

BLOCK = tarfile.BLOCKSIZE
#: Of records that extend a header: the most bytes of each, and the most before one member.
LONGEST_RECORD, MOST_RECORDS = 64 * 2**10, 8
#: No member has so many bytes; larger numbers are more than a file can be read at.
LARGEST = 10**18

_NAMES, _PAX = (tarfile.GNUTYPE_LONGNAME,), (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_OTHERS = (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK)


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file. begin: where its headers begin. offset: where its bytes do.

    data: None if they were not wanted.
    """

    name: str
    begin: int
    offset: int
    size: int
    data: bytes | None


@dataclass(slots=True)
class _Extension:
    """What records before a header say in its place."""

    records: int = 0
    name: str | None = None
    size: int | None = None
    is_sparse: bool = False


def members(
    file: io.BufferedReader, at: int, wanted: Callable[[str, int], bool]
) -> Iterator[Member]:
    """The regular files from the offset ``at`` on, where ``file`` stands. Raises Damaged."""
    begin, extension = at, _Extension()
    while (header := _header(file, at)) is not None:
        at += BLOCK
        if header.type in (*_NAMES, *_PAX, *_OTHERS):
            at += _extend(extension, header, file, at)
            continue
        size = header.size if extension.size is None else extension.size
        if header.type == tarfile.GNUTYPE_SPARSE or extension.is_sparse:
            raise Damaged(f"the member at byte {begin:,} is sparse, which is not read")
        name = header.name if extension.name is None else extension.name
        if header.isreg():
            data = _data(file, size, at, wanted=wanted(name, size))
            skip(file, padded(size) - size)
            yield Member(name, begin, at, size, data)
        at += padded(size) if header.isreg() else 0
        begin, extension = at, _Extension()


def _header(file: io.BufferedReader, at: int) -> tarfile.TarInfo | None:
    """The next header; None at the end, which two empty blocks mark."""
    block = file.read(BLOCK)
    if not block.strip(b"\0") and len(block) in (0, BLOCK):
        return None
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError as error:
        raise Damaged(f"no header of a tar at byte {at:,}: {error}") from None
    if not 0 <= header.size < LARGEST:
        raise Damaged(f"the member at byte {at:,} has an impossible size")
    return header


def _extend(
    extension: _Extension, header: tarfile.TarInfo, file: io.BufferedReader, at: int
) -> int:
    """Takes in a record; how many bytes it takes."""
    extension.records += 1
    if header.size > LONGEST_RECORD or extension.records > MOST_RECORDS:
        raise Damaged(
            f"the header at byte {at:,} is extended by more than {MOST_RECORDS} records, or by "
            f"more than {LONGEST_RECORD:,} bytes"
        )
    record = _exactly(file, padded(header.size), at)[: header.size]
    if header.type in _NAMES:
        extension.name = record.rstrip(b"\0").decode("utf-8", "backslashreplace")
    elif header.type in _PAX:
        _extend_by_pax(extension, record, at)
    return padded(header.size)


def _extend_by_pax(extension: _Extension, record: bytes, at: int) -> None:
    """``LENGTH NAME=VALUE`` lines, of which only the name and the size matter."""
    while record.strip(b"\0"):
        length, _, _ = record.partition(b" ")
        is_number = length.isdigit() and len(length) < 10
        if not is_number or not 0 < int(length) <= len(record):
            raise Damaged(f"the PAX record at byte {at:,} is malformed")
        name, _, value = record[len(length) + 1 : int(length) - 1].partition(b"=")
        record = record[int(length) :]
        if name == b"path":
            extension.name = value.decode("utf-8", "backslashreplace")
        elif name == b"size":
            if not value.isdigit() or len(value) > 18:
                raise Damaged(f"the PAX record at byte {at:,} has no size: {value[:20]!r}")
            extension.size = int(value)
        elif name.startswith(b"GNU.sparse."):
            extension.is_sparse = True


def _exactly(file: io.BufferedReader, size: int, at: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise Damaged(f"it ends within the member at byte {at:,}")
    return data


def _data(file: io.BufferedReader, size: int, at: int, *, wanted: bool) -> bytes | None:
    """A member's bytes, or None where they are passed over; all of them must be there."""
    if wanted:
        return _exactly(file, size, at)
    if size:
        skip(file, size - 1)
        _exactly(file, 1, at)
    return None


def padded(size: int) -> int:
    """What so many bytes take in a tar."""
    return -(-size // BLOCK) * BLOCK
