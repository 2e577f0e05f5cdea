"""JPEGs by the thousand that cost what photographs cost to decode, each with pixels of its own."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image

#: Width and height by the prefix of a key.
SIZES = {"coco": (640, 480), "2mp": (1600, 1200), "12mp": (4000, 3000)}
#: Pictures of a size that are drawn; all others have the pixels of one, differently scaled.
BASES = {"coco": 64, "2mp": 16, "12mp": 8}
#: What is before the table of the luma's quantization: marker, length, number of the table.
_LUMA = b"\xff\xdb\x00\x43\x00"
#: Widest picture that is drawn as a whole.
TILE = 1000


def picture(key: str) -> bytes:
    """The JPEG of a key such as ``coco/17.jpg``: one of the bases, changed by its number.

    Its bits are added to steps of the luma's quantization, of low frequencies, which changes the
    pixels at any size: an engine computes equal pixels once. The number: below 2**24.
    """
    size, _, name = key.partition("/")
    number = int(name.partition(".")[0])
    made = bytearray(drawn(size, number % BASES[size]))
    table = made.index(_LUMA) + len(_LUMA)
    for bit in range(24):
        made[table + 1 + bit] += number >> bit & 1
    return bytes(made)


@lru_cache(maxsize=256)
def drawn(size: str, seed: int) -> bytes:
    """A picture of octaves of noise, as large and as slow to decode as a photograph.

    A large one is a small one side by side with its mirror images.
    """
    width, height = SIZES[size]
    tiles = -(-width // TILE)
    sheet = _octaves(width // tiles, height // tiles, np.random.default_rng(seed))
    mirrored = np.concatenate([sheet, sheet[:, ::-1]] * (tiles // 2) or [sheet], axis=1)
    mirrored = np.concatenate([mirrored, mirrored[::-1]] * (tiles // 2) or [mirrored])
    stream = io.BytesIO()
    Image.fromarray(mirrored).save(stream, "JPEG", quality=88)
    return stream.getvalue()


def _octaves(width: int, height: int, random: np.random.Generator) -> np.ndarray:
    """Noise whose amplitude falls with its frequency, (height, width, 3)."""
    sheet = np.zeros((height, width, 3), np.float32)
    cell = max(width, height) // 4
    while cell >= 2:
        rows, columns = -(-height // cell) + 1, -(-width // cell) + 1
        small = (random.normal(size=(rows, columns, 3)) * cell**0.55).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(small[..., channel])
            layer = layer.resize((width, height), Image.Resampling.BICUBIC)
            sheet[..., channel] += np.asarray(layer)
        cell //= 2
    sheet = 128 + 50 * sheet / sheet.std()
    return sheet.clip(0, 255).astype(np.uint8)
