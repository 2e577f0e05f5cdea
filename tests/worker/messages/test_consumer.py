"""Celery's consumer and its remote control, as a worker has them."""

import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.utils.collections import LimitedSet
from celery.worker import consumer as celery_consumer
from celery.worker import control, state
from celery.worker.consumer.connection import Connection as WorkerConnection

from blipq.errors import QueueFull, QueueUnavailable
from blipq.settings import Settings
from blipq.transport.broker import make_app
from blipq_worker.messages.consumer import Door, consumer_class
from blipq_worker.messages.controls import REFUSED, refuse_controls
from blipq_worker.messages.envelope import Malformed, WholeJob
from blipq_worker.messages.revokes import follow_revokes
from blipq_worker.process.health import BrokerLoop


class Told:
    """What the worker is told by its consumer."""

    def __init__(self) -> None:
        self.recorded: list[WholeJob] = []
        self.refused: list[Malformed] = []
        self.ended: list[BaseException] = []
        self.dropped = 0
        self.away: list[Exception] = []
        self.loop = BrokerLoop()

    def refuse(self, message: Malformed) -> None:
        if self.away:
            raise self.away.pop()
        self.refused.append(message)

    def record(self, job: WholeJob) -> None:
        if self.away:
            raise self.away.pop()
        self.recorded.append(job)

    def drop(self) -> None:
        self.dropped += 1

    def consumer(self) -> Any:
        """A consumer without a connection."""
        door = Door(
            record=self.record,
            refuse=self.refuse,
            dropped=self.drop,
            problem=lambda: None,
            ended=self.ended.append,
        )
        cls = consumer_class(door, self.loop)
        consumer = cls.__new__(cls)
        consumer.connection_errors = (OSError, KeyError)  # as kombu's for Redis
        return consumer


