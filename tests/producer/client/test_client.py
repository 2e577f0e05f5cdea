"""The client and its handles, with a worker played by hand."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blipq import (
    Client,
    Generation,
    ImageRef,
    InvalidRequest,
    Job,
    JobCancelled,
    JobExpired,
    JobFailed,
    JobNotFound,
    QueueUnavailable,
    ResultTimeout,
    Settings,
    Turn,
)
from blipq.ledger.connection import connect
from blipq.ledger.worker import Claim, WorkerLedger
from blocking import BlockingClient
from conftest import wait_until

IMAGE = "s3://uploads/cat.jpg"
RESULT = json.dumps({"kind": "caption", "captions": [{"text": "a cat"}]})


def request_of(client: Client, job: Job[Any]) -> dict[str, Any]:
    return json.loads(client.ledger.redis.hget(f"blipq:job:{job.id}", "request"))


def claimed(ledger: WorkerLedger, job: Job[Any]) -> Claim:
    claim = ledger.claim(job.id, "w1")
    assert isinstance(claim, Claim)
    return claim


# --- verbs ----------------------------------------------------------------------------------------


def test_a_caption_request_says_only_what_was_asked(client: Client) -> None:
    job = client.caption(IMAGE)
    assert request_of(client, job) == {"kind": "caption", "image": {"uri": IMAGE}}


def test_generation_parameters_may_be_a_mapping(client: Client) -> None:
    asked = client.caption(IMAGE, "a photo of", generation={"num_beams": 3}, best_of=2)
    same = client.caption(IMAGE, "a photo of", generation=Generation(num_beams=3), best_of=2)
    assert request_of(client, asked) == request_of(client, same)
    assert request_of(client, asked)["generation"] == {"num_beams": 3}


def test_earlier_turns_may_be_pairs(client: Client) -> None:
    pairs = client.vqa(IMAGE, "why?", history=[("what?", "a cat")])
    turns = client.vqa(IMAGE, "why?", history=[Turn(question="what?", answer="a cat")])
    assert request_of(client, pairs) == request_of(client, turns)


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ({"image": IMAGE}, "image"),
        ({"text": "a cat"}, "text"),
        ({"image": IMAGE, "text": "a cat"}, "multimodal"),
    ],
)
def test_what_is_given_decides_what_is_embedded(
    client: Client, given: dict[str, str], mode: str
) -> None:
    request = request_of(client, client.embed(**given))  # type: ignore[arg-type]
    assert request.get("mode", "image") == mode
    assert request.get("image") == ({"uri": IMAGE} if "image" in given else None)


def test_a_description_may_ask_one_question_and_one_text(client: Client) -> None:
    request = request_of(client, client.describe(IMAGE, questions="why?", texts="a cat"))
    assert (request["questions"], request["texts"]) == (["why?"], ["a cat"])


def test_a_search_says_only_what_differs_from_the_defaults(client: Client) -> None:
    request = request_of(client, client.search("pets", "a cat", filter={"by": ["Ann", "Bob"]}))
    assert request["filter"] == {"by": ["Ann", "Bob"]}
    assert (request["index"], request["text"], "image" in request) == ("pets", "a cat", False)
    by_image = request_of(client, client.search("pets", image=IMAGE, top_k=3))
    assert (by_image["image"], by_image["top_k"]) == ({"uri": IMAGE}, 3)


def test_an_image_may_be_a_reference_with_an_etag(client: Client) -> None:
    job = client.match(ImageRef(uri=IMAGE, etag="abc"), "a cat", head="itc")
    assert request_of(client, job)["image"] == {"uri": IMAGE, "etag": "abc"}


@pytest.mark.parametrize("as_source", [str, Path, lambda path: Path(path).read_bytes()])
def test_a_local_image_is_uploaded(
    client: Client, tmp_path: Path, as_source: Callable[[Path], Any]
) -> None:
    (tmp_path / "cat").write_bytes(b"a cat")
    job = client.caption(as_source(tmp_path / "cat"))
    uri = request_of(client, job)["image"]["uri"]
    assert uri.startswith("s3://blipq-inbox/")


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        (lambda client: client.caption("ftp://example.org/cat.jpg"), "image"),
        (lambda client: client.caption(IMAGE, generation={"num_beans": 1}), "num_beans"),
        (lambda client: client.caption(IMAGE, generation={"temperature": "nan"}), "temperature"),
        (lambda client: client.caption(IMAGE, best_of=0), "best_of"),
        (lambda client: client.vqa(IMAGE, []), "questions"),
        (lambda client: client.vqa(IMAGE, "a\udcff"), "questions"),
        (lambda client: client.vqa(IMAGE, "why?", choices=["one"]), "choices"),
        (lambda client: client.vqa(IMAGE, "why?", choices=["one", "one "]), "choices must differ"),
        (lambda client: client.vqa(IMAGE, "why?", choices=["one", " "]), "must not be blank"),
        (
            lambda client: client.vqa(
                IMAGE, "why?", choices=["one", "two"], generation={"num_beams": 1}
            ),
            "no effect on choices",
        ),
        (lambda client: client.match(IMAGE, "a cat", head="itx"), "head"),
        (lambda client: client.embed(), "image"),
        (lambda client: client.describe(IMAGE, caption=False), "ask for a caption"),
        (lambda client: client.embed(text="a cat", dtype="int8"), "dtype"),
        (lambda client: client.embed(text="a cat", index="pets"), "an index holds images"),
        (lambda client: client.search("pets"), "either a text or an image"),
        (lambda client: client.search("../pets", "a cat"), "index"),
        (lambda client: client.search("pets", "a cat", filter={"by": {"or": "x"}}), "filter"),
        (lambda client: client.caption(IMAGE, priority="urgent"), "priority"),
        (lambda client: client.caption(IMAGE, expires_in="soon"), "expires_in"),
        (lambda client: client.caption(IMAGE, modle="demo"), "modle"),
        (lambda client: client.caption(IMAGE, output="/tmp/out.json"), "output"),
    ],
)
def test_a_wrong_argument_is_named(
    client: Client, ask: Callable[[Client], object], field: str
) -> None:
    with pytest.raises(InvalidRequest, match=field):
        ask(client)


def test_a_wrong_history_is_an_invalid_request(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="history"):
        client.vqa(IMAGE, "why?", history=[("a question without an answer",)])  # type: ignore[list-item]


def test_wrong_options_are_told_before_anything_is_uploaded(client: Client, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="priority"):
        client.caption(tmp_path / "gone.png", priority="urgent")


# --- handles --------------------------------------------------------------------------------------


def test_a_result_is_awaited(client: Client, ledger: WorkerLedger) -> None:
    job = client.caption(IMAGE)
    claim = claimed(ledger, job)
    later = threading.Timer(0.1, ledger.succeed, (claim, RESULT, "{}"))
    later.start()
    assert job.result(timeout=10).text == "a cat"
    later.join()


def test_an_outcome_is_awaited_without_an_exception(client: Client) -> None:
    job = client.caption(IMAGE)
    job.cancel()
    assert job.outcome(timeout=5).status == "cancelled"


def test_a_result_that_is_there_needs_no_time(client: Client, ledger: WorkerLedger) -> None:
    job = client.caption(IMAGE)
    ledger.succeed(claimed(ledger, job), RESULT, "{}")
    assert job.result(timeout=0).text == "a cat"


def test_a_timeout_says_that_the_job_goes_on(client: Client) -> None:
    job = client.caption(IMAGE, model="nobody")
    with pytest.raises(ResultTimeout, match=r"still queued.*no live worker.*'nobody'"):
        job.result(timeout=0.05)
    assert job.status() == "queued"


def test_a_failure_is_raised_with_its_code(client: Client, ledger: WorkerLedger) -> None:
    job = client.caption(IMAGE)
    error = {"code": "image_unavailable", "message": "503", "retryable": True}
    ledger.fail(claimed(ledger, job), json.dumps(error), "{}")
    with pytest.raises(JobFailed, match="image_unavailable: 503") as raised:
        job.result(timeout=5)
    assert (raised.value.code, raised.value.attempts) == ("image_unavailable", 1)
    assert raised.value.retryable
    assert raised.value.job_id == job.id


def test_a_cancelled_job_has_no_result(client: Client) -> None:
    job = client.caption(IMAGE)
    assert job.cancel()
    assert not job.cancel(), "it had ended"
    with pytest.raises(JobCancelled):
        job.result(timeout=5)


def test_a_job_past_its_deadline_has_no_result(client: Client) -> None:
    with pytest.raises(JobExpired, match="deadline"):
        client.caption(IMAGE, expires_in="20ms").result(timeout=10)


def test_without_a_timeout_the_deadline_bounds_the_wait(client: Client) -> None:
    with pytest.raises(JobExpired):
        client.caption(IMAGE, expires_in="20ms").result()


@pytest.mark.parametrize("look", [Job.info, Job.wait, Job.result, Job.cancel, Job.status])
def test_an_unknown_id_is_not_found(client: Client, look: Callable[[Job[Any]], object]) -> None:
    with pytest.raises(JobNotFound, match="job_unknown"):
        look(client.job("job_unknown"))


def test_handles_of_one_job_are_equal(client: Client) -> None:
    assert client.job("job_1") == client.job("job_1") != client.job("job_2")
    assert len({client.job("job_1"), client.job("job_1")}) == 1
    assert repr(client.job("job_1")) == "<blipq.Job job_1>"


def test_a_client_may_be_shared_by_threads(client: Client, ledger: WorkerLedger) -> None:
    jobs = [client.caption(f"s3://uploads/{number}.jpg") for number in range(8)]
    told: list[str] = []
    waiting = [
        threading.Thread(target=lambda job=job: told.append(job.result(timeout=20).text))
        for job in jobs
    ]
    for thread in waiting:
        thread.start()
    for job in jobs:
        ledger.succeed(claimed(ledger, job), RESULT, "{}")
    for thread in waiting:
        thread.join()
    assert told == ["a cat"] * 8


# --- when Redis does not answer -------------------------------------------------------------------


@pytest.fixture
def frozen(own_redis: Settings) -> Iterator[Settings]:
    """A Redis that takes connections and answers nothing."""
    with connect(own_redis) as raw:
        pid = raw.info("server")["process_id"]
    os.kill(pid, signal.SIGSTOP)
    yield own_redis
    os.kill(pid, signal.SIGCONT)


def test_redis_down_is_told_at_once() -> None:
    with Client(redis_url="redis://127.0.0.1:1/0") as client:
        with pytest.raises(QueueUnavailable, match="Redis does not answer") as raised:
            client.caption(IMAGE)
        assert raised.value.job_id


@pytest.mark.parametrize("opened", [Client, BlockingClient])
@pytest.mark.parametrize(
    "wait",
    [
        lambda client, job: job.wait(),
        lambda client, job: job.result(),
        lambda client, job: client.wait_all([job]),
        lambda client, job: list(client.as_completed([job])),
    ],
)
def test_a_wait_without_a_timeout_ends_when_redis_is_gone_for_good(
    own_redis: Settings,
    opened: Callable[..., Any],
    wait: Callable[[Any, Any], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It went on for ever, without an error or a line in a log."""
    monkeypatch.setattr("blipq.client.waiting.GRACE_S", 0.5)
    with opened(own_redis) as client:
        job = client.caption(IMAGE, expires_in=1)
        with connect(own_redis) as raw:
            os.kill(raw.info("server")["process_id"], signal.SIGKILL)
        with pytest.raises(QueueUnavailable, match="Redis"):
            wait(client, job)


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.caption(IMAGE),
        lambda client: client.job("job_1").status(),
        lambda client: client.job("job_1").cancel(),
    ],
)
def test_a_frozen_redis_is_told_within_the_timeout(
    frozen: Settings, call: Callable[[Client], object]
) -> None:
    with Client(frozen) as client:
        started = time.monotonic()
        with pytest.raises(QueueUnavailable):
            call(client)
        assert time.monotonic() - started < 2 * frozen.timeout_s


