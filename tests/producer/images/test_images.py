"""Decoding: correct pixels for every accepted kind of image, one clear error for the rest."""

import base64
import gc
import gzip
import io
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import weakref
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pillow_heif
import pytest
from PIL import Image, ImageChops

from blipq.contract import ErrorCode
from blipq.errors import PermanentError
from blipq.images.decoding import ImageLimits, decode, decoded, opened, reduce
from blipq.images.structure import check_scans, scans_in, without_metadata

RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A small PNG whose header promises many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(64))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, body) for name, body in chunks)


def refused(data: bytes, code: ErrorCode, limits: ImageLimits | None = None) -> str:
    with pytest.raises(PermanentError) as caught:
        decode(data, limits or ImageLimits())
    assert caught.value.code == code
    return str(caught.value)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "GIF"])
def test_each_accepted_format_decodes_to_rgb(format: str) -> None:
    image = decode(encoded(Image.new("RGB", (16, 12), RED), format))
    assert (image.mode, image.size) == ("RGB", (16, 12))
    pixel = image.getpixel((8, 6))
    assert isinstance(pixel, tuple)
    assert all(abs(got - want) <= 8 for got, want in zip(pixel, RED, strict=True))


@pytest.fixture
def heif() -> Iterator[ImageLimits]:
    """Limits of a worker that reads HEIC, with the package that does."""
    pillow_heif.register_heif_opener()
    yield ImageLimits(formats=("JPEG", "HEIF"))
    for known in (Image.OPEN, Image.SAVE, Image.SAVE_ALL):
        known.pop("HEIF", None)
    Image.ID.remove("HEIF")


