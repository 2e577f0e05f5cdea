"""A job's life on the worker, with everything real but the model."""

import hashlib
import io
import json
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import redis
from benchmarks.stand_ins import WithoutSessions, model_info
from botocore.exceptions import ClientError
from PIL import Image

from blipq import (
    CaptionRequest,
    Client,
    EmbedRequest,
    ErrorCode,
    IndexEntry,
    Job,
    JobInfo,
    Kind,
    Options,
    Settings,
    Submission,
)
from blipq.client.backend import Backend, Services
from blipq.errors import PermanentError, TransientError
from blipq.images.decoding import ImageLimits
from blipq.index.store import Indexes
from blipq.ledger.connection import connect
from blipq.ledger.worker import MAX_CRASHES, MAX_RETRIES, Claim, WorkerLedger
from blipq.s3.refusals import Refusal, S3Refused, S3Unavailable
from blipq.s3.storage import Storage
from blipq_worker.blip2 import (
    EmbedItem,
    ExplainItem,
    GeneratedText,
    GenerateItem,
    MatchItem,
    Pixels,
    RerankItem,
)
from blipq_worker.claims import Held
from blipq_worker.engine.backend import Engine
from blipq_worker.images.fetch import Fetcher
from blipq_worker.images.loader import Pictures
from blipq_worker.images.memory_budget import Budget
from blipq_worker.images.s3_access import AccessRefused, S3Access
from blipq_worker.index.writer import IndexWriter
from blipq_worker.inference.local import LocalInference
from blipq_worker.inference.requests import ImagePixels, Recipe
from blipq_worker.jobs.claiming import Claiming
from blipq_worker.jobs.errors import HandBack, JobFailedTask
from blipq_worker.jobs.execution import Execution
from blipq_worker.jobs.foreign import ForeignMessages
from blipq_worker.jobs.index_asker import IndexAccess
from blipq_worker.jobs.outcomes import Outcomes
from blipq_worker.jobs.outputs import Outputs
from blipq_worker.jobs.quarantine import Gate
from blipq_worker.jobs.runner import Runner
from blipq_worker.messages.envelope import Malformed
from blipq_worker.process.metrics import WorkerMetrics
from blipq_worker.process.usage import Usage
from blipq_worker.settings import WorkerSettings
from conftest import ledger_of, wait_until

TINY = WorkerSettings(
    retry_backoff_s=0.001,
    job_timeout_s=20,
    decode_threads=1,
    allowed_outputs=("blipq-outputs",),
)


class Model:
    """Says how large the picture is. ``before`` is called before each answer."""

    info = model_info(
        checkpoint="fake",
        default_prompt="a photo of",
        retrieval_checkpoint="fake-itm",
        retrieval_revision="1",
    )

    def __init__(self) -> None:
        self.before: Callable[[], object] = lambda: None
        self.known: dict[str, tuple[int, int]] = {}

    def on_step(self, call: Any) -> None:
        """It has no steps."""

    def on_encode(self, call: Any) -> None:
        self.encoded = call

    def pixels(self, views: Any, *, digest: str, whole: bool) -> Pixels:
        size = tuple(views[0][:2])  # see ``sizes``
        return Pixels(size, digest=digest, whole=whole)  # type: ignore[arg-type]

    def recall(self, digest: str, needed: Any) -> Pixels | None:
        size = self.known.get(digest)
        return None if size is None else Pixels(size, digest=digest)  # type: ignore[arg-type]

    def check(self, item: Any) -> None:
        if "too long" in str(getattr(item, "prompts", getattr(item, "text", None))):
            raise PermanentError(ErrorCode.INVALID_REQUEST, "the text is too long")

    def is_long(self, item: Any) -> bool:
        """None is."""
        return False

    def generate(self, items: list[GenerateItem], wanted: Any) -> list[list[list[GeneratedText]]]:
        self.before()
        self.encoded([item.pixels for item in items if item.pixels.digest not in self.known], 1.0)
        said = ["{} x {}".format(*item.pixels.generation) for item in items]
        return [
            [[GeneratedText(text, 3)] for _ in item.prompts]
            for text, item in zip(said, items, strict=True)
        ]

    def match(self, items: list[MatchItem]) -> list[list[float]]:
        self.before()
        return [[1 / len(text) for text in item.texts] for item in items]

    def explain(self, items: list[ExplainItem]) -> list[Any]:
        """Everywhere alike."""
        return [
            {
                str(number): np.ones((1 + len(text.split()), 4, 4), dtype=np.float32)
                for number, text in enumerate(item.texts)
            }
            for item in items
        ]

    def embed(self, items: list[EmbedItem]) -> list[Any]:
        self.before()
        sizes = [item.pixels.generation if item.pixels else (0, 0) for item in items]
        return [
            {
                "size": np.array(size, dtype=np.float32),
                "image_embeds_proj": _direction(size[0]),
                "text_embeds_proj": _direction(len(item.text or "")),
            }
            for size, item in zip(sizes, items, strict=True)
        ]

    def rerank(self, items: list[RerankItem]) -> list[tuple[float, float]]:
        """The higher the picture, the better it matches."""
        self.before()
        heights = [float(item.pixels.generation[1]) for item in items]
        return [(height, height / 100) for height in heights]


def sizes(image: Image.Image, recipes: Sequence[Recipe]) -> tuple[memoryview, ...]:
    """Pixels of which the first two tell how large the picture was."""
    return tuple(memoryview(bytes(image.size).ljust(recipe.size, b"0")) for recipe in recipes)


def _direction(number: int) -> Any:
    """(32, 256): 32 times the same direction, near to that of near numbers."""
    return np.tile(np.eye(256)[0] * 30 + np.eye(256)[1] * number, (32, 1)) / np.hypot(30, number)


class Parts(SimpleNamespace):
    """A runner and what it is made of."""

    client: Client
    ledger: WorkerLedger
    model: Model
    held: Held
    gate: Gate
    metrics: WorkerMetrics
    runner: Runner
    execution: Execution
    outcomes: Outcomes
    foreign: ForeignMessages
    pictures: Pictures
    engine: Engine
    indexes: Indexes

    def run(self, job: Job[Any]) -> JobInfo:
        """Runs the message of a job; what became of it."""
        self.runner.run(Kind(job.info().kind), job.id)
        return job.info()

    def fail(self, job: Job[Any]) -> JobInfo:
        """Runs a job that fails."""
        with pytest.raises(JobFailedTask):
            self.run(job)
        return job.info()


@pytest.fixture(scope="module")
def storage(settings: Settings) -> Storage:
    """Making an S3 client takes longer than any of these tests."""
    return Storage(settings)


