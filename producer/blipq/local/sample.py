"""A picture that every model can caption."""

import struct
import zlib


def red_square() -> bytes:
    """A red square on white as a PNG: nothing here may need Pillow."""
    side, red, white = 64, b"\xdc\x1e\x1e", b"\xff\xff\xff"
    rows = []
    for y in range(side):
        inside = range(23, 41)
        rows.append(
            b"\0" + b"".join(red if x in inside and y in inside else white for x in range(side))
        )

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"".join(rows))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )
