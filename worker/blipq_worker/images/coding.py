"""Bodies that are compressed on their way, or were stored so: ``Content-Encoding``."""

import re
import zlib
from collections.abc import Callable
from typing import Protocol

from blipq.contract import ErrorCode
from blipq.errors import PermanentError

#: Codings that do not change the bytes: S3's name for its own chunks among them.
_NONE = frozenset({"", "identity", "aws-chunked"})
#: How gzip and zlib begin. Servers name a coding for bytes that have none, too.
_GZIP, _ZLIB = b"\x1f\x8b", (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_ZSTD = b"\x28\xb5\x2f\xfd"
#: How a zstd frame without content begins: writers put their own notes there.
_SKIPPED = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
#: Log2 of the memory that a zstd stream may ask for: 8 MiB, as RFC 9659 has it for HTTP.
_ZSTD_WINDOW = 23
#: Members of a gzip or frames of a zstd. For each, what follows it is copied.
_MOST_PARTS = 256


class TooLong(Exception):
    """More bytes come out than may."""


def plain(data: bytes, coding: str | None, most: int) -> bytes:
    """The bytes without the codings that a header names, ``most`` of them at most.

    br and zstd are read where the packages for them are installed. Raises PermanentError
    (image_invalid) for another coding or damage, and TooLong.
    """
    for name in reversed((coding or "").lower().split(",")):
        name = name.strip()
        if name in _NONE:
            continue
        decoder = _DECODERS.get(name)
        if decoder is None:
            raise _invalid(
                f"Content-Encoding {name[:40]!r} is not read: store the image without it"
            )
        data = decoder(data, most)
    return data


def _inflated(data: bytes, most: int) -> bytes:
    if not data.startswith((_GZIP, *_ZLIB)):
        return data
    return _joined(data, most, lambda: zlib.decompressobj(_GZIP_OR_ZLIB), zlib.error)


def _unbrotlied(data: bytes, most: int) -> bytes:
    try:
        import brotli
    except ImportError:
        raise _missing("br", "brotli>=1.2") from None
    decoder = brotli.Decompressor()
    try:
        found: bytes = decoder.process(data, output_buffer_limit=most + 1)
    except TypeError:  # an earlier version: it would unpack a bomb whole
        raise _missing("br", "brotli>=1.2") from None
    except brotli.error as error:
        raise _damaged(str(error)) from None
    _check_whole(found, most, is_all=decoder.is_finished())
    return found


def _unzstded(data: bytes, most: int) -> bytes:
    if not data.startswith(_ZSTD) and not _SKIPPED.match(data):
        return data
    try:
        from backports import zstd
    except ImportError:
        raise _missing("zstd", "backports.zstd") from None
    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW}
    return _joined(data, most, lambda: zstd.ZstdDecompressor(options=options), zstd.ZstdError)


class _Decoder(Protocol):
    """Decodes one part of a body, and keeps what follows it."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, most: int, /) -> bytes: ...


def _joined(
    data: bytes, most: int, decoder: Callable[[], _Decoder], error: type[Exception]
) -> bytes:
    """What the members of a gzip, or the frames of a zstd, come to one after the other."""
    found = bytearray()
    for _ in range(_MOST_PARTS):
        part = decoder()
        try:
            found += part.decompress(data, most + 1 - len(found))
        except error as why:
            raise _damaged(str(why)) from None
        _check_whole(found, most, is_all=part.eof)
        data = part.unused_data
        if not data.strip(b"\0"):  # archives are padded
            return bytes(found)
    raise _damaged(f"it has more than {_MOST_PARTS} parts")


def _check_whole(found: bytes | bytearray, most: int, *, is_all: bool) -> None:
    if len(found) > most:
        raise TooLong
    if not is_all:
        raise _damaged("the compressed bytes are cut")


_DECODERS: dict[str, Callable[[bytes, int], bytes]] = {
    **dict.fromkeys(("gzip", "x-gzip", "deflate"), _inflated),
    "br": _unbrotlied,
    "zstd": _unzstded,
}


def _missing(name: str, package: str) -> PermanentError:
    return _invalid(
        f"Content-Encoding {name!r} is not read here: store the image without it, or install a "
        f"package on the workers: pip install '{package}'"
    )


def _damaged(why: str) -> PermanentError:
    return _invalid(f"its Content-Encoding is damaged: {why}")


def _invalid(message: str) -> PermanentError:
    return PermanentError(ErrorCode.IMAGE_INVALID, message)
