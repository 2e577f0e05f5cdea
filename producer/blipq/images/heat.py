"""Heat maps as colours: of a match that was explained, for terminals, pages and pictures.

Plain Python, so that the door needs no Pillow.
"""

import struct
import zlib
from typing import NamedTuple

from blipq.contract import Array

#: How much of a picture its map's colours cover.
OPACITY = 0.65
#: From cold to hot. The luminance rises all the way, so that nobody needs to tell the hues apart.
_ANCHORS = ((10, 20, 90), (140, 40, 130), (240, 110, 60), (255, 230, 90))
#: The most rows and columns that are drawn; models have 16 or 26.
_MOST = 256
_CODES = {"float16": "e", "float32": "f"}


class Heat(NamedTuple):
    """One map. levels: from 0 to 255, row by row from the top."""

    columns: int
    rows: int
    levels: bytes


def heat_of(map_: Array, number: int = 0) -> Heat:
    """One of a text's maps: 0 for the whole text, n for its n-th word.

    Raises ValueError where there is none, or where it is no map.
    """
    if len(map_.shape) != 3:
        raise ValueError(f"{len(map_.shape)} dimensions, where maps have three")
    count, rows, columns = map_.shape
    if not (0 <= number < count and 0 < rows <= _MOST and 0 < columns <= _MOST):
        raise ValueError(f"no map {number} among {count} of {rows} x {columns}")
    layout = struct.Struct(f"<{rows * columns}{_CODES[map_.dtype]}")
    try:
        values = layout.unpack_from(map_.tobytes(), number * layout.size)
    except struct.error as error:
        raise ValueError(f"numbers are missing: {error}") from None
    # What is no number is cold.
    return Heat(
        columns, rows, bytes(round(255 * min(each, 1)) if each > 0 else 0 for each in values)
    )


def _colour(level: int) -> tuple[int, int, int]:
    place, steps = level / 255, len(_ANCHORS) - 1
    start = min(int(place * steps), steps - 1)
    share = place * steps - start
    red, green, blue = (
        round(cold + share * (hot - cold))
        for cold, hot in zip(_ANCHORS[start], _ANCHORS[start + 1], strict=True)
    )
    return red, green, blue


#: The colour of each level: red, green and blue, one behind the other.
PALETTE = bytes(part for level in range(256) for part in _colour(level))


def png(heat: Heat) -> bytes:
    """The map alone, a pixel for each value, translucent: a page lays it over the picture."""
    size = struct.pack(">IIBBBBB", heat.columns, heat.rows, 8, 3, 0, 0, 0)
    starts = range(0, len(heat.levels), heat.columns)
    lines = b"".join(b"\0" + heat.levels[start : start + heat.columns] for start in starts)
    chunks = (
        (b"IHDR", size),
        (b"PLTE", PALETTE),
        (b"tRNS", bytes([round(255 * OPACITY)]) * 256),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*each) for each in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    check = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)
