"""The scripts under any order of events: two workers, a reconciler, and crashes between any steps.

The machine plays clients, a broker that loses and repeats messages, workers that crash, and a clock
of its own. It checks after each step that an outcome never changes, and at the end that every job
reaches one. ``GUARANTEES_RUNS=10000`` runs it longer.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib import resources
from typing import Any, cast

import pytest
import redis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from blipq import ErrorCode, Settings, Status, Submission, TenantLimited
from blipq.contract import CaptionRequest, Options
from blipq.ledger.codec import Message
from blipq.ledger.connection import connect
from blipq.ledger.scripts import runner
from blipq.ledger.worker import MAX_CRASHES, Claim, WorkerLedger, new_nonce
from blipq.local.stack import LocalStack

RUNS = int(os.environ.get("GUARANTEES_RUNS", "150"))
LEASE_S, GRACE_S, EXPIRES_S = 10.0, 5.0, 10_000.0
MOST_JOBS = 3
MOST_OPEN = 2  # of the tenant whose jobs these are
WORKERS = st.sampled_from(("a", "b"))
PICK = st.integers(min_value=0, max_value=1000)
RESULT = '{"kind": "caption", "captions": [{"text": "a red circle"}]}'

REAL_SCRIPT_TEXT = runner.script_text
OWN_CLOCK = "local time = {math.floor(redis.call('GET', 'clock') / 1000), 0}"


def with_own_clock(*names: str, noted: bool = False) -> str:
    """A script that reads the time from a key instead of from Redis."""
    text = REAL_SCRIPT_TEXT(*names, noted=noted)
    assert "local time = redis.call('TIME')" in text or not re.search(r"\bnow\b", text)
    return text.replace("local time = redis.call('TIME')", OWN_CLOCK)


def receipt_of(claim: Claim) -> str:
    """A receipt of one run alone: what is stored already counts as its own worker's repetition."""
    return json.dumps({"note": claim.token})


