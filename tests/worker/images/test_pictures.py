"""From a reference to what the model takes: an image that is known is not loaded again."""

import hashlib
import io
import json
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from benchmarks.stand_ins import model_info
from PIL import Image
from pytest_httpserver import HTTPServer

from blipq import Client, ErrorCode, ImageRef, Settings
from blipq.contract import Receipt
from blipq.errors import PermanentError
from blipq.images.decoding import ImageLimits
from blipq.s3.storage import Storage
from blipq.ssrf.http import GuardedHttp
from blipq.ssrf.policy import Policy
from blipq_worker.claims import Lost
from blipq_worker.images import loader
from blipq_worker.images.fetch import Fetched, Fetcher
from blipq_worker.images.forgetting import Forgetting
from blipq_worker.images.https import HttpsFetcher
from blipq_worker.images.loader import Pictures, Recent, mark_of
from blipq_worker.images.memory_budget import Budget
from blipq_worker.images.objects import Objects
from blipq_worker.images.preprocess import pixels_of
from blipq_worker.images.s3_access import AccessRefused
from blipq_worker.inference.requests import ImagePixels, ModelInfo, Recipe
from blipq_worker.receipt import DEMO_NOTE, Stopwatch
from conftest import ledger_of, wait_until

PLACE = "s3://blipq-inbox/pictures/a.png"


def png(*size: int, color: str = "black") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, color).save(data, "PNG")
    return data.getvalue()


SMALL, LARGE = png(30, 20), png(300, 20, color="red")


def pixels(data: bytes) -> tuple[bytes, ...]:
    """What a model is sent of a picture."""
    small = Image.open(io.BytesIO(data)).resize((4, 4), Image.Resampling.BICUBIC)
    return (small.tobytes(),)


class Model:
    """An ``Inference`` whose model knows the images that it was shown."""

    info = model_info(checkpoint="demo", recipe=Recipe(4, 3, "demo"))

    def __init__(self) -> None:
        self.known: set[str] = set()

    def model(self, name: str) -> ModelInfo:
        return self.info

    def forget(self, digests: Collection[str]) -> None:
        self.known -= set(digests)

    def knows(self, model: str, digests: Sequence[str], features: Any) -> tuple[bool, ...]:
        return tuple(digest in self.known for digest in digests)


