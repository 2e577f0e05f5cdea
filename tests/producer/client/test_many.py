"""Many jobs at once: submitted by the chunk, awaited over one subscription."""

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from blipq import (
    CaptionRequest,
    Client,
    IdempotencyConflict,
    InvalidRequest,
    JobNotFound,
    Options,
    QueueFull,
    QueueUnavailable,
    ResultTimeout,
    Settings,
    Submission,
    SubmitStopped,
    VQARequest,
)
from blipq.client.submitting import MAX_JOBS
from blipq.ledger.worker import Claim, WorkerLedger
from conftest import wait_until

RESULT = '{"kind": "caption", "captions": [{"text": "a cat"}]}'


def asked(number: int) -> CaptionRequest:
    return CaptionRequest.model_validate({"image": f"s3://uploads/{number}.jpg"})


def image_of(raw: "redis.Redis", id: str) -> str:
    return str(raw.hget(f"blipq:job:{id}", "request"))


def finish(ledger: WorkerLedger, id: str) -> None:
    claim = ledger.claim(id, "w1")
    assert isinstance(claim, Claim)
    assert ledger.succeed(claim, RESULT, "{}")


# --- submit_many ----------------------------------------------------------------------------------


def test_jobs_come_back_in_order_and_are_published(
    client: Client, raw_redis: "redis.Redis"
) -> None:
    jobs = client.submit_many(map(asked, range(2 * MAX_JOBS + 1)))
    assert len(jobs) == 2 * MAX_JOBS + 1
    for number in (0, MAX_JOBS - 1, MAX_JOBS, 2 * MAX_JOBS):
        assert f"/{number}.jpg" in image_of(raw_redis, jobs[number].id)
    assert raw_redis.llen("blipq.default.normal") == len(jobs)


def test_kinds_and_queues_may_be_mixed(client: Client, raw_redis: "redis.Redis") -> None:
    questions = VQARequest.model_validate({"image": "s3://uploads/cat.jpg", "questions": "why?"})
    urgent = Submission(questions, Options.model_validate({"priority": "high"}), id="job_urgent")
    plain, high = client.submit_many([asked(1), urgent], Options(model="demo"))
    assert plain.info().model == "demo"
    assert high.id == "job_urgent"
    assert (high.info().kind, high.info().model) == ("vqa", "default")
    assert raw_redis.llen("blipq.demo.normal") == raw_redis.llen("blipq.default.high") == 1


def test_requests_are_taken_as_they_are_needed(client: Client, raw_redis: "redis.Redis") -> None:
    open_when_taken = []

    def requests() -> Iterator[CaptionRequest]:
        for number in range(2 * MAX_JOBS):
            open_when_taken.append(raw_redis.zcard("blipq:open"))
            yield asked(number)

    client.submit_many(requests())
    assert open_when_taken[MAX_JOBS - 1 : MAX_JOBS + 1] == [0, MAX_JOBS]


def test_long_requests_make_small_chunks(client: Client, raw_redis: "redis.Redis") -> None:
    texts = [f"{number:04}" + "x" * 4000 for number in range(64)]  # a quarter of a megabyte

    def requests() -> Iterator[VQARequest]:
        for number in range(9):
            fields = {"image": f"s3://uploads/{number}.jpg", "questions": texts}
            if number == 8:
                assert raw_redis.zcard("blipq:open") >= 4
            yield VQARequest.model_validate(fields)

    assert len(client.submit_many(requests())) == 9


def test_nothing_to_submit_is_fine(client: Client) -> None:
    assert client.submit_many([]) == []


def test_the_same_submissions_again_are_the_same_jobs(
    client: Client, raw_redis: "redis.Redis"
) -> None:
    submissions = [Submission(asked(number)) for number in range(3)]
    assert client.submit_many(submissions) == client.submit_many(submissions)
    assert raw_redis.zcard("blipq:open") == 3


def test_an_idempotency_key_finds_the_first_job(client: Client) -> None:
    options = Options(idempotency_key="order-42")
    first = client.submit(asked(1), options)
    assert client.submit_many([Submission(asked(1), options)]) == [first]