def test_a_photo_of_a_phone_is_read_upright(heif: ImageLimits) -> None:
    sides = Image.new("RGB", (64, 32), RED)
    sides.paste(BLUE, (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x112] = 6  # a quarter turn to the right shows it upright
    image = decode(encoded(sides, "HEIF", quality=95, exif=exif.tobytes()), heif)
    assert (image.mode, image.size) == ("RGB", (32, 64))
    for place, wanted in (((16, 8), BLUE), ((16, 56), RED)):
        pixel: Any = image.getpixel(place)
        assert all(abs(got - want) <= 12 for got, want in zip(pixel, wanted, strict=True))


def test_a_heic_that_is_cut_is_told_as_damaged_in_one_line(heif: ImageLimits) -> None:
    data = encoded(Image.effect_noise((64, 64), 60).convert("RGB"), "HEIF")
    for size in (60, len(data) // 2):
        reason = refused(data[:size], ErrorCode.IMAGE_INVALID, heif)
        assert "damaged" in reason
        assert "\n" not in reason


def test_a_truncated_jpeg_is_image_invalid() -> None:
    data = encoded(Image.effect_noise((200, 200), 60), "JPEG")
    assert "truncated" in refused(data[: len(data) // 2], ErrorCode.IMAGE_INVALID)


def noise(mode: str) -> Image.Image:
    """The same each time."""
    pixels = random.Random(11).randbytes(200 * 120)
    return Image.frombytes("L", (200, 120), pixels).convert(mode)


JPEGS = [
    {},
    {"progressive": True},
    {"optimize": True},
    {"quality": 95, "subsampling": 0},
    {"restart_marker_blocks": 4},
]


@pytest.mark.parametrize("options", JPEGS)
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_that_lacks_only_its_end_has_all_its_pixels(
    mode: str, options: dict[str, Any]
) -> None:
    data = encoded(noise(mode), "JPEG", **options)
    whole = decode(data).tobytes()
    for cut in (1, 2):  # the end marker, or its second half
        assert decode(data[:-cut]).tobytes() == whole


@pytest.mark.parametrize("options", JPEGS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_that_lacks_pixels_is_never_taken_for_whole(
    mode: str, options: dict[str, Any]
) -> None:
    """A few bits of its last block may be missing; wherever else it is cut, it is refused."""
    data = encoded(noise(mode), "JPEG", **options)
    whole = decode(data)
    for cut in (*range(3, 60), len(data) // 3, len(data) // 2):
        with suppress(PermanentError):
            read = decode(data[:-cut])
            assert cut < 8
            changed = ImageChops.difference(read, whole).getbbox() or (192, 112, 200, 120)
            assert changed[0] >= 180
            assert changed[1] >= 100


@pytest.mark.parametrize("format", ["PNG", "WEBP", "AVIF", "GIF"])
def test_half_a_file_is_image_invalid(format: str) -> None:
    data = encoded(Image.effect_noise((200, 200), 60).convert("RGB"), format)
    refused(data[: len(data) // 2], ErrorCode.IMAGE_INVALID)


def test_an_empty_file_is_image_invalid() -> None:
    assert "0 bytes" in refused(b"", ErrorCode.IMAGE_INVALID)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"<!DOCTYPE html><html><body>403</body></html>", "an HTML page"),
        (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "an XML document"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b'{"error": "not found"}', "JSON"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"\x00\x00\x00\x18ftypheic....", "HEIC"),
        (b"\x00\x00\x00\x18ftyphevx....", "HEIC"),
        (b"\x00\x00\x00\x18ftypmsf1....", "HEIF"),
        (b"\xff\x0a\x00\x00", "JPEG XL"),
        (gzip.compress(b"a cat", mtime=0), "gzip"),
        (b"data:image/jpeg;base64,/9j/4AAQ", "a data: URL"),
        (base64.b64encode(b"\xff\xd8\xff\xe0\x00\x10JFIF"), "Base64"),
        (base64.b64encode(b"\x89PNG\r\n\x1a\n"), "Base64"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "a pointer of Git LFS"),
        (b"\x01\x02\x03", "unknown bytes (01 02 03)"),
    ],
)
def test_what_is_not_an_image_is_named_in_the_message(data: bytes, found: str) -> None:
    assert f"found {found}," in refused(data, ErrorCode.IMAGE_INVALID)


@pytest.mark.parametrize("format", ["TIFF", "BMP", "ICO"])
def test_a_format_outside_the_list_is_image_invalid(format: str) -> None:
    data = encoded(Image.new("RGB", (8, 8)), format)
    assert f"found {format}," in refused(data, ErrorCode.IMAGE_INVALID)


def test_the_list_of_formats_can_be_widened_and_narrowed() -> None:
    picture = Image.new("RGB", (8, 8), BLUE)
    assert decode(encoded(picture, "BMP"), ImageLimits(formats=("BMP",))).getpixel((0, 0)) == BLUE
    narrow = ImageLimits(formats=("JPEG",))
    assert "found PNG," in refused(encoded(picture, "PNG"), ErrorCode.IMAGE_INVALID, narrow)


def test_a_damaged_header_is_image_invalid() -> None:
    data = b"\x89PNG\r\n\x1a\n" + bytes(40)
    assert "damaged header" in refused(data, ErrorCode.IMAGE_INVALID)


def test_a_webp_that_is_cut_is_told_as_truncated() -> None:
    data = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(data, "WEBP")
    cut = data.getvalue()[:-10]
    assert f"truncated: {len(cut):,} of {len(cut) + 10:,} bytes" in refused(
        cut, ErrorCode.IMAGE_INVALID
    )


@pytest.mark.parametrize("side", [30_000, 9_000])
def test_a_png_bomb_is_image_too_large_before_it_is_decoded(side: int) -> None:
    assert "50,000,000" in refused(png_claiming(side, side), ErrorCode.IMAGE_TOO_LARGE)


@pytest.mark.parametrize(
    ("size", "limits"),
    [
        ((20, 20), ImageLimits(max_pixels=399)),
        ((21, 2), ImageLimits(max_side=20)),
        ((101, 1), ImageLimits()),
        ((1, 101), ImageLimits()),
    ],
)
def test_each_limit_is_checked(size: tuple[int, int], limits: ImageLimits) -> None:
    refused(encoded(Image.new("RGB", size)), ErrorCode.IMAGE_TOO_LARGE, limits)


def test_an_image_at_the_limits_passes() -> None:
    limits = ImageLimits(max_pixels=400, max_side=40, max_aspect=4)
    assert decode(encoded(Image.new("RGB", (40, 10))), limits).size == (40, 10)


def test_a_raised_pixel_limit_also_raises_pillows_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode(encoded(Image.new("RGB", (20, 20)))).size == (20, 20)


# --- what takes a decoder's time --------------------------------------------------------------


def chunk(name: bytes, body: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(name + body))
    return struct.pack(">I", len(body)) + name + body + checksum


def with_scans(image: Image.Image, more: int) -> bytes:
    """A progressive JPEG whose last scan is there so many times more."""
    data = encoded(image, "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + more * last + data[-2:]


def test_a_progressive_jpeg_is_walked_over_a_bounded_number_of_times() -> None:
    """Else 0.3 MB of scans hold a decoder for minutes."""
    small = Image.effect_noise((64, 48), 60)
    assert decode(with_scans(small, 90)).size == (64, 48)
    assert "scans" in refused(with_scans(small, 95), ErrorCode.IMAGE_INVALID)
    assert "scans" in refused(with_scans(small, 20_000), ErrorCode.IMAGE_INVALID)


def test_the_larger_the_picture_the_fewer_scans_it_may_have() -> None:
    large = with_scans(Image.new("L", (6000, 6000), 120), 60)
    assert "36,000,000 pixels" in refused(large, ErrorCode.IMAGE_INVALID)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_usual_progressive_jpeg_of_the_largest_size_passes(mode: str) -> None:
    """Its scans are counted as its encoder made them."""
    data = encoded(Image.new(mode, (64, 64)), "JPEG", progressive=True)
    scans = scans_in(data)
    assert 5 < scans < 20
    check_scans(scans, ImageLimits().max_pixels)


def test_scans_are_counted_where_a_decoder_finds_them() -> None:
    """Not in a thumbnail, not behind the end; but behind restarts, fill bytes and garbage."""
    data = encoded(Image.effect_noise((64, 48), 60), "JPEG")
    at = data.index(b"\xff\xda")
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + 8) + b"\xff\xda\xff\xda\0\0\0\0"
    assert scans_in(data) == 1
    assert scans_in(data[:2] + thumbnail + data[2:]) == 1
    assert scans_in(data + data[at:]) == 1
    scan = data[at:-2]
    for between in (b"", b"\xff\xd0", b"\xff\xff\xff", b"garbage\xff\x00"):
        assert scans_in(data[:-2] + between + scan + data[-2:]) == 2
    assert scans_in(data[:at]) == 0
    assert scans_in(data[: at + 3]) == 1


def in_parts(format: str, count: int) -> bytes:
    """A tiny picture with so many parts more than it needs."""
    data = encoded(Image.new("RGB", (8, 8), RED), format)
    if format == "JPEG":
        return data[:2] + count * b"\xff\xfe\0\2" + data[2:]
    if format == "PNG":
        at = data.index(b"IDAT") - 4
        return data[:at] + count * chunk(b"teSt", b"") + data[at:]
    at = data.index(b",", 13 + 3 * 2 ** (data[10] % 8 + 1))
    return data[:at] + b"!\xfe" + count * b"\x01x" + b"\0" + data[at:]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF"])
def test_a_file_has_a_bounded_number_of_parts(format: str) -> None:
    """Each is a step in Python: twenty megabytes of empty ones took seconds and half a gigabyte."""
    assert decode(in_parts(format, 2_000)).size == (8, 8)
    assert "parts" in refused(in_parts(format, 100_001), ErrorCode.IMAGE_INVALID)


@pytest.mark.parametrize("before", [b"", b"\xff\xe0", b"\xff\xe0\0\2", b"\xff\xda\0\2a\xff\0"])
@pytest.mark.parametrize("after", [b"", b"\0", b"\xd0"])
def test_a_jpeg_of_fill_bytes_is_looked_through_once(before: bytes, after: bytes) -> None:
    """From each of them on it was looked to the last: an hour a megabyte, and no thread ran."""
    data = b"\xff\xd8" + before + b"\xff" * 4_000_000 + after
    assert scans_in(data) <= 1
    assert len(without_metadata(data)) <= len(data)


def test_fill_bytes_before_a_marker_hide_neither_a_scan_nor_the_metadata() -> None:
    data = encoded(Image.effect_noise((64, 48), 60), "JPEG", progressive=True)
    filled = data.replace(b"\xff\xda", b"\xff\xff\xff\xff\xda")
    assert scans_in(filled) == scans_in(data) > 1
    profile = b"\xff\xff" + segment(0xE2, b"ICC_PROFILE\0")
    assert decode(data[:2] + profile + filled[2:]).tobytes() == decode(data).tobytes()


def test_a_gif_of_empty_extensions_is_in_parts_too() -> None:
    data = encoded(Image.new("RGB", (8, 8), RED), "GIF")
    at = data.index(b",", 13 + 3 * 2 ** (data[10] % 8 + 1))
    many = data[:at] + 100_001 * b"!\xfe\0" + data[at:]
    assert "parts" in refused(many, ErrorCode.IMAGE_INVALID)


def test_what_follows_a_picture_is_no_part_of_it() -> None:
    for format in ("JPEG", "PNG", "GIF"):
        data = encoded(Image.new("RGB", (8, 8), RED), format)
        assert decode(data + bytes(2 * 2**20)).size == (8, 8)


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP"])
def test_a_bomb_in_the_metadata_is_not_unpacked(name: bytes) -> None:
    data = encoded(Image.new("RGB", (8, 8), RED))
    bomb = chunk(name, b"k\0\0" + zlib.compress(bytes(64 * 2**20), 9))
    at = data.index(b"IDAT") - 4
    tracemalloc.start()
    try:
        assert decode(data[:at] + bomb + data[at:]).getpixel((0, 0)) == RED
        assert decode(data[:-12] + bomb + data[-12:]).getpixel((0, 0)) == RED
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


DAMAGED_CHUNKS = {
    "a profile whose checksum is wrong": chunk(b"iCCP", b"k\0\0" + zlib.compress(b"x"))[:-1] + b"!",
    "a profile of an unknown method": chunk(b"iCCP", b"k\0\7garbage"),
    "a profile without a name": chunk(b"iCCP", b"garbage"),
    "a text of an unknown method": chunk(b"zTXt", b"k\0\7garbage"),
    "a text that is not compressed": chunk(b"iTXt", b"k\0\1\0\0\0garbage"),
    "a text whose checksum is wrong": chunk(b"iTXt", b"k\0\0\0\0\0text")[:-1] + b"!",
    "short colours": chunk(b"cHRM", b"\0\0"),
    "a short size": chunk(b"pHYs", b"\0"),
    "an animation without frames": chunk(b"acTL", b"\0"),
    "EXIF whose checksum is wrong": chunk(b"eXIf", b"II*\0")[:-1] + b"!",
    "EXIF that is none": chunk(b"eXIf", b"garbage"),
}


@pytest.mark.parametrize("damage", DAMAGED_CHUNKS)
def test_damaged_metadata_does_not_spoil_a_png(damage: str) -> None:
    """Before its pixels or behind them, beside an EXIF block that says which side is up."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (20, 10), RED), exif=None if "EXIF" in damage else exif)
    for at in (data.index(b"IDAT") - 4, len(data) - 12):
        image = decode(data[:at] + DAMAGED_CHUNKS[damage] + data[at:])
        assert image.size == ((20, 10) if "EXIF" in damage else (10, 20))
        assert image.getpixel((0, 0)) == RED


#: The worker's own filter, which tests take away.
QUIET = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\.")


def segment(code: int, body: bytes) -> bytes:
    return bytes([0xFF, code]) + struct.pack(">H", 2 + len(body)) + body


@QUIET
@pytest.mark.parametrize(
    "damaged",
    [
        segment(0xE0, b"JFIF\0"),
        segment(0xE2, b"ICC_PROFILE\0"),
        segment(0xED, b"Photoshop 3.0\x008BIM\4\4"),
        segment(0xEE, b"Adobe"),
        segment(0xE2, b"MPF\0" + bytes(40)),
        segment(0xE2, b"MPF\0MM\0*\xff\xff\xff\xff"),
        segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff<tiff:Orientation='x'>"),
    ],
)
def test_damaged_metadata_does_not_spoil_a_jpeg(damaged: bytes) -> None:
    for colours in ("RGB", "CMYK"):
        data = encoded(Image.effect_noise((20, 10), 60).convert(colours), "JPEG")
        found = decode(data[:2] + damaged + data[2:])
        assert found.tobytes() == decode(data).tobytes()


def test_a_jpeg_keeps_its_orientation_beside_a_damaged_profile() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (20, 10)), "JPEG", exif=exif)
    assert decode(data[:2] + segment(0xE2, b"ICC_PROFILE\0") + data[2:]).size == (10, 20)
    xmp = segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="6"/>')
    data = encoded(Image.new("RGB", (20, 10)), "JPEG")
    for damaged in (b"", segment(0xE2, b"ICC_PROFILE\0")):
        assert decode(data[:2] + xmp + damaged + data[2:]).size == (10, 20)


@QUIET
@pytest.mark.parametrize("format", ["WEBP", "AVIF"])
def test_metadata_that_is_garbage_does_not_spoil_a_picture(format: str) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0" + 40 * b"\xff"
    garbage = {"icc_profile": b"profile" * 40, "exif": exif, "xmp": b"<x:xmp" * 40}
    data = encoded(Image.new("RGB", (20, 10), RED), format, **garbage)
    assert decode(data).size == (20, 10)


def test_damage_of_what_a_png_shows_is_image_invalid() -> None:
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([*BLUE, *RED])
    data = encoded(palette, transparency=0)
    for name in (b"IHDR", b"tRNS"):
        at = data.index(name) + 4
        refused(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], ErrorCode.IMAGE_INVALID)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF"])
def test_a_picture_that_takes_too_long_is_given_up_and_says_so(format: str) -> None:
    data = encoded(Image.effect_noise((400, 300), 60).convert("RGB"), format)
    limits = ImageLimits(decode_s=-1.0)
    assert "takes more than" in refused(data, ErrorCode.IMAGE_INVALID, limits)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF"])
def test_a_picture_is_given_up_in_the_middle_of_its_pixels(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = opened(encoded(Image.effect_noise((900, 900), 60).convert("RGB"), format))
    now = time.thread_time()
    monkeypatch.setattr("blipq.images.decoding.time.thread_time", lambda: now + 3600)
    with pytest.raises(PermanentError, match="takes more than 20 s") as caught:
        decoded(image)
    assert caught.value.code == ErrorCode.IMAGE_INVALID


def test_time_that_a_picture_waits_is_not_its_own() -> None:
    """For its room, or while the process stands still: neither says anything about it."""
    image = opened(encoded(Image.new("RGB", (40, 30), RED), "JPEG"), ImageLimits(decode_s=0.5))
    time.sleep(0.7)
    assert decoded(image).size == (40, 30)


# --- what becomes of the pixels -----------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    stored = Image.new("RGB", (20, 10), BLUE)
    stored.paste(RED, (0, 0, 5, 5))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encoded(stored, "PNG", exif=exif))
    assert image.size == ((20, 10) if orientation < 5 else (10, 20))
    corners = [(0, 0), (image.width - 1, 0), (image.width - 1, image.height - 1)]
    corners.append((0, image.height - 1))
    red_corner = {1: 0, 2: 1, 3: 2, 4: 3, 5: 0, 6: 1, 7: 2, 8: 3}[orientation]
    assert [image.getpixel(at) == RED for at in corners].index(True) == red_corner


def test_a_jpeg_with_exif_6_stands_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(Image.new("RGB", (20, 10)), "JPEG", exif=exif)).size == (10, 20)


def test_a_damaged_exif_block_does_not_spoil_the_picture() -> None:
    data = encoded(Image.new("RGB", (20, 10), RED), "JPEG", exif=b"Exif\x00\x00garbage")
    assert decode(data).size == (20, 10)


def test_hidden_red_does_not_show_through_transparency() -> None:
    image = decode(encoded(Image.new("RGBA", (4, 4), (*RED, 0))))
    assert image.getpixel((0, 0)) == WHITE


def test_half_transparent_red_is_laid_on_white() -> None:
    image = decode(encoded(Image.new("RGBA", (4, 4), (*RED, 128))))
    assert image.getpixel((0, 0)) == (255, 127, 127)


def test_transparent_greyscale_is_laid_on_white() -> None:
    assert decode(encoded(Image.new("LA", (4, 4), (0, 0)))).getpixel((0, 0)) == WHITE


def test_a_transparent_palette_colour_is_laid_on_white() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([*BLUE, *RED])
    image.putpixel((0, 0), 0)
    decoded = decode(encoded(image, "PNG", transparency=1))
    assert [decoded.getpixel((0, 0)), decoded.getpixel((1, 1))] == [BLUE, WHITE]


def test_a_palette_with_an_alpha_for_each_colour_is_laid_on_white() -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([*BLUE, *RED])
    image.putpixel((1, 0), 1)
    decoded = decode(encoded(image, "PNG", transparency=bytes([255, 0])))
    assert [decoded.getpixel((0, 0)), decoded.getpixel((1, 0))] == [BLUE, WHITE]


def test_sixteen_bit_greyscale_is_scaled_and_not_clipped() -> None:
    image = Image.new("I;16", (2, 1))
    image.putpixel((0, 0), 40_000)
    image.putpixel((1, 0), 65_535)
    decoded = decode(encoded(image))
    assert [decoded.getpixel((0, 0)), decoded.getpixel((1, 0))] == [(156,) * 3, WHITE]


@pytest.mark.parametrize("quality", [30, 95])
def test_a_cmyk_jpeg_becomes_rgb(quality: int) -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    pixel = decode(encoded(cyan, "JPEG", quality=quality)).getpixel((8, 8))
    assert isinstance(pixel, tuple)
    assert pixel[0] < 20
    assert min(pixel[1:]) > 235


def test_greyscale_and_bitmaps_become_rgb() -> None:
    assert decode(encoded(Image.new("L", (2, 2), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert decode(encoded(Image.new("1", (2, 2), 1))).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "MPO"])
def test_an_animation_gives_its_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, BLUE)]
    lossless = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **lossless)
    pixel = decode(data).getpixel((4, 4))
    assert isinstance(pixel, tuple)
    assert pixel[0] > 240
    assert pixel[2] < 15


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", ["progressive JPEG", "turned JPEG", "PNG", "WEBP", "AVIF"])
def test_decoding_takes_no_more_memory_than_is_said_before(case: str) -> None:
    """Each in a process of its own, which gives back what it frees."""
    script = Path(__file__).with_name("decode_once.py")
    done = subprocess.run([sys.executable, str(script), case], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "I;16"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "GIF"])
def test_a_picture_is_gone_with_its_last_user(format: str, mode: str) -> None:
    """Pixels of one that nobody closes would else wait for a collection of cycles: up to 200 MB."""
    picture = Image.new(mode, (16, 12)).convert(mode if format == "PNG" else "RGB")
    gc.collect()
    gc.disable()
    try:
        image = opened(encoded(picture, format))
        kept = [weakref.ref(image)]
        image = decoded(image)
        kept.append(weakref.ref(image))
        del image
        assert [each() for each in kept] == [None, None]
    finally:
        gc.enable()


def test_a_damaged_image_keeps_no_pixels_while_its_error_is_told() -> None:
    data = encoded(Image.effect_noise((200, 200), 60), "JPEG")
    image = opened(data[: len(data) // 2])
    with pytest.raises(PermanentError):
        decoded(image)
    with pytest.raises(ValueError, match="closed"):
        image.getpixel((0, 0))


@pytest.mark.parametrize(
    ("size", "least", "expected"),
    [
        ((4000, 3000), 448, (1000, 750)),
        ((4000, 3000), 1500, (2000, 1500)),
        ((4001, 3001), 1501, (4001, 3001)),
        ((2000, 2000), 448, (2000, 2000)),  # not large
    ],
)
def test_a_large_jpeg_may_be_decoded_at_a_part_of_its_size(
    size: tuple[int, int], least: int, expected: tuple[int, int]
) -> None:
    gradient = Image.linear_gradient("L").convert("RGB").resize(size)
    for format, found in (("JPEG", expected), ("PNG", size)):
        image = opened(encoded(gradient, format, **{"quality": 90, "compress_level": 1}))
        reduce(image, least)
        picture = decoded(image)
        assert picture.size == found
        small = picture.resize((64, 64), Image.Resampling.BICUBIC)
        apart = ImageChops.difference(small, gradient.resize((64, 64), Image.Resampling.BICUBIC))
        assert max(high for _, high in apart.getextrema()) <= 4


def test_a_jpeg_without_its_end_is_looked_at_in_full() -> None:
    """Whether it lacks pixels is seen by two ways of decoding it."""
    whole = encoded(noise("RGB").resize((2100, 2000)), "JPEG")
    image = opened(whole[:-2])
    reduce(image, 16)
    assert decoded(image).size == (2100, 2000)
    cut = opened(whole[: len(whole) // 2])
    reduce(cut, 16)
    with pytest.raises(PermanentError):
        decoded(cut)
