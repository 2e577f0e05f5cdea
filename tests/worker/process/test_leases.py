"""What a worker holds, how it keeps it, and how it brings back what others lost."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
import redis

from blipq import Client, Options, QueueUnavailable, Settings
from blipq.contract import CaptionRequest
from blipq.ledger.connection import connect
from blipq.ledger.operator import OperatorLedger
from blipq.ledger.worker import Claim, Turn, WorkerLedger
from blipq_worker.claims import Held
from blipq_worker.process.heartbeat import EXIT_HUNG, Heartbeat, beat_s
from blipq_worker.process.reconciler import Reconciler
from blipq_worker.process.usage import Usage
from conftest import ledger_of, wait_until

IMAGE = "s3://uploads/cat.jpg"
QUEUE = "blipq.default.normal"


@pytest.fixture
def client(apart: Settings) -> Any:
    with Client(apart) as client:
        yield client


@pytest.fixture
def ledger(client: Client) -> WorkerLedger:
    return ledger_of(client)


@pytest.fixture
def claim(client: Client) -> Claim:
    return claimed(client)


def claimed(client: Client, *, lease_s: float = 30.0, **options: Any) -> Claim:
    ledger = ledger_of(client)
    claim = ledger.claim(client.caption(IMAGE, **options).id, "w1", lease_s=lease_s)
    assert isinstance(claim, Claim)
    return claim


def heartbeat(ledger: WorkerLedger, held: Held, **changes: Any) -> Heartbeat:
    options = {"threads": 2, "lease_s": 30.0, "grace_s": 0.0, "watchdog_s": 60.0}
    options |= {
        "usage": Usage(),
        "stalled_for": lambda: 0.0,
        "taking": lambda: True,
        "draining": lambda: False,
    }
    return Heartbeat(ledger, held, "w1", ["default"], **(options | changes))  # type: ignore[arg-type]


def test_a_worker_says_where_its_jobs_may_write(client: Client, ledger: WorkerLedger) -> None:
    heartbeat(ledger, Held(), outputs=("answers",)).tick()
    assert OperatorLedger.beside(client.ledger).workers()["w1"]["outputs"] == ["answers"]


# --- held -----------------------------------------------------------------------------------------


def test_a_lost_claim_hears_of_it(claim: Claim) -> None:
    held, calls = Held(), []
    held.add(claim)
    held.on_lost(claim, lambda: calls.append("told"))
    assert not held.event(claim).is_set()
    held.lose([claim, replace(claim, id="job_unknown")])
    assert held.event(claim).is_set()
    assert calls == ["told"]


def test_a_claim_that_is_not_held_is_lost(claim: Claim) -> None:
    held = Held()
    assert held.event(claim).is_set()
    held.add(claim)
    held.remove(claim)
    assert held.event(claim).is_set()
    assert held.claims() == []


def test_who_asks_after_the_loss_is_told_at_once(claim: Claim) -> None:
    """The loss may fall between putting an item into the batcher and asking to hear of it."""
    held, calls = Held(), []
    held.add(claim)
    held.lose([claim])
    held.on_lost(claim, lambda: calls.append("told"))
    assert calls == ["told"]


def test_an_older_claim_of_a_job_does_not_let_a_newer_one_go(
    client: Client, claim: Claim, ledger: WorkerLedger
) -> None:
    held = Held()
    ledger.hand_back(claim)
    newer = ledger.claim(claim.id, "w1")
    assert isinstance(newer, Claim)
    held.add(newer)
    held.remove(claim)
    assert held.claims() == [newer]
    assert held.event(claim).is_set()
    assert not held.event(newer).is_set()


# --- heartbeat ------------------------------------------------------------------------------------


def test_a_beat_renews_leases(client: Client, ledger: WorkerLedger) -> None:
    held, claim = Held(), claimed(client, lease_s=1)
    held.add(claim)
    before = ledger.redis.zscore("blipq:running", claim.id)
    heartbeat(ledger, held).tick()
    assert ledger.redis.zscore("blipq:running", claim.id) > before


def test_a_beat_finds_out_that_a_job_was_cancelled(ledger: WorkerLedger, claim: Claim) -> None:
    held = Held()
    held.add(claim)
    ledger.cancel(claim.id)
    heartbeat(ledger, held).tick()
    assert held.event(claim).is_set()


def test_a_beat_that_is_answered_late_ends_no_newer_claim_of_the_job(
    ledger: WorkerLedger, claim: Claim
) -> None:
    """Given back and claimed anew by the same worker while its question was on the way."""
    held, renew = Held(), ledger.renew
    held.add(claim)

    def late(*asked: Any, **options: Any) -> list[str]:
        ledger.hand_back(claim)
        lost = renew(*asked, **options)
        held.remove(claim)
        newer = ledger.claim(claim.id, "w1")
        assert isinstance(newer, Claim)
        held.add(newer)
        return lost

    ledger.renew = late  # type: ignore[method-assign]
    heartbeat(ledger, held).tick()
    (newer,) = held.claims()
    assert newer.token != claim.token
    assert not held.event(newer).is_set()
    assert held.event(claim).is_set()


def test_a_beat_says_that_the_worker_lives(client: Client, ledger: WorkerLedger) -> None:
    heartbeat(ledger, Held()).tick()
    assert client.caption(IMAGE).info().live_workers == 1
    info = json.loads(ledger.redis.get("blipq:worker:w1"))
    assert (info["models"], info["threads"], info["active"]) == (["default"], 2, 0)


def test_a_worker_with_room_says_so(ledger: WorkerLedger) -> None:
    heartbeat(ledger, Held()).tick()
    assert ledger.redis.exists("blipq:spare:default")


def test_room_must_have_lasted_for_a_grace(ledger: WorkerLedger) -> None:
    """A free thread now and then is no sign that messages were lost."""
    taking = True
    beating = heartbeat(ledger, Held(), grace_s=0.2, taking=lambda: taking)
    beating.tick()
    assert not ledger.redis.exists("blipq:spare:default")
    taking = False  # a job runs alone, or the consumer is not connected
    beating.tick()
    taking = True
    since = time.monotonic()
    wait_until(lambda: beating.tick() or ledger.redis.exists("blipq:spare:default"), "room")  # type: ignore[func-returns-value]
    assert time.monotonic() - since >= 0.2


def test_a_beat_that_redis_refuses_is_a_problem_until_the_next(ledger: WorkerLedger) -> None:
    beating, run = heartbeat(ledger, Held()), ledger._run
    ledger._run = refused  # type: ignore[method-assign]
    with pytest.raises(QueueUnavailable):
        beating.tick()
    assert "NOREPLICAS" in str(beating.problem)
    ledger._run = run  # type: ignore[method-assign]
    beating.tick()
    assert beating.problem is None


def refused(*_: Any) -> Any:
    raise redis.ResponseError("NOREPLICAS Not enough good replicas to write.")


def test_a_full_worker_has_no_room(client: Client, ledger: WorkerLedger) -> None:
    held = Held()
    for number in range(2):
        held.add(claimed(client, metadata={"number": str(number)}))
    heartbeat(ledger, held).tick()
    assert not ledger.redis.exists("blipq:spare:default")


def test_a_draining_worker_serves_no_model(client: Client, ledger: WorkerLedger) -> None:
    heartbeat(ledger, Held(), draining=lambda: True).tick()
    assert client.caption(IMAGE).info().live_workers == 0


def test_a_worker_is_registered_before_it_takes_messages(ledger: WorkerLedger) -> None:
    """Who read its line "ready" once found no worker in the registry, for up to two seconds."""
    beating = heartbeat(ledger, Held())
    beating.start()
    try:
        assert ledger.redis.exists("blipq:worker:w1")
    finally:
        beating.stop()


def test_a_heart_beats_until_it_is_stopped(ledger: WorkerLedger) -> None:
    beating = heartbeat(ledger, Held(), lease_s=0.05)
    beating.start()
    wait_until(lambda: ledger.redis.exists("blipq:worker:w1"), "a beat")
    beating.stop()
    assert not beating._thread.is_alive()


def test_a_heart_outlives_an_outage_of_redis(apart: Settings, ledger: WorkerLedger) -> None:
    nowhere = apart.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    beating = heartbeat(WorkerLedger(connect(nowhere), nowhere), Held(), lease_s=0.05)
    beating.start()
    beating._ledger = beating._registration._ledger = ledger
    wait_until(lambda: ledger.redis.exists("blipq:worker:w1"), "a beat after the outage")
    beating.stop()


def test_a_worker_whose_model_hangs_ends() -> None:
    code = (
        "from blipq_worker.process.heartbeat import Heartbeat, Held, Usage\n"
        "Heartbeat(None, Held(), 'w1', [], usage=Usage(), threads=1, lease_s=30,"
        " grace_s=1, watchdog_s=1, stalled_for=lambda: 2.0, taking=bool, draining=bool).tick()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == EXIT_HUNG, ended.stderr


# --- reconciler -----------------------------------------------------------------------------------


def reconciler(client: Client, worker: str = "w1", *, lease_s: float = 0.1) -> Reconciler:
    ledger = ledger_of(client)
    return Reconciler(ledger, client.broker, worker, lease_s=lease_s, grace_s=0.01)


def test_a_dead_workers_job_is_published_again(client: Client, ledger: WorkerLedger) -> None:
    claim = claimed(client, lease_s=0.01)
    ledger.redis.delete("blipq.default.normal")
    sweeping = reconciler(client)
    sweeping.start()
    wait_until(lambda: ledger.redis.llen("blipq.default.normal"), "the message")
    sweeping.stop()
    message = json.loads(ledger.redis.lindex("blipq.default.normal", 0))
    assert message["headers"]["id"] == claim.id


def test_a_sweep_goes_on_until_nothing_is_due(client: Client, ledger: WorkerLedger) -> None:
    """It once settled a hundred of each kind a second."""
    requests = [CaptionRequest(image=f"{IMAGE}?{number}") for number in range(250)]
    for job in client.submit_many(requests):
        assert isinstance(ledger.claim(job.id, "w0", lease_s=0.001), Claim)
    ledger.redis.delete(QUEUE)
    dying = client.submit_many(requests, Options(expires_in=0.001))
    ledger.redis.delete(QUEUE)
    ledger.redis.set("blipq:reconciler", "0 w1", px=60_000)  # it has long been w1's turn
    time.sleep(0.1)
    reconciler(client, lease_s=30.0).tick()
    assert ledger.redis.zcard("blipq:running") == 0
    assert ledger.redis.llen(QUEUE) == 250
    assert ledger.redis.zcard("blipq:open") == 250
    assert {job.status() for job in dying[:3]} == {"expired"}


@pytest.mark.parametrize("lease_s", [0.1, 3.0, 30.0, 300.0])
@pytest.mark.parametrize("timeout_s", [0.5, 3.0, 10.0])
def test_a_new_sweeper_waits_for_beats_that_hung_and_never_longer_than_a_lease(
    client: Client, apart: Settings, lease_s: float, timeout_s: float
) -> None:
    """A beat that began while Redis was away may hang for a whole timeout after it is back."""
    ledger = WorkerLedger(client.ledger.redis, apart.model_copy(update={"timeout_s": timeout_s}))
    turn = Reconciler(ledger, client.broker, "w1", lease_s=lease_s, grace_s=0.01)._turn
    assert turn.ttl_s + turn.patience_s <= lease_s
    longest = timeout_s + 2 * beat_s(lease_s)
    assert turn.patience_s == pytest.approx(min(longest, lease_s - turn.ttl_s))


def test_one_worker_at_a_time_sweeps(client: Client, ledger: WorkerLedger) -> None:
    claimed(client, lease_s=0.01)
    ledger.reconcile(turn=Turn("w2", ttl_s=60, patience_s=0))
    wait_until(lambda: _due(ledger.redis), "the lease to run out")
    reconciler(client).tick()
    assert _due(ledger.redis), "left to the other"


def _due(raw: "redis.Redis") -> int:
    seconds, micros = raw.time()
    return raw.zcount("blipq:running", "-inf", seconds * 1000 + micros // 1000)