class Sharing(Backend):
    """The usual services with this storage."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def services(self, settings: Settings, client: str) -> Services:
        services = super().services(settings, client)
        services.storage = self.storage
        return services


@pytest.fixture
def parts(
    apart: Settings, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Parts]:
    monkeypatch.setattr("blipq_worker.images.loader.pixels_of", sizes)
    # The model knows no sessions: all of its texts are written in batches.
    monkeypatch.setattr("blipq_worker.engine.backend.Batcher", WithoutSessions)
    with Client(apart, backend=Sharing(storage)) as client:
        ledger = ledger_of(client)
        model, held, gate, metrics = Model(), Held(), Gate(), WorkerMetrics()
        engine = Engine(
            {"default": model},  # type: ignore[dict-item]
            max_batch_size=4,
            batch_wait_timeout_s=0,
            max_waiting=8,
        )
        engine.batcher.start()
        indexes = Indexes(Settings(indexes=str(tmp_path / "indexes")))
        writer = IndexWriter(indexes, max_waiting=8)
        writer.start()
        inference = LocalInference(engine)
        pictures = Pictures(
            Fetcher(client.storage, max_bytes=2**20, timeout_s=10),
            inference,
            fetching=Budget(TINY.fetch_memory_bytes, most=4),
            decoding=Budget(TINY.decode_memory_bytes, most=TINY.decode_threads),
            limits=ImageLimits(),
            timeout_s=10,
        )
        foreign = ForeignMessages(ledger, metrics)
        outcomes = Outcomes(
            ledger,
            client.broker,
            held,
            metrics,
            S3Access(client.storage),
            usage=Usage(),
            retry_backoff_s=TINY.retry_backoff_s,
        )
        claiming = Claiming(
            ledger,
            held,
            foreign,
            outcomes,
            worker="w1",
            lease_s=TINY.lease_s,
            served=["default"],
            stopping=lambda: gate.closed,
        )
        execution = Execution(
            inference,
            pictures,
            Outputs(client.storage, ledger, TINY),
            IndexAccess(indexes, writer),
            held,
            timeout_s=TINY.job_timeout_s,
        )
        yield Parts(
            client=client,
            ledger=ledger,
            model=model,
            held=held,
            gate=gate,
            metrics=metrics,
            runner=Runner(claiming, execution, outcomes, gate),
            execution=execution,
            outcomes=outcomes,
            foreign=foreign,
            pictures=pictures,
            engine=engine,
            indexes=indexes,
        )
        writer.close()
        engine.batcher.close(timeout=10)


@pytest.fixture(scope="module")
def picture() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (30, 20)).save(data, "PNG")
    return data.getvalue()


# --- what goes well -------------------------------------------------------------------------------


def test_a_caption_is_stored_with_its_receipt(parts: Parts, picture: bytes) -> None:
    info = parts.run(parts.client.caption(picture))
    assert (info.status, info.attempts) == ("succeeded", 1)
    assert info.result.text == "30 x 20"
    assert b'kind="caption",model="default",outcome="succeeded"} 1.0' in parts.metrics.page()
    receipt = info.receipt
    assert (receipt.worker, receipt.checkpoint, receipt.dtype) == ("w1", "fake", "float32")
    assert (receipt.tokens, receipt.batch_size) == (3, 1)
    times = (receipt.queue_ms, receipt.fetch_ms, receipt.decode_ms, receipt.generate_ms)
    assert all(time is not None and time >= 0 for time in times)
    assert parts.held.claims() == []


def test_the_receipt_says_what_looking_took_and_whether_the_image_was_known(
    parts: Parts, picture: bytes
) -> None:
    receipt = parts.run(parts.client.caption(picture)).receipt
    assert (receipt.vision_ms, receipt.cache_hit) == (1.0, False)
    parts.model.known[hashlib.sha256(picture).hexdigest()] = (30, 20)
    again = parts.run(parts.client.caption(picture, "again")).receipt
    assert (again.vision_ms, again.cache_hit, again.decode_ms) == (0, True, None)
    text = parts.run(parts.client.embed(text="a cat")).receipt
    assert (text.vision_ms, text.cache_hit) == (None, None)


def forgetful(parts: Parts) -> list[bool]:
    """Has the model forget all images after each was loaded; whether loads brought pixels."""
    loaded: list[bool] = []

    def forget(image: ImagePixels) -> None:
        parts.model.known.clear()
        loaded.append(bool(image.pixels))

    meanwhile(parts, forget)
    return loaded


def meanwhile(parts: Parts, call: Callable[[ImagePixels], object]) -> None:
    """Calls with each image between its loading and its item."""
    load = parts.pictures.load

    def loaded(*args: Any, **kwargs: Any) -> ImagePixels:
        image = load(*args, **kwargs)
        call(image)
        return image

    parts.pictures.load = loaded  # type: ignore[method-assign]


def test_an_image_that_the_model_forgets_meanwhile_is_sent_with_its_pixels(
    parts: Parts, picture: bytes
) -> None:
    parts.run(parts.client.caption(picture))
    parts.model.known[hashlib.sha256(picture).hexdigest()] = (30, 20)
    loaded = forgetful(parts)
    info = parts.run(parts.client.caption(picture, "again"))
    assert loaded == [False, True]
    assert (info.result.text, info.attempts) == ("30 x 20", 1)
    assert (info.receipt.vision_ms, info.receipt.cache_hit) == (1.0, False)
    assert info.receipt.decode_ms is not None


def test_all_parts_of_a_description_outlive_a_forgotten_image(parts: Parts, picture: bytes) -> None:
    parts.model.known[hashlib.sha256(picture).hexdigest()] = (30, 20)
    loaded = forgetful(parts)
    info = parts.run(parts.client.describe(picture, questions=["why?"], texts=["ab"], embed=True))
    assert loaded[:2] == [False, True]
    assert info.result.caption.text == "30 x 20"
    assert info.result.embed["size"].tolist() == [30, 20]


def test_a_job_is_about_one_image_however_often_that_is_fetched(
    parts: Parts, picture: bytes
) -> None:
    put = parts.client.storage.client.put_object
    bucket, key = "blipq-inbox", f"{uuid.uuid4()}.png"
    put(Bucket=bucket, Key=key, Body=picture)
    parts.model.known[hashlib.sha256(picture).hexdigest()] = (30, 20)

    def replace_it(image: ImagePixels) -> None:
        if not image.pixels:
            parts.model.known.clear()
            put(Bucket=bucket, Key=key, Body=png(50, 40))

    meanwhile(parts, replace_it)
    job = parts.client.caption(f"s3://{bucket}/{key}")
    info = parts.run(job)
    assert (info.status, info.last_error.code) == ("queued", "image_changed")
    due_again(parts)
    assert parts.run(job).result.text == "50 x 40"


def together(parts: Parts, jobs: list[Job[Any]], items: int = 1) -> list[JobInfo]:
    """Runs jobs side by side: the model answers when all of them wait for it.

    items: what each asks of the model at least. A job starts when those before it have asked
    that much: which of two equal items came first is no matter of luck.
    """
    going = threading.Event()
    parts.model.before = lambda: going.wait(20)
    batcher, asked = parts.engine.batcher, []
    submit = batcher.submit

    def count(*arguments: Any, **options: Any) -> Any:
        asked.append(submit(*arguments, **options))
        return asked[-1]

    batcher.submit = count  # type: ignore[method-assign]
    with ThreadPoolExecutor(len(jobs)) as threads:
        ran = []
        for job in jobs:
            before = len(asked)
            ran.append(threads.submit(parts.run, job))
            wait_until(lambda: len(asked) >= before + items, "a job to wait")  # noqa: B023
        going.set()
        return [each.result(20) for each in ran]


def test_equal_jobs_in_flight_are_computed_once(parts: Parts, picture: bytes) -> None:
    infos = together(parts, [parts.client.caption(picture) for _ in range(3)])
    assert [info.result.text for info in infos] == ["30 x 20"] * 3
    assert [info.receipt.shared for info in infos] == [None, True, True]
    assert [info.receipt.tokens for info in infos] == [3, None, None]
    assert all(info.receipt.checkpoint == "fake" for info in infos)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a"},
        {"generation": {"num_beams": 2}},
    ],
)
def test_jobs_that_differ_are_computed_each(
    parts: Parts, picture: bytes, fields: dict[str, Any]
) -> None:
    infos = together(
        parts, [parts.client.caption(picture), parts.client.caption(picture, **fields)]
    )
    assert [info.receipt.shared for info in infos] == [None, None]


def test_a_job_of_several_parts_is_shared_where_all_of_them_are(
    parts: Parts, picture: bytes
) -> None:
    client = parts.client
    infos = together(parts, [client.caption(picture), client.describe(picture, embed=True)])
    assert [info.receipt.shared for info in infos] == [None, None]
    infos = together(parts, [client.describe(picture, embed=True) for _ in range(2)], items=2)
    assert [info.receipt.shared for info in infos] == [None, True]


def test_samples_are_drawn_for_each_job(parts: Parts, picture: bytes) -> None:
    sampled = {"do_sample": True, "num_beams": 2}
    infos = together(parts, [parts.client.caption(picture, generation=sampled) for _ in range(2)])
    assert [info.receipt.shared for info in infos] == [None, None]


def test_answers_come_in_the_order_of_the_questions(parts: Parts, picture: bytes) -> None:
    info = parts.run(parts.client.vqa(picture, ["why?", "how?"]))
    assert [answer.question for answer in info.result.answers] == ["why?", "how?"]


def test_turns_that_there_is_no_room_for_are_left_out_and_told(
    parts: Parts, picture: bytes
) -> None:
    history = [("a", "too long"), ("b", "short")]
    info = parts.run(parts.client.vqa(picture, "why?", history=history))
    assert info.status == "succeeded"
    assert info.receipt.note == "1 of 2 earlier turns were left out: there was no room"


def test_turns_that_no_message_to_the_engine_could_carry_are_left_out_too(
    parts: Parts, picture: bytes
) -> None:
    """Some tokenizers make one token of thousands of characters."""
    history = [("a" * 4000, "b" * 4000)] * 20
    info = parts.run(parts.client.vqa(picture, "why?", history=history))
    assert info.status == "succeeded"
    assert info.receipt.note == "16 of 20 earlier turns were left out: there was no room"


def test_a_question_that_alone_is_too_long_is_an_invalid_request(
    parts: Parts, picture: bytes
) -> None:
    info = parts.fail(parts.client.vqa(picture, "too long", history=[("a", "b")]))
    assert info.error.code == "invalid_request"


def test_a_description_has_several_parts(parts: Parts, picture: bytes) -> None:
    job = parts.client.describe(picture, questions=["why?", "how?"], texts=["ab", "a"])
    info = parts.run(job)
    assert info.result.caption.text == "30 x 20"
    assert len(info.result.vqa.answers) == 2
    assert [scored.score for scored in info.result.match.scores] == [0.5, 1.0]
    receipt = info.receipt
    assert receipt.tokens == 9
    assert receipt.generate_ms is not None
    assert receipt.match_ms is not None


def test_texts_are_scored(parts: Parts, picture: bytes) -> None:
    info = parts.run(parts.client.match(picture, ["ab", "a"]))
    assert [scored.score for scored in info.result.scores] == [0.5, 1.0]


def test_features_of_an_image_are_stored(parts: Parts, picture: bytes) -> None:
    info = parts.run(parts.client.embed(picture))
    assert info.result["size"].tolist() == [30, 20]
    assert info.receipt.embed_ms >= 0


def test_features_of_a_text_need_no_image(parts: Parts) -> None:
    info = parts.run(parts.client.embed(text="a cat"))
    assert info.result["size"].tolist() == [0, 0]
    assert info.receipt.fetch_ms is None


def test_a_text_that_is_too_long_to_embed_is_an_invalid_request(parts: Parts) -> None:
    info = parts.fail(parts.client.embed(text="too long"))
    assert (info.error.code, info.error.message) == ("invalid_request", "the text is too long")


# --- search ---------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def pictures(parts: Parts) -> dict[str, str]:
    """Three pictures in the index "sizes", their URIs by id."""
    uris = {}
    for id, size in {"a": (10, 50), "b": (20, 70), "c": (30, 60)}.items():
        entry = {"name": "sizes", "id": id, "metadata": {"even": str(size[0] == 20)}}
        uris[id] = parts.client.storage.upload(png(*size)).uri
        info = parts.run(parts.client.embed(uris[id], index=entry))
        assert (info.result.indexed, info.result.arrays) == (id, {})
        assert info.receipt.index_ms > 0
    return uris


def test_the_nearest_are_looked_at_again_and_the_rest_follow(
    parts: Parts, pictures: dict[str, str]
) -> None:
    ten = "x" * 10
    by_cosine = parts.run(parts.client.search("sizes", ten, rerank=0)).result.hits
    assert [(hit.id, hit.itm) for hit in by_cosine] == [("a", None), ("b", None), ("c", None)]
    assert by_cosine[0].itc == pytest.approx(1, abs=1e-3)
    info = parts.run(parts.client.search("sizes", ten, rerank=2))
    assert [(hit.id, hit.itm) for hit in info.result.hits] == [("b", 0.7), ("a", 0.5), ("c", None)]
    assert info.result.hits[0].uri == pictures["b"]
    assert (info.receipt.rerank_ms > 0, info.result.skipped) == (True, ())
    best = parts.run(parts.client.search("sizes", ten, top_k=1)).result
    assert [hit.id for hit in best.hits] == ["b"]


def test_an_image_is_searched_by_without_looking_again(
    parts: Parts, pictures: dict[str, str]
) -> None:
    result = parts.run(parts.client.search("sizes", image=png(29, 9), top_k=2)).result
    assert [(hit.id, hit.itm) for hit in result.hits] == [("c", None), ("b", None)]


def test_an_image_of_an_index_that_is_forgotten_meanwhile_is_sent_with_its_pixels(
    parts: Parts, pictures: dict[str, str]
) -> None:
    for size in ((10, 50), (20, 70), (30, 60)):
        parts.model.known[hashlib.sha256(png(*size)).hexdigest()] = size
    loaded = forgetful(parts)
    info = parts.run(parts.client.search("sizes", "x" * 10, rerank=2))
    assert [(hit.id, hit.itm) for hit in info.result.hits] == [("b", 0.7), ("a", 0.5), ("c", None)]
    assert False in loaded
    assert True in loaded


def test_an_image_of_an_index_that_is_forgotten_and_gone_meanwhile_is_skipped(
    parts: Parts, pictures: dict[str, str]
) -> None:
    parts.model.known[hashlib.sha256(png(20, 70)).hexdigest()] = (20, 70)
    bucket, key = pictures["b"].removeprefix("s3://").split("/")

    def lose_b(image: ImagePixels) -> None:
        if not image.pixels:
            parts.model.known.clear()
            parts.client.storage.client.delete_object(Bucket=bucket, Key=key)

    meanwhile(parts, lose_b)
    result = parts.run(parts.client.search("sizes", "x" * 10)).result
    assert [hit.id for hit in result.hits] == ["c", "a"]
    assert [(each.id, each.code) for each in result.skipped] == [("b", "image_not_found")]


def test_hits_have_the_metadata_that_the_filter_asks_for(
    parts: Parts, pictures: dict[str, str]
) -> None:
    result = parts.run(parts.client.search("sizes", "x", filter={"even": ["True", "x"]})).result
    assert [(hit.id, hit.metadata) for hit in result.hits] == [("b", {"even": "True"})]


def test_images_that_have_gone_are_skipped_and_named(
    parts: Parts, pictures: dict[str, str]
) -> None:
    bucket, key = pictures["b"].removeprefix("s3://").split("/")
    parts.client.storage.client.delete_object(Bucket=bucket, Key=key)
    result = parts.run(parts.client.search("sizes", "x")).result
    assert [hit.id for hit in result.hits] == ["c", "a"]
    assert [(each.id, each.code) for each in result.skipped] == [("b", "image_not_found")]


def test_a_search_of_no_index_is_an_invalid_request(parts: Parts) -> None:
    error = parts.fail(parts.client.search("none", "x")).error
    message = "index: there is no index 'none' (`blipq index list` shows all)"
    assert (error.code, error.message) == ("invalid_request", message)


def test_an_index_that_is_away_is_asked_again_later(
    parts: Parts, picture: bytes, tmp_path: Path
) -> None:
    (tmp_path / "indexes").write_text("not a folder")
    job = parts.client.embed(picture, index="sizes")
    waiting = parts.run(job)
    assert waiting.status == "queued"
    assert waiting.last_error is not None
    assert waiting.last_error.retryable
    (tmp_path / "indexes").unlink()
    due_again(parts)
    assert parts.run(job).status == "succeeded"


def test_a_model_without_retrieval_searches_nothing(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(item: Any) -> None:
        raise PermanentError(ErrorCode.MODEL_UNAVAILABLE, "no retrieval checkpoint")

    monkeypatch.setattr(parts.model, "check", missing)
    assert parts.fail(parts.client.search("sizes", "x")).error.code == "model_unavailable"


# --- what else goes well --------------------------------------------------------------------------


def test_an_output_is_the_result_as_json(parts: Parts, picture: bytes) -> None:
    uri = "s3://blipq-outputs/results/1.json"
    info = parts.run(parts.client.caption(picture, output=uri))
    stored = parts.client.storage.client.get_object(Bucket="blipq-outputs", Key="results/1.json")
    assert json.loads(stored["Body"].read()) == info.result.model_dump(mode="json") | {
        "captions": [{"text": "30 x 20", "tokens": 3}]
    }


def test_a_large_result_is_read_where_the_ledger_points(
    parts: Parts, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = {"results": "s3://blipq-outputs/large", "result_bytes": 10}
    outputs = Outputs(parts.client.storage, parts.ledger, TINY.model_copy(update=update))
    monkeypatch.setattr(parts.execution, "_outputs", outputs)
    job = parts.client.caption(picture)
    info = parts.run(job)
    assert (info.status, info.result) == ("succeeded", None)
    assert info.result_uri.startswith("s3://blipq-outputs/large/")
    assert job.result(timeout=1).text == "30 x 20"
    assert parts.client.forget([job.id]).objects[-1] == info.result_uri


def test_an_output_is_there_before_the_job_ends(
    parts: Parts, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = parts.client.caption(picture, output="s3://blipq-outputs/results/2.json")
    statuses = []
    put = parts.client.storage.put_over

    def watched(*args: Any, **kwargs: Any) -> bool:
        statuses.append(job.status())
        return put(*args, **kwargs)

    monkeypatch.setattr(parts.client.storage, "put_over", watched)
    assert (parts.run(job).status, statuses) == ("succeeded", ["running"])


HEAT_MAPS = "s3://blipq-outputs/results/maps"


@pytest.mark.parametrize(
    ("texts", "size"), [(["a cat"], (512, 341)), (["a", "b", "c", "d", "e"], (1023, 454))]
)
@pytest.mark.parametrize("known", [False, True])
def test_heat_maps_are_drawn_beside_the_output_in_the_shape_of_the_picture(
    parts: Parts, picture: bytes, texts: list[str], size: tuple[int, int], known: bool
) -> None:
    if known:  # then no job has pixels made otherwise
        parts.model.known[hashlib.sha256(picture).hexdigest()] = (30, 20)
    job = parts.client.match(picture, texts, explain=True, output=f"{HEAT_MAPS}.json")
    info = parts.run(job)
    assert info.status == "succeeded", info.error
    with Image.open(io.BytesIO(parts.client.storage.read(f"{HEAT_MAPS}.json.heat.png"))) as sheet:
        assert (sheet.format, sheet.size) == ("PNG", size)
    assert parts.client.forget([job.id]).objects[-2:] == [
        f"{HEAT_MAPS}.json",
        f"{HEAT_MAPS}.json.heat.png",
    ]
    with pytest.raises(S3Refused):
        parts.client.storage.read(f"{HEAT_MAPS}.json.heat.png")


def test_whoever_finds_an_output_finds_its_heat_maps(
    parts: Parts, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    put = parts.client.storage.put_over

    def watched(uri: str, *args: Any, **kwargs: Any) -> bool:
        written.append(uri)
        return put(uri, *args, **kwargs)

    monkeypatch.setattr(parts.client.storage, "put_over", watched)
    parts.run(parts.client.match(picture, "a cat", explain=True, output=f"{HEAT_MAPS}.json"))
    assert written == [f"{HEAT_MAPS}.json.heat.png", f"{HEAT_MAPS}.json"]
    parts.run(parts.client.match(picture, "a cat", output=f"{HEAT_MAPS}.json"))
    parts.run(parts.client.match(picture, "a cat", explain=True))
    assert written[2:] == [f"{HEAT_MAPS}.json"], "nothing is drawn that nobody wants"


def test_heat_maps_are_drawn_over_no_picture_and_under_no_name_that_s3_refuses(
    parts: Parts, picture: bytes
) -> None:
    image = "s3://blipq-outputs/results/mine.json.heat.png"
    parts.client.storage.put(image, picture, content_type="image/png")
    over = parts.client.match(image, "a", explain=True, output=image.removesuffix(".heat.png"))
    long = f"s3://blipq-outputs/{'x' * 1020}"
    for job, why in (
        (over, f"{image} is the image that the job is about"),
        (parts.client.match(picture, "a", explain=True, output=long), "at most 1,024 bytes"),
    ):
        error = parts.fail(job).error
        assert (error.code, why in error.message) == ("invalid_request", True), error
    assert parts.client.storage.read(image) == picture


def test_a_second_message_of_a_job_does_nothing(parts: Parts, picture: bytes) -> None:
    job = parts.client.caption(picture)
    first = parts.run(job)
    assert parts.run(job) == first


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_missing_image_fails_at_once(parts: Parts) -> None:
    info = parts.fail(parts.client.caption("s3://blipq-inbox/no/such.png"))
    assert (info.status, info.error.code) == ("failed", "image_not_found")
    assert (info.attempts, info.error.retryable) == (1, False)
    assert info.receipt.fetch_ms is not None


def test_what_is_no_image_fails_at_once(parts: Parts) -> None:
    assert parts.fail(parts.client.caption(b"not an image")).error.code == "image_invalid"


def test_a_prompt_that_is_too_long_is_an_invalid_request(parts: Parts, picture: bytes) -> None:
    info = parts.fail(parts.client.caption(picture, "too long"))
    assert (info.error.code, info.error.message) == ("invalid_request", "the text is too long")


def test_an_unexpected_failure_of_the_model_is_internal(parts: Parts, picture: bytes) -> None:
    parts.model.before = lambda: 1 / 0
    info = parts.fail(parts.client.caption(picture))
    assert info.error.code == "internal"
    assert info.error.message == "ZeroDivisionError: division by zero"


def test_the_log_has_the_cause_of_a_models_failure_under_the_jobs_id(
    parts: Parts, picture: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    parts.model.before = lambda: 1 / 0
    job = parts.client.caption(picture)
    parts.fail(job)
    (told,) = [each.getMessage() for each in caplog.records if "Traceback" in each.getMessage()]
    assert told.startswith(f"{job.id}: ZeroDivisionError: division by zero\nTraceback")
    assert "in generate\n" in told


def test_a_job_that_needs_too_much_memory_says_so(parts: Parts, picture: bytes) -> None:
    def out_of_memory() -> None:
        raise MemoryError

    parts.model.before = out_of_memory
    assert parts.fail(parts.client.caption(picture)).error.code == "out_of_memory"


def test_a_huge_message_is_cut(parts: Parts, picture: bytes) -> None:
    def shout() -> None:
        raise RuntimeError("x" * 100_000)

    parts.model.before = shout
    assert len(parts.fail(parts.client.caption(picture)).error.message) == 2000


OUTPUT = "s3://blipq-outputs/rights.json"
HOOK = {"url": "https://example.org/hook"}
ALL = {
    "models": ["*"],
    "buckets": ["*"],
    "indexes": ["*"],
    "outputs": ["*"],
    "webhook_hosts": ["*"],
}


def with_rights(parts: Parts, request: Any, rights: str, **options: Any) -> Job[Any]:
    """A job of a key, whose door has checked nothing."""
    given = Options.model_validate(options)
    return parts.client.submit(Submission(request, given, tenant="shop", rights=rights))


@pytest.mark.parametrize(
    ("missing", "code"),
    [
        ("models", "invalid_request"),
        ("buckets", "image_forbidden"),
        ("indexes", "invalid_request"),
        ("outputs", "invalid_request"),
        ("webhook_hosts", "invalid_request"),
    ],
)
def test_a_job_that_names_what_its_key_does_not_allow_fails_and_writes_nothing(
    parts: Parts, picture: bytes, storage: Storage, missing: str, code: str
) -> None:
    storage.client.delete_object(Bucket="blipq-outputs", Key="rights.json")
    image = parts.client.storage.upload(picture)
    request = EmbedRequest(image=image, index=IndexEntry(name="photos", id="1"))
    rights = json.dumps(ALL | {missing: ["x"]})
    job = with_rights(parts, request, rights, output=OUTPUT, webhook=HOOK)
    info = parts.fail(job)
    assert info.error is not None
    assert info.error.code == code
    assert f"is not among the {missing} of its key" in info.error.message
    assert storage.head("blipq-outputs", "rights.json") is None
    assert parts.indexes.infos() == []


def test_a_job_that_names_what_its_key_allows_runs_and_its_record_sheds_the_lists(
    parts: Parts, picture: bytes
) -> None:
    image = parts.client.storage.upload(picture)
    job = with_rights(parts, CaptionRequest(image=image), json.dumps(ALL), output=OUTPUT)
    assert parts.run(job).status == "succeeded"
    left = parts.ledger.redis.hkeys(f"blipq:job:{job.id}")
    assert "tenant" in left
    assert "rights" not in left


def test_an_https_image_of_another_host_than_its_keys_is_forbidden(parts: Parts) -> None:
    request = CaptionRequest.model_validate({"image": "https://example.org/cat.jpg"})
    info = parts.fail(with_rights(parts, request, json.dumps(ALL)))
    assert info.error is not None
    assert info.error.code == "url_forbidden"


def test_lists_that_cannot_be_read_allow_nothing(parts: Parts, picture: bytes) -> None:
    image = parts.client.storage.upload(picture)
    job = with_rights(parts, CaptionRequest(image=image), '{"buckets": 1}')
    info = parts.fail(job)
    assert info.error is not None
    assert info.error.message == "rights: they cannot be read"


def test_an_output_that_cannot_be_written_fails_the_job(
    parts: Parts, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blipq import InvalidRequest

    def refuse(*_: Any, **__: Any) -> None:
        raise InvalidRequest("S3 refuses: AccessDenied")

    monkeypatch.setattr(parts.client.storage, "put_over", refuse)
    info = parts.fail(parts.client.caption(picture, output="s3://blipq-outputs/results/3.json"))
    assert (info.error.code, info.result) == ("invalid_request", None)
    assert info.error.message == "output: S3 refuses: AccessDenied"


# --- what is wrong with the worker ---------------------------------------------------------------


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: Any, **__: Any) -> bytes:
        raise AccessRefused("s3://photos/cat.jpg: the provided token has expired")

    monkeypatch.setattr(Fetcher, "fetch", fetch)
    monkeypatch.setattr("blipq_worker.jobs.outcomes.REFUSED_PAUSE_S", 0.0)


@pytest.mark.usefixtures("refused")
def test_a_job_goes_back_uncounted_however_often_s3_refuses_its_worker(
    parts: Parts, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Storage, "refused_access", lambda self: "the token has expired")
    job = parts.client.caption(picture)
    for _ in range(MAX_RETRIES + 3):
        info = parts.run(job)
        assert (info.status, info.attempts) == ("queued", 0)
    assert parts.held.claims() == []
    assert b'kind="caption",model="default",outcome="handed_back"' in parts.metrics.page()


@pytest.mark.usefixtures("refused")
def test_a_job_whose_bucket_alone_refuses_its_worker_is_put_off_uncounted(
    parts: Parts, picture: bytes
) -> None:
    """No thread waits for it, and others are not kept from theirs."""
    job = parts.client.caption(picture)
    info = parts.run(job)
    assert (info.status, info.attempts) == ("queued", 0)
    (due,) = parts.ledger.redis.zrange("blipq:delayed", 0, -1)
    assert due == job.id


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("of_worker", ["the token has expired", None])
def test_who_waits_for_a_job_that_s3_refuses_reads_why(
    parts: Parts, picture: bytes, monkeypatch: pytest.MonkeyPatch, of_worker: str | None
) -> None:
    """It was queued without a word, in the worker's log alone."""
    monkeypatch.setattr(Storage, "refused_access", lambda self: of_worker)
    info = parts.run(parts.client.caption(picture))
    assert info.status == "queued"
    assert info.last_error is not None
    assert info.last_error.code == "image_unavailable"
    assert "the provided token has expired" in info.last_error.message


