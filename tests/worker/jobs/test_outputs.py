"""A result's object in S3: written by whoever holds the job, and nowhere else than allowed."""

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from blipq import Client, ImageRef, Settings
from blipq.contract import CaptionRequest
from blipq.errors import PermanentError, QueueUnavailable, TransientError
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.s3.outputs import why_all_refuse, why_refused
from blipq.s3.storage import Storage
from blipq_worker.claims import Lost
from blipq_worker.images.s3_access import AccessRefused
from blipq_worker.jobs import outputs
from blipq_worker.jobs.outputs import Outputs, output_storage
from blipq_worker.settings import WorkerSettings
from conftest import ledger_of
from refusing_s3 import refusing_s3

IMAGE = "s3://photos/cat.jpg"
BUCKET = "blipq-outputs"
OPTIONS = WorkerSettings(allowed_outputs=(BUCKET,))


@pytest.fixture(scope="module")
def storage(settings: Settings) -> Storage:
    return Storage(settings)


@pytest.fixture
def client(apart: Settings) -> Iterator[Client]:
    with Client(apart) as client:
        yield client


@pytest.fixture
def uri(request: pytest.FixtureRequest, storage: Storage) -> str:
    """A place where nothing is yet."""
    key = f"{request.node.name}.json".replace("[", "-").replace("]", "")
    storage.client.delete_object(Bucket=BUCKET, Key=key)
    return f"s3://{BUCKET}/{key}"


def claimed(client: Client, uri: str) -> Claim:
    job = client.caption(IMAGE, output=uri)
    claim = ledger_of(client).claim(job.id, "w1")
    assert isinstance(claim, Claim)
    return claim


def taken_over(ledger: WorkerLedger, claim: Claim) -> Claim:
    """The claim of another worker, after the lease of the first has run out."""
    assert ledger.hand_back(claim)
    other = ledger.claim(claim.id, "w2")
    assert isinstance(other, Claim)
    return other


def stored(storage: Storage, uri: str) -> str | None:
    bucket, key = uri.removeprefix("s3://").split("/", 1)
    if storage.head(bucket, key) is None:
        return None
    return str(storage.client.get_object(Bucket=bucket, Key=key)["Body"].read().decode())


class Freezing(Storage):
    """Stands still right before it writes, as a process does that is stopped there."""

    def __init__(self, settings: Settings, meanwhile: Callable[[], object]) -> None:
        super().__init__(settings)
        self._meanwhile = meanwhile

    def put_over(self, *args: Any, **kwargs: Any) -> bool:
        meanwhile, self._meanwhile = self._meanwhile, lambda: None
        meanwhile()
        return super().put_over(*args, **kwargs)


# --- who writes -----------------------------------------------------------------------------------


def test_the_holder_writes_over_what_is_there(client: Client, storage: Storage, uri: str) -> None:
    writer = Outputs(storage, ledger_of(client), OPTIONS)
    writer.write(claimed(client, uri), "first")
    writer.write(claimed(client, uri), "second")
    assert stored(storage, uri) == "second"


@pytest.mark.parametrize("before", [None, "of a job before"])
def test_a_worker_frozen_before_its_write_leaves_a_newer_answer_alone(
    client: Client, storage: Storage, settings: Settings, uri: str, before: str | None
) -> None:
    if before is not None:
        storage.put(uri, before.encode(), content_type="text/plain")
    claim = claimed(client, uri)

    def meanwhile() -> None:
        other = taken_over(ledger_of(client), claim)
        Outputs(storage, ledger_of(client), OPTIONS).write(other, "newer")
        ledger_of(client).succeed(other, json.dumps({"kind": "caption", "captions": []}), "{}")

    frozen = Freezing(settings, meanwhile)
    with pytest.raises(Lost):
        Outputs(frozen, ledger_of(client), OPTIONS).write(claim, "older")
    assert stored(storage, uri) == "newer"


# --- large results --------------------------------------------------------------------------------

LARGE = OPTIONS.model_copy(update={"results": f"s3://{BUCKET}/large/", "result_bytes": 1024})