class Jobs(RuleBasedStateMachine):
    """What can happen to jobs."""

    raw: "redis.Redis"
    settings: Settings

    def __init__(self) -> None:
        super().__init__()
        self.raw.flushall()
        self.now = 1_000_000_000_000
        self.raw.set("clock", self.now)
        self.ledger = WorkerLedger(self.raw, self.settings)
        self.ledger.limit("shop", MOST_OPEN, None)
        self.broker: list[Message] = []
        self.held: dict[str, list[Claim]] = {"a": [], "b": []}
        self.ids: list[str] = []
        self.outcomes: dict[str, tuple[Any, ...]] = {}
        self.tokens: dict[str, str] = {}
        self.begun: Counter[str] = Counter()

    # -- clients --

    @rule(published=st.booleans())
    def submit(self, published: bool) -> None:
        if len(self.ids) == MOST_JOBS:
            return
        id = f"job_{len(self.ids)}"
        request = CaptionRequest(image="s3://bucket/key")
        options = Options(expires_in=EXPIRES_S)
        submission = Submission(request, options, id, "shop")
        if self._open() >= MOST_OPEN:
            with pytest.raises(TenantLimited):
                self.ledger.submit(submission, notify="x")
            return
        message = self.ledger.submit(submission, notify="x")
        assert isinstance(message, Message)
        self.ids.append(id)
        if published:
            self.broker.append(message)

    @rule(pick=PICK)
    def submit_again(self, pick: int) -> None:
        if self.ids:
            id = self.ids[pick % len(self.ids)]
            request = CaptionRequest(image="s3://bucket/key")
            again = Submission(request, Options(expires_in=EXPIRES_S), id, "shop")
            assert self.ledger.submit(again, notify="x") == id

    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        if self.ids:
            id = self.ids[pick % len(self.ids)]
            ended = id in self.outcomes or self._read(id).ended
            assert (self.ledger.cancel(id) == "cancelled") is not ended

    # -- the broker --

    @rule(pick=PICK)
    def lose_a_message(self, pick: int) -> None:
        if self.broker:
            self.broker.pop(pick % len(self.broker))

    @rule(pick=PICK)
    def repeat_a_message(self, pick: int) -> None:
        if self.broker:
            self.broker.append(self.broker[pick % len(self.broker)])

    # -- workers --

    @rule(worker=WORKERS, pick=PICK, answered=st.booleans())
    def deliver(self, worker: str, pick: int, answered: bool = True) -> None:
        if self.broker:
            message = self.broker.pop(pick % len(self.broker))
            nonce = new_nonce()
            claim = self.ledger.claim(message.id, worker, lease_s=LEASE_S, nonce=nonce)
            if not answered:  # the worker heard nothing, and asks again
                claim = self.ledger.claim(message.id, worker, lease_s=LEASE_S, nonce=nonce)
            if isinstance(claim, Claim):
                self.held[worker].append(claim)
                self.tokens[claim.id] = claim.token
                self.begun[claim.id] += not claim.solo

    @rule(worker=WORKERS, pick=PICK, late=st.booleans())
    def withdraw(self, worker: str, pick: int, late: bool) -> None:
        """A worker that stops hears of no claim; the question may arrive after its withdrawal."""
        if self.broker:
            message, nonce = self.broker[pick % len(self.broker)], new_nonce()
            claim = partial(self.ledger.claim, message.id, worker, lease_s=LEASE_S, nonce=nonce)
            if not late:
                claim()
            self.ledger.withdraw({nonce: message.id})
            assert not isinstance(claim(), Claim), "nobody hears of it"

    @rule(worker=WORKERS, pick=PICK)
    def begin_alone(self, worker: str, pick: int) -> None:
        """One claim at a time gets its turn; the others wait, and may crash with it."""
        solo = [claim for claim in self.held[worker] if claim.solo]
        if solo:
            claim = solo[pick % len(solo)]
            self.begun[claim.id] += self.ledger.begin(claim)

    @rule(worker=WORKERS, pick=PICK)
    def finish(self, worker: str, pick: int) -> None:
        claim = self._take(worker, pick)
        if claim is not None and self.ledger.succeed(claim, RESULT, receipt_of(claim)):
            self._held_it_last(claim)

    @rule(worker=WORKERS, pick=PICK)
    def fail(self, worker: str, pick: int) -> None:
        claim = self._take(worker, pick)
        error = '{"code": "internal", "message": "x"}'
        if claim is not None and self.ledger.fail(claim, error, receipt_of(claim)):
            self._held_it_last(claim)

    @rule(worker=WORKERS, pick=PICK)
    def retry_later(self, worker: str, pick: int) -> None:
        claim = self._take(worker, pick)
        if claim is not None:
            self.ledger.retry(claim, 3.0)

    @rule(worker=WORKERS, pick=PICK, published=st.booleans())
    def hand_back(self, worker: str, pick: int, published: bool) -> None:
        claim = self._take(worker, pick)
        if claim is not None and self.ledger.hand_back(claim) and published:
            self.broker.append(Message(claim.kind, claim.id, claim.queue))

    @rule(worker=WORKERS)
    def renew(self, worker: str) -> None:
        held = {claim.id: claim.token for claim in self.held[worker]}
        if held:
            lost = set(self.ledger.renew(held, lease_s=LEASE_S))
            self.held[worker] = [each for each in self.held[worker] if each.id not in lost]

    @rule(worker=WORKERS)
    def crash(self, worker: str) -> None:
        self.held[worker].clear()

    @rule(worker=WORKERS, spare=st.booleans())
    def register(self, worker: str, spare: bool) -> None:
        self.ledger.register(worker, ["default"], "{}", ttl_s=4, spare=spare)

    # -- time --

    @rule()
    def reconcile(self) -> None:
        self.broker += self.ledger.reconcile(grace_s=GRACE_S).messages

    @rule(seconds=st.sampled_from((0.5, 3.0, 6.0, 11.0)))
    def wait(self, seconds: float) -> None:
        self.now += int(seconds * 1000)
        self.raw.set("clock", self.now)

    @rule(worker=WORKERS)
    def lapse(self, worker: str) -> None:
        """A lease runs out, and the job goes to a worker that is not its first."""
        self.wait(11.0)
        self.reconcile()
        self.deliver(worker, 0)

    # -- what must hold --

    @invariant()
    def an_outcome_never_changes(self) -> None:
        for id in self.ids:
            info = self._read(id)
            if info.ended:
                outcome = (info.status, info.completed_at, info.error)
                assert self.outcomes.setdefault(id, outcome) == outcome
                if info.error is not None and info.error.code is ErrorCode.ATTEMPTS_EXHAUSTED:
                    assert self.begun[id] >= MAX_CRASHES, "it waited while another job crashed"

    @invariant()
    def a_tenants_open_jobs_are_counted(self) -> None:
        assert self.raw.zcard("blipq:tenant:shop") == self._open()

    def _open(self) -> int:
        return sum(not self._read(id).ended for id in self.ids)

    def _held_it_last(self, claim: Claim) -> None:
        assert claim.token == self.tokens[claim.id], "a stale worker ended a job"

    def teardown(self) -> None:
        """With one healthy worker left, every job reaches its outcome."""
        for claims in self.held.values():
            claims.clear()
        for _ in range(60):
            if all(self._read(id).ended for id in self.ids):
                break
            self.wait(3.0)
            self.ledger.register("a", ["default"], "{}", ttl_s=4, spare=True)
            self.reconcile()
            while self.broker:
                self.deliver("a", 0)
            while self.held["a"]:
                self.finish("a", 0)
        self.an_outcome_never_changes()
        left = {id: self._read(id).status for id in self.ids if not self._read(id).ended}
        assert not left, f"stuck: {left}"
        assert self.raw.zcard("blipq:open") == 0
        assert self.raw.zcard("blipq:running") == 0
        assert {self._read(id).status for id in self.ids} <= {
            Status.SUCCEEDED,
            Status.FAILED,
            Status.CANCELLED,
        }

    def _take(self, worker: str, pick: int) -> Claim | None:
        claims = self.held[worker]
        return claims.pop(pick % len(claims)) if claims else None

    def _read(self, id: str) -> Any:
        info = self.ledger.read(id)
        assert info is not None, f"{id} is gone"
        return info