class Message(SimpleNamespace):
    """One whose envelope is sound."""

    def __init__(self, *arguments: Any, **headers: Any) -> None:
        headers = {"task": "blipq.caption", "id": "job_1"} | headers
        body = json.dumps([["job_1", *arguments], {}, {}]).encode()
        super().__init__(headers=headers, body=body, outcome="", stuck=0)
        self.content_type, self.content_encoding = "application/json", "utf-8"

    def ack_log_error(self, *_: Any) -> None:
        self.outcome = "acknowledged"

    def reject(self, *, requeue: bool) -> None:
        if self.stuck:  # the broker does not take it
            self.stuck -= 1
            raise OSError("the broker is away")
        self.outcome = "given back" if requeue else "rejected"


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.mark.parametrize("error", [RuntimeError("a bug"), SystemExit(0)])
def test_the_worker_hears_that_its_consumer_ended(
    told: Told, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def start(self: Any) -> None:
        raise error

    monkeypatch.setattr(celery_consumer.Consumer, "start", start)
    with pytest.raises(type(error)):
        told.consumer().start()
    assert told.ended == [error]


def handler(told: Told, monkeypatch: pytest.MonkeyPatch, error: Exception) -> Any:
    def handle(message: Any) -> None:
        raise error

    monkeypatch.setattr(celery_consumer.Consumer, "create_task_handler", lambda self: handle)
    return told.consumer().create_task_handler()


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("y"), RecursionError()])
def test_a_message_that_celery_chokes_on_is_refused(
    told: Told, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    message = Message()
    handler(told, monkeypatch, error)(message)
    assert [each.id for each in told.refused] == ["job_1"]
    assert message.outcome == "acknowledged"


def test_a_lost_connection_is_not_the_messages_fault(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConnectionError):
        handler(told, monkeypatch, ConnectionError("lost"))(Message())
    assert told.refused == []


def test_a_malformed_message_goes_back_while_the_ledger_is_away(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blipq_worker.messages.consumer.PAUSE_S", 0.0)
    told.away.append(QueueUnavailable("Redis is away"))
    message = Message()
    told.consumer().on_decode_error(message, ValueError("no base64"))
    assert (message.outcome, told.refused) == ("given back", [])


REQUEST = {"image": "s3://photos/cat.jpg"}


@pytest.fixture
def taking(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The messages that Celery is given to run."""
    taken: list[Any] = []
    monkeypatch.setattr("blipq_worker.messages.consumer.PAUSE_S", 0.0)
    create = "create_task_handler"
    monkeypatch.setattr(celery_consumer.Consumer, create, lambda self: taken.append)
    return taken


def test_a_job_that_a_message_brings_whole_is_recorded_before_it_waits_for_a_thread(
    told: Told, taking: list[Any]
) -> None:
    message = Message(REQUEST, {"expires_in": 60})
    told.consumer().create_task_handler()(message)
    assert [(each.id, each.request) for each in told.recorded] == [("job_1", REQUEST)]
    assert taking == [message]


def test_a_job_that_is_on_record_is_not_recorded_again(told: Told, taking: list[Any]) -> None:
    message = Message()
    told.consumer().create_task_handler()(message)
    assert (told.recorded, taking) == ([], [message])


def test_a_whole_job_goes_back_to_its_queue_while_the_ledger_does_not_take_it(
    told: Told, taking: list[Any]
) -> None:
    told.away.append(QueueFull("too many jobs are open"))
    message = Message(REQUEST)
    told.consumer().create_task_handler()(message)
    assert (message.outcome, told.recorded, taking) == ("given back", [], [])


def test_a_whole_job_stays_in_hand_while_neither_ledger_nor_broker_takes_it(
    told: Told, taking: list[Any]
) -> None:
    told.away += [QueueUnavailable("Redis is away")] * 3
    message = Message(REQUEST)
    message.stuck = 3
    told.consumer().create_task_handler()(message)
    assert [each.id for each in told.recorded] == ["job_1"]
    assert taking == [message]
    assert not told.loop.turning, "it says meanwhile that it takes nothing"


def at(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def test_a_whole_job_for_later_is_left_to_the_ledger(told: Told, taking: list[Any]) -> None:
    """Celery would hold its message in memory until then."""
    message = Message(REQUEST, eta=at(60))
    told.consumer().create_task_handler()(message)
    assert 50 < told.recorded[0].delay_s <= 60
    assert (message.outcome, taking) == ("acknowledged", [])


def test_a_message_that_has_expired_is_left_to_celery_unrecorded(
    told: Told, taking: list[Any]
) -> None:
    """What follows on Celery's verdict records the job as expired."""
    message = Message(REQUEST, expires=at(-60))
    told.consumer().create_task_handler()(message)
    assert (told.recorded, taking) == ([], [message])
    assert "expires" in message.headers


def test_a_message_that_has_not_expired_as_it_comes_does_so_no_more(
    told: Told, taking: list[Any]
) -> None:
    """Its job is on record from now on: without a message it would wait to be published again."""
    message = Message(REQUEST, expires=at(60))
    told.consumer().create_task_handler()(message)
    assert len(told.recorded) == len(taking) == 1
    assert "expires" not in message.headers


def test_a_malformed_message_that_cannot_be_recorded_is_dropped_and_counted(told: Told) -> None:
    """The error once ended the loop, and the message went on to the next worker."""
    told.away.append(ValueError("no such key"))
    message = Message()
    told.consumer().on_decode_error(message, ValueError("no base64"))
    assert (message.outcome, told.dropped, told.refused) == ("acknowledged", 1, [])


def test_a_loop_that_connects_again_is_alive_and_takes_nothing() -> None:
    loop = BrokerLoop()
    assert loop.turning
    loop.failed("NOREPLICAS")
    assert not loop.turning
    assert loop.stuck() is None
    assert "NOREPLICAS" in str(loop.away())
    loop.turned()
    assert loop.turning
    assert loop.away() is None


def test_each_command_of_remote_control_is_known_to_be_sound_or_refused() -> None:
    """A new one of Celery's must be judged before workers obey it."""
    sound = {"revoke", "terminate", "shutdown"}
    sound |= {"enable_events", "disable_events", "heartbeat", "election"}
    commands = {name for name, known in control.Panel.meta.items() if known.type == "control"}
    assert commands - sound == set(REFUSED) - {"report"}


@pytest.mark.parametrize(
    "settings",
    [
        {"redis_url": "sentinel://:hush@a,b/0?master=m&sentinel_password=hush"},
        {"redis_url": "redis://:hush@a/0"},
        {"redis_url": "redis://a/0", "broker_url": "amqp://u:hush@a//;amqp://u:hush@b//"},
        {"redis_url": "redis://a/0", "broker_url": "amqps://u:hush@a//;amqps://u:hush@b//"},
    ],
)
def test_remote_control_tells_where_the_broker_is_and_no_password(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Celery leaves out the one of the address in use, not those of a list, nor the sentinels'."""
    monkeypatch.setattr(control.Panel, "data", dict(control.Panel.data))
    refuse_controls()
    app = make_app(Settings(**settings))
    step = WorkerConnection(SimpleNamespace())

    class Controller:
        def stats(self) -> dict[str, Any]:
            return {"total": {}, **step.info(SimpleNamespace(connection=app.connection_for_read()))}

    panel = SimpleNamespace(app=app, consumer=SimpleNamespace(controller=Controller()))
    told = control.Panel.data["stats"](panel)
    assert told["broker"]["hostname"] == "a"
    told = [control.Panel.data[name](panel) for name in ("stats", "conf", "dump_conf")]
    assert "hush" not in str(told)


def test_every_way_to_revoke_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads cannot be terminated: Celery's own command failed, and took remote control along."""
    monkeypatch.setattr(control.Panel, "data", dict(control.Panel.data))
    monkeypatch.setattr(state, "revoked", LimitedSet())
    cancelled: list[str] = []

    def cancel(id: str) -> bool:
        cancelled.append(id)
        return id != "job_3"

    follow_revokes(cancel, lambda *_: True, lambda *_: None)
    panel = SimpleNamespace(app=Celery(broker="memory://", set_as_current=False))
    control.Panel.data["revoke"](panel, "job_1", terminate=True, signal="KILL")
    control.Panel.data["revoke"](panel, ["job_2", 7], terminate=False)
    control.Panel.data["terminate"](panel, "SIGTERM", ["job_3"])
    assert cancelled == ["job_1", "job_2", "job_3"]
    assert list(state.revoked) == ["job_3"], "what the ledger knows must not be dropped later"
