"""The pictures of cases: each is fetched once, and kept in a folder for the other model."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from PIL import Image

from blipq.contract import ErrorCode, ImageRef
from blipq.errors import InvalidRequest, PermanentError
from blipq.images.decoding import ImageLimits, decoded, opened, reduce
from blipq_worker.images.fetch import Fetcher
from blipq_worker.images.preprocess import pixels_of
from blipq_worker.inference.requests import ImagePixels, Recipe

#: Of all pictures that are kept. Jobs whose pictures would take more are not compared.
MOST_BYTES = 4 * 2**30
#: Of a picture in a report: its longer side.
SHOWN_SIDE = 320


class Pictures:
    """Pictures as models and people see them.

    Raises WorkError, and InvalidRequest where the folder has no room.

    A picture that is replaced meanwhile is another one for nobody: both models see the same bytes.
    """

    def __init__(self, fetcher: Fetcher, limits: ImageLimits, folder: Path) -> None:
        self._fetcher = fetcher
        self._limits = limits
        self._folder = folder
        self._kept = 0

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
            self._keep(file, self._fetcher.fetch(image).data)
        with kept_on_disk(self._folder):
            return file.read_bytes()

    def _keep(self, file: Path, data: bytes) -> None:
        if self._kept + len(data) > MOST_BYTES:
            raise PermanentError(
                ErrorCode.IMAGE_TOO_LARGE,
                f"the pictures before it take {self._kept:,} bytes, of {MOST_BYTES:,} at most",
            )
        with kept_on_disk(self._folder):
            file.write_bytes(data)
        self._kept += len(data)


@contextmanager
def kept_on_disk(folder: object) -> Iterator[None]:
    """OSError as InvalidRequest, whose message has the remedy."""
    try:
        yield
    except OSError as error:
        raise InvalidRequest(
            f"pictures cannot be kept in {folder}: {error.strerror or error}; TMPDIR names a "
            "folder with more room, --jobs fewer jobs"
        ) from error