@pytest.fixture
def machine(
    stack: LocalStack, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[dict[str, str]], type[Jobs]]]:
    """The machine on a Redis database of its own, with scripts as they are or mutated."""
    url = stack.settings().redis_url.removesuffix("/0") + "/5"
    own = Settings.model_validate(stack.settings_fields() | {"redis_url": url})
    raw = connect(own)

    def made(mutations: dict[str, str]) -> type[Jobs]:
        def text(*names: str, noted: bool = False) -> str:
            script = with_own_clock(*names, noted=noted)
            for sound, broken in mutations.items():
                script = script.replace(sound, broken)
            return script

        monkeypatch.setattr(runner, "script_text", text)
        return cast("type[Jobs]", type("Jobs", (Jobs,), {"raw": raw, "settings": own}))

    yield made
    raw.flushdb()
    raw.close()


def explore(machine: type[Jobs], runs: int, *phases: Phase) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=runs,
            stateful_step_count=40,
            deadline=None,
            database=None,
            phases=phases or tuple(Phase),
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.timeout(7200)
def test_no_order_of_events_loses_doubles_or_sticks_a_job(
    machine: Callable[[dict[str, str]], type[Jobs]],
) -> None:
    explore(machine({}), RUNS)


MUTATIONS = {
    "a withdrawn claim may come late": {"if is_late then return {'busy'} end": ""},
    "a stale token may finish, and hand back": {
        "if job.status ~= 'running' or fence(job) ~= token then return 0 end": (
            "if job.status ~= 'running' then return 0 end"
        ),
        "if not job or fence(job) ~= token then": "if not job then",
    },
    "a recovered job stays running": {
        "'status', 'queued', 'published_at', published_at)": "'published_at', published_at)"
    },
    "a crash counts for jobs that wait": {"if job.waiting then": "if false then"},
    "an ended job counts as its tenant's": {
        "if job.tenant then redis.call('ZREM'": "if false then redis.call('ZREM'"
    },
    "a job is counted as no tenant's": {"    add_to_tenant(id, tenant)\n": ""},
    "an ended job may be cancelled": {"if ended(job) then return 'ended' end": ""},
}


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_a_broken_script_is_found_out(
    machine: Callable[[dict[str, str]], type[Jobs]], mutation: dict[str, str]
) -> None:
    scripts = resources.files("blipq.ledger") / "scripts"
    texts = [each.read_text() for each in scripts.iterdir() if each.name.endswith(".lua")]
    assert all(any(sound in text for text in texts) for sound in mutation), "it breaks a script"
    broken = machine(mutation)
    with pytest.raises((AssertionError, redis.RedisError, ExceptionGroup)):
        explore(broken, 2000, Phase.generate)
