"""Distinct photos of 1024x768 pixels, about 100 KB each as JPEG."""

import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SIZE = (1024, 768)
QUALITY = 85


class Pictures:
    """Crops of a few photos, each one different: no two have the same bytes, so no cache helps."""

    def __init__(self, photos: Sequence[Image.Image], seed: int = 0) -> None:
        self._photos = photos
        self._seed = seed
        self._numbers = itertools.count(seed * 1_000_000)
        self._made: dict[int, bytes] | None = None  # kept where they are wanted again

    def take(self, count: int) -> list[bytes]:
        """The next so many pictures."""
        return [self._picture(number) for number in itertools.islice(self._numbers, count)]

    def again(self) -> "Pictures":
        """The same from the first one; what one of the two has made the other need not make."""
        same = Pictures(self._photos, self._seed)
        if self._made is None:
            self._made = {}
        same._made = self._made
        return same

    def _picture(self, number: int) -> bytes:
        if self._made is None:
            return self._crop(number)
        if number not in self._made:
            self._made[number] = self._crop(number)
        return self._made[number]

    def _crop(self, number: int) -> bytes:
        draw = np.random.default_rng(number)
        photo = self._photos[number % len(self._photos)]
        share = draw.uniform(0.6, 0.95)
        width, height = (max(1, int(side * share)) for side in photo.size)
        left = int(draw.integers(0, photo.width - width + 1))
        top = int(draw.integers(0, photo.height - height + 1))
        picture = photo.crop((left, top, left + width, top + height)).resize(SIZE)
        if draw.integers(2):
            picture = ImageOps.mirror(picture)
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=QUALITY)
        return stream.getvalue()


def read(folder: Path) -> list[Image.Image]:
    """The photos in a folder. Raises ValueError if there is none."""
    photos = []
    for path in sorted(folder.iterdir()):
        try:
            photos.append(Image.open(path).convert("RGB"))
        except OSError:  # not a picture
            continue
    if not photos:
        raise ValueError(f"no picture in {folder}")
    return photos


def drawn(count: int = 8) -> list[Image.Image]:
    """Clouds of many sizes and colours, which compress about as photos do."""
    return [_cloud(seed) for seed in range(count)]


def _cloud(seed: int) -> Image.Image:
    draw = np.random.default_rng(seed)
    total = np.zeros((SIZE[1], SIZE[0], 3))
    for octave in _octaves():
        noise = draw.normal(size=(octave * 3, octave * 4, 3))
        layer = Image.fromarray(np.uint8(np.clip(128 + 45 * noise, 0, 255))).resize(SIZE)
        total += (np.asarray(layer, dtype=float) - 128) / octave**0.6
    return Image.fromarray(np.uint8(np.clip(128 + total, 0, 255)))


def _octaves() -> Iterator[int]:
    return iter((1, 2, 4, 8, 16, 32, 64, 128))
