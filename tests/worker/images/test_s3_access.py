"""Whether S3 takes the worker: what readiness says of it."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blipq import Settings
from blipq.contract import ImageRef
from blipq.s3.storage import Storage
from blipq_worker.images.fetch import Fetcher
from blipq_worker.images.s3_access import AccessRefused, S3Access
from refusing_s3 import RefusingS3, refusing_s3


@pytest.fixture
def s3() -> Iterator[RefusingS3]:
    with refusing_s3() as server:
        yield server


def access(s3: RefusingS3, ask_every_s: float = 0) -> S3Access:
    return S3Access(Storage(s3.settings, attempts=1), ask_every_s=ask_every_s)


def test_a_worker_is_not_ready_until_s3_takes_it(s3: RefusingS3) -> None:
    s3.refuse(403, "InvalidAccessKeyId")
    asked = access(s3)
    assert "InvalidAccessKeyId" in str(asked.trouble())
    s3.refuse(403, "AccessDenied")  # it may not read that object, and is known
    assert asked.trouble() is None


def test_s3_is_not_asked_again_once_it_takes_the_worker(s3: RefusingS3) -> None:
    asked = access(s3)
    assert [asked.trouble() for _ in range(5)] == [None] * 5
    assert len(s3.requests) == 1


def test_a_job_that_is_refused_makes_its_worker_unready_while_that_lasts(s3: RefusingS3) -> None:
    asked = access(s3)
    assert asked.trouble() is None
    s3.refuse(400, "ExpiredToken")
    assert asked.is_refused("a job met ExpiredToken")
    assert "ExpiredToken" in str(asked.trouble())
    s3.refuse(404, "NoSuchKey")
    assert asked.trouble() is None


def test_s3_is_asked_now_and_then_alone(s3: RefusingS3) -> None:
    s3.refuse(403, "InvalidAccessKeyId")
    asked = access(s3, ask_every_s=3600)
    for _ in range(5):
        assert asked.trouble() is not None
    assert len(s3.requests) == 1


def test_an_s3_that_does_not_answer_says_nothing_of_the_worker(s3: RefusingS3) -> None:
    s3.refuse(503, "SlowDown")
    asked = access(s3)
    assert asked.trouble() is None
    s3.refuse(400, "InvalidToken")
    assert "InvalidToken" in str(asked.trouble())


@pytest.mark.parametrize("code", ["", "PermanentRedirect"])
def test_a_worker_whose_endpoint_redirects_everything_is_not_ready(
    s3: RefusingS3, code: str
) -> None:
    s3.refuse(301, code)
    asked = access(s3)
    assert (code or "301") in str(asked.trouble())
    with pytest.raises(AccessRefused):
        Fetcher(asked._storage, max_bytes=10**6, timeout_s=5).fetch(
            ImageRef(uri="s3://photos/a.jpg")
        )


def test_a_worker_whose_account_is_closed_is_not_ready_while_it_is(s3: RefusingS3) -> None:
    asked = access(s3)
    s3.refuse(403, "AccountDisabled")
    assert asked.is_refused("a job met AccountDisabled")
    assert "AccountDisabled" in str(asked.trouble())
    s3.refuse(404, "NoSuchKey")
    assert asked.trouble() is None


def test_a_worker_whose_profile_is_gone_is_not_ready_and_its_jobs_are_not_at_fault(
    s3: RefusingS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nope")
    asked = access(s3)
    assert "nope" in str(asked.trouble())
    with pytest.raises(AccessRefused, match="nope"):
        Fetcher(asked._storage, max_bytes=10**6, timeout_s=5).fetch(
            ImageRef(uri="s3://photos/a.jpg")
        )


def test_a_bucket_that_refuses_the_worker_alone_does_not_make_it_unready(s3: RefusingS3) -> None:
    """In another region, say: S3 takes the worker everywhere else."""
    asked = access(s3)
    assert not asked.is_refused("a job met AuthorizationHeaderMalformed")
    assert asked.trouble() is None


def test_jobs_that_are_refused_together_ask_once_or_twice(s3: RefusingS3) -> None:
    s3.refuse(400, "ExpiredToken")
    asked, together = access(s3), threading.Barrier(16)

    def meet(_: int) -> bool:
        together.wait(30)
        return asked.is_refused("a job met ExpiredToken")

    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(meet, range(16))) == [True] * 16
    assert len(s3.requests) < 16


def test_a_refusal_counts_while_s3_does_not_say_otherwise(s3: RefusingS3) -> None:
    s3.refuse(503, "SlowDown")
    asked = access(s3)
    assert asked.is_refused("a job met ExpiredToken")
    assert asked.trouble() == "a job met ExpiredToken"
    s3.refuse(404, "NoSuchKey")
    assert asked.trouble() is None


def test_a_worker_without_credentials_is_not_ready(
    s3: RefusingS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    nobody = Settings(s3_endpoint_url=s3.settings.s3_endpoint_url)
    assert "no S3 credentials" in str(S3Access(Storage(nobody)).trouble())
    assert s3.requests == []


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (403, "AccessDenied"),
        (400, "InvalidIdentityToken"),
        (403, "RegionDisabledException"),
        (400, "ExpiredTokenException"),
    ],
)
def test_a_worker_whose_role_is_refused_is_not_ready_and_its_jobs_are_not_at_fault(
    s3: RefusingS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, code: str
) -> None:
    """STS refuses; S3 is never asked."""
    token = tmp_path / "token"
    token.write_text("a.b.c")
    with refusing_s3() as sts:
        sts.refuse(status, code)
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", str(sts.settings.s3_endpoint_url))
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/worker")
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("HOME", "/nonexistent")
        storage = Storage(Settings(s3_endpoint_url=s3.settings.s3_endpoint_url), attempts=1)
        assert code in str(S3Access(storage).trouble())
        with pytest.raises(AccessRefused, match=code):
            Fetcher(storage, max_bytes=10**6, timeout_s=5).fetch(ImageRef(uri="s3://photos/a.jpg"))
    assert s3.requests == []
