"""What S3's refusals mean to producers: by their code, where their status alone would mislead."""

from collections.abc import Iterator
from typing import Any

import pytest
from botocore.exceptions import (
    ClientError,
    CredentialRetrievalError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
)

from blipq import BlipqError, Client, InvalidRequest, QueueUnavailable, Settings
from blipq.bulk.journal import Journal
from blipq.bulk.results import write
from blipq.s3.refusals import CODES, Refusal, S3Refused, S3Unavailable, refusal_in, refusal_of
from blipq.s3.storage import Storage
from blipq.watch.objects import Objects
from blipq.watch.queue import Queue
from refusing_s3 import RefusingS3, refusing_s3

FULL = [
    (403, "QuotaExceeded"),  # Ceph
    (400, "XMinioAdminBucketQuotaExceeded"),
    (507, "XMinioStorageFull"),
    (403, "InsufficientStorageSpace"),  # Huawei
    (403, "ProjectQuotaExceeded"),  # of no store that is known
]
#: Refusals that pass, though their status says that the request is wrong.
PASSING = [
    (400, "RequestTimeout"),
    (400, "XAmzContentSHA256Mismatch"),
    (400, "ThrottlingException"),
    (400, "KMS.ThrottlingException"),
    (400, "ExpiredToken"),
    (400, "TokenRefreshRequired"),
    (403, "RequestTimeTooSkewed"),
    (408, "RequestTimeout"),
    (409, "OperationAborted"),
    (409, "ConditionalRequestConflict"),
    (429, "TooManyRequests"),
    (503, "SlowDown"),
    (400, "XMinioBackendDown"),
    (400, "XAmzContentChecksumMismatch"),
    *FULL,
]
ACCOUNT = [
    (403, "AccountProblem"),
    (403, "AccountDisabled"),
    (403, "AllAccessDisabled"),
    (403, "InvalidPayer"),
    (403, "NotSignedUp"),
    (403, "InvalidAccountId"),
    (403, "UserProjectAccountProblem"),  # Google
    (403, "NotEntitled"),  # R2
    (403, "UserSuspended"),  # Ceph
    (403, "InArrearOrInsufficientBalance"),  # Huawei
    (402, "PaymentRequired"),
]
OURS = [
    (400, "InvalidToken"),
    (400, "AuthorizationHeaderMalformed"),
    (403, "InvalidAccessKeyId"),
    (403, "SignatureDoesNotMatch"),
    (403, "InvalidTokenId"),  # MinIO, of a session token
    (403, "AccessKeyDisabled"),
    (400, "InvalidRegion"),  # MinIO
    (400, "XMinioInsecureClientRequest"),
    (401, "Unauthorized"),
    *ACCOUNT,
]


@pytest.fixture
def s3() -> Iterator[RefusingS3]:
    with refusing_s3() as server:
        yield server


@pytest.fixture
def storage(s3: RefusingS3) -> Storage:
    return Storage(s3.settings, attempts=1)


def refusal(action: Any) -> BlipqError:
    with pytest.raises((S3Refused, S3Unavailable)) as raised:
        action()
    return raised.value


@pytest.mark.parametrize(("status", "code"), PASSING)
def test_an_upload_that_a_later_try_can_save_is_retryable(
    s3: RefusingS3, storage: Storage, status: int, code: str
) -> None:
    """A conflict above all: it does not say that the object is there."""
    s3.refuse(status, code)
    error = refusal(lambda: storage.upload(b"a cat"))
    assert isinstance(error, QueueUnavailable)
    assert error.retryable
    assert code in str(error)


@pytest.mark.parametrize(
    ("status", "code"), [*OURS, (403, "AccessDenied"), (400, "KMS.DisabledException")]
)
def test_an_upload_that_no_later_try_can_save_is_refused(
    s3: RefusingS3, storage: Storage, status: int, code: str
) -> None:
    s3.refuse(status, code)
    error = refusal(lambda: storage.upload(b"a cat"))
    assert isinstance(error, InvalidRequest)
    assert not error.retryable


