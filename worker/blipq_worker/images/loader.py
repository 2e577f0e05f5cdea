"""From a reference to what the model takes: fetched, decoded and preprocessed, or known already."""

import threading
from collections import OrderedDict
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass
from typing import Generic, TypeVar

from PIL.Image import Image

from blipq.contract import ImageRef
from blipq.images.decoding import ImageLimits, bytes_to_decode, decoded, opened
from blipq_worker.blip2 import Blip2, Feature, Pixels
from blipq_worker.claims import Lost
from blipq_worker.images.fetch import Fetcher
from blipq_worker.images.memory_budget import Budget
from blipq_worker.receipt import Stopwatch
from blipq_worker.seam.requests import Feature

#: Places and images remembered: some hundred bytes each.
REMEMBERED = 16_384

Key = TypeVar("Key")
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """The most recently used ``size`` entries. Thread-safe."""

    def __init__(self, size: int = REMEMBERED) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._entries: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """What is remembered."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: Key, value: Value) -> None:
        """Remembers; the least recently used entry goes."""
        with self._lock:
            self._entries[key] = value
            self._entries.move_to_end(key)
            if len(self._entries) > self._size:
                self._entries.popitem(last=False)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What lay at a place: its ETag, and the SHA-256 of its bytes."""

    etag: str
    digest: str


class Pictures:
    """Loads images under budgets of memory.

    fetching: bytes of downloads held at once. decoding: bytes of pictures held at once.
    timeout_s: longest wait for either. Whether an image may be read is asked of its store each
    time: only the download of bytes that are known, their decoding and the look at them are spared.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        *,
        fetching: Budget,
        decoding: Budget,
        limits: ImageLimits,
        timeout_s: float,
    ) -> None:
        self._fetcher = fetcher
        self._fetching = fetching
        self._decoding = decoding
        self._limits = limits
        self._timeout_s = timeout_s
        self._places: Recent[tuple[str, str | None], _Seen] = Recent()
        self._sizes: Recent[str, tuple[int, int]] = Recent()

    def load(
        self,
        image: ImageRef,
        model: Blip2,
        needed: Collection[Feature],
        watch: Stopwatch,
        lost: threading.Event,
    ) -> Pixels:
        """The image's pixels, or the needed features where they are known.

        Of its bytes and its full size nothing is kept. Raises WorkError, and Lost once the claim is
        gone.
        """
        place = image.uri, image.version_id
        seen = self._places.get(place)
        # Taken before the store is asked: what is held now cannot be forgotten meanwhile.
        known = model.recall(seen.digest, needed) if seen is not None else None
        etag = seen.etag if seen is not None and known is not None else None
        with self._fetching.reserve(self._fetcher.max_bytes, timeout=self._timeout_s) as share:
            with watch.stage("fetch"):
                fetched = self._fetcher.fetch(image, unless=etag)
            if lost.is_set():
                raise Lost
            if fetched is None:
                assert known is not None, "without an ETag all is fetched"
                return self._noted(known, model, watch)
            share.shrink(len(fetched.data))
            digest = fetched.digest
            known = model.recall(digest, needed)
            if known is None:
                picture = opened(fetched.data, self._limits)
                known = self._decoded(picture, model, digest, "patches" in needed, watch)
        if fetched.etag is not None:
            self._places.put(place, _Seen(fetched.etag, digest))
        return self._noted(known, model, watch)

    def _decoded(
        self, image: Image, model: Blip2, digest: str, whole: bool, watch: Stopwatch
    ) -> Pixels:
        room = bytes_to_decode(image)
        # The picture is closed before its room goes to the next: whoever else refers to it.
        with (
            self._decoding.reserve(room, timeout=self._timeout_s),
            watch.stage("decode"),
            closing(decoded(image)) as picture,
        ):
            self._sizes.put(digest, picture.size)
            return model.preprocess(picture, digest=digest, whole=whole)

    def _noted(self, pixels: Pixels, model: Blip2, watch: Stopwatch) -> Pixels:
        size = self._sizes.get(pixels.digest or "")
        if size is not None:
            watch.note_size(model.info.checkpoint, size)
        return pixels