@pytest.mark.parametrize("code", ["AllAccessDisabled", "InvalidPayer", "AccountProblem"])
def test_a_job_whose_bucket_is_of_a_closed_account_fails(
    parts: Parts, picture: bytes, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """S3 takes the worker elsewhere: asking every ten seconds for seven days opens no account."""

    def get_object(*_: Any, **__: Any) -> Any:
        raise ClientError({"Error": {"Code": code}}, "GetObject")

    job = parts.client.caption(picture)
    monkeypatch.setattr(Storage, "refused_access", lambda self: None)
    monkeypatch.setattr(parts.client.storage.client, "get_object", get_object)
    info = parts.fail(job)
    assert info.error.code == "image_forbidden"
    assert code in info.error.message


def test_a_job_whose_account_is_closed_waits_where_s3_refuses_the_worker(
    parts: Parts, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get_object(*_: Any, **__: Any) -> Any:
        raise ClientError({"Error": {"Code": "AccountProblem"}}, "GetObject")

    job = parts.client.caption(picture)
    monkeypatch.setattr("blipq_worker.jobs.outcomes.REFUSED_PAUSE_S", 0.0)
    monkeypatch.setattr(parts.client.storage.client, "get_object", get_object)
    info = parts.run(job)
    assert (info.status, info.attempts) == ("queued", 0)


def test_a_job_whose_index_refuses_the_worker_goes_back(
    parts: Parts, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise S3Unavailable("S3 refuses for now: ExpiredToken", Refusal.EXPIRED)

    monkeypatch.setattr(parts.indexes, "open_or_create", refuse)
    job = parts.client.embed(picture, index={"name": "sizes"})
    assert parts.run(job).status == "queued"


# --- retries --------------------------------------------------------------------------------------


@pytest.fixture
def unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: Any, **__: Any) -> bytes:
        raise TransientError(ErrorCode.IMAGE_UNAVAILABLE, "S3 is slow")

    monkeypatch.setattr(Fetcher, "fetch", fetch)


def due_again(parts: Parts) -> None:
    wait_until(lambda: parts.ledger.reconcile().messages, "the retry to be due")


@pytest.mark.usefixtures("unavailable")
def test_a_passing_failure_puts_the_job_back(parts: Parts, picture: bytes) -> None:
    info = parts.run(parts.client.caption(picture))
    assert (info.status, info.error) == ("queued", None)
    assert parts.held.claims() == []


def test_a_retry_can_succeed(parts: Parts, picture: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    job = parts.client.caption(picture)
    with monkeypatch.context() as broken:
        broken.setattr(Fetcher, "fetch", _raise_unavailable)
        parts.run(job)
    due_again(parts)
    info = parts.run(job)
    assert (info.status, info.attempts) == ("succeeded", 2)


def _raise_unavailable(*_: Any, **__: Any) -> bytes:
    raise TransientError(ErrorCode.IMAGE_UNAVAILABLE, "S3 is slow")


@pytest.mark.usefixtures("unavailable")
def test_a_job_that_is_out_of_retries_keeps_its_own_code(parts: Parts, picture: bytes) -> None:
    job = parts.client.caption(picture)
    for _ in range(MAX_RETRIES):
        assert parts.run(job).status == "queued"
        due_again(parts)
    info = parts.fail(job)
    assert (info.status, info.error.code) == ("failed", "image_unavailable")
    assert (info.error.retryable, info.attempts) == (True, MAX_RETRIES + 1)


def test_a_wait_that_is_too_long_is_told_for_what_it_is(
    parts: Parts, picture: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A decoder without room is not a model that does not answer."""
    pictures = parts.pictures
    pictures._timeout_s = 0.01
    pictures._decoding._use = "to decode an image"
    with pictures._decoding.reserve(1, timeout=1):
        parts.run(parts.client.caption(picture))
    assert "bytes to decode an image were not free within 0.01 s" in caplog.text
    caplog.clear()
    parts.execution._timeout_s = 0.2
    goes_on = threading.Event()
    parts.model.before = lambda: goes_on.wait(10)  # type: ignore[method-assign]
    try:
        parts.run(parts.client.caption(picture))
    finally:
        goes_on.set()
    assert "the model did not answer within 0.2 s" in caplog.text


# --- jobs that nobody wants any more --------------------------------------------------------------


def test_a_cancelled_job_is_not_started(parts: Parts, picture: bytes) -> None:
    job = parts.client.caption(picture)
    job.cancel()
    parts.model.before = lambda: pytest.fail("the model was asked")
    assert parts.run(job).status == "cancelled"


def test_a_job_cancelled_midway_has_no_result(parts: Parts, picture: bytes) -> None:
    job = parts.client.caption(picture)

    def cancel() -> None:
        job.cancel()
        parts.held.lose(parts.held.claims())  # as the heartbeat does

    parts.model.before = cancel
    info = parts.run(job)
    assert (info.status, info.result) == ("cancelled", None)
    assert parts.held.claims() == []


def test_a_cancelled_job_writes_no_output(
    parts: Parts, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = parts.client.caption(picture, output="s3://blipq-outputs/results/4.json")

    def cancel() -> None:
        job.cancel()
        parts.held.lose(parts.held.claims())

    parts.model.before = cancel
    refuse = lambda *_, **__: pytest.fail("written")  # noqa: E731
    monkeypatch.setattr(parts.client.storage, "put_over", refuse)
    assert parts.run(job).status == "cancelled"


def test_a_job_taken_over_keeps_the_other_workers_result(parts: Parts, picture: bytes) -> None:
    job = parts.client.caption(picture)
    other = json.dumps({"kind": "caption", "captions": [{"text": "the other's"}]})

    def take_over() -> None:
        (mine,) = parts.held.claims()
        parts.ledger.hand_back(mine)
        claim = parts.ledger.claim(job.id, "w2")
        assert isinstance(claim, Claim)
        parts.ledger.succeed(claim, other, "{}")

    parts.model.before = take_over
    assert parts.run(job).result.text == "the other's"


# --- hand-back and drain --------------------------------------------------------------------------


def test_a_draining_worker_leaves_messages_alone(parts: Parts, picture: bytes) -> None:
    job = parts.client.caption(picture)
    parts.gate.close()
    with pytest.raises(HandBack):
        parts.run(job)
    assert (job.info().status, job.info().attempts) == ("queued", 0)


def test_what_runs_can_be_handed_back(parts: Parts, picture: bytes) -> None:
    job = parts.client.caption(picture)
    counts: list[int] = []
    parts.model.before = lambda: counts.append(parts.outcomes.hand_back_all())
    info = parts.run(job)
    assert counts == [1]
    assert (info.status, info.attempts) == ("queued", 0)


def test_handing_back_while_redis_is_away_has_an_end(
    parts: Parts, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blipq_worker.jobs.outcomes.HAND_BACK_FOR_S", 0.0)
    claims = [parts.ledger.claim(parts.client.caption(picture).id, "w1") for _ in range(3)]
    for claim in claims:
        assert isinstance(claim, Claim)
        parts.held.add(claim)
    faults = Faults(parts.ledger, "requeue", LOST, LOST, LOST, ran=False)
    assert parts.outcomes.hand_back_all() <= 1
    assert faults.calls <= 1


def hiccup(parts: Parts, seen: list[bool], *, ran: bool) -> None:
    """Loses the next two answers to a hand-back, and notes whether the claim is held meanwhile."""

    class Watching(redis.TimeoutError):
        def __str__(self) -> str:
            seen.append(bool(parts.held.claims()))
            return "the answer did not come"

    Faults(parts.ledger, "requeue", Watching(), Watching(), ran=ran)


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("ran", [False, True])
def test_a_hand_back_whose_answer_is_lost_is_no_crash(
    parts: Parts, picture: bytes, monkeypatch: pytest.MonkeyPatch, ran: bool
) -> None:
    """The claim was dropped while its process lived: its lease ran out, and after three times the
    job failed for good.
    """
    monkeypatch.setattr(Storage, "refused_access", lambda self: "the token has expired")
    job, held = parts.client.caption(picture), list[bool]()
    hiccup(parts, held, ran=ran)
    info = parts.run(job)
    assert (info.status, info.attempts) == ("queued", 0)
    assert held
    assert all(held)
    assert parts.held.claims() == []
    assert parts.ledger.redis.zcard("blipq:running") == 0
    assert b'kind="caption",model="default",outcome="handed_back"} 1.0' in parts.metrics.page()


def test_a_job_that_waits_to_run_alone_goes_back_through_lost_answers(
    parts: Parts, picture: bytes
) -> None:
    job, held = parts.client.caption(picture), list[bool]()
    parts.ledger.claim(job.id, "w0", lease_s=0.01)
    wait_until(lambda: parts.ledger.reconcile().messages, "the other worker's lease to run out")
    Faults(parts.ledger, "begin", LOST, ran=False)
    hiccup(parts, held, ran=False)
    with ThreadPoolExecutor(1) as thread, parts.gate.shared():
        run = thread.submit(parts.run, job)
        wait_until(lambda: job.status() == "running", "its claim")
        parts.gate.close()
    info = run.result(timeout=10)
    assert (info.status, info.attempts) == ("queued", 1)
    assert held
    assert all(held)
    assert parts.held.claims() == []


@pytest.mark.parametrize("lost_device", [False, True])
@pytest.mark.parametrize("ran", [False, True])
def test_what_is_held_goes_back_through_lost_answers(
    parts: Parts, picture: bytes, ran: bool, lost_device: bool
) -> None:
    jobs = [parts.client.caption(picture) for _ in range(3)]
    for job in jobs:
        claim = parts.ledger.claim(job.id, "w1")
        assert isinstance(claim, Claim)
        parts.held.add(claim)
    hiccup(parts, [], ran=ran)
    if lost_device:
        parts.outcomes.hand_back_lost()
    else:
        assert parts.outcomes.hand_back_all() == 3
    assert [(job.info().status, job.info().attempts) for job in jobs] == [("queued", 0)] * 3
    assert parts.held.claims() == []


@pytest.mark.parametrize("ran", [False, True])
def test_a_claim_that_is_not_heard_of_before_the_worker_stops_is_no_crash(
    parts: Parts, picture: bytes, ran: bool
) -> None:
    """The message went back, and the lease of the claim that nobody knew of ran out."""

    class Closing(redis.TimeoutError):
        def __str__(self) -> str:
            parts.gate.close()
            return "the answer did not come"

    job = parts.client.caption(picture)
    Faults(parts.ledger, "claim", Closing(), ran=ran)
    with pytest.raises(HandBack):
        parts.run(job)
    assert (job.info().status, job.info().attempts) == ("queued", 0)
    assert parts.ledger.redis.zcard("blipq:running") == 0
    assert isinstance(parts.ledger.claim(job.id, "w2"), Claim)


@pytest.mark.parametrize("lost_device", [False, True])
def test_a_process_that_ends_withdraws_the_claims_that_it_asks_for(
    parts: Parts, picture: bytes, lost_device: bool
) -> None:
    """It ends at once, as at a second signal: the answer is on its way to nobody."""
    job, ran, ended = parts.client.caption(picture), threading.Event(), threading.Event()
    run = parts.ledger._run

    def slow(name: str, *args: Any) -> Any:
        answer = run(name, *args)
        if name == "claim":
            ran.set()
            ended.wait(20)
        return answer

    parts.ledger._run = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        claiming = pool.submit(parts.run, job)
        assert ran.wait(20)
        parts.gate.close()
        parts.outcomes.hand_back_lost() if lost_device else parts.outcomes.hand_back_all()
        assert (job.info().status, job.info().attempts) == ("queued", 0)
        ended.set()
        claiming.result(20)  # had it lived on, it would have found its claim gone
    assert (job.info().status, job.info().attempts) == ("queued", 0)


def test_what_redis_has_not_taken_back_in_time_stays_held(
    parts: Parts, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose model failed its check lives on, and tries again."""
    monkeypatch.setattr("blipq_worker.jobs.outcomes.HAND_BACK_FOR_S", 0.0)
    job = parts.client.caption(picture)
    claim = parts.ledger.claim(job.id, "w1")
    assert isinstance(claim, Claim)
    parts.held.add(claim)
    Faults(parts.ledger, "requeue", LOST, ran=False)
    assert parts.outcomes.hand_back_all() == 0
    assert parts.held.claims() == [claim]
    assert parts.outcomes.hand_back_all() == 1
    assert (job.info().status, job.info().attempts) == ("queued", 0)


def test_a_newer_contract_stays_in_its_queue(parts: Parts, picture: bytes) -> None:
    job = parts.client.caption(picture)
    parts.ledger.redis.hset(f"blipq:job:{job.id}", "contract", 99)
    parts.run(job)
    assert (job.status(), job.info().attempts) == ("queued", 0)


class Faults:
    """Stands in front of a script: of its first calls, some fail before it runs, some after."""

    def __init__(self, ledger: WorkerLedger, script: str, *errors: Exception, ran: bool) -> None:
        self.left = list(errors)
        self.calls = 0

        def faulty(run: Callable[..., Any], place: int) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                if args[place] != script or not self.left:
                    return run(*args)
                self.calls += 1
                if ran:
                    run(*args)
                raise self.left.pop(0)

            return call

        ledger._run = faulty(ledger._run, 0)  # type: ignore[method-assign]
        ledger._act = faulty(ledger._act, 2)  # type: ignore[method-assign]


LOST = redis.TimeoutError("the answer did not come")
REFUSALS = (
    redis.exceptions.ReadOnlyError("You can't write against a read only replica."),
    redis.ResponseError("NOREPLICAS Not enough good replicas to write."),
    redis.ResponseError("BUSY Redis is busy running a script."),
    redis.ResponseError("a reply that nobody knows"),
)


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("script", ["claim", "begin", "finish"])
def test_a_job_goes_on_through_answers_that_are_lost(
    parts: Parts, picture: bytes, script: str, ran: bool
) -> None:
    """Whether the script ran before its answer was lost or not: it is asked for again."""
    job = parts.client.caption(picture)
    if script == "begin":
        parts.ledger.claim(job.id, "w0", lease_s=0.01)
        wait_until(lambda: parts.ledger.reconcile().messages, "a crash")
    faults = Faults(parts.ledger, script, LOST, LOST, ran=ran)
    info = parts.run(job)
    assert faults.calls == 2
    assert info.result.text == "30 x 20"
    assert info.attempts == (2 if script == "begin" else 1)
    assert b'outcome="succeeded"} 1.0' in parts.metrics.page()


@pytest.mark.parametrize("script", ["claim", "finish"])
def test_a_job_goes_on_through_error_replies(parts: Parts, picture: bytes, script: str) -> None:
    Faults(parts.ledger, script, *REFUSALS, ran=False)
    assert parts.run(parts.client.caption(picture)).result.text == "30 x 20"


def test_a_claim_is_renewed_until_its_outcome_is_stored(parts: Parts, picture: bytes) -> None:
    job = parts.client.caption(picture)
    held: list[bool] = []

    class Watching(redis.TimeoutError):
        def __str__(self) -> str:
            held.append(bool(parts.held.claims()))
            return "away"

    Faults(parts.ledger, "finish", Watching(), ran=False)
    parts.run(job)
    assert held
    assert all(held)
    assert parts.held.claims() == []


def test_an_outcome_is_given_up_only_after_the_deadline(parts: Parts, picture: bytes) -> None:
    job = parts.client.caption(picture, expires_in=1.0)
    Faults(parts.ledger, "finish", *[LOST] * 100, ran=False)
    parts.run(job)
    assert job.info().status == "expired"


def test_a_retry_through_an_outage_is_counted_once(parts: Parts) -> None:
    job = parts.client.caption("s3://blipq-inbox/picture")
    parts.model.before = lambda: None
    fetch = parts.pictures.load

    def away(*args: Any, **kwargs: Any) -> Any:
        raise TransientError(ErrorCode.IMAGE_UNAVAILABLE, "S3 is away")

    parts.pictures.load = away  # type: ignore[method-assign]
    Faults(parts.ledger, "requeue", LOST, ran=True)
    parts.run(job)
    parts.pictures.load = fetch  # type: ignore[method-assign]
    assert parts.ledger.redis.hget(f"blipq:job:{job.id}", "retries") == "1"


def test_a_message_goes_back_when_the_worker_stops_while_redis_is_away(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blipq_worker.jobs.outcomes.HAND_BACK_FOR_S", 0.0)
    parts.ledger.redis = connect(Settings(redis_url="redis://127.0.0.1:1/0"))
    with ThreadPoolExecutor(1) as pool:
        ran = pool.submit(parts.runner.run, Kind.CAPTION, "job_1")
        wait_until(lambda: parts.gate._inside, "the job to come in")
        parts.gate.close()
        with pytest.raises(HandBack):
            ran.result(20)


def test_a_job_that_may_have_killed_its_worker_runs_alone(parts: Parts, picture: bytes) -> None:
    job = parts.client.caption(picture)
    parts.ledger.claim(job.id, "w0", lease_s=0.01)
    alone: list[bool] = []
    parts.model.before = lambda: alone.append(parts.gate._solo)

    wait_until(lambda: parts.ledger.reconcile().messages, "the other worker's lease to run out")
    parts.run(job)
    assert alone == [True]
    assert (job.status(), job.info().attempts) == ("succeeded", 2)


def test_a_job_that_is_cancelled_while_it_waits_to_run_alone_does_not(
    parts: Parts, picture: bytes
) -> None:
    job, other = parts.client.caption(picture), parts.client.caption(picture)
    parts.ledger.claim(job.id, "w0", lease_s=0.01)
    wait_until(lambda: parts.ledger.reconcile().messages, "the other worker's lease to run out")
    with ThreadPoolExecutor(1) as thread, parts.gate.shared():
        run = thread.submit(parts.run, job)
        wait_until(lambda: job.status() == "running", "its claim")
        job.cancel()
    run.result(timeout=10)
    assert job.status() == "cancelled"
    assert not parts.held.claims()
    parts.run(other)
    assert other.status() == "succeeded"


# --- messages of foreign clients ------------------------------------------------------------------


def test_a_job_sent_whole_is_recorded_and_run(parts: Parts, picture: bytes) -> None:
    uri = parts.client.storage.upload(picture).uri
    parts.runner.run(Kind.CAPTION, "job_foreign", {"image": uri}, {"metadata": {"a": "b"}})
    info = parts.client.job("job_foreign").info()
    assert (info.result.text, info.metadata) == ("30 x 20", {"a": "b"})


@pytest.mark.parametrize("priority", ["normal", "high"])
def test_a_job_sent_to_the_queue_of_another_model_waits_in_its_own(
    parts: Parts, picture: bytes, priority: str
) -> None:
    """It failed as ``model_unavailable`` while its own model was scaled to zero."""
    uri, queue = parts.client.storage.upload(picture).uri, f"blipq.other.{priority}"
    options = {"model": "other", "priority": priority}
    for _ in range(MAX_CRASHES + MAX_RETRIES):
        parts.runner.run(Kind.CAPTION, "job_foreign", {"image": uri}, options)
        info = parts.client.job("job_foreign").info()
        assert (info.status, info.model, info.attempts) == ("queued", "other", 0)
    assert parts.held.claims() == []
    message = json.loads(parts.ledger.redis.lindex(queue, 0))
    assert message["headers"]["id"] == "job_foreign"
    assert parts.ledger.redis.zscore(f"blipq:queued:{queue}", "job_foreign") is not None


@pytest.mark.parametrize(
    ("request_", "options"),
    [
        ({"image": "not s3"}, None),
        ({}, None),
        ([1], None),
        ("text", None),
        ({"image": "s3://uploads/a.png"}, {"priority": "urgent"}),
        ({"image": "s3://uploads/a.png"}, ["urgent"]),
        ({"image": "s3://uploads/a.png"}, {3: 4}),
        ({"image": "s3://uploads/a.png"}, {"idempotency_key": "\ud800"}),
        ({"image": "s3://uploads/a.png"}, {"\ud800": 1}),
        ({"image": "s3://uploads/a.png", "\ud800": 1}, None),
        ({"image": "s3://uploads/a\ud800.png"}, None),
        ({"image": "s3://uploads/a.png", "kind": "vqa"}, None),  # its task says caption
        ({"image": "s3://uploads/a.png", "kind": ["caption"]}, None),
        ({"image": "s3://uploads/a.png"}, {"expires_in": float("nan")}),
    ],
)
def test_a_message_that_makes_no_sense_is_a_failed_job(
    parts: Parts, request_: Any, options: Any
) -> None:
    parts.runner.run(Kind.CAPTION, "job_foreign", request_, options)
    info = parts.client.job("job_foreign").info()
    assert (info.status, info.error.code) == ("failed", "invalid_request")


def test_a_misspelled_field_of_a_job_sent_whole_is_told_with_those_that_there_are(
    parts: Parts,
) -> None:
    request = {"image": "s3://uploads/a.png", "generation": {"num_beam": 1}}
    parts.runner.run(Kind.CAPTION, "job_foreign", request)
    message = parts.client.job("job_foreign").info().error.message
    hint = "caption.generation.num_beam: unknown; did you mean num_beams? (accepted: max_new_tokens"
    assert message.startswith(hint)


def test_a_job_sent_whole_under_the_key_of_another_says_whose_it_is(
    parts: Parts, picture: bytes
) -> None:
    uri = parts.client.storage.upload(picture).uri
    for id in ("job_first", "job_second"):
        parts.runner.run(Kind.CAPTION, id, {"image": uri}, {"idempotency_key": "k"})
    error = parts.client.job("job_second").info().error
    assert error is not None
    assert "job_first" in error.message


def test_a_job_sent_whole_goes_back_while_too_many_are_open(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blipq_worker.jobs.claiming.LAST_PAUSE_S", 0.01)
    parts.ledger.settings = parts.ledger.settings.model_copy(update={"max_open_jobs": 0})
    with pytest.raises(HandBack):
        parts.runner.run(Kind.CAPTION, "job_foreign", {"image": "s3://uploads/a.png"})
    assert parts.ledger.read("job_foreign") is None


def test_a_malformed_message_is_a_failed_job_or_counted(parts: Parts) -> None:
    parts.foreign.refuse(Malformed("malformed message: no body", "job_foreign", Kind.VQA))
    parts.foreign.refuse(Malformed("malformed message: no body"))
    info = parts.client.job("job_foreign").info()
    assert (info.kind, info.error.code) == ("vqa", "invalid_request")
    assert "no body" in info.error.message
    page = parts.metrics.page()
    assert b'blipq_worker_messages_refused_total{outcome="recorded"} 1.0' in page
    assert b'blipq_worker_messages_refused_total{outcome="dropped"} 1.0' in page


def test_a_malformed_message_about_a_known_job_changes_nothing(
    parts: Parts, picture: bytes
) -> None:
    job = parts.client.caption(picture)
    parts.foreign.refuse(Malformed("malformed message: no body", job.id))
    assert job.status() == "queued"


def test_a_revoked_job_is_cancelled_wherever_it_is(parts: Parts, picture: bytes) -> None:
    job = parts.client.caption(picture)
    assert parts.foreign.cancel(job.id)
    assert job.status() == "cancelled"
    assert not parts.foreign.cancel("job_unknown")
    request = {"image": "s3://uploads/a.png"}
    assert parts.foreign.cancel_sent(Kind.CAPTION, "job_foreign", request)
    assert parts.client.job("job_foreign").status() == "cancelled"


def test_a_job_whose_message_had_expired_is_recorded_as_expired(
    parts: Parts, picture: bytes
) -> None:
    request = {"image": "s3://uploads/a.png"}
    parts.foreign.expire_sent(Kind.CAPTION, "job_foreign", request, {"expires_in": "1h"})
    parts.foreign.expire_sent(Kind.CAPTION, "job_odd", request, ["odd"])
    known = parts.client.caption(picture)
    parts.foreign.expire_sent(Kind.CAPTION, known.id)
    wait_until(lambda: parts.client.job("job_foreign").status() == "expired", "its deadline")
    assert parts.client.job("job_odd").status() == "failed"
    assert known.status() == "queued"


def test_an_expired_message_while_redis_is_away_ends_nothing(parts: Parts) -> None:
    Faults(parts.ledger, "submit", LOST, ran=False)
    parts.foreign.expire_sent(Kind.CAPTION, "job_foreign", {"image": "s3://uploads/a.png"})
    assert parts.ledger.read("job_foreign") is None


def test_a_revoke_while_redis_is_away_ends_nothing(parts: Parts, picture: bytes) -> None:
    job = parts.client.caption(picture)
    Faults(parts.ledger, "cancel", LOST, ran=False)
    assert not parts.foreign.cancel(job.id)
    assert job.status() == "queued"


def test_a_message_without_a_job_is_dropped(parts: Parts) -> None:
    parts.runner.run(Kind.CAPTION, "job_unknown")
    assert parts.ledger.read("job_unknown") is None
