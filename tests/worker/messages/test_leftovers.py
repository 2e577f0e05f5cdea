"""Messages that workers of earlier versions took with them as they died go back."""

import json
import time
from typing import Any

import pytest

from blipq import Settings
from blipq.ledger.connection import connect
from blipq_worker.messages.leftovers import AGE_S, SLICE, Leftovers

QUEUE = "blipq.default.normal"
OLD_S = AGE_S + 60


@pytest.fixture
def raw(apart: Settings) -> Any:
    with connect(apart) as raw:
        yield raw


def taken(raw: Any, tag: str, age_s: float, queue: Any = QUEUE) -> str:
    """A copy as kombu keeps it; the message."""
    message = {"body": "[]", "headers": {"id": tag}, "properties": {"delivery_tag": tag}}
    raw.hset("unacked", tag, json.dumps([message, "", queue]))
    raw.zadd("unacked_index", {tag: time.time() - age_s})
    return json.dumps(message)


def test_a_copy_goes_back_when_it_is_as_old_as_earlier_versions_let_it_be(raw: Any) -> None:
    message = taken(raw, "old", OLD_S)
    taken(raw, "young", AGE_S - 60)
    Leftovers(raw).put_back()
    assert raw.lrange(QUEUE, 0, -1) == [message]
    assert raw.hkeys("unacked") == raw.zrange("unacked_index", 0, -1) == ["young"]


def test_copies_of_other_applications_stay_and_hide_none_of_ours(raw: Any) -> None:
    for number in range(SLICE):
        taken(raw, f"theirs {number}", OLD_S + 60, "celery")
    taken(raw, "no queue", OLD_S + 60, 7)
    raw.hset("unacked", "no JSON", "[")
    raw.zadd("unacked_index", {"no JSON": 0, "no copy": 0})
    message = taken(raw, "ours", OLD_S)
    leftovers = Leftovers(raw)
    for _ in range(2):
        leftovers.put_back()
    assert raw.lrange(QUEUE, 0, -1) == [message]
    assert raw.hlen("unacked") == SLICE + 2
    assert not raw.exists("celery")