@pytest.mark.parametrize(("status", "code"), FULL)
def test_a_producer_is_told_to_make_room(
    s3: RefusingS3, storage: Storage, status: int, code: str
) -> None:
    s3.refuse(status, code)
    error = refusal(lambda: storage.upload(b"a cat"))
    assert "S3 has no room: delete objects or raise the quota" in str(error)


@pytest.mark.parametrize(("status", "code"), ACCOUNT)
def test_a_producer_is_told_whose_account_it_is(
    s3: RefusingS3, storage: Storage, status: int, code: str
) -> None:
    s3.refuse(status, code)
    error = refusal(lambda: storage.upload(b"a cat"))
    assert "its owner must settle that with the provider" in str(error)


def test_a_producer_is_told_to_check_its_keys(s3: RefusingS3, storage: Storage) -> None:
    s3.refuse(403, "InvalidAccessKeyId")
    assert "check keys, region and endpoint" in str(refusal(lambda: storage.upload(b"a cat")))
    s3.refuse(400, "ExpiredToken")
    assert "renew the credentials" in str(refusal(lambda: storage.upload(b"a cat")))


@pytest.mark.parametrize(("status", "code"), PASSING[::3])
def test_a_watch_a_bulk_and_its_results_wait_for_what_passes(
    s3: RefusingS3, storage: Storage, status: int, code: str, tmp_path: Any
) -> None:
    s3.refuse(status, code)
    objects = Objects(storage)
    assert refusal(lambda: objects.head("photos", "a.jpg")).retryable
    assert refusal(lambda: list(objects.pages("photos", ""))).retryable
    assert refusal(lambda: storage.has_bucket("photos")).retryable
    facts = {"manifest": "m", "template": None, "defaults": {}, "id": "b", "version": "1"}
    journal = Journal.create(tmp_path / "m.bulk", **facts)
    try:
        assert refusal(lambda: write(journal, "s3://photos/out.jsonl", storage)).retryable
    finally:
        journal.close()


@pytest.mark.parametrize(("status", "code"), [(400, "ExpiredToken"), (403, "RequestTimeTooSkewed")])
def test_a_queue_that_refuses_for_now_is_asked_again(
    s3: RefusingS3, status: int, code: str
) -> None:
    s3.refuse(status, code)
    url = f"{s3.settings.s3_endpoint_url}/123/uploads"
    queue = Queue(url, s3.settings, visibility_s=60, wait_s=0)
    assert refusal(queue.next).retryable


def test_a_head_that_is_refused_once_says_nothing_of_the_object(
    s3: RefusingS3, storage: Storage
) -> None:
    """HEAD has no body: whether a 403 is a skewed clock or a closed bucket, GET says."""
    s3.refuse(403, "RequestTimeTooSkewed", times=1)
    error = refusal(lambda: Objects(storage).head("photos", "a.jpg"))
    assert error.retryable
    assert s3.requests == ["HEAD", "GET"]
    found = Objects(storage).head("photos", "a.jpg")
    assert found is not None


def test_a_head_that_is_forbidden_says_so(s3: RefusingS3, storage: Storage) -> None:
    s3.refuse(403, "AccessDenied")
    error = refusal(lambda: Objects(storage).head("photos", "a.jpg"))
    assert isinstance(error, S3Refused)
    assert error.refusal is Refusal.FORBIDDEN


@pytest.mark.parametrize(("status", "code"), [*OURS, (400, "ExpiredToken")])
def test_credentials_that_are_refused_are_told_apart_from_what_they_may_not_do(
    s3: RefusingS3, storage: Storage, status: int, code: str
) -> None:
    s3.refuse(status, code)
    assert code in str(storage.refused_access())
    for taken in ((403, "AccessDenied"), (404, "NoSuchKey"), (404, "NoSuchBucket")):
        s3.refuse(*taken)
        assert storage.refused_access() is None
    s3.refuse(503, "SlowDown")
    with pytest.raises(QueueUnavailable):
        storage.refused_access()