class Watched(Fetcher):
    """Counts what is downloaded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.downloads = self.asked = 0

    def fetch(self, image: ImageRef, **options: Any) -> Fetched | None:  # type: ignore[override]
        self.asked += 1
        fetched: Fetched | None = super().fetch(image, **options)
        self.downloads += fetched is not None
        return fetched


class Parts(SimpleNamespace):
    model: Model
    fetcher: Watched
    pictures: Pictures
    watch: Stopwatch
    decoded: int

    def load(self, uri: str = PLACE, *, spare: bool = True, **fields: Any) -> ImagePixels:
        image = ImageRef(uri=uri, **fields)
        self.watch = Stopwatch(queue_ms=0, worker="w")
        loaded: ImagePixels = self.pictures.load(
            image, "default", {"generation"}, self.watch, self.lost, spare=spare
        )
        if loaded.pixels:
            self.decoded += 1
            self.model.known.add(str(loaded.digest))
        return loaded

    def counts(self) -> tuple[int, int, int]:
        """Requests to S3, downloads, decoded pictures."""
        return self.fetcher.asked, self.fetcher.downloads, self.decoded


@pytest.fixture(scope="module")
def storage(settings: Settings) -> Storage:
    return Storage(settings)


def made(storage: Storage, decoding: Budget | None = None, **options: Any) -> Parts:
    fetcher = Watched(storage, max_bytes=2**20, timeout_s=10, **options)
    model = Model()
    pictures = Pictures(
        fetcher,
        model,  # type: ignore[arg-type]
        fetching=Budget(2**22, most=4),
        decoding=decoding or Budget(2**28, most=4),
        limits=ImageLimits(),
        timeout_s=10,
    )
    return Parts(model=model, fetcher=fetcher, pictures=pictures, lost=threading.Event(), decoded=0)


@pytest.fixture
def parts(storage: Storage) -> Parts:
    storage.put(PLACE, SMALL, content_type="image/png")
    return made(storage)


def refusal(parts: Parts, **fields: Any) -> ErrorCode:
    with pytest.raises(PermanentError) as caught:
        parts.load(**fields)
    return caught.value.code


def test_an_image_is_forgotten_by_the_mark_of_its_uri(parts: Parts, storage: Storage) -> None:
    other = PLACE.replace("a.png", "b.png")
    storage.put(other, LARGE, content_type="image/png")
    parts.load()
    parts.load(other)
    assert parts.pictures.forget({mark_of("s3://other/a.png")}) == set()
    assert parts.pictures.forget({mark_of(PLACE)}) == {hashlib.sha256(SMALL).hexdigest()}
    assert parts.pictures.forget({mark_of(PLACE)}) == set()
    parts.load()
    parts.load(other)
    assert parts.counts() == (4, 3, 2)  # downloaded again, the other one is not


def test_an_image_of_a_web_server_is_forgotten_too(
    storage: Storage, httpserver: HTTPServer
) -> None:
    httpserver.expect_request("/a.png").respond_with_data(SMALL)
    url = httpserver.url_for("/a.png")
    http = GuardedHttp(Policy(allow=("localhost", "127.0.0.1")), timeout_s=10)
    parts = made(storage, https=HttpsFetcher(http, max_bytes=2**20))
    parts.load(url)
    parts.load(url)
    assert parts.counts() == (2, 2, 1), "a web server is asked for all of it each time"
    assert parts.pictures.forget({mark_of(url)}) == {hashlib.sha256(SMALL).hexdigest()}


def test_a_worker_drops_what_it_knows_of_images_whose_jobs_were_erased(
    parts: Parts, apart: Settings
) -> None:
    digest = hashlib.sha256(SMALL).hexdigest()
    with Client(apart) as client:
        forgetting = Forgetting(ledger_of(client), parts.pictures, parts.model)  # type: ignore[arg-type]
        job = client.caption(PLACE)
        parts.load()
        forgetting.tick()
        assert parts.model.known == {digest}
        client.forget([job.id])
        forgetting.tick()
        assert parts.model.known == set()
        parts.model.known.add(digest)  # of another job, later
        forgetting.tick()
        assert parts.model.known == {digest}  # what has been erased is dropped once


def test_what_is_known_is_not_downloaded_or_decoded_again(parts: Parts) -> None:
    first, second = parts.load(), parts.load()
    assert first.pixels == pixels(SMALL)
    assert second.pixels == ()
    assert first.digest == second.digest == hashlib.sha256(SMALL).hexdigest()
    assert parts.counts() == (2, 1, 1), "the store is asked each time"


def test_the_wait_until_another_image_was_decoded_is_in_the_receipt(storage: Storage) -> None:
    storage.put(PLACE, SMALL, content_type="image/png")
    decoding = Budget(2**28, most=1)
    parts = made(storage, decoding)
    with ThreadPoolExecutor(1) as thread:
        with decoding.reserve(1, timeout=10):
            loading = thread.submit(parts.load)
            wait_until(lambda: decoding.waiting == 1, "an image waits")
            time.sleep(0.2)
        loading.result(10)
    receipt = Receipt.model_validate_json(parts.watch.receipt())
    assert receipt.decode_wait_ms is not None
    assert receipt.decode_ms is not None
    assert receipt.decode_wait_ms >= 200
    assert decoding.waiting == 0


def test_what_is_forgotten_is_loaded_again(parts: Parts) -> None:
    parts.load()
    parts.model.known.clear()
    assert parts.load().pixels == pixels(SMALL)
    assert parts.counts() == (2, 2, 2)


def test_pixels_are_made_of_what_is_known_where_the_model_has_forgotten_it(parts: Parts) -> None:
    parts.load()
    assert parts.load(spare=False).pixels == pixels(SMALL)
    assert parts.counts() == (2, 2, 2)


def test_an_object_that_was_replaced_is_loaded_again(parts: Parts, storage: Storage) -> None:
    parts.load()
    storage.put(PLACE, LARGE, content_type="image/png")
    assert parts.load().pixels == pixels(LARGE)


def test_the_same_bytes_at_another_place_are_not_decoded_again(
    parts: Parts, storage: Storage
) -> None:
    parts.load()
    storage.put("s3://blipq-inbox/pictures/b.png", SMALL, content_type="image/png")
    assert parts.load("s3://blipq-inbox/pictures/b.png").pixels == ()
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
    parts.fetcher._objects = Objects(Storage(Settings.model_validate(wrong)))
    with pytest.raises(AccessRefused):
        parts.load()


def test_bytes_that_are_known_open_no_other_bucket(parts: Parts, storage: Storage) -> None:
    known = parts.load()
    other = made(storage, allowed_buckets=["elsewhere"])
    other.model.known.add(str(known.digest))
    assert refusal(other) is ErrorCode.IMAGE_FORBIDDEN
    assert other.fetcher.downloads == 0


def test_an_etag_that_was_asked_for_holds_for_what_is_known(parts: Parts, storage: Storage) -> None:
    parts.load()
    etag = storage.client.head_object(Bucket="blipq-inbox", Key="pictures/a.png")["ETag"]
    assert parts.load(etag=etag).pixels == ()
    assert parts.load(etag=etag.strip('"')).pixels == ()
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


def test_a_photo_that_is_loaded_again_for_its_job_is_noted_once(
    parts: Parts, storage: Storage
) -> None:
    """The model may have forgotten it meanwhile."""
    storage.put(PLACE, LARGE, content_type="image/png")
    watch, place = Stopwatch(queue_ms=0, worker="w"), ImageRef(uri=PLACE)
    for spare in (True, False):
        parts.pictures.load(place, "default", {"generation"}, watch, parts.lost, spare=spare)
    assert json.loads(watch.receipt())["note"] == DEMO_NOTE


def test_a_claim_that_is_lost_decodes_nothing(parts: Parts) -> None:
    parts.lost.set()
    with pytest.raises(Lost):
        parts.load()
    assert parts.fetcher.downloads == 1
    assert not parts.pictures._sizes._entries


def test_what_is_remembered_is_bounded() -> None:
    recent: Recent[int, int] = Recent(2)
    recent.put(1, 1)
    recent.put(2, 2)
    recent.get(1)
    recent.put(3, 3)
    assert [recent.get(key) for key in (1, 2, 3)] == [1, None, 3]


@pytest.mark.parametrize("draft", [False, True])
def test_a_large_photo_is_decoded_smaller_where_the_model_allows_it(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, draft: bool
) -> None:
    """What a job hears of the photo's size is as it was stored, but upright."""
    photo = Image.linear_gradient("L").convert("RGB").resize((2400, 1800))
    exif = photo.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    data = io.BytesIO()
    photo.save(data, "JPEG", quality=60, exif=exif)
    storage.put(PLACE, data.getvalue(), content_type="image/jpeg")
    parts = made(storage)
    parts.model.info = model_info(checkpoint="demo", recipe=Recipe(4, 3, "demo", draft))
    seen: list[tuple[int, int]] = []

    def watch(image: Image.Image, recipes: Any) -> tuple[memoryview, ...]:
        seen.append(image.size)
        return pixels_of(image, recipes)

    monkeypatch.setattr(loader, "pixels_of", watch)
    loaded = parts.load()
    assert seen == [(225, 300) if draft else (1800, 2400)]
    expected = photo.transpose(Image.Transpose.ROTATE_270).resize((4, 4), Image.Resampling.BICUBIC)
    sent = np.frombuffer(loaded.pixels[0], "u1").astype(int)
    assert np.abs(sent - np.asarray(expected).ravel()).max() <= 3
    assert list(parts.pictures._sizes._entries.values()) == [(1800, 2400)]


def test_two_parts_of_one_object_are_two_pictures(parts: Parts, storage: Storage) -> None:
    one, two = png(8, 8), png(8, 8, color="red")
    storage.put(PLACE, one + two, content_type="application/x-tar")
    etag = storage.client.head_object(Bucket="blipq-inbox", Key="pictures/a.png")["ETag"]
    places = ({"offset": 0, "length": len(one)}, {"offset": len(one), "length": len(two)})
    digests = [parts.load(etag=etag, **place).digest for place in places]
    assert digests == [hashlib.sha256(data).hexdigest() for data in (one, two)]
    assert [parts.load(etag=etag, **place).digest for place in places] == digests
    assert parts.counts() == (4, 2, 2)
