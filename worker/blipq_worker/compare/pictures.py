"""The pictures of cases: each is fetched once, and kept in a folder for the other model."""

import hashlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from PIL import Image

from blipq.contract import ImageRef
from blipq.images.decoding import ImageLimits, decoded, opened, reduce
from blipq_worker.images.fetch import Fetcher
from blipq_worker.images.preprocess import pixels_of
from blipq_worker.inference.requests import ImagePixels, Recipe

#: Of a picture in a report: its longer side.
SHOWN_SIDE = 320


class Pictures:
    """Pictures as models and people see them. Raises WorkError.

    A picture that is replaced meanwhile is another one for nobody: both models see the same bytes.
    """

    def __init__(self, fetcher: Fetcher, limits: ImageLimits, folder: Path) -> None:
        self._fetcher = fetcher
        self._limits = limits
        self._folder = folder

    def pixels(self, image: ImageRef, recipes: Sequence[Recipe]) -> ImagePixels:
        """A picture resized as a model takes it. It has no digest: no cache may know it."""
        picture = opened(self._data(image), self._limits)
        if all(recipe.draft for recipe in recipes):
            reduce(picture, 2 * max(recipe.side for recipe in recipes))
        with closing(decoded(picture)) as whole:
            return ImagePixels(whole=True, pixels=pixels_of(whole, recipes))

    def shown(self, image: ImageRef) -> Image.Image:
        """A picture for people."""
        picture = opened(self._data(image), self._limits)
        reduce(picture, SHOWN_SIDE)
        whole = decoded(picture)
        whole.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        return whole

    def _data(self, image: ImageRef) -> bytes:
        name = hashlib.sha256(image.model_dump_json().encode()).hexdigest()
        file = self._folder / name
        if not file.exists():
            file.write_bytes(self._fetcher.fetch(image).data)
        return file.read_bytes()