def test_a_conflict_stops_it_with_all_before_it_recorded(
    client: Client, raw_redis: "redis.Redis"
) -> None:
    client.submit(asked(9), id="job_taken")
    taken = Submission(asked(1), id="job_taken")
    with pytest.raises(SubmitStopped, match="request 1: job job_taken") as raised:
        client.submit_many([asked(0), taken, asked(2)])
    stopped = raised.value
    assert isinstance(stopped.__cause__, IdempotencyConflict)
    assert (stopped.index, stopped.retryable) == (1, False)
    assert [job.status() for job in stopped.jobs] == ["queued"]
    assert [pending.request for pending in stopped.pending] == [asked(1), asked(2)]
    assert raw_redis.zcard("blipq:open") == 2
    assert raw_redis.llen("blipq.default.normal") == 2


def test_an_invalid_request_stops_it_with_all_before_it_recorded(client: Client) -> None:
    inside = Options.model_validate({"webhook": {"url": "https://example.com:8443/"}})
    with pytest.raises(SubmitStopped, match="webhook") as raised:
        client.submit_many([asked(0), Submission(asked(1), inside), asked(2)])
    assert isinstance(raised.value.__cause__, InvalidRequest)
    assert [job.status() for job in raised.value.jobs] == ["queued"]
    assert [pending.request for pending in raised.value.pending] == [asked(1)]


def full(settings: Settings, most: int) -> Client:
    return Client(settings.model_copy(update={"max_open_jobs": most}))


def test_a_full_queue_stops_it_and_the_rest_can_be_submitted_later(apart: Settings) -> None:
    rest = map(asked, range(5))
    with full(apart, 3) as client:
        with pytest.raises(SubmitStopped) as raised:
            client.submit_many(rest)
        stopped = raised.value
        assert isinstance(stopped.__cause__, QueueFull)
        assert (stopped.index, stopped.retryable) == (3, True)
        for job in stopped.jobs:
            job.cancel()
        later = client.submit_many(itertools.chain(stopped.pending, rest))
    assert len(stopped.jobs) + len(later) == 5


def test_a_full_queue_is_waited_for(apart: Settings) -> None:
    with full(apart, 2) as client:
        first = client.submit_many([asked(0), asked(1)])
        room = threading.Timer(0.2, first[0].cancel)
        room.start()
        (job,) = client.submit_many([asked(2)], timeout=20)
        room.join()
        assert job.status() == "queued"


def test_redis_away_stops_it_and_nothing_is_doubled(own_redis: Settings) -> None:
    submissions = [Submission(asked(number)) for number in range(3)]
    nowhere = own_redis.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    with Client(nowhere) as client, pytest.raises(SubmitStopped) as raised:
        client.submit_many(submissions)
    assert isinstance(raised.value.__cause__, QueueUnavailable)
    assert raised.value.jobs == []
    with Client(own_redis) as client:
        client.submit_many(submissions[:2])
        jobs = client.submit_many(raised.value.pending)
        assert [job.id for job in jobs] == [submission.id for submission in submissions]
        assert client.ledger.redis.zcard("blipq:open") == 3


