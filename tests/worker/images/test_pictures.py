"""From a reference to what the model takes: an image that is known is not loaded again."""

import hashlib
import io
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from blipq import ErrorCode, ImageRef, Settings
from blipq.errors import PermanentError
from blipq.images.decoding import ImageLimits
from blipq.s3.storage import Storage
from blipq_worker.blip2 import Pixels
from blipq_worker.claims import Lost
from blipq_worker.images.fetch import Fetched, Fetcher
from blipq_worker.images.loader import Pictures, Recent
from blipq_worker.images.memory_budget import Budget
from blipq_worker.images.s3_access import AccessRefused
from blipq_worker.receipt import DEMO_NOTE, Stopwatch

PLACE = "s3://blipq-inbox/pictures/a.png"


def png(*size: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size).save(data, "PNG")
    return data.getvalue()


SMALL, LARGE = png(30, 20), png(300, 20)


class Model:
    """Knows the features of the images it has decoded."""

    info = SimpleNamespace(checkpoint="demo")

    def __init__(self) -> None:
        self.decoded: list[tuple[int, int]] = []
        self.known: dict[str, Pixels] = {}

    def preprocess(self, image: Image.Image, *, digest: str, whole: bool) -> Pixels:
        self.decoded.append(image.size)
        self.known[digest] = Pixels(None, digest=digest)
        return Pixels(image.size, digest=digest, whole=whole)  # type: ignore[arg-type]

    def recall(self, digest: str, needed: Any) -> Pixels | None:
        return self.known.get(digest)


class Watched(Fetcher):
    """Counts what is downloaded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.downloads = self.asked = 0

    def fetch(self, image: ImageRef, *, unless: str | None = None) -> Fetched | None:
        self.asked += 1
        fetched = super().fetch(image, unless=unless)
        self.downloads += fetched is not None
        return fetched


class Parts(SimpleNamespace):
    model: Model
    fetcher: Watched
    pictures: Pictures
    watch: Stopwatch

    def load(self, uri: str = PLACE, **fields: Any) -> Pixels:
        image = ImageRef(uri=uri, **fields)
        self.watch = Stopwatch(queue_ms=0, worker="w")
        return self.pictures.load(  # type: ignore[no-any-return]
            image, self.model, {"generation"}, self.watch, self.lost
        )

    def counts(self) -> tuple[int, int, int]:
        """Requests to S3, downloads, decoded pictures."""
        return self.fetcher.asked, self.fetcher.downloads, len(self.model.decoded)


@pytest.fixture(scope="module")
def storage(settings: Settings) -> Storage:
    return Storage(settings)


def made(storage: Storage, **options: Any) -> Parts:
    fetcher = Watched(storage, max_bytes=2**20, timeout_s=10, **options)
    pictures = Pictures(
        fetcher,
        fetching=Budget(2**22, most=4),
        decoding=Budget(2**28, most=4),
        limits=ImageLimits(),
        timeout_s=10,
    )
    return Parts(model=Model(), fetcher=fetcher, pictures=pictures, lost=threading.Event())


@pytest.fixture
def parts(storage: Storage) -> Parts:
    storage.put(PLACE, SMALL, content_type="image/png")
    return made(storage)


def refusal(parts: Parts, **fields: Any) -> ErrorCode:
    with pytest.raises(PermanentError) as caught:
        parts.load(**fields)
    return caught.value.code


def test_what_is_known_is_not_downloaded_or_decoded_again(parts: Parts) -> None:
    first, second = parts.load(), parts.load()
    assert first.generation == (30, 20)
    assert second.generation is None
    assert first.digest == second.digest == hashlib.sha256(SMALL).hexdigest()
    assert parts.counts() == (2, 1, 1), "the store is asked each time"


def test_what_is_forgotten_is_loaded_again(parts: Parts) -> None:
    parts.load()
    parts.model.known.clear()
    assert parts.load().generation == (30, 20)
    assert parts.counts() == (2, 2, 2)


def test_an_object_that_was_replaced_is_loaded_again(parts: Parts, storage: Storage) -> None:
    parts.load()
    storage.put(PLACE, LARGE, content_type="image/png")
    assert parts.load().generation == (300, 20)


def test_the_same_bytes_at_another_place_are_not_decoded_again(
    parts: Parts, storage: Storage
) -> None:
    parts.load()
    storage.put("s3://blipq-inbox/pictures/b.png", SMALL, content_type="image/png")
    assert parts.load("s3://blipq-inbox/pictures/b.png").generation is None
    assert parts.counts() == (2, 2, 1)


def test_an_object_that_was_deleted_is_not_found_though_it_is_known(
    parts: Parts, storage: Storage
) -> None:
    parts.load()
    storage.client.delete_object(Bucket="blipq-inbox", Key="pictures/a.png")
    assert refusal(parts) is ErrorCode.IMAGE_NOT_FOUND


def test_what_one_may_not_read_is_not_answered_though_it_is_known(
    parts: Parts, settings: Settings
) -> None:
    """The same worker, after its rights have been taken away."""
    parts.load()
    wrong = settings.model_dump() | {"s3_secret_access_key": "wrong"}
    parts.fetcher._storage = Storage(Settings.model_validate(wrong))
    with pytest.raises(AccessRefused):
        parts.load()


def test_bytes_that_are_known_open_no_other_bucket(parts: Parts, storage: Storage) -> None:
    known = parts.load()
    other = made(storage, allowed_buckets=["elsewhere"])
    other.model.known[str(known.digest)] = known
    assert refusal(other) is ErrorCode.IMAGE_FORBIDDEN
    assert other.fetcher.downloads == 0


def test_an_etag_that_was_asked_for_holds_for_what_is_known(parts: Parts, storage: Storage) -> None:
    parts.load()
    etag = storage.client.head_object(Bucket="blipq-inbox", Key="pictures/a.png")["ETag"]
    assert parts.load(etag=etag).generation is None
    assert parts.load(etag=etag.strip('"')).generation is None
    assert parts.fetcher.downloads == 1
    assert refusal(parts, etag='"0123456789abcdef0123456789abcdef"') is ErrorCode.IMAGE_CHANGED
    storage.put(PLACE, LARGE, content_type="image/png")
    assert refusal(parts, etag=etag) is ErrorCode.IMAGE_CHANGED


def test_a_photo_for_the_demo_model_is_noted_though_it_is_known(
    parts: Parts, storage: Storage
) -> None:
    storage.put(PLACE, LARGE, content_type="image/png")
    for _ in range(2):
        parts.load()
        assert DEMO_NOTE in parts.watch.receipt()
    assert parts.fetcher.downloads == 1


def test_a_claim_that_is_lost_decodes_nothing(parts: Parts) -> None:
    parts.lost.set()
    with pytest.raises(Lost):
        parts.load()
    assert parts.model.decoded == []


def test_what_is_remembered_is_bounded() -> None:
    recent: Recent[int, int] = Recent(2)
    recent.put(1, 1)
    recent.put(2, 2)
    recent.get(1)
    recent.put(3, 3)
    assert [recent.get(key) for key in (1, 2, 3)] == [1, None, 3]
