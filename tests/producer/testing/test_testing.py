"""The fake's own affairs: what a test tells it and what it can be asked."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest

import blipq
from blipq import (
    Caption,
    CaptionRequest,
    CaptionResult,
    Client,
    ErrorCode,
    JobFailed,
    QueueUnavailable,
    Settings,
)
from blipq.testing import FakeBlipq
from conftest import ROOT

CAT = CaptionResult(captions=(Caption(text="a cat"),))
DOG = CaptionResult(captions=(Caption(text="a dog"),))


@pytest.fixture
def fake() -> FakeBlipq:
    fake = FakeBlipq()
    fake.answer("caption", CAT)
    return fake


def test_answers_come_one_after_the_other_and_the_last_stays(fake: FakeBlipq) -> None:
    fake.answer("caption", CAT, DOG)
    with Client(backend=fake) as client:
        jobs = client.submit_many([request() for _ in range(3)])
        assert [job.result(timeout=1) for job in jobs] == [CAT, DOG, DOG]


def request() -> CaptionRequest:
    return CaptionRequest.model_validate({"image": "s3://uploads/cat.jpg"})


def test_a_kind_without_an_answer_says_how_to_tell_one(fake: FakeBlipq) -> None:
    says_how = pytest.raises(JobFailed, match=r"FakeBlipq.answer\('vqa', ...\)")
    with Client(backend=fake) as client, says_how:
        client.vqa("s3://uploads/cat.jpg", "why?").result(timeout=1)


def test_an_answer_that_raises_is_an_internal_error(fake: FakeBlipq) -> None:
    def wrong(asked: object) -> CaptionResult:
        raise RuntimeError("a bug in the test")

    fake.answer("caption", wrong)
    with Client(backend=fake) as client, pytest.raises(JobFailed, match="a bug") as raised:
        client.caption("s3://uploads/cat.jpg").result(timeout=1)
    assert raised.value.code == ErrorCode.INTERNAL


@pytest.mark.parametrize("answer", [None, "a cat", {"kind": "caption", "captions": []}])
def test_an_answer_that_is_no_result_is_an_internal_error(fake: FakeBlipq, answer: Any) -> None:
    fake.answer("caption", lambda request: answer)
    with Client(backend=fake) as client, pytest.raises(JobFailed, match="must be a result, not"):
        client.caption("s3://uploads/cat.jpg").result(timeout=1)


def test_what_was_asked_and_stored_can_be_looked_at(fake: FakeBlipq) -> None:
    with Client(backend=fake) as client:
        client.caption(b"a cat", "a photo of", output="s3://results/1.json").result(timeout=1)
    (asked,) = fake.requests
    assert isinstance(asked, CaptionRequest)
    assert asked.prompt == "a photo of"
    assert fake.objects[asked.image.uri] == b"a cat"
    assert CaptionResult.model_validate_json(fake.objects["s3://results/1.json"]) == CAT
    assert [job.status for job in fake.jobs] == ["succeeded"]


def test_nothing_is_connected_to(fake: FakeBlipq) -> None:
    nowhere = Settings(redis_url="redis://127.0.0.1:1/0", s3_endpoint_url="http://127.0.0.1:1")
    with pytest.raises(QueueUnavailable), Client(nowhere) as client:
        client.caption("s3://uploads/cat.jpg")
    with Client(nowhere, backend=fake) as client:
        assert client.caption(b"a cat").result(timeout=1) == CAT


PAGE = (ROOT / "docs" / "clients.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_the_python_of_the_page_runs_on_the_fake(
    code: str, fake: FakeBlipq, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(blipq, "Client", functools.partial(Client, backend=fake))
    monkeypatch.chdir(tmp_path)
    Path("uris.txt").write_text("s3://uploads/1.jpg s3://uploads/2.jpg")
    exec(code, {})
