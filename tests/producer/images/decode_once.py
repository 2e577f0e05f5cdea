"""Decodes one 4-megapixel image of a kind; exit code 0 if it took no more than was said before."""

import io
import sys

from PIL import Image

from blipq.images.decoding import bytes_to_decode, decoded, opened
from blipq_worker.process.malloc import give_large_blocks_back

SIDE = 2000
SMALL_THINGS = 2**22
TURNED = Image.Exif()
TURNED[0x0112] = 6
NOISE = Image.effect_noise((SIDE // 8, SIDE // 8), 90).resize((SIDE, SIDE)).convert("RGB")
GREY_AND_ALPHA = Image.merge("LA", [NOISE.getchannel(0), NOISE.getchannel(1)])

CASES = {
    "progressive JPEG": lambda: encoded(NOISE, "JPEG", progressive=True, subsampling=0),
    "turned JPEG": lambda: encoded(NOISE.convert("CMYK"), "JPEG", progressive=True, exif=TURNED),
    "PNG": lambda: encoded(GREY_AND_ALPHA, "PNG", compress_level=1),
    "WEBP": lambda: encoded(GREY_AND_ALPHA.convert("RGBA"), "WEBP", method=0),
    "AVIF": lambda: encoded(GREY_AND_ALPHA.convert("RGBA"), "AVIF", speed=10),
}


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def memory_bytes(what: str) -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(what))
    return int(line.split()[1]) * 1024


def main() -> int:
    give_large_blocks_back()
    data = CASES[sys.argv[1]]()
    image = opened(data)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak counts from here
    before, said = memory_bytes("VmRSS"), bytes_to_decode(image)
    decoded(image)
    took = memory_bytes("VmHWM") - before
    print(f"took {took / SIDE**2:.1f} bytes a pixel, said {said / SIDE**2:.1f}")
    return 0 if took <= said + SMALL_THINGS else 1


if __name__ == "__main__":
    sys.exit(main())