def told(code: str, status: int, operation: str = "GetObject") -> ClientError:
    answer: Any = {
        "Error": {"Code": code},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return ClientError(answer, operation)


@pytest.mark.parametrize(
    "operation",
    [
        "AssumeRole",
        "AssumeRoleWithWebIdentity",
        "GetSessionToken",
        "GetRoleCredentials",
        "CreateOAuth2Token",
    ],
)
@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "AccessDenied", Refusal.ACCESS),
        (400, "InvalidIdentityToken", Refusal.ACCESS),
        (403, "RegionDisabledException", Refusal.ACCESS),
        (403, "OptInRequired", Refusal.ACCOUNT),
        (404, "ResourceNotFoundException", Refusal.ACCESS),
        (400, "InvalidRequest", Refusal.ACCESS),
        (400, "ExpiredTokenException", Refusal.EXPIRED),
        (400, "IDPCommunicationError", Refusal.PASSING),
        (400, "Throttling", Refusal.PASSING),
        (429, "TooManyRequestsException", Refusal.PASSING),
        (503, "ServiceUnavailable", Refusal.PASSING),
    ],
)
def test_a_refused_credential_chain_is_never_about_the_object(
    operation: str, status: int, code: str, expected: Refusal
) -> None:
    assert refusal_of(told(code, status, operation)) is expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (told("KMS.NotFoundException", 400), Refusal.ENCRYPTION),
        (told("CloudKmsDisabledKey", 400), Refusal.ENCRYPTION),
        (told("InvalidRequest", 400), Refusal.ENCRYPTION),
        (told("507", 507), Refusal.FULL),
        (told("ThrottledByAnotherStore", 400), Refusal.PASSING),
        (told("SomethingNew", 400), Refusal.INVALID),
        (told("SomethingNew", 403), Refusal.FORBIDDEN),
        (told("SomethingNew", 429), Refusal.PASSING),
        (told("SomethingNew", 599), Refusal.PASSING),
        (told("MethodNotAllowed", 405), Refusal.MISSING),
        (told("304", 304), Refusal.PASSING),
        (NoCredentialsError(), Refusal.ACCESS),
        (CredentialRetrievalError(provider="p", error_msg="e"), Refusal.EXPIRED),
        (EndpointConnectionError(endpoint_url="u"), Refusal.PASSING),
        (ParamValidationError(report="key too long"), Refusal.INVALID),
    ],
)
def test_what_the_table_does_not_know_is_judged_by_its_status(
    error: Exception, expected: Refusal
) -> None:
    assert refusal_of(error) is expected


def test_a_code_is_found_in_what_a_library_says_of_it() -> None:
    assert refusal_in("status: 400, body: <Code>ExpiredToken</Code>") is Refusal.EXPIRED
    assert refusal_in("An error occurred (SlowDown) when calling") is Refusal.PASSING
    assert refusal_in("the table is Busy and NotFound") is None
    assert all(code.strip() == code for code in CODES)


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "AccountDisabled"])
def test_a_watch_ends_where_its_own_credentials_are_refused(
    apart: Settings, s3: RefusingS3, code: str
) -> None:
    """The upload is not at fault: it is not refused, and the source delivers it again."""
    from blipq.watch.events import Notification
    from blipq.watch.rules import Rules
    from producer.watch.test_watcher import Script, Watched

    rule = {"name": "c", "bucket": "photos", "request": {"kind": "caption"}}
    s3.refuse(403, code)
    where = s3.settings.s3_endpoint_url
    with Client(apart.model_copy(update={"s3_endpoint_url": where})) as client:
        batch = Script(Notification("photos", "cat.jpg"))
        watched = Watched(Rules.model_validate({"name": "w", "rules": [rule]}), client)
        with pytest.raises(S3Refused, match=code):
            watched.take(batch)
    assert batch.refused is None
    assert watched.counts == (0, 0, 0, 0)
