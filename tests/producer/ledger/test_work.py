"""What jobs will take: counted by shape in the real ledger, and predicted from what they took."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from blipq import Client
from blipq.cli.terminal.output import state_of
from blipq.contract import (
    CaptionRequest,
    DescribeRequest,
    EmbedRequest,
    MatchRequest,
    Request,
    SearchRequest,
    VQARequest,
)
from blipq.ledger import keys
from blipq.ledger.operator import OperatorLedger
from blipq.ledger.work import FIRST_GUESS_S, Costs, shape_of, work_of
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.ops.outlook import outlooks
from conftest import ledger_of, wait_until

IMAGE = "s3://uploads/cat.jpg"
CAPTION = "caption.1.8.32.0"


@pytest.fixture
def ledger(client: Client) -> WorkerLedger:
    return ledger_of(client)


@pytest.fixture
def open_work(ledger: WorkerLedger) -> Callable[[], tuple[Any, Any]]:
    """Counts by shape: of the open jobs, and of those that a worker holds."""
    return lambda: (
        ledger.redis.hgetall(keys.work("default")),
        ledger.redis.hgetall(keys.working("default")),
    )


def claimed_when_due(ledger: WorkerLedger, id: str) -> Claim:
    """A claim of a job whose retry is due within moments."""
    claims: list[Claim] = []

    def tried() -> bool:
        ledger.reconcile()
        answer = ledger.claim(id, "w1")
        if isinstance(answer, Claim):
            claims.append(answer)
        return bool(claims)

    wait_until(tried, "the retry")
    return claims[0]


def learned(*ran: tuple[Any, ...], used: tuple[tuple[str, str, float], ...] = ()) -> str:
    return json.dumps({"ran": [list(each) for each in ran], "used": [list(each) for each in used]})


@pytest.mark.parametrize(
    ("request_", "shape"),
    [
        (CaptionRequest(image=IMAGE), CAPTION),
        (CaptionRequest(image=IMAGE, best_of=3), "caption.1.4.32.4"),
        (CaptionRequest(image=IMAGE, generation={"num_beams": 1}), "caption.1.1.32.0"),
        (CaptionRequest(image=IMAGE, generation={"do_sample": True}), "caption.1.1.32.0"),
        (VQARequest(image=IMAGE, questions=("a?", "b?", "c?")), "vqa.4.8.16.0"),
        (VQARequest(image=IMAGE, questions=("a?",), choices=("x", "y")), "vqa.1.0.0.2"),
        (MatchRequest(image=IMAGE, texts=("a",) * 100), "match.0.0.0.128"),
        (EmbedRequest(image=IMAGE), "embed.0.0.0.0"),
        (DescribeRequest(image=IMAGE, questions=("a?",), texts=("b",)), "describe.2.8.32.1"),
        (DescribeRequest(image=IMAGE, caption=False, texts=("b",)), "describe.0.0.0.1"),
        (SearchRequest(index="photos", text="a"), "search.0.0.0.128"),
    ],
)
def test_a_shape_says_what_a_jobs_cost_depends_on(request_: Request, shape: str) -> None:
    assert shape_of(request_) == shape


def test_a_job_is_counted_from_its_submission_to_its_end_however_it_ends(
    client: Client, ledger: WorkerLedger, open_work: Callable[[], Any]
) -> None:
    first, second = client.caption(IMAGE), client.caption(IMAGE)
    assert open_work() == ({CAPTION: "2"}, {})
    claim = ledger.claim(first.id, "w1")
    assert isinstance(claim, Claim)
    assert open_work() == ({CAPTION: "2"}, {CAPTION: "1"})
    assert ledger.hand_back(claim)
    assert open_work() == ({CAPTION: "2"}, {})
    claim = ledger.claim(first.id, "w1")
    assert isinstance(claim, Claim)
    assert ledger.retry(claim, 0.001)
    assert open_work() == ({CAPTION: "2"}, {})
    claim = claimed_when_due(ledger, first.id)
    assert ledger.succeed(claim, "{}", "{}")
    assert open_work() == ({CAPTION: "1"}, {})
    assert ledger.claim(second.id, "w1") != "busy"
    assert open_work() == ({CAPTION: "1"}, {CAPTION: "1"})
    second.cancel()
    assert open_work() == ({}, {})


def test_a_dead_letter_that_is_tried_again_is_work_again(
    client: Client, ledger: WorkerLedger, open_work: Callable[[], Any]
) -> None:
    job = client.caption(IMAGE)
    claim = ledger.claim(job.id, "w1")
    assert isinstance(claim, Claim)
    error = json.dumps({"code": "internal", "message": "no"})
    assert ledger.fail(claim, error, "{}", dead=True)
    assert open_work() == ({}, {})
    assert OperatorLedger.beside(ledger).retry_dead_letter(job.id)
    assert open_work() == ({CAPTION: "1"}, {})


def test_counts_that_an_earlier_version_left_behind_go_with_the_last_open_job(
    client: Client, ledger: WorkerLedger, open_work: Callable[[], Any]
) -> None:
    ledger.redis.hset(keys.work("default"), "vqa.1.1.1.0", 40)
    client.caption(IMAGE)
    assert open_work() == ({CAPTION: "1"}, {})


def test_what_jobs_took_predicts_those_that_wait(client: Client, ledger: WorkerLedger) -> None:
    for _ in range(3):
        client.caption(IMAGE)
    assert outlooks(ledger.redis)["default"].work.waiting_s == 3 * FIRST_GUESS_S
    ledger.learn(learned(("default", CAPTION, 10, 2000.0, 0, 0.0, 5000.0)))
    assert outlooks(ledger.redis)["default"].work.waiting_s == pytest.approx(0.6)
    job = client.caption(IMAGE)
    assert isinstance(ledger.claim(job.id, "w1"), Claim)
    work = outlooks(ledger.redis)["default"].work
    assert (work.waiting_s, work.running_s) == (pytest.approx(0.6), pytest.approx(0.2))


def test_the_number_of_waiting_jobs_is_exact_whatever_the_counts_say() -> None:
    costs = Costs({CAPTION: "10 100 0 0 0 300"})
    assert work_of(costs, {CAPTION: "50"}, {}, waiting=3).waiting_s == pytest.approx(0.3)
    assert work_of(costs, {}, {}, waiting=3).waiting_s == pytest.approx(0.3)
    assert work_of(costs, {CAPTION: "50"}, {CAPTION: "50"}, waiting=0).waiting_s == 0


def test_cached_images_make_cheaper_jobs_as_often_as_they_are_lately(
    client: Client, ledger: WorkerLedger
) -> None:
    ledger.learn(learned(("default", CAPTION, 100, 10_000.0, 100, 2000.0, 0.0)))
    cost = Costs(ledger.redis.hgetall(keys.cost("default"))).of(CAPTION)
    assert cost is not None
    assert cost.gpu_s == pytest.approx(0.06)  # half of 100 ms, half of 20
    for _ in range(20):
        ledger.learn(learned(("default", CAPTION, 0, 0.0, 100, 2000.0, 0.0)))
    cost = Costs(ledger.redis.hgetall(keys.cost("default"))).of(CAPTION)
    assert cost is not None
    assert cost.gpu_s == pytest.approx(0.02, rel=0.01)


def test_a_shape_without_a_past_costs_what_the_nearest_of_its_kind_does() -> None:
    costs = Costs({"vqa.1.8.16.0": "9 10 0 0 0 0", "vqa.8.8.16.0": "9 70 0 0 0 0"})
    assert costs.gpu_s("vqa.4.8.16.0") == pytest.approx(0.07)
    assert costs.gpu_s("match.0.0.0.1") == pytest.approx(0.04)  # any job of the model
    assert Costs({}).gpu_s("match.0.0.0.1") == FIRST_GUESS_S


def test_how_far_predictions_were_off_is_known(client: Client, ledger: WorkerLedger) -> None:
    ledger.learn(learned(("default", CAPTION, 10, 1000.0, 0, 0.0, 0.0)))
    assert Costs(ledger.redis.hgetall(keys.cost("default"))).error is None
    ledger.learn(learned(("default", CAPTION, 10, 1000.0, 0, 0.0, 0.0)))
    assert Costs(ledger.redis.hgetall(keys.cost("default"))).error == 0
    ledger.learn(learned(("default", CAPTION, 10, 2000.0, 0, 0.0, 0.0)))
    error = Costs(ledger.redis.hgetall(keys.cost("default"))).error
    assert error == pytest.approx(1000 / 3000, rel=0.1)


def test_tenants_and_shapes_are_bounded(client: Client, ledger: WorkerLedger) -> None:
    used = tuple(("default", f"t{number}", 10.0) for number in range(1100))
    shapes = [("default", f"vqa.{n}.1.1.0", 1, 1.0, 0, 0.0, 1.0) for n in range(1100)]
    ledger.learn(learned(*shapes, used=used))
    ledger.learn(learned(used=(("default", "t1", 5.0),)))
    found = ledger.redis.hgetall(keys.used("default"))
    assert len(found) == 1001
    assert (float(found["t1"]), float(found["~others"])) == (15, 1000)
    assert ledger.redis.hlen(keys.cost("default")) <= 1001


def test_all_that_is_learned_expires(client: Client, ledger: WorkerLedger) -> None:
    client.caption(IMAGE)
    ledger.learn(learned(("default", CAPTION, 1, 1.0, 0, 0.0, 1.0), used=(("default", "", 1.0),)))
    for key in (keys.work, keys.cost, keys.used):
        assert ledger.redis.ttl(key("default")) > 0


def test_a_job_says_how_many_are_taken_before_it(client: Client, ledger: WorkerLedger) -> None:
    jobs = [client.caption(IMAGE) for _ in range(3)]
    client.caption(IMAGE, priority="low")
    client.caption(IMAGE, model="other")
    assert [job.info().queue_position for job in jobs] == [0, 1, 2]  # also where no worker lives
    client.caption(IMAGE, priority="high")
    assert [job.info().queue_position for job in jobs] == [1, 2, 3]
    claim = ledger.claim(jobs[0].id, "w1")
    assert isinstance(claim, Claim)
    assert [job.info().queue_position for job in jobs] == [None, 1, 2]
    assert state_of(jobs[1].info()).startswith("queued, no live worker serves")
    assert state_of(jobs[1].info()).endswith(", behind 1")
    ledger.retry(claim, delay_s=60.0)
    assert [job.info().queue_position for job in jobs] == [None, 1, 2]  # it waits for its time
    jobs[1].cancel()
    assert [job.info().queue_position for job in jobs] == [None, None, 1]


def test_a_job_says_when_it_should_end(client: Client, ledger: WorkerLedger) -> None:
    jobs = [client.caption(IMAGE) for _ in range(4)]
    assert jobs[0].info().eta is None  # nobody serves it
    ledger.register("w1", ["default"], ttl_s=30, spare=True, info="{}")
    ledger.register("w2", ["default"], ttl_s=30, spare=True, info="{}")
    assert jobs[0].info().eta is None  # nothing is known
    ledger.learn(learned(("default", CAPTION, 10, 40_000.0, 0, 0.0, 60_000.0)))  # 4 s, in 6 s
    urgent = client.caption(IMAGE, priority="high")
    claim = ledger.claim(jobs[0].id, "w1")
    assert isinstance(claim, Claim)

    def left(job: Any) -> float:
        info = job.info()
        return float(info.eta.timestamp() - info.created_at.timestamp())

    assert left(jobs[0]) == pytest.approx(6, abs=1)
    assert left(urgent) == pytest.approx(4 / 2 / 2 + 6, abs=1)  # half of the one that runs
    assert left(jobs[3]) == pytest.approx((4 / 2 + 3 * 4) / 2 + 6, abs=1)
    ledger.succeed(claim, json.dumps({"kind": "caption", "captions": []}), "{}")
    assert jobs[0].info().eta is None
