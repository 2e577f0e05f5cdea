"""JPEGs by the thousand, no two of equal bytes, that cost what photographs cost to decode."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image

#: Width and height by the prefix of a key.
SIZES = {"coco": (640, 480), "12mp": (4000, 3000)}
#: Different pictures of a size. What is equal in two is no help: features are kept by the bytes.
BASES = {"coco": 64, "12mp": 8}
#: Widest picture that is drawn as a whole.
TILE = 1000


def picture(key: str) -> bytes:
    """The JPEG of a key such as ``coco/17.jpg``: one of the bases, with the key as its comment."""
    size, _, name = key.partition("/")
    base = drawn(size, sum(name.encode()) % BASES[size])
    comment = key.encode()
    length = (len(comment) + 2).to_bytes(2)
    return b"".join([base[:2], b"\xff\xfe", length, comment, base[2:]])


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
