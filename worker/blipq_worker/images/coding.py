"""Bodies that are compressed on their way, or were stored so: ``Content-Encoding``."""

import zlib

from blipq.contract import ErrorCode
from blipq.errors import PermanentError

#: What says nothing about the bytes: S3's name for its own chunks among them.
_NONE = frozenset({"", "identity", "aws-chunked"})
_DEFLATED = frozenset({"gzip", "x-gzip", "deflate"})
#: How gzip and zlib begin. Servers name a coding for bytes that have none, too.
_GZIP, _ZLIB = b"\x1f\x8b", (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS


class TooLong(Exception):
    """More bytes come out than may."""


def plain(data: bytes, coding: str | None, most: int) -> bytes:
    """The bytes without the codings that a header names, ``most`` of them at most.

    Raises PermanentError (image_invalid) for another coding or damage, and TooLong.
    """
    for name in reversed((coding or "").lower().split(",")):
        name = name.strip()
        if name in _DEFLATED:
            data = _inflated(data, most)
        elif name not in _NONE:
            raise _invalid(
                f"Content-Encoding {name[:40]!r} is not read: store the image without it"
            )
    return data


def _inflated(data: bytes, most: int) -> bytes:
    if not data.startswith((_GZIP, *_ZLIB)):
        return data
    inflater = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        found = inflater.decompress(data, most + 1)
    except zlib.error as error:
        raise _invalid(f"its Content-Encoding is damaged: {error}") from None
    if len(found) > most:
        raise TooLong
    if not inflater.eof:
        raise _invalid("its Content-Encoding is damaged: the compressed bytes are cut")
    return found


def _invalid(message: str) -> PermanentError:
    return PermanentError(ErrorCode.IMAGE_INVALID, message)
