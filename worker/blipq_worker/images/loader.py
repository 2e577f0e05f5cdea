"""From a reference to what the model takes: fetched, decoded and preprocessed, or known already."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

from PIL.Image import Image

from blipq.contract import ImageRef
from blipq.images.decoding import ImageLimits, bytes_to_decode, decoded, opened, reduce
from blipq_worker.claims import Lost
from blipq_worker.images.fetch import Fetcher
from blipq_worker.images.memory_budget import Budget
from blipq_worker.images.preprocess import pixels_of
from blipq_worker.inference.interface import Inference
from blipq_worker.inference.requests import Feature, ImagePixels
from blipq_worker.receipt import Stopwatch

#: Places and images remembered: some hundred bytes each.
REMEMBERED = 16_384

#: Entered while a decoder reads the bytes of strangers.
Marked = Callable[[], AbstractContextManager[None]]

#: Of an image: its URI, its version, and which part of the object it is.
_Place = tuple[str, str | None, int | None, int | None]

Key = TypeVar("Key")
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """The most recently used ``size`` entries. Thread-safe."""

    def __init__(self, size: int = REMEMBERED) -> None:
        self._size = size
        self._lock = threading.Lock()  # reading an entry moves it, so reads change the order, too
        self._entries: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """The value of a key, which is the most recently used one now; None if unknown."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def drop(self, keys: Iterable[Key]) -> list[Value]:
        """Forgets entries; what they were."""
        with self._lock:
            return [self._entries.pop(key) for key in keys if key in self._entries]

    def known(self) -> list[Key]:
        """What there is an entry for."""
        with self._lock:
            return list(self._entries)

    def put(self, key: Key, value: Value) -> None:
        """Remembers; the least recently used entry goes."""
        with self._lock:
            self._entries[key] = value
            self._entries.move_to_end(key)
            if len(self._entries) > self._size:
                self._entries.popitem(last=False)


def mark_of(uri: str) -> str:
    """What the ledger calls an image by whose jobs were erased."""
    return hashlib.sha1(uri.encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True)
class _Seen:
    """What lay at a place: its ETag if the store gave one, and the SHA-256 of its bytes."""

    etag: str | None
    digest: str


class Pictures:
    """Loads images under budgets of memory.

    fetching: bytes of downloads held at once. decoding: bytes of pictures held at once.
    timeout_s: longest wait for either. Whether an image may be read is checked with its store each
    time: only the download of bytes that are known, their decoding and the look at them are spared.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        inference: Inference,
        *,
        fetching: Budget,
        decoding: Budget,
        limits: ImageLimits,
        timeout_s: float,
    ) -> None:
        self._fetcher = fetcher
        self._inference = inference
        self._fetching = fetching
        self._decoding = decoding
        self._limits = limits
        self._timeout_s = timeout_s
        self._places: Recent[_Place, _Seen] = Recent()
        self._sizes: Recent[str, tuple[int, int]] = Recent()

    def load(
        self,
        image: ImageRef,
        model: str,
        needed: Collection[Feature],
        watch: Stopwatch,
        lost: threading.Event,
        *,
        spare: bool = True,
        marked: Marked = nullcontext,
    ) -> ImagePixels:
        """The image as the model takes it; without pixels where it knows all that is needed.

        marked: entered while the image is decoded, which may end the process. spare: False has the
        pixels made in any case: the model has forgotten what it knew. Of the image's bytes and its
        full size nothing is kept. Raises WorkError, InferenceError, and Lost once the claim is
        gone.
        """
        place = image.uri, image.version_id, image.offset, image.length
        whole = "patches" in needed
        seen = self._places.get(place)
        etag = None
        if spare and seen is not None and seen.etag is not None:
            etag = seen.etag if self._is_known(model, seen.digest, needed) else None
        with self._fetching.reserve(self._fetcher.max_bytes, timeout=self._timeout_s) as share:
            with watch.stage("fetch"):
                fetched = self._fetcher.fetch(image, unless=etag, sized=share.shrink)
            if lost.is_set():
                raise Lost
            if fetched is None:
                assert seen is not None, "without an ETag all is fetched"
                return self._noted(ImagePixels(seen.digest, whole), model, watch)
            share.shrink(len(fetched.data))
            made = ImagePixels(fetched.digest, whole)
            if not (spare and self._is_known(model, fetched.digest, needed)):
                with marked():
                    picture = opened(fetched.data, self._limits)
                made = self._decoded(picture, model, made, watch, marked)
        # Without an ETag, too: by its place an image is forgotten.
        self._places.put(place, _Seen(fetched.etag, fetched.digest))
        return self._noted(made, model, watch)

    def forget(self, marks: Collection[str]) -> set[str]:
        """Forgets images by the SHA-1 digests of their URIs; the SHA-256 digests of their bytes."""
        if not marks:
            return set()
        gone = [place for place in self._places.known() if mark_of(place[0]) in marks]
        digests = {seen.digest for seen in self._places.drop(gone)}
        self._sizes.drop(digests)
        return digests

    def size_of(self, image: ImagePixels) -> tuple[int, int] | None:
        """Width and height of a loaded image before it was resized, as far as they are known."""
        return self._sizes.get(image.digest or "")

    def _is_known(self, model: str, digest: str, needed: Collection[Feature]) -> bool:
        return all(self._inference.knows(model, [digest], needed))

    def _decoded(
        self, image: Image, model: str, made: ImagePixels, watch: Stopwatch, marked: Marked
    ) -> ImagePixels:
        assert made.digest is not None
        room, size = bytes_to_decode(image), image.size
        recipes = self._inference.model(model).recipes
        if all(recipe.draft for recipe in recipes):
            reduce(image, 2 * max(recipe.side for recipe in recipes))
        reduced = image.size
        with ExitStack() as held:
            with watch.stage("decode_wait"):
                held.enter_context(self._decoding.reserve(room, timeout=self._timeout_s))
            held.enter_context(watch.stage("decode"))
            held.enter_context(marked())
            # The picture is closed before its room goes to the next: whoever else refers to it.
            picture = held.enter_context(closing(decoded(image)))
            self._sizes.put(made.digest, size if picture.size == reduced else size[::-1])
            return ImagePixels(made.digest, made.whole, pixels_of(picture, recipes))

    def _noted(self, image: ImagePixels, model: str, watch: Stopwatch) -> ImagePixels:
        size = self._sizes.get(image.digest or "")
        if size is not None:
            watch.note_size(self._inference.model(model).checkpoint, size)
        return image
