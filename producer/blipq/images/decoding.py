"""Bytes to one RGB image, or a reason why not.

The bytes come from strangers: the list of formats is closed, size and structure are checked before
any pixel is decoded, the time is bounded, and whatever a decoder raises on hostile input becomes
``image_invalid``.
"""

import io
import logging
import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from PIL import Image, ImageChops
from PIL.PngImagePlugin import PngImageFile

from blipq.contract import ErrorCode
from blipq.errors import PermanentError
from blipq.images.structure import (
    Excessive,
    check_scans,
    lacks_end,
    scans_in,
    without_metadata,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What is decoded at all.

    formats: Pillow's format names. max_pixels: width x height. max_side: pixels.
    max_aspect: longer side over shorter side. decode_s: seconds of CPU time, so that neither a
    busy machine nor a process that stood still is blamed on the picture.
    """

    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "AVIF", "GIF")
    max_pixels: int = 50_000_000
    max_side: int = 16_384
    max_aspect: float = 100.0
    decode_s: float = 20.0


DEFAULT_LIMITS = ImageLimits()

# Pillow's own guard, for sizes that a decoder meets before `decode` can check. It is set once for
# the process, because swapping warning filters around each decode would race between threads.
Image.MAX_IMAGE_PIXELS = DEFAULT_LIMITS.max_pixels
# What Pillow finds wrong with metadata is no news: one file can hold thousands of such faults.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
Image.init()

_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)

#: The most that decoding held, in bytes per pixel: the decoder's own buffers (WebP's two canvases,
#: AVIF's and HEIF's planes, a progressive JPEG's coefficients), the picture, and its next form.
_BYTES_PER_PIXEL = {"WEBP": 18, "AVIF": 14, "HEIF": 18}
_BYTES_PER_PIXEL_OF_OTHERS = 12

#: Pixels of a JPEG beyond which it may be decoded at a part of its size.
_LARGE = 4_000_000

_JPEG_END = b"\xff\xd9"
#: Any coded data, to go on with where a picture is cut; and the same with each bit the other way.
_ONE_END = bytes(random.Random(7).choices(range(1, 0xFF), k=4096)) + _JPEG_END
_OTHER_END = bytes(0xFF - byte for byte in _ONE_END[:4096]) + _JPEG_END

_EIGHT_OF_SIXTEEN_BITS = [round(value / 257) for value in range(65_536)]

_ORIENTATION_TAG = 0x0112
_UPRIGHT_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"8BPS", "PSD"),
    (b"\x00\x00\x01\x00", "ICO"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG2000"),
    (b"%PDF", "PDF"),
    (b"%!PS", "EPS"),
    (b"PK\x03\x04", "ZIP"),
    (b"\x1f\x8b", "gzip"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"data:", "a data: URL"),
    (b"version https://git-lfs.github.com/", "a pointer of Git LFS"),
    # Base64 of the first bytes of a JPEG, a PNG and a GIF.
    (b"/9j/", "Base64"),
    (b"iVBORw0KGgo", "Base64"),
    (b"R0lGOD", "Base64"),
)
_BOX_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), "HEIC"),
    **dict.fromkeys((b"mif1", b"msf1"), "HEIF"),
}


class _Timed(io.BytesIO):
    """A file that cannot be read once its thread has worked on it for so many seconds: ``until``.

    Pillow feeds its decoders piece by piece, so that this ends what Python could not: JPEG, PNG and
    GIF, and whatever goes through a header in Python. WebP and AVIF are decoded in one call; there
    the number of pixels is the bound.
    """

    def __init__(self, data: bytes, seconds: float, until: float) -> None:
        self.lacks_end = lacks_end(data)
        # A last FF is half of something: of the end, or of a coded FF.
        super().__init__(data.rstrip(b"\xff") + _ONE_END if self.lacks_end else data)
        self._seconds = seconds
        self._until = until

    def otherwise(self) -> "_Timed":
        """A file that lacks its end, with the other one: the first bit that is missing differs."""
        data = self.getvalue().removesuffix(_ONE_END)
        return _Timed(data + _OTHER_END, self._seconds, self._until)

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes. Raises PermanentError (image_invalid) when the time is over."""
        if time.thread_time() > self._until:
            raise _invalid(f"the image takes more than {self._seconds:g} s to decode")
        return super().read(size)


def decode(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """The image in ``data``: RGB, upright, first frame of an animation.

    EXIF orientation is applied, transparency is laid on white, 16-bit greyscale is scaled to
    8 bits, and CMYK, palettes, greyscale and bitmaps are converted. Damaged metadata (colour
    profiles, texts, EXIF) is passed over, and so is a JPEG's missing end. Thread-safe.

    Raises PermanentError with ``image_too_large`` before any pixel is decoded, or with
    ``image_invalid`` when the bytes are not a whole image of an accepted format.
    """
    return decoded(opened(data, limits))


def opened(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """The image in ``data`` with its size checked and no pixel decoded. Raises as ``decode``."""
    if not data:
        raise _invalid("the file is empty (0 bytes)")
    if limits.max_pixels > (Image.MAX_IMAGE_PIXELS or 0):
        Image.MAX_IMAGE_PIXELS = limits.max_pixels
    try:
        scans = scans_in(data)
        image = _open(data, limits)
        _check_size(image.width, image.height, limits)
        check_scans(scans, image.width * image.height)
    except Excessive as error:
        raise _invalid(f"the image needs too much work: {error}") from error
    return image


def bytes_to_decode(image: Image.Image) -> int:
    """The most memory that ``decoded`` takes for an opened image, whatever its mode."""
    each = _BYTES_PER_PIXEL.get(image.format or "", _BYTES_PER_PIXEL_OF_OTHERS)
    each *= 2 if _endless(image) is not None else 1
    return image.width * image.height * each


def reduce(image: Image.Image, least: int) -> None:
    """Has a large JPEG decoded at a half, a quarter or an eighth: both sides keep ``least`` pixels.

    Of an opened image, for whoever will make it smaller still: libjpeg then computes fewer
    frequencies, in a quarter of the time. A file without its end is compared in full.
    """
    large = image.format == "JPEG" and image.width * image.height > _LARGE
    if large and _endless(image) is None:
        image.draft(None, (least, least))


def decoded(image: Image.Image) -> Image.Image:
    """The picture of an opened image, which is closed: of it no pixel is kept, even on an error."""
    found = image.format
    try:
        _load(image)
        for change in (_upright, _eight_bits, _on_white, _rgb):
            image = _changed(image, change)
        return image
    except (MemoryError, PermanentError):
        image.close()
        raise
    except Exception as error:  # a decoder may raise anything on damaged bytes
        image.close()
        reason = " ".join(str(error).split())  # libheif's ends with a line
        raise _invalid(f"the {found} image is damaged: {reason}") from error


def _changed(image: Image.Image, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The image after a change. What it was before gives its pixels up: they may be 200 MB."""
    new = change(image)
    if new is not image:
        image.close()
    return new


def _load(image: Image.Image) -> None:
    """Decodes the pixels. What is behind them in a PNG are texts and the like: damage ends them."""
    if not isinstance(image, PngImageFile):
        file = _endless(image)
        image.load()
        if file is not None:
            _check_whole(image, file)
        return
    image.load_end = partial(_passed_over, image.load_end)  # type: ignore[method-assign]
    try:
        image.load()
    finally:
        # It refers back to the image, whose pixels would stay until a collection of cycles.
        del image.load_end


def _endless(image: Image.Image) -> _Timed | None:
    """The file of a JPEG whose end is missing, before the image is loaded."""
    file = getattr(image, "fp", None)
    return file if isinstance(file, _Timed) and file.lacks_end else None


def _check_whole(image: Image.Image, file: _Timed) -> None:
    """Raises PermanentError if a JPEG without an end lacks pixels, too.

    libjpeg decodes what follows as if it was part of the picture: pixels that differ with it are
    not there. Of a few bits that are missing in the last block alone nothing may be seen.
    """
    with Image.open(file.otherwise(), formats=("JPEG",)) as other:
        other.load()
        if ImageChops.difference(image, other).getbbox(alpha_only=False) is not None:
            raise _invalid("the JPEG image is truncated: pixels are missing at its end")


def _passed_over(action: Callable[[], None]) -> None:
    try:
        action()
    except (MemoryError, PermanentError):
        raise
    except Exception:
        log.debug("damaged metadata behind the pixels", exc_info=True)


def _open(data: bytes, limits: ImageLimits) -> Image.Image:
    """The opened image; where it cannot be, then without the metadata that may be the reason."""
    until = time.thread_time() + limits.decode_s
    with _open_errors(data, limits):
        try:
            return _opened(data, limits, until)
        except (*_BOMBS, MemoryError, PermanentError):
            raise
        except Exception:
            bare = without_metadata(data)
            if len(bare) == len(data):
                raise
        return _opened(bare, limits, until)


def _opened(data: bytes, limits: ImageLimits, until: float) -> Image.Image:
    return Image.open(_Timed(data, limits.decode_s, until), formats=limits.formats)


@contextmanager
def _open_errors(data: bytes, limits: ImageLimits) -> Iterator[None]:
    try:
        yield
    except _BOMBS as error:
        raise _too_large(
            f"the image has more than {limits.max_pixels:,} pixels ({error})"
        ) from error
    except (MemoryError, PermanentError):
        raise
    except Exception as error:
        raise _invalid(_why_not_opened(data, limits)) from error


def _why_not_opened(data: bytes, limits: ImageLimits) -> str:
    found = _sniff(data)
    accepted = ", ".join(limits.formats)
    if found in limits.formats or (found == "HEIC" and "HEIF" in limits.formats):
        declared = int.from_bytes(data[4:8], "little") + 8  # by a RIFF's header
        if found == "WEBP" and declared > len(data):
            return f"the WEBP image is truncated: {len(data):,} of {declared:,} bytes"
        return f"the {found} image has a damaged header"
    return f"found {found}, where one of {accepted} was expected (BLIPQ_IMAGE_FORMATS)"


def _sniff(data: bytes) -> str:
    """What the bytes seem to be, in words for an error message."""
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        return _BOX_BRANDS.get(data[8:12], "an ISO media file such as MP4")
    return _sniff_text(data)


def _sniff_text(data: bytes) -> str:
    start = data[:256].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if b"<svg" in start:
        return "SVG"
    if start.startswith(b"<?xml") or start.startswith(b"<error"):
        return "an XML document"
    if start.startswith((b"{", b"[")):
        return "JSON"
    return f"unknown bytes ({data[:8].hex(' ')})"


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    found = f"the image is {width:,} x {height:,} pixels"
    if min(width, height) < 1:
        raise _invalid(f"{found}: it has no pixels")
    if width * height > limits.max_pixels:
        most = f"at most {limits.max_pixels:,} in all"
        raise _too_large(f"{found}: {most} (BLIPQ_MAX_IMAGE_PIXELS)")
    if max(width, height) > limits.max_side:
        raise _too_large(f"{found}: a side has at most {limits.max_side:,} (BLIPQ_MAX_IMAGE_SIDE)")
    if max(width, height) > limits.max_aspect * min(width, height):
        factor = f"a factor of at most {limits.max_aspect:g}"
        raise _too_large(f"{found}: sides differ by {factor} (BLIPQ_MAX_IMAGE_ASPECT)")


def _upright(image: Image.Image) -> Image.Image:
    method = _UPRIGHT_BY_ORIENTATION.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # a damaged EXIF block does not spoil the picture it came with
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    if not image.mode.startswith("I"):
        return image
    # Pillow's own conversion clips, so that everything above 255 of 65,535 turns white.
    scaled = image.convert("I").point(_EIGHT_OF_SIXTEEN_BITS, "L")
    scaled.info.pop("transparency", None)  # a 16-bit colour key means nothing in 8 bits
    return scaled


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    # A plain conversion would show the colour that fully transparent pixels hide.
    canvas = Image.new("RGB", image.size, (255, 255, 255))
    seen = image if image.mode == "RGBA" else image.convert("RGBA")
    canvas.paste(seen, mask=seen)
    return canvas


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _invalid(message: str) -> PermanentError:
    return PermanentError(ErrorCode.IMAGE_INVALID, message)


def _too_large(message: str) -> PermanentError:
    return PermanentError(ErrorCode.IMAGE_TOO_LARGE, message)
