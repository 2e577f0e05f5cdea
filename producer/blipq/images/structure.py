"""What a file is made of: how much work a decoder has with it, and which parts are its picture.

A few bytes can cost a lot: each scan of a progressive JPEG is a walk over the whole picture, and
a file may have millions of segments. The counts never fall short of what the decoders will meet.
"""

import re
import zlib
from collections.abc import Iterator

#: Segments, chunks or blocks. A file of 20 MiB in blocks of 1 KiB has a fifth of that.
MOST_PARTS = 100_000
#: Encoders write about ten scans, odd ones some twenty.
MOST_SCANS = 100
#: Pixels times scans: forty walks over the largest picture, some seconds.
MOST_SCANNED_PIXELS = 2_000_000_000

#: What ends entropy-coded data, and what begins a segment: no stuffed zero, no restart. One FF of
#: those that may fill the space before is enough, and all that a search in linear time allows.
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL)
#: A marker right here, with what fills the space before.
_JPEG_MARKER_HERE = re.compile(rb"\xff++([^\x00\xd0-\xd7\xff])", re.DOTALL)
_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_FIRST_WITH_LENGTH = 0xC0
_FIRST_APP, _LAST_APP, _COMMENT = 0xE0, 0xEF, 0xFE
#: JPEG's metadata about pixels, and the least length of each: the colour space, and which side is
#: up, in EXIF or XMP.
_JPEG_NEEDED = {
    0xE0: ((b"JFIF\0", 14),),
    0xEE: ((b"Adobe", 12),),
    0xE1: ((b"Exif\0\0", 6), (b"http://ns.adobe.com/xap/1.0/\0", 29)),
}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class Excessive(Exception):
    """The structure costs too much work."""


def scans_in(data: bytes) -> int:
    """How often decoding a file walks over the whole picture, by its parts: 0 if not.

    Raises Excessive for a JPEG, a PNG or a GIF in too many parts.
    """
    if data.startswith(b"\xff\xd8"):
        return _jpeg_scans(data)
    if data.startswith(b"\x89PNG"):
        _check_chunks(data)
    elif data.startswith(b"GIF8"):
        _check_blocks(data)
    return 0


def check_scans(scans: int, pixels: int) -> None:
    """Raises Excessive for too many walks over so many pixels."""
    if scans > MOST_SCANS or scans * pixels > MOST_SCANNED_PIXELS:
        raise Excessive(f"it has {scans:,} scans of {pixels:,} pixels")


def without_metadata(data: bytes) -> bytes:
    """A JPEG or a PNG with its picture, its colours and its orientation alone; others as they are.

    Their decoder in Pillow takes damage in a text or a colour profile for damage of the picture.
    """
    if data.startswith(b"\xff\xd8"):
        return _bare_jpeg(data)
    if data.startswith(_PNG_SIGNATURE):
        return _bare_png(data)
    return data


def _bare_jpeg(data: bytes) -> bytes:
    parts, at = [data[:2]], 2
    while (marker := _JPEG_MARKER_HERE.match(data, at)) is not None:
        code, body = marker[1][0], marker.end() + 2
        if code == _SCAN or code < _FIRST_WITH_LENGTH:
            break
        end = marker.end() + int.from_bytes(data[marker.end() : body])
        is_metadata = _FIRST_APP <= code <= _LAST_APP or code == _COMMENT
        needed = _JPEG_NEEDED.get(code, ())
        is_needed = any(
            end - body >= least and data.startswith(name, body) for name, least in needed
        )
        if is_needed or not is_metadata:
            parts.append(data[at:end])
        at = end
    parts.append(data[at:])
    return b"".join(parts)


def _bare_png(data: bytes) -> bytes:
    at = len(_PNG_SIGNATURE)
    parts = [data[:at]]
    while at < len(data):
        name, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4])
        # A capital begins the name of what no decoder may pass over.
        is_picture = name[:1].isupper() or name == b"tRNS"
        if is_picture or (name == b"eXIf" and _is_whole(data[at + 4 : end])):
            parts.append(data[at:end])
        at = end
    return b"".join(parts)


def _is_whole(chunk: bytes) -> bool:
    """Whether a chunk's name and body have the checksum that follows them."""
    return zlib.crc32(chunk[:-4]) == int.from_bytes(chunk[-4:])


def lacks_end(data: bytes) -> bool:
    """Whether a JPEG lacks its end marker. Raises Excessive."""
    if not data.startswith(b"\xff\xd8") or data.endswith(bytes((0xFF, _END))):
        return False
    return _END not in _jpeg_markers(data)


def _jpeg_scans(data: bytes) -> int:
    """The scans of the first picture: decoders read nothing behind its end."""
    return sum(code == _SCAN for code in _jpeg_markers(data))


def _jpeg_markers(data: bytes) -> Iterator[int]:
    """The codes of the first picture's markers, up to its end."""
    at = parts = 0
    while (marker := _JPEG_MARKER.search(data, at)) is not None:
        code, at = marker[1][0], marker.end()
        yield code
        if code == _END:
            break
        parts = _one_more(parts)
        if code >= _FIRST_WITH_LENGTH and code != _START:
            at += int.from_bytes(data[at : at + 2])


def _check_chunks(data: bytes) -> None:
    at = len(_PNG_SIGNATURE)
    parts = 0
    while at < len(data) and data[at + 4 : at + 8] != b"IEND":
        parts = _one_more(parts)
        at += 12 + int.from_bytes(data[at : at + 4])


def _check_blocks(data: bytes) -> None:
    """The blocks of a GIF before its first frame: comments, and what applications keep there."""
    flags = data[10] if len(data) > 10 else 0
    at = 13 + (3 * 2 ** (flags % 8 + 1) if flags & 0x80 else 0)
    parts = 0
    while data[at : at + 1] == b"!":
        parts = _one_more(parts)
        at += 2
        while (size := data[at : at + 1]) not in (b"", b"\0"):
            parts = _one_more(parts)
            at += 1 + size[0]
        at += 1


def _one_more(parts: int) -> int:
    if parts == MOST_PARTS:
        raise Excessive(f"it has more than {MOST_PARTS:,} parts")
    return parts + 1
