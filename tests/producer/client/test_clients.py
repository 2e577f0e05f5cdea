"""One set of scenarios for both clients, on the real stack and on the fake: all behave alike.

On the real stack the test plays the worker: it takes the messages that were published, and gives
the same answers as the fake.
"""

import hashlib
import inspect
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blipq import (
    AsyncClient,
    AsyncJob,
    Caption,
    CaptionRequest,
    CaptionResult,
    Client,
    ErrorCode,
    IdempotencyConflict,
    InvalidRequest,
    Job,
    JobCancelled,
    JobError,
    JobExpired,
    JobFailed,
    JobFilter,
    JobNotFound,
    Options,
    QueueFull,
    ResultTimeout,
    Settings,
    Submission,
    SubmitStopped,
    TenantLimited,
)
from blipq.contract import request_adapter
from blipq.errors import PermanentError
from blipq.ledger.connection import connect
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.s3.storage import Storage
from blipq.testing import FakeBlipq
from blocking import BlockingClient

IMAGE = "s3://uploads/cat.jpg"
CAT = CaptionResult(captions=(Caption(text="a cat"),))
QUEUES = ["blipq.default.high", "blipq.default.normal", "blipq.default.low"]


class RealWorld(FakeBlipq):
    """The real services, and a worker that is told its answers like the fake."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self._redis = connect(settings, timeout_s=10)
        self._ledger = WorkerLedger(self._redis, settings)
        self._storage = Storage(settings)
        self._may_run = threading.Event()
        self._may_run.set()
        self._over = False
        self._thread = threading.Thread(target=self._play)
        self._thread.start()

    def stop_worker(self) -> None:
        self._may_run.clear()

    def start_worker(self) -> None:
        self._may_run.set()

    def close(self) -> None:
        self._over = True
        self._may_run.set()
        self._thread.join()
        self._redis.close()

    def _play(self) -> None:
        while not self._over:
            self._may_run.wait()
            taken: Any = self._redis.brpop(QUEUES, timeout=0.2)
            if taken is not None:
                self._may_run.wait()
                self._run(json.loads(taken[1])["headers"]["id"])
            for message in self._ledger.reconcile().messages:
                self._run(message.id)

    def _run(self, id: str) -> None:
        claim = self._ledger.claim(id, "played")
        if not isinstance(claim, Claim):
            return
        outcome = self._outcome(request_adapter.validate_json(claim.request))
        if isinstance(outcome, JobError):
            self._ledger.fail(claim, outcome.model_dump_json(), "{}")
        else:
            self._ledger.succeed(claim, outcome.model_dump_json(exclude_none=True), "{}")


@pytest.fixture(params=["real", "fake"])
def world(request: pytest.FixtureRequest) -> Iterator[FakeBlipq]:
    """Where jobs go."""
    if request.param == "fake":
        fake = FakeBlipq()
        fake.answer("caption", CAT)
        yield fake
        return
    real = RealWorld(request.getfixturevalue("apart"))
    real.answer("caption", CAT)
    yield real
    real.close()


@pytest.fixture(params=["Client", "AsyncClient"])
def opened(request: pytest.FixtureRequest, world: FakeBlipq) -> Iterator[Callable[..., Any]]:
    """Makes clients of one sort, with settings of their own, that close after the test."""
    kind: Any = Client if request.param == "Client" else BlockingClient
    made = []

    def opened(**settings: Any) -> Any:
        if isinstance(world, RealWorld):
            client = kind(world.settings.model_copy(update=settings))
        else:
            client = kind(backend=world, **settings)
        made.append(client)
        return client.__enter__()

    yield opened
    for client in made:
        client.__exit__(None, None, None)


@pytest.fixture
def client(opened: Callable[..., Any]) -> Any:
    return opened()


def asked(number: int) -> CaptionRequest:
    return CaptionRequest.model_validate({"image": f"s3://uploads/{number}.jpg"})


# --- one job --------------------------------------------------------------------------------------


def test_a_job_comes_to_its_result(client: Any) -> None:
    job = client.caption(IMAGE)
    assert job.result(timeout=20) == CAT
    info = job.info()
    assert (info.status, info.kind, info.attempts, info.model) == (
        "succeeded",
        "caption",
        1,
        "default",
    )
    assert info.created_at <= info.started_at <= info.completed_at < info.expires_at
    assert job.status() == "succeeded"


def test_options_come_back_with_the_job(client: Any) -> None:
    job = client.caption(IMAGE, priority="high", expires_in="1h", metadata={"order": "42"})
    info = job.wait(timeout=20)
    assert info.metadata == {"order": "42"}
    assert 3500 < (info.expires_at - info.created_at).total_seconds() <= 3600


@pytest.mark.parametrize(
    ("ask", "kind"),
    [
        (lambda client: client.vqa(IMAGE, "why?", history=[("what?", "a cat")]), "vqa"),
        (lambda client: client.match(IMAGE, ["a cat", "a dog"], head="itc"), "match"),
        (lambda client: client.embed(IMAGE, "a cat"), "embed"),
        (lambda client: client.describe(IMAGE, questions="why?"), "describe"),
        (lambda client: client.search("photos", "a cat"), "search"),
    ],
)
def test_every_kind_is_asked(
    client: Any, world: FakeBlipq, ask: Callable[[Any], Any], kind: str
) -> None:
    world.answer(kind, JobError(code=ErrorCode.MODEL_UNAVAILABLE, message="none here"))
    job = ask(client)
    assert job.info().kind == kind
    with pytest.raises(JobFailed, match="model_unavailable: none here"):
        job.result(timeout=20)


def test_a_local_image_is_uploaded(client: Any, tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(b"a cat")
    assert client.caption(tmp_path / "cat.jpg").result(timeout=20) == CAT
    assert client.caption(b"a cat").result(timeout=20) == CAT
    with pytest.raises(InvalidRequest, match="cannot read"):
        client.caption(tmp_path / "dog.jpg")


def test_a_text_is_no_path_where_users_write_it(opened: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(b"a cat")
    client = opened(local_paths=False)
    with pytest.raises(InvalidRequest, match="is no s3://"):
        client.caption(str(tmp_path / "cat.jpg"))
    assert client.caption(tmp_path / "cat.jpg").result(timeout=20) == CAT


@pytest.mark.parametrize(
    ("options", "field"),
    [({"generation": {"num_beans": 1}}, "num_beans"), ({"priority": "urgent"}, "priority")],
)
def test_a_wrong_argument_is_named(client: Any, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        client.caption(IMAGE, **options)


def test_a_misspelt_argument_is_told_with_the_nearest_of_the_verb(client: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"promt: unknown; did you mean prompt\?"):
        client.caption(IMAGE, promt="a photo of")


def test_a_misspelt_setting_is_not_passed_over(opened: Callable[..., Any]) -> None:
    for kind in (Client, BlockingClient):
        with pytest.raises(InvalidRequest, match=r"redis_ulr: unknown; did you mean redis_url\?"):
            kind(redis_ulr="redis://127.0.0.1/0")


def test_what_is_no_request_is_told(client: Any) -> None:
    with pytest.raises(InvalidRequest, match="a CaptionRequest or another is expected, not dict"):
        client.submit({"kind": "caption", "image": IMAGE})
    with pytest.raises(InvalidRequest, match="not str"):
        client.submit_many([IMAGE])


def test_an_option_of_the_wrong_kind_names_its_fields(client: Any) -> None:
    told = "webhook: must be an object with named fields: url, events"
    with pytest.raises(InvalidRequest, match=told):
        client.caption(IMAGE, webhook="https://example.org/hook")


def test_a_failure_has_its_code(client: Any, world: FakeBlipq) -> None:
    world.answer("caption", PermanentError(ErrorCode.IMAGE_NOT_FOUND, "no such key"), CAT)
    with pytest.raises(JobFailed, match="no such key") as raised:
        client.caption(IMAGE).result(timeout=20)
    assert (raised.value.code, raised.value.attempts) == ("image_not_found", 1)
    assert client.caption(IMAGE).result(timeout=20) == CAT


def test_an_answer_may_depend_on_the_request(client: Any, world: FakeBlipq) -> None:
    world.answer(
        "caption", lambda asked: CaptionResult(captions=(Caption(text=asked.prompt or "-"),))
    )
    assert client.caption(IMAGE, "a photo of").result(timeout=20).text == "a photo of"


def test_time_is_up_while_the_job_goes_on(client: Any, world: FakeBlipq) -> None:
    world.stop_worker()
    job = client.caption(IMAGE)
    with pytest.raises(ResultTimeout, match="still queued") as raised:
        job.result(timeout=0.05)
    assert raised.value.job_id == job.id
    world.start_worker()
    assert job.result(timeout=20) == CAT


def test_a_job_is_cancelled_once(client: Any, world: FakeBlipq) -> None:
    world.stop_worker()
    job = client.caption(IMAGE)
    assert job.cancel()
    assert not job.cancel()
    with pytest.raises(JobCancelled):
        job.result(timeout=20)


def test_a_deadline_passes(client: Any, world: FakeBlipq) -> None:
    world.stop_worker()
    with pytest.raises(JobExpired):
        client.caption(IMAGE, expires_in="20ms").result(timeout=20)


@pytest.mark.parametrize("look", ["info", "wait", "result", "cancel"])
def test_an_unknown_id_is_not_found(client: Any, look: str) -> None:
    with pytest.raises(JobNotFound, match="job_unknown"):
        getattr(client.job("job_unknown"), look)()


def test_a_stored_id_is_a_handle_for_another_client(opened: Callable[..., Any]) -> None:
    stored = opened().caption(IMAGE).id
    job = opened().job(stored)
    assert job.result(timeout=20) == CAT
    assert job == opened().job(stored)


def test_an_idempotency_key_is_one_job(client: Any) -> None:
    first = client.caption(IMAGE, idempotency_key="order-42")
    assert client.caption(IMAGE, idempotency_key="order-42") == first
    with pytest.raises(IdempotencyConflict, match=first.id):
        client.caption("s3://uploads/dog.jpg", idempotency_key="order-42")
    with pytest.raises(IdempotencyConflict):
        client.caption(IMAGE, idempotency_key="order-42", priority="high")


def test_a_full_queue_refuses(opened: Callable[..., Any], world: FakeBlipq) -> None:
    world.stop_worker()
    client = opened(max_open_jobs=1)
    client.caption(IMAGE)
    with pytest.raises(QueueFull):
        client.caption(IMAGE)


# --- many jobs ------------------------------------------------------------------------------------


def test_many_are_submitted_and_awaited_in_order(client: Any) -> None:
    jobs = client.submit_many(map(asked, range(250)), Options(metadata={"a": "b"}))
    ended = client.wait_all(jobs, timeout=60)
    assert ended == jobs
    assert {job.result(timeout=0).text for job in ended} == {"a cat"}
    assert ended[0].info().metadata == {"a": "b"}


def test_many_are_given_as_they_end(client: Any, world: FakeBlipq) -> None:
    world.stop_worker()
    jobs = client.submit_many(map(asked, range(3)))
    ending = client.as_completed(jobs, timeout=20)
    jobs[2].cancel()
    assert next(ending) == jobs[2]
    world.start_worker()
    assert set(ending) == set(jobs[:2])


def test_time_is_up_for_those_that_have_not_ended(client: Any, world: FakeBlipq) -> None:
    world.stop_worker()
    jobs = client.submit_many(map(asked, range(3)))
    jobs[0].cancel()
    with pytest.raises(ResultTimeout, match="2 of 3 jobs"):
        list(client.as_completed(jobs, timeout=0.1))
    with pytest.raises(ResultTimeout, match="2 of 3 jobs"):
        client.wait_all(jobs, timeout=0.1)


def test_submissions_that_stopped_go_on_where_they_stopped(
    opened: Callable[..., Any], world: FakeBlipq
) -> None:
    world.stop_worker()
    client = opened(max_open_jobs=3)
    rest = map(asked, range(5))
    with pytest.raises(SubmitStopped, match="request 3") as raised:
        client.submit_many(rest)
    world.start_worker()
    waited = client.submit_many(itertools.chain(raised.value.pending, rest), timeout=20)
    assert len(waited) == 2


def test_the_same_submissions_are_the_same_jobs(client: Any) -> None:
    submissions = [Submission(asked(number)) for number in range(3)]
    first = client.submit_many(submissions)
    assert client.submit_many(submissions) == first
    assert [job.id for job in first] == [submission.id for submission in submissions]


def test_waits_of_many_threads_share_a_client(client: Any) -> None:
    jobs = client.submit_many(map(asked, range(20)))
    told: list[str] = []
    threads = [
        threading.Thread(target=lambda job=job: told.append(job.result(timeout=20).text))
        for job in jobs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == ["a cat"] * 20
    assert len(client.notifier) == 0


# --- parity ---------------------------------------------------------------------------------------


def parts(kind: type) -> dict[str, Any]:
    return {name: part for name, part in vars(kind).items() if not name.startswith("_")}


def signature(part: Any) -> list[tuple[Any, ...]]:
    if isinstance(part, property):
        return [("self", None, inspect.Parameter.empty)]
    parameters = inspect.signature(part).parameters.values()
    return [(each.name, each.default) for each in parameters]


@pytest.mark.parametrize(
    ("sync", "asynchronous"), [(Client, AsyncClient), (Job, AsyncJob)], ids=["client", "job"]
)
def test_both_have_the_same_names_and_arguments(sync: type, asynchronous: type) -> None:
    here, there = parts(sync), parts(asynchronous)
    renamed = {"aclose": "close"}
    assert {renamed.get(name, name) for name in there} == set(here)
    for name, part in there.items():
        if not isinstance(here[renamed.get(name, name)], property):
            assert signature(part) == signature(here[renamed.get(name, name)]), name


# --- tenants --------------------------------------------------------------------------------------


def test_a_tenant_is_that_of_the_call_or_of_the_settings(opened: Callable[..., Any]) -> None:
    client = opened(tenant="shop")
    jobs = [
        client.caption(IMAGE),
        client.caption(IMAGE, tenant="zoo"),
        client.submit(asked(1)),
        client.submit(asked(2), tenant="zoo"),
        *client.submit_many([asked(3), Submission(asked(4), tenant="own"), Submission(asked(5))]),
        *client.submit_many([asked(6)], tenant="zoo"),
    ]
    named = [job.info().tenant for job in jobs]
    assert named == ["shop", "zoo", "shop", "zoo", "shop", "own", None, "zoo"]


def test_a_tenants_upload_is_in_its_part_of_the_inbox_and_forgotten_with_its_job(
    client: Any,
) -> None:
    job = client.caption(b"a cat", tenant="shop")
    job.wait(timeout=20)
    report = client.forget([job.id])
    (image,) = report.objects
    assert image.startswith("s3://blipq-inbox/shop/")
    assert report.left == []


def test_a_tenant_with_its_open_jobs_is_refused_and_others_are_not(
    client: Any, world: FakeBlipq
) -> None:
    world.stop_worker()
    client.limit("shop", open_jobs=1)
    first = client.caption(IMAGE, tenant="shop", idempotency_key="k")
    assert client.caption(IMAGE, tenant="shop", idempotency_key="k").id == first.id
    with pytest.raises(TenantLimited, match="the tenant 'shop' may have 1 open jobs") as refused:
        client.caption(IMAGE, tenant="shop")
    found = refused.value.tenant, refused.value.limit, refused.value.most
    assert found == ("shop", "open_jobs", 1)
    client.caption(IMAGE, tenant="zoo")
    client.caption(IMAGE)
    world.start_worker()
    assert first.result(timeout=20) == CAT
    client.caption(IMAGE, tenant="shop")


def test_a_tenant_that_has_used_its_rate_up_is_refused_until_it_has_some(client: Any) -> None:
    client.limit("shop", rate=0.01)
    client.caption(IMAGE, tenant="shop")
    with pytest.raises(TenantLimited, match=r"may submit 0\.01 jobs a second") as refused:
        client.caption(IMAGE, tenant="shop")
    assert 50 < refused.value.retry_after_s <= 100
    client.limit("shop", rate=0.2)  # it holds at once
    client.caption(IMAGE, tenant="shop")
    with pytest.raises(TenantLimited) as refused:
        client.caption(IMAGE, tenant="shop")
    assert 4 < refused.value.retry_after_s <= 5
    client.limit("shop")
    client.caption(IMAGE, tenant="shop")
    with pytest.raises(InvalidRequest, match="rate: "):
        client.limit("shop", rate=0)


# --- queues, and many jobs, for operators ---------------------------------------------------------


def test_a_paused_queue_keeps_its_jobs_until_it_is_resumed(client: Any) -> None:
    assert client.pause("blipq.default.low") == 0
    waits = client.caption(IMAGE, priority="low")
    assert client.caption(IMAGE).result(timeout=20) == CAT  # another queue goes on
    with pytest.raises(ResultTimeout):
        waits.result(timeout=0.3)
    assert client.resume("blipq.default.low") == 1
    assert waits.result(timeout=20) == CAT
    assert client.caption(IMAGE, priority="low").result(timeout=20) == CAT


@pytest.mark.parametrize("name", ["default", "blipq.default", "blipq.default.urgent", ""])
def test_only_a_queue_can_be_paused(client: Any, name: str) -> None:
    for call in (client.pause, client.resume):
        with pytest.raises(InvalidRequest, match=r"not of the form blipq.MODEL.PRIORITY"):
            call(name)


def test_jobs_that_match_are_cancelled_and_counted_first(client: Any, world: FakeBlipq) -> None:
    world.stop_worker()
    jobs = [client.caption(IMAGE, metadata={"user": user, "n": "1"}) for user in "aab"]
    where = JobFilter(metadata={"user": "a"})
    assert client.cancel_all(where, dry_run=True) == 2
    assert {job.status() for job in jobs} == {"queued"}
    assert client.cancel_all(where) == 2
    assert [job.status() for job in jobs] == ["cancelled", "cancelled", "queued"]
    assert client.cancel_all(where) == 0
    assert client.cancel_all([jobs[2].id, jobs[0].id, "job_unknown"]) == 1


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ({"status": "queued"}, 3),
        ({"status": "succeeded"}, 0),
        ({"kind": "caption"}, 2),
        ({"kind": "caption", "priority": "high"}, 1),
        ({"priority": "low"}, 0),
        ({"model": "default"}, 3),
        ({"metadata": {"n": "2"}}, 1),
        ({"metadata": {"n": "2", "user": "b"}}, 0),
        ({"code": "image_not_found"}, 0),
    ],
)
def test_a_filter_means_jobs_that_meet_all_conditions(
    client: Any, world: FakeBlipq, where: Any, count: int
) -> None:
    world.stop_worker()
    client.caption(IMAGE, metadata={"n": "1"})
    client.caption(IMAGE, metadata={"n": "2", "user": "a"}, priority="high")
    client.vqa(IMAGE, "why?")
    assert client.cancel_all(JobFilter(**where), dry_run=True) == count


def test_jobs_that_failed_are_tried_again(client: Any, world: FakeBlipq) -> None:
    world.answer("caption", PermanentError(ErrorCode.IMAGE_NOT_FOUND, "no such key"), CAT)
    failed, done = client.caption(IMAGE), client.caption(IMAGE)
    assert failed.wait(timeout=20).status == "failed"
    assert done.wait(timeout=20).status == "succeeded"
    assert client.retry_all(JobFilter(code="image_forbidden")) == 0
    assert client.retry_all([done.id, "job_unknown"]) == 0
    assert client.retry_all(JobFilter(code="image_not_found"), dry_run=True) == 1
    assert failed.status() == "failed"
    assert client.retry_all(JobFilter(code="image_not_found")) == 1
    assert client.job(failed.id).result(timeout=20) == CAT


def test_waiting_jobs_move_to_another_priority(client: Any, world: FakeBlipq) -> None:
    world.stop_worker()
    low, high = client.caption(IMAGE, priority="low"), client.caption(IMAGE, priority="high")
    client.pause("blipq.default.low")
    client.pause("blipq.default.normal")
    assert client.expedite(JobFilter(model="default"), dry_run=True) == 1
    assert client.expedite([low.id, high.id]) == 1
    assert client.expedite([low.id]) == 0
    world.start_worker()
    assert low.result(timeout=20) == CAT
    assert high.result(timeout=20) == CAT


def test_a_job_is_erased_with_what_it_left(client: Any, world: FakeBlipq) -> None:
    gone = client.caption(b"a cat", idempotency_key="k", metadata={"user": "42"})
    stays = client.caption(b"a dog")
    assert {gone.wait(timeout=20).status, stays.wait(timeout=20).status} == {"succeeded"}
    cat = f"s3://blipq-inbox/{hashlib.sha256(b'a cat').hexdigest()}"
    assert client.count(JobFilter(metadata={"user": "42"})) == 1
    report = client.forget(JobFilter(metadata={"user": "42"}))
    assert (report.jobs, report.objects, report.left) == ([gone.id], [cat], [])
    with pytest.raises(JobNotFound):
        client.job(gone.id).info()
    assert stays.info().status == "succeeded"
    # Its key is free, too, and the picture is uploaded again.
    assert client.caption(b"a cat", idempotency_key="k").result(timeout=20) == CAT
    assert client.forget([gone.id, "job_unknown"]).jobs == []


def test_an_open_job_is_cancelled_before_it_is_erased(client: Any, world: FakeBlipq) -> None:
    world.stop_worker()
    job = client.caption(IMAGE, metadata={"user": "42"})
    assert client.forget([job.id]).jobs == [job.id]
    world.start_worker()
    assert client.count(JobFilter(metadata={"user": "42"})) == 0


def test_an_upload_that_an_open_job_names_is_left(client: Any, world: FakeBlipq) -> None:
    done = client.caption(b"a cat")
    assert done.wait(timeout=20).status == "succeeded"
    world.stop_worker()
    client.caption(b"a cat", "a photo of")
    report = client.forget([done.id])
    assert report.objects == []
    assert "an open job names it" in report.left[0]


def test_entries_of_an_index_are_removed_or_told(client: Any, world: FakeBlipq) -> None:
    world.answer("embed", JobError(code=ErrorCode.MODEL_UNAVAILABLE, message="none here"))
    jobs = [client.embed(IMAGE, index="photos") for _ in range(2)]
    for job in jobs:
        job.wait(timeout=20)
    assert client.forget([jobs[0].id]).left == [f"{IMAGE}: in the index photos"]
    removed: list[Any] = []
    report = client.forget([jobs[1].id], unindex=lambda *entry: removed.append(entry))
    assert (removed, report.entries, report.left) == ([("photos", [IMAGE])], 1, [])


def test_jobs_are_named_by_a_filter_with_conditions_or_by_a_list(client: Any) -> None:
    with pytest.raises(ValueError, match="at least one condition"):
        JobFilter()
    with pytest.raises(InvalidRequest, match="a list of ids"):
        client.cancel_all("job_1")
