"""Datasets on the real stack; the tests play the worker, and answer with the request."""

import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from typer.testing import CliRunner, Result

from blipq import Client, ImageRef, Settings
from blipq.cli import app
from blipq.ledger.connection import connect
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.local.stack import LocalStack
from blipq.s3.storage import Storage
from blipq_worker.images.fetch import Fetcher

Run = Callable[..., Result]


@pytest.fixture
def client(apart: Settings) -> Iterator[Client]:
    with Client(apart) as client:
        yield client


@pytest.fixture
def ledger(apart: Settings) -> Iterator[WorkerLedger]:
    with connect(apart) as raw:
        yield WorkerLedger(raw, apart)


@pytest.fixture
def run(stack: LocalStack, apart: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``blipq bulk ...`` in a folder of its own."""
    for name, value in stack.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BLIPQ_REDIS_URL", str(apart.redis_url))
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["bulk", *map(str, arguments)])


@pytest.fixture
def bucket(client: Client) -> Iterator[str]:
    """A bucket of datasets, emptied at the end."""
    storage = client.storage
    storage.create_bucket("datasets")
    yield "datasets"
    for each in storage.client.list_objects_v2(Bucket="datasets").get("Contents", ()):
        storage.client.delete_object(Bucket="datasets", Key=each["Key"])


class Answering:
    """Plays a worker: fetches each picture for real, and answers with what it read and the request.

    A picture that cannot be fetched fails its job. ``runs`` has the requests.
    """

    def __init__(self, ledger: WorkerLedger, storage: Storage) -> None:
        self.runs: list[dict[str, Any]] = []
        self._ledger = ledger
        self._fetcher = Fetcher(storage, max_bytes=2**20, timeout_s=10)
        self._stop = threading.Event()

    def work(self) -> None:
        redis_: redis.Redis[str] = self._ledger.redis  # type: ignore[assignment, type-arg]
        while not self._stop.wait(0.005):
            for queue in redis_.zrange("blipq:queues", 0, -1):  # type: ignore[union-attr]
                for id in redis_.zrange(f"blipq:queued:{queue}", 0, -1):  # type: ignore[union-attr]
                    claim = self._ledger.claim(id, "w1")
                    if isinstance(claim, Claim):
                        self._end(claim)

    def stop(self) -> None:
        self._stop.set()

    def _end(self, claim: Claim) -> None:
        request = json.loads(claim.request)
        self.runs.append(request)
        try:
            data = self._fetcher.fetch(ImageRef(**request["image"])).data
        except Exception as error:
            wrong = {"code": "image_not_found", "message": str(error)}
            self._ledger.fail(claim, json.dumps(wrong), "{}")
            return
        seen = data.decode("latin-1")
        spent = {"gpu_ms": 10.0, "cache_hit": False}
        receipt = json.dumps({"checkpoint": "demo", "revision": "r1", **spent})
        self._ledger.succeed(claim, json.dumps(_result(request, seen)), receipt)


def _result(request: Mapping[str, Any], seen: str) -> dict[str, Any]:
    if request["kind"] == "vqa":
        answers = [{"question": each, "text": f"{each} {seen}"} for each in request["questions"]]
        return {"kind": "vqa", "answers": answers}
    text = f"{request.get('prompt', '')} {seen}".strip()
    return {"kind": "caption", "captions": [{"text": text, "score": 0.5}]}


@pytest.fixture
def answering(ledger: WorkerLedger, client: Client) -> Callable[[], Any]:
    """A block in which all jobs are answered."""

    @contextmanager
    def block() -> Iterator[Answering]:
        worker = Answering(ledger, client.storage)
        thread = threading.Thread(target=worker.work)
        thread.start()
        try:
            yield worker
        finally:
            worker.stop()
            thread.join()

    return block


@pytest.fixture
def tar() -> Callable[[Mapping[str, bytes]], bytes]:
    """A tar of these members."""

    def made(members: Mapping[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return stream.getvalue()

    return made


@pytest.fixture
def uploads_left(client: Client) -> Callable[[], list[str]]:
    """What bulks have left in the inbox."""

    def found() -> list[str]:
        answer = client.storage.client.list_objects_v2(
            Bucket=client.settings.inbox_bucket, Prefix="bulk/"
        )
        return [each["Key"] for each in answer.get("Contents", ())]

    return found