def test_jobs_whose_recording_was_not_answered_are_published(
    client: Client, raw_redis: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost answer once left them to the reconciler: ten idle seconds."""
    submit_all = client.ledger.submit_all

    def answer_is_lost(jobs: Any) -> Any:
        monkeypatch.setattr(client.ledger, "submit_all", submit_all)
        submit_all(jobs)
        raise QueueUnavailable("the answer was lost")

    monkeypatch.setattr(client.ledger, "submit_all", answer_is_lost)
    jobs = client.submit_many([asked(0), asked(1)], timeout=20)
    assert len({job.id for job in jobs}) == 2
    assert raw_redis.llen("blipq.default.normal") == 2


# --- as_completed, wait_all -----------------------------------------------------------------------


def test_jobs_are_given_as_they_end(client: Client, ledger: WorkerLedger) -> None:
    jobs = client.submit_many(map(asked, range(3)))
    ending = client.as_completed(jobs, timeout=20)
    for job in reversed(jobs):
        finish(ledger, job.id)
        assert next(ending) == job
    assert list(ending) == []


def test_what_a_job_came_to_is_read_already(
    client: Client, ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    jobs = client.submit_many(map(asked, range(2)))
    finish(ledger, jobs[0].id)
    jobs[1].cancel()
    told = {job.id: job for job in client.as_completed(jobs, timeout=20)}
    raw_redis.flushdb()
    assert told[jobs[0].id].result().text == "a cat"
    assert told[jobs[1].id].status() == "cancelled"


def test_jobs_of_another_client_are_waited_for(
    client: Client, ledger: WorkerLedger, apart: Settings
) -> None:
    with Client(apart) as other:
        jobs = client.submit_many(map(asked, range(2)))
        later = [threading.Timer(0.1, finish, (ledger, job.id)) for job in jobs]
        for timer in later:
            timer.start()
        assert {job.status() for job in other.as_completed(jobs, timeout=20)} == {"succeeded"}
        for timer in later:
            timer.join()


def test_time_is_up_for_those_that_have_not_ended(client: Client, ledger: WorkerLedger) -> None:
    jobs = client.submit_many(map(asked, range(3)))
    finish(ledger, jobs[1].id)
    ending = client.as_completed(jobs, timeout=0.1)
    assert next(ending) == jobs[1]
    with pytest.raises(ResultTimeout, match="2 of 3 jobs"):
        next(ending)


def test_an_unknown_job_among_them_is_not_found(client: Client) -> None:
    jobs = [client.submit(asked(0)), client.job("job_unknown")]
    with pytest.raises(JobNotFound, match="job_unknown"):
        list(client.as_completed(jobs, timeout=20))


def test_all_are_waited_for_and_keep_their_order(client: Client, ledger: WorkerLedger) -> None:
    jobs = client.submit_many(map(asked, range(3)))
    for job in reversed(jobs):
        finish(ledger, job.id)
    ended = client.wait_all([*jobs, jobs[0]], timeout=20)
    assert ended == [*jobs, jobs[0]]
    assert {job.result().text for job in ended} == {"a cat"}


def test_a_bar_shows_how_many_have_ended(
    client: Client, ledger: WorkerLedger, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = client.submit_many(map(asked, range(2)))
    finish(ledger, jobs[0].id)
    jobs[1].cancel()
    client.wait_all(jobs, timeout=20, progress=True)
    shown = capsys.readouterr()
    assert "2/2" in shown.err
    assert "1 without a result" in shown.err
    assert shown.out == ""


def test_a_wait_for_many_leaves_nothing_behind(client: Client, ledger: WorkerLedger) -> None:
    jobs = client.submit_many(map(asked, range(3)))
    ending = client.as_completed(jobs, timeout=20)
    finish(ledger, jobs[0].id)
    next(ending)
    assert len(client.notifier) == 3
    ending.close()  # type: ignore[attr-defined]
    assert len(client.notifier) == 0


def test_one_subscription_and_few_looks_serve_a_thousand_jobs(
    client: Client, ledger: WorkerLedger, raw_redis: "redis.Redis"
) -> None:
    jobs = client.submit_many(map(asked, range(1000)))
    ended: list[str] = []

    def wait() -> None:
        ended.extend(job.id for job in client.as_completed(jobs, timeout=60))

    waiting = threading.Thread(target=wait)
    waiting.start()
    wait_until(lambda: len(client.notifier) == 1000, "the wait")
    wait_until(lambda: raw_redis.pubsub_channels("blipq:ended:*"), "the subscription")
    assert len(raw_redis.pubsub_channels("blipq:ended:*")) == 1
    raw_redis.config_resetstat()
    for job in jobs:
        finish(ledger, job.id)
    waiting.join()
    assert len(ended) == 1000
    calls = raw_redis.info("commandstats")["cmdstat_evalsha"]["calls"]
    assert calls < 2000 + 1000, "claims and finishes, and fewer looks than jobs"