def test_a_large_result_goes_to_s3_and_a_small_one_does_not(
    client: Client, storage: Storage
) -> None:
    ledger = ledger_of(client)
    job = client.submit(CaptionRequest.model_validate({"image": IMAGE}), id="../a job?#")
    claim = ledger.claim(job.id, "w1")
    assert isinstance(claim, Claim)
    outputs = Outputs(storage, ledger, LARGE)
    assert outputs.place(claim, "x" * 1024) is None
    uri = outputs.place(claim, "x" * 1025)
    assert uri == f"s3://{BUCKET}/large/{hashlib.sha256(job.id.encode()).hexdigest()}.json"
    assert stored(storage, uri) == "x" * 1025
    assert Outputs(storage, ledger, OPTIONS).place(claim, "x" * 10**6) is None


def test_the_bytes_of_a_result_count_not_its_characters(
    client: Client, storage: Storage, uri: str
) -> None:
    outputs, claim = Outputs(storage, ledger_of(client), LARGE), claimed(client, uri)
    assert outputs.place(claim, "图" * 341) is None  # 1,023 bytes
    assert outputs.place(claim, "图" * 342) == uri


def test_a_large_result_that_is_at_its_output_is_not_written_twice(
    client: Client, storage: Storage, uri: str
) -> None:
    assert Outputs(storage, ledger_of(client), LARGE).place(claimed(client, uri), "x" * 9999) == uri


def test_a_lost_claim_writes_no_large_result(client: Client, storage: Storage) -> None:
    job = client.caption(IMAGE)
    ledger = ledger_of(client)
    claim = ledger.claim(job.id, "w1")
    assert isinstance(claim, Claim)
    job.cancel()
    with pytest.raises(Lost):
        Outputs(storage, ledger, LARGE).place(claim, "x" * 9999)


@pytest.mark.parametrize("key", ["large/1.json", "./large/1.json", "large//1.json"])
def test_no_output_is_among_the_results_of_other_jobs(
    client: Client, storage: Storage, key: str
) -> None:
    outputs = Outputs(storage, ledger_of(client), LARGE)
    with pytest.raises(PermanentError, match="among the results of other jobs"):
        outputs.check(claimed(client, f"s3://{BUCKET}/{key}"), None)
    outputs.check(claimed(client, f"s3://{BUCKET}/larger/1.json"), None)


@pytest.mark.parametrize("how", ["cancelled", "taken over"])
def test_a_job_that_is_no_longer_held_writes_nothing(
    client: Client, storage: Storage, uri: str, how: str
) -> None:
    claim = claimed(client, uri)
    if how == "cancelled":
        client.job(claim.id).cancel()
    else:
        taken_over(ledger_of(client), claim)
    with pytest.raises(Lost):
        Outputs(storage, ledger_of(client), OPTIONS).write(claim, "late")
    assert stored(storage, uri) is None


def test_a_write_that_another_jobs_write_overtook_is_made_again(
    client: Client, storage: Storage, settings: Settings, uri: str
) -> None:
    """Two jobs may share a place: the later write stays, as ever."""
    frozen = Freezing(
        settings, lambda: storage.put(uri, b"another job's", content_type="text/plain")
    )
    Outputs(frozen, ledger_of(client), OPTIONS).write(claimed(client, uri), "mine")
    assert stored(storage, uri) == "mine"


def test_a_place_that_is_written_all_the_time_is_given_up_for_now(
    client: Client, storage: Storage, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "put_over", lambda *_, **__: False)
    with pytest.raises(TransientError, match="others keep writing"):
        Outputs(storage, ledger_of(client), OPTIONS).write(claimed(client, uri), "mine")


