"""Equal jobs in flight are computed once, and none of them depends on another's fate."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from blipq.errors import TransientError
from blipq_worker.claims import Held, Lost
from blipq_worker.jobs.coalescing import EqualJobs
from conftest import wait_until


class Jobs:
    """Equal jobs on threads; the leader computes until ``go``."""

    def __init__(self) -> None:
        self.held = Held()
        self.equal: EqualJobs[str] = EqualJobs(self.held, timeout_s=20)
        self.go = threading.Event()
        self.computed: list[str] = []
        self.threads = ThreadPoolExecutor(16)

    def claim(self, name: str) -> Any:
        claim: Any = SimpleNamespace(id=name, token=1)
        self.held.add(claim)
        return claim

    def compute(self, name: str) -> str:
        self.computed.append(name)
        assert self.go.wait(20)
        return f"by {name}"

    def start(
        self, name: str, key: str = "k", compute: Callable[[str], str] | None = None
    ) -> "Future[tuple[str, bool]]":
        compute = compute or self.compute
        claim = self.claim(name)
        return self.threads.submit(lambda: self.equal.answer(key, claim, lambda: compute(name)))

    def following(self, count: int) -> None:
        """Waits until so many wait for the leader."""
        (leader,) = self.equal._leaders.values()
        wait_until(lambda: len(leader._done_callbacks) == count, f"{count} followers")


@pytest.fixture
def jobs() -> Any:
    jobs = Jobs()
    yield jobs
    jobs.go.set()
    jobs.threads.shutdown()


def led(jobs: Jobs, followers: int, compute: Callable[[str], str] | None = None) -> list[Any]:
    """A leader that computes, and its followers."""
    leader = jobs.start("leader", compute=compute)
    wait_until(lambda: jobs.computed, "the leader")
    others = [jobs.start(f"follower {n}") for n in range(followers)]
    jobs.following(followers)
    return [leader, *others]


def test_equal_jobs_are_computed_once(jobs: Jobs) -> None:
    futures = led(jobs, 5)
    jobs.go.set()
    answers = [future.result(20) for future in futures]
    assert answers == [("by leader", False)] + [("by leader", True)] * 5
    assert jobs.computed == ["leader"]


def test_other_jobs_are_computed_for_themselves(jobs: Jobs) -> None:
    futures = [jobs.start(name, key=name) for name in "ab"]
    wait_until(lambda: len(jobs.computed) == 2, "both")
    jobs.go.set()
    assert [future.result(20) for future in futures] == [("by a", False), ("by b", False)]


def test_a_job_that_comes_after_the_answer_computes_again(jobs: Jobs) -> None:
    jobs.go.set()
    assert jobs.start("a").result(20) == ("by a", False)
    assert jobs.start("b").result(20) == ("by b", False)


def test_a_leader_that_is_cancelled_takes_nobody_along(jobs: Jobs) -> None:
    cancelled = threading.Event()

    def compute(name: str) -> str:
        jobs.computed.append(name)
        assert cancelled.wait(20)
        raise Lost

    leader, *others = led(jobs, 3, compute)
    jobs.go.set()
    cancelled.set()
    with pytest.raises(Lost):
        leader.result(20)
    texts = {future.result(20)[0] for future in others}
    assert texts <= {f"by follower {n}" for n in range(3)}
    assert "by leader" not in texts


def test_followers_of_a_cancelled_leader_follow_one_of_their_own(jobs: Jobs) -> None:
    cancelled = threading.Event()

    def compute(name: str) -> str:
        jobs.computed.append(name)
        assert cancelled.wait(20)
        raise Lost

    _, *others = led(jobs, 3, compute)
    cancelled.set()
    wait_until(lambda: len(jobs.computed) == 2, "the next leader")
    jobs.following(2)
    jobs.go.set()
    answers = [future.result(20) for future in others]
    assert sorted(shared for _, shared in answers) == [False, True, True]
    assert len({text for text, _ in answers}) == 1


def test_a_leader_that_fails_fails_alone(jobs: Jobs) -> None:
    failed = threading.Event()

    def compute(name: str) -> str:
        jobs.computed.append(name)
        assert failed.wait(20)
        raise MemoryError

    leader, *others = led(jobs, 2, compute)
    jobs.go.set()
    failed.set()
    with pytest.raises(MemoryError):
        leader.result(20)
    assert {future.result(20) for future in others} == {
        ("by follower 0", False),
        ("by follower 1", False),
    }


def test_a_follower_that_is_cancelled_leaves_at_once(jobs: Jobs) -> None:
    leader, first, second = led(jobs, 2)
    jobs.held.lose(claim for claim in jobs.held.claims() if claim.id == "follower 0")
    with pytest.raises(Lost):
        first.result(20)
    jobs.go.set()
    assert second.result(20) == ("by leader", True)
    assert leader.result(20) == ("by leader", False)


def test_a_follower_does_not_wait_for_ever(jobs: Jobs) -> None:
    jobs.equal._timeout_s = 0.05
    _, follower = led(jobs, 1)
    with pytest.raises(TransientError, match=r"an equal job did not end within 0\.05 s"):
        follower.result(20)


def test_nothing_is_left_behind(jobs: Jobs) -> None:
    futures = led(jobs, 3)
    jobs.go.set()
    for future in futures:
        future.result(20)
    assert jobs.equal._leaders == {}
