"""A key is one job, whatever its clients' lists and beliefs, and in whatever order they go on."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blipq import CaptionRequest, Options, QueueUnavailable
from blipq.errors import BlipqError
from blipq.ledger import codec
from blipq.ledger.cells.calls import Round
from blipq.ledger.cells.fleet import Fleet as Calls
from blipq.ledger.cells.producer import CellLedger
from blipq.ledger.codec import Message
from blipq.ledger.connection import connect
from blipq.submission import Submission, new_id
from guarantees.cells.fleet import Fleet

RUNS = int(os.environ.get("GUARANTEES_RUNS", "150"))
NAMES = "abc"
#: Lists that clients were given one after the other.
HISTORIES = (
    ("1=a,b,c",),
    ("1=a", "1=a 2=a,c"),
    ("1=a,b", "1=a,b 2=a"),
    ("1=a,b", "1=a,b 2=a,b,c"),
    ("1=a,b", "1=a,b 2=a", "1=a,b 2=a 3=a,b,c"),
    ("1=a,b,c", "1=a,b,c 2=b,c", "1=a,b,c 2=b,c 3=a,b"),
)
CELL = st.sampled_from(NAMES)
NUMBER = st.integers(min_value=0, max_value=11)
BELIEF = st.sampled_from((None, True, False))
EVENT = st.one_of(
    st.tuples(st.just("submit"), NUMBER, st.tuples(BELIEF, BELIEF, BELIEF)),
    st.tuples(st.just("answer"), NUMBER),
    st.tuples(st.just("answer"), NUMBER),
    st.tuples(st.just("no answer"), NUMBER),
    st.tuples(st.just("models"), st.sets(CELL)),
)


class World:
    """Cells on real servers, and which of them serve the model of all jobs."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.raws: dict[str, redis.Redis] = {}
        self.ledgers: dict[tuple[str, bool], CellLedger] = {}
        for name in NAMES:
            own = fleet.settings("1=a,b,c", known_models=()).in_cell(name)
            self.raws[name] = connect(own)
            for served in (True, False):
                one = own.model_copy(update={"known_models": ("m",) if served else ()})
                self.ledgers[name, served] = CellLedger(self.raws[name], one)
        self.begin("k")

    def begin(self, key: str) -> None:
        self.key = key
        self.serving: set[str] = set()
        self.live: list[Round[Any]] = []
        self.answers: list[Message | str | BlipqError] = []
        for raw in self.raws.values():
            raw.flushall()

    def submit(self, lists: str, beliefs: tuple[bool | None, ...] = ()) -> Round[Any]:
        given = self.fleet.settings(lists)
        calls = Calls(given)
        for cell, known in zip(NAMES, beliefs, strict=False):
            if known is not None:
                calls.health.learn(cell, "m", known)
        options = Options(idempotency_key=self.key, model="m")
        submission = Submission(CaptionRequest(image="s3://bucket/key"), options, new_id())
        job = codec.prepare(submission, given, notify="n")
        return Round(calls.submit_all([job]), calls.health)

    def go_on(self, round: Round[Any], *, answers: bool = True) -> bool:
        """Makes one call of a submit; whether there are more."""
        assert round.call is not None
        cell, on = round.call
        try:
            if not answers:
                raise QueueUnavailable("away")
            answer = on(self.ledgers[cell, cell in self.serving])
        except BlipqError as error:
            round.failed(error)
        else:
            round.answered(answer)
        if round.call is None:
            self.answers += round.answer
        return round.call is not None

    def ids(self) -> set[str]:
        found = (each.id if isinstance(each, Message) else each for each in self.answers)
        return {each for each in found if isinstance(each, str)}

    def close(self) -> None:
        for raw in self.raws.values():
            raw.close()


@pytest.fixture
def world(tmp_path: Any) -> Iterator[World]:
    fleet = Fleet(tmp_path, NAMES, known_models=())
    world = World(fleet)
    yield world
    world.close()
    fleet.stop()


@settings(
    max_examples=RUNS, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    key=NUMBER, lists=st.sampled_from(HISTORIES), events=st.lists(EVENT, max_size=40), last=NUMBER
)
def test_a_key_is_one_job_and_is_recorded_where_one_cell_serves_its_model(
    world: World, key: int, lists: tuple[str, ...], events: list[tuple[Any, ...]], last: int
) -> None:
    world.begin(f"k{key}")
    for kind, what, *more in events:
        if kind == "models":
            world.serving = what
        elif kind == "submit" and len(world.live) < 4:
            world.live.append(world.submit(lists[what % len(lists)], *more))
        elif kind != "submit" and world.live:
            one = world.live[what % len(world.live)]
            if not world.go_on(one, answers=kind == "answer"):
                world.live.remove(one)
    newest = lists[-1].rpartition("=")[2].split(",")
    world.serving = {newest[last % len(newest)]}
    later = world.submit(lists[-1])
    for one in [*world.live, later]:
        while world.go_on(one):
            pass
    assert later.answer
    assert not isinstance(later.answer[0], BlipqError), "it is recorded, whatever was before"
    assert len(world.ids()) == 1
    assert sum(map(len, world.fleet.records().values())) == 1