def test_a_write_waits_until_redis_confirms_the_claim(
    client: Client, storage: Storage, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, renew, failures = claimed(client, uri), WorkerLedger.renew, [1, 2]

    def away(*args: Any, **kwargs: Any) -> list[str]:
        if failures:
            failures.pop()
            assert stored(storage, uri) is None
            raise QueueUnavailable("Redis does not answer")
        return renew(*args, **kwargs)

    monkeypatch.setattr(WorkerLedger, "renew", away)
    monkeypatch.setattr(outputs, "PAUSE_S", 0.01)
    Outputs(storage, ledger_of(client), OPTIONS).write(claim, "after all")
    assert stored(storage, uri) == "after all"


def test_a_write_that_redis_never_confirms_is_not_made(
    client: Client, storage: Storage, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any, **__: Any) -> list[str]:
        raise QueueUnavailable("Redis does not answer")

    claim = claimed(client, uri)
    monkeypatch.setattr(WorkerLedger, "renew", away)
    monkeypatch.setattr(outputs, "PAUSE_S", 0.01)
    monkeypatch.setattr(outputs, "CONFIRM_FOR_S", 0.05)
    with pytest.raises(TransientError, match="Redis does not answer"):
        Outputs(storage, ledger_of(client), OPTIONS).write(claim, "unsure")
    assert stored(storage, uri) is None


def test_a_lease_that_a_write_could_outlast_is_renewed_first(
    client: Client, storage: Storage, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to a renewal came so late that little of the lease is left."""
    now, renewals = [0.0], []
    renew = WorkerLedger.renew

    def late(*args: Any, **kwargs: Any) -> list[str]:
        renewals.append(now[0])
        now[0] += 29.0 if len(renewals) == 1 else 0.1
        return renew(*args, **kwargs)

    monkeypatch.setattr(WorkerLedger, "renew", late)
    monkeypatch.setattr(outputs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(outputs.time, "sleep", lambda _: None)
    Outputs(storage, ledger_of(client), OPTIONS).write(claimed(client, uri), "mine")
    assert renewals == [0.0, 29.0]


@pytest.mark.parametrize("lease_s", [2.0, 3.0, 30.0, 600.0])
def test_a_write_ends_within_a_fresh_lease(settings: Settings, lease_s: float) -> None:
    """Settings allow no lease that is too short for one."""
    options = WorkerSettings(lease_s=lease_s)
    assert output_storage(settings, options).longest_write_s + outputs._EXPECT_S < lease_s


@pytest.mark.parametrize("there", ["", "etag", None])
def test_a_store_without_conditions_is_written_all_the_same(there: str | None) -> None:
    with refusing_s3() as s3:
        s3.refuse(501, "NotImplemented", times=0 if there is None else 1)
        store = Storage(s3.settings, attempts=1)
        assert store.put_over("s3://b-c/k", b"{}", there, content_type="application/json")
        assert s3.requests == ["PUT"] * (1 if there is None else 2)


@pytest.mark.parametrize(
    ("status", "code"), [(412, "PreconditionFailed"), (409, "ConditionalRequestConflict")]
)
def test_a_conflict_is_no_write(status: int, code: str) -> None:
    with refusing_s3() as s3:
        s3.refuse(status, code)
        store = Storage(s3.settings, attempts=1)
        assert not store.put_over("s3://b-c/k", b"{}", "", content_type="application/json")


def test_a_worker_that_may_only_write_writes(client: Client, uri: str) -> None:
    """Its HEAD is refused, and the GET that asks why."""
    with refusing_s3() as s3:
        s3.refuse(403, "AccessDenied", times=2)
        Outputs(Storage(s3.settings, attempts=1), ledger_of(client), OPTIONS).write(
            claimed(client, uri), "mine"
        )
        assert s3.requests == ["HEAD", "GET", "PUT"]


def test_an_output_whose_key_is_gone_is_not_the_requests_fault(client: Client, uri: str) -> None:
    with refusing_s3() as s3:
        s3.refuse(400, "KMS.DisabledException")
        writer = Outputs(Storage(s3.settings, attempts=1), ledger_of(client), OPTIONS)
        with pytest.raises(PermanentError) as raised:
            writer.write(claimed(client, uri), "mine")
    assert raised.value.code == "internal"


@pytest.mark.parametrize(
    ("status", "code"), [(403, "QuotaExceeded"), (400, "XMinioAdminBucketQuotaExceeded")]
)
def test_an_output_that_finds_no_room_is_tried_again(
    client: Client, uri: str, status: int, code: str
) -> None:
    with refusing_s3() as s3:
        s3.script = [None, (status, code)]  # the HEAD is answered, the PUT is not taken
        writer = Outputs(Storage(s3.settings, attempts=1), ledger_of(client), OPTIONS)
        with pytest.raises(TransientError, match="delete objects or raise the quota"):
            writer.write(claimed(client, uri), "mine")


def test_an_output_that_a_closed_account_refuses_is_the_workers_affair(
    client: Client, uri: str
) -> None:
    with refusing_s3() as s3:
        s3.refuse(403, "AccountDisabled")
        writer = Outputs(Storage(s3.settings, attempts=1), ledger_of(client), OPTIONS)
        with pytest.raises(AccessRefused):
            writer.write(claimed(client, uri), "mine")


def test_a_job_without_an_output_asks_nobody(client: Client, storage: Storage) -> None:
    claim = ledger_of(client).claim(client.caption(IMAGE).id, "w1")
    assert isinstance(claim, Claim)
    writer = Outputs(storage, ledger_of(client), WorkerSettings())
    writer.check(claim, ImageRef(uri=IMAGE))
    ledger_of(client).cancel(claim.id)
    writer.write(claim, "nowhere")


# --- where ----------------------------------------------------------------------------------------

PLACES = Settings(inbox_bucket="inbox", indexes="s3://shared/indexes")


@pytest.mark.parametrize(
    ("uri", "allowed"),
    [
        ("s3://answers/a.json", ("answers",)),
        ("s3://answers/blipq/a.json", ("other", "answers/blipq/")),
        ("s3://shared/indexes-2/a.json", ("shared",)),
        ("s3://answers/a//b.json", ("answers",)),
    ],
)
def test_an_output_may_go_where_it_is_allowed(uri: str, allowed: tuple[str, ...]) -> None:
    assert why_refused(uri, allowed, PLACES, ImageRef(uri=IMAGE)) is None


@pytest.mark.parametrize(
    ("uri", "allowed", "why"),
    [
        ("s3://answers/a.json", (), "names no bucket"),
        ("s3://answers/a.json", ("answer", "answers-2", "answers/b"), "outside"),
        ("s3://answers/blipq/../a.json", ("answers/blipq",), "'..'"),
        ("s3://answers/blipq//./../a.json", ("answers/blipq",), "'..'"),
        (f"s3://inbox/{'0' * 64}", ("inbox",), "inbox"),
        ("s3://inbox/results/a.json", ("inbox/results",), "inbox"),
        ("s3://shared/indexes/photos.lance/data", ("shared",), "search indexes"),
        ("s3://shared/./indexes/photos.lance/data", ("shared",), "search indexes"),
        ("s3://shared//indexes//photos.lance/data", ("shared",), "search indexes"),
        (IMAGE, ("photos",), "the image that the job is about"),
        ("s3://photos/./cat.jpg", ("photos",), "the image that the job is about"),
    ],
)
def test_an_output_goes_nowhere_else(uri: str, allowed: tuple[str, ...], why: str) -> None:
    """Above all not over what others uploaded, or what searches read."""
    assert why in str(why_refused(uri, allowed, PLACES, ImageRef(uri=IMAGE)))


def test_a_bucket_of_indexes_is_theirs_alone() -> None:
    places = Settings(indexes="s3://indexes")
    assert "search indexes" in str(why_refused("s3://indexes/a.json", ("indexes",), places))


def test_what_may_be_read_may_not_be_written(client: Client, storage: Storage, uri: str) -> None:
    options = WorkerSettings(allowed_buckets=(BUCKET,))
    with pytest.raises(PermanentError, match="BLIPQ_ALLOWED_OUTPUTS") as raised:
        Outputs(storage, ledger_of(client), options).check(claimed(client, uri), None)
    assert raised.value.code == "invalid_request"


WORKERS: dict[str, dict[str, Any]] = {
    "old": {"models": ["default"]},
    "a": {"models": ["default"], "outputs": ["answers"]},
    "b": {"models": ["default", "other"], "outputs": []},
}


def test_what_all_workers_refuse_is_known_beforehand(caplog: pytest.LogCaptureFixture) -> None:
    uri = "s3://answers/a.json"
    assert "the workers of 'other' refuse it" in str(why_all_refuse(uri, "other", WORKERS, PLACES))
    assert why_all_refuse(uri, "default", WORKERS, PLACES) is None
    assert "some workers of 'default' refuse" in caplog.text
    assert why_all_refuse(uri, "nobody's", WORKERS, PLACES) is None
    assert why_all_refuse(uri, "default", {"old": WORKERS["old"]}, PLACES) is None
    assert "inbox" in str(why_all_refuse("s3://inbox/a", "nobody's", WORKERS, PLACES))