def test_a_frozen_redis_is_told_on_a_connection_that_was_open(own_redis: Settings) -> None:
    with Client(own_redis) as client, connect(own_redis) as raw:
        client.caption(IMAGE)
        pid = raw.info("server")["process_id"]
        os.kill(pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            with pytest.raises(QueueUnavailable) as raised:
                client.caption(IMAGE)
            assert time.monotonic() - started < 2 * own_redis.timeout_s
        finally:
            os.kill(pid, signal.SIGCONT)
        again = client.submit(_caption_request(), id=raised.value.job_id)
        assert again.status() == "queued"


def _caption_request() -> Any:
    from blipq import CaptionRequest

    return CaptionRequest.model_validate({"image": IMAGE})


def test_a_wait_ends_in_time_while_redis_is_frozen(frozen: Settings) -> None:
    with Client(frozen) as client:
        started = time.monotonic()
        with pytest.raises(QueueUnavailable):
            client.job("job_1").wait(timeout=0.2)
        assert time.monotonic() - started < 0.2 + 4 * frozen.timeout_s


def test_a_wait_outlives_an_outage_of_redis(own_redis: Settings) -> None:
    with Client(own_redis) as client, connect(own_redis) as raw:
        job = client.caption(IMAGE)
        pid = raw.info("server")["process_id"]
        os.kill(pid, signal.SIGSTOP)
        outcome: list[Any] = []
        waiting = threading.Thread(target=lambda: outcome.append(job.wait(timeout=30)))
        waiting.start()
        threading.Timer(1.2, os.kill, (pid, signal.SIGCONT)).start()
        wait_until(lambda: _cancelled(client, job), "Redis to answer again")
        waiting.join()
    assert outcome[0].status == "cancelled"


def _cancelled(client: Client, job: Job[Any]) -> bool:
    try:
        return job.cancel()
    except QueueUnavailable:
        return False


def test_a_job_whose_end_is_told_is_not_polled_for_meanwhile(
    client: Client, ledger: WorkerLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    polls, poll = [], client.ledger.poll
    monkeypatch.setattr(client.ledger, "poll", lambda *a, **k: polls.append(a) or poll(*a, **k))
    job = client.caption(b"a cat")
    ending = threading.Timer(2.0, lambda: ledger.succeed(claimed(ledger, job), RESULT, "{}"))
    ending.start()
    assert job.result(timeout=30).text == "a cat"
    assert len(polls) <= 4, "before and after the subscription, perhaps in between, and at its end"


# --- when the process forks -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_goes_on_with_the_client_at_full_speed(
    client: Client, ledger: WorkerLedger, tmp_path: Path
) -> None:
    """The child once had a dead notifier: its waits were told nothing, and each took polls."""
    before = client.caption(b"a cat")
    with pytest.raises(ResultTimeout):
        before.result(timeout=0.2)  # the notifier runs; broker and S3 are connected
    child = os.fork()
    if child == 0:
        _exit_after(lambda: _ask_and_be_told(client, tmp_path / "id"))
    redis = client.ledger.redis
    (channel,) = redis.pubsub_channels("blipq:ended:*")
    wait_until(lambda: redis.pubsub_numsub(channel) == [(channel, 2)], "both to listen")
    wait_until(lambda: redis.llen("blipq.default.normal") == 2, "both messages")
    job = client.job((tmp_path / "id").read_text())
    ledger.succeed(claimed(ledger, job), RESULT, "{}")
    assert os.waitpid(child, 0)[1] == 0
    before.cancel()
    assert before.wait(timeout=20).status == "cancelled"


def _ask_and_be_told(client: Client, note: Path) -> None:
    job = client.caption(b"a dog")
    note.write_text(job.id)
    with client.notifier.watch([job.id]) as inbox:
        assert inbox.take(30) == [job.id]
    assert job.result(timeout=5).text == "a cat"
    client.close()


def _exit_after(work: Callable[[], None]) -> None:
    """Ends a forked child without the parent's exit handlers; its code says how the work went."""
    try:
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)
