"""A front keeps its promises to its callers, whatever becomes of the engine."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO

import msgspec
import numpy as np
import pytest

from blipq_worker.inference import (
    Answer,
    EngineBusy,
    EngineClient,
    EngineGone,
    Generate,
    GenerationParams,
    ImagePixels,
    ItemFailed,
    Match,
    UnknownModel,
)
from conftest import ROOT, wait_until
from worker.inference.stand_in import INFO, MODELS, NAME, SIDE, Served, item, pixels, serving


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as served:
        yield served


@pytest.fixture
def holding() -> Iterator[Served]:
    with serving(hold=True) as served:
        yield served


@contextmanager
def a_client(path: Path, **options: object) -> Iterator[EngineClient]:
    client = EngineClient(path, **{"timeout_s": 10.0, **options})  # type: ignore[arg-type]
    with closing(client):
        yield client
    # One that connects just then waits for as long as an engine may be silent.
    wait_until(lambda: not client._thread.is_alive(), "the end of the client's thread")


def ask(client: EngineClient, value: int = 1) -> "Future[Answer]":
    return client.submit("default", item(value), "normal")


def score(future: "Future[Answer]") -> float:
    value: float = future.result(10).value.scores[0]  # type: ignore[union-attr]
    return value


def test_many_threads_share_one_connection_and_each_gets_its_own_answers(served: Served) -> None:
    with a_client(served.path) as client, ThreadPoolExecutor(16) as pool:
        values = [number % 256 for number in range(600)]
        answers = pool.map(lambda value: score(ask(client, value)), values)
        assert list(answers) == values
        assert served.server.fronts == 1


def test_the_models_are_known_to_the_front(served: Served) -> None:
    with a_client(served.path) as client:
        assert client.models() == MODELS
        assert client.model("default") == INFO
        with pytest.raises(UnknownModel, match="nobody"):
            client.model("nobody")
        with pytest.raises(UnknownModel, match="nobody"):
            client.submit("nobody", item(), "normal")
        with pytest.raises(UnknownModel, match="nobody"):
            client.knows("nobody", [NAME], ["patches"])


def test_the_deadline_arrives_in_the_engines_time(holding: Served) -> None:
    with a_client(holding.path) as client:
        deadline = time.monotonic() + 60
        client.submit("default", item(), "high", deadline)
        client.submit("default", item(), "low", time.monotonic() - 5)
        wait_until(lambda: len(holding.backend.met) == 2, "the items")
        (_, _, first, met), (_, _, second, late) = holding.backend.met
        assert (first, second) == ("high", "low")
        assert met == pytest.approx(deadline, abs=5)
        assert late is not None
        assert late <= time.monotonic()


def test_known_images_are_told(served: Served) -> None:
    with a_client(served.path) as client:
        client.submit("default", item(name=NAME), "normal").result(10)
        assert client.knows("default", [NAME, "b" * 64], {"patches"}) == (True, False)
        client.submit("default", Match(ImagePixels(NAME), ("a",)), "normal").result(10)
        unknown = client.submit("default", Match(ImagePixels("b" * 64), ("a",)), "normal")
        with pytest.raises(ItemFailed) as failed:
            unknown.result(10)
        assert failed.value.failure.kind == "image_unknown"


def test_an_item_that_the_engine_would_refuse_costs_no_connection(holding: Served) -> None:
    """All items of a front share its connection: one bad item must not end it."""
    wrong = [
        Generate(ImagePixels(None, False, (pixels(),)), (), GenerationParams()),
        Generate(ImagePixels(None, False, (pixels(),)), ("x" * 40_000,), GenerationParams()),
        Generate(ImagePixels(None, False, (pixels(side=8),)), ("a",), GenerationParams()),
        Generate(ImagePixels(None), ("a",), GenerationParams()),
        Match(ImagePixels("no digest"), ("a",)),
        Match(ImagePixels(NAME), ("\ud800",)),
    ]
    with a_client(holding.path) as client:
        future = ask(client)
        for each in wrong:
            with pytest.raises(ValueError, match=r"."):
                client.submit("default", each, "normal")
        wait_until(lambda: len(holding.backend.open) == 1, "the good item")
        holding.run(holding.backend.answer_all)
        assert score(future) == 1


def test_a_cancelled_future_ends_the_work_on_its_item(holding: Served) -> None:
    with a_client(holding.path) as client:
        future, other = ask(client), ask(client, 7)
        wait_until(lambda: len(holding.backend.open) == 2, "the items")
        assert future.cancel()
        wait_until(lambda: holding.backend.cancelled == [0], "its end")
        holding.run(holding.backend.answer_all)
        assert score(other) == 7


def test_an_item_that_the_engine_gives_up_is_cancelled(holding: Served) -> None:
    with a_client(holding.path) as client:
        future = ask(client)
        wait_until(lambda: len(holding.backend.open) == 1, "the item")
        holding.run(lambda: holding.backend.cancel(0))
        with pytest.raises(CancelledError):
            future.result(10)


def test_a_failure_of_an_item_has_its_code(holding: Served) -> None:
    from blipq_worker.inference import Failure

    with a_client(holding.path) as client:
        future = ask(client)
        wait_until(lambda: len(holding.backend.open) == 1, "the item")
        [(_, done)] = holding.backend.open.values()
        holding.run(lambda: done(Failure("permanent", "invalid_request", "too long")))
        with pytest.raises(ItemFailed, match="invalid_request: too long") as failed:
            future.result(10)
        assert failed.value.failure.kind == "permanent"


def test_credits_bound_what_is_sent_and_a_submit_waits_for_one() -> None:
    with serving(hold=True, credits=2) as served, a_client(served.path, timeout_s=0.3) as client:
        first, second = ask(client), ask(client)
        with pytest.raises(EngineBusy, match="2 items had no answer for"):
            ask(client)
        first.cancel()
        third = ask(client)
        wait_until(lambda: len(served.backend.met) == 3, "the third item")
        assert not second.done()
        assert not third.done()
        assert client.connected


def test_a_submit_that_waits_for_a_credit_gets_the_next_one() -> None:
    with serving(hold=True, credits=1) as served, a_client(served.path) as client:
        first = ask(client)
        wait_until(lambda: served.backend.open, "the first item")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(ask, client, 9)
            served.run(served.backend.answer_all)
            assert score(first) == 1
            second = waiting.result(10)
            wait_until(lambda: served.backend.open, "the second item")
            served.run(served.backend.answer_all)
            assert score(second) == 9


def test_without_an_engine_a_submit_says_so() -> None:
    with tempfile.TemporaryDirectory(prefix="bq") as folder:
        path = Path(folder) / "engine"
        with a_client(path, timeout_s=0.2) as client:
            assert not client.connected
            assert client.beat is None
            with pytest.raises(EngineGone, match="no engine at"):
                ask(client)


def test_a_client_may_come_before_its_engine() -> None:
    with tempfile.TemporaryDirectory(prefix="bq") as folder:
        path = Path(folder) / "engine"
        with a_client(path) as client, ThreadPoolExecutor(1) as pool:
            early = pool.submit(ask, client, 4)
            with an_engine(path):
                assert score(early.result(10)) == 4


def test_closing_fails_what_is_open_and_what_comes_later(holding: Served) -> None:
    with a_client(holding.path) as client:
        future = ask(client)
    with pytest.raises(EngineGone, match="closes its connection"):
        future.result(10)
    with pytest.raises(EngineGone, match="has closed"):
        ask(client)
    wait_until(lambda: holding.server.fronts == 0, "its end")
    client.close()  # again: it is nothing


def test_an_engine_that_ends_says_why(served: Served) -> None:
    heard: list[str] = []
    with a_client(served.path, on_lost=heard.append) as client:
        score(ask(client))
        served.stop()
        wait_until(lambda: heard, "the end of the engine")
        assert heard == ["the engine closed the connection: the engine ends"]


def test_an_array_of_any_shape_is_sent_whole(served: Served) -> None:
    whole = np.zeros((SIDE, SIDE, 3), np.uint8)
    whole[0, 0, 0], whole[-1, -1, -1] = 3, 4
    with a_client(served.path) as client:
        image = ImagePixels(None, False, (memoryview(whole),))
        answer = client.submit("default", Match(image, ("a",)), "normal").result(10)
        assert answer.value.scores == (3, 4)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="C-contiguous"):
        ImagePixels(None, False, (memoryview(whole[:, ::-1]),))


def test_the_front_hears_why_it_was_cut_also_where_it_is_sending(served: Served) -> None:
    heard: list[str] = []
    with a_client(served.path, on_lost=heard.append) as client, ThreadPoolExecutor(8) as pool:
        score(ask(client))
        [front] = served.server._fronts.values()

        def send() -> None:
            with suppress(EngineGone):
                while not heard:
                    ask(client).result(10)

        threads = [pool.submit(send) for _ in range(8)]
        served.run(lambda: served.server._cut(front, "a test"))
        for each in threads:
            each.result(20)
        wait_until(lambda: heard, "the end")
        assert heard == ["the engine closed the connection: a test"]


def test_half_a_message_ends_its_connection(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal's exception in the midst of a send: the next message must not pass for its rest."""
    with a_client(served.path) as client:
        score(ask(client))
        connection = client._connection
        assert connection is not None

        class Interrupted:
            def sendmsg(self, parts: list[bytes], *_: object) -> int:
                connection._socket, cut = real, bytes(parts[1][:1000])
                real.sendall(parts[0] + cut)
                raise KeyboardInterrupt

        real = connection._socket
        monkeypatch.setattr(connection, "_socket", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            ask(client)
        wait_until(lambda: client._connection not in (connection, None), "another connection")
        assert score(ask(client, 8)) == 8
        assert len(served.backend.met) == 2


def test_an_item_that_waits_for_a_credit_loses_that_time_to_its_deadline() -> None:
    with serving(hold=True, credits=1) as served, a_client(served.path) as client:
        ask(client)
        wait_until(lambda: served.backend.open, "the first item")
        deadline = time.monotonic() + 60
        with ThreadPoolExecutor(1) as pool:
            pool.submit(client.submit, "default", item(), "normal", deadline)
            time.sleep(1)
            served.run(served.backend.answer_all)
            wait_until(lambda: len(served.backend.met) == 2, "the second item")
        assert served.backend.met[1][3] == pytest.approx(deadline, abs=0.9)


def test_a_bad_item_keeps_no_credit() -> None:
    bad = Match(ImagePixels(NAME), ("x" * 40_000,))
    with serving(credits=1) as served, a_client(served.path) as client:
        for value in range(3):
            with pytest.raises(ValueError, match="Submit"):
                client.submit("default", bad, "normal")
            assert score(ask(client, value)) == value


def test_the_front_may_close_when_it_hears_that_the_engine_is_gone(served: Served) -> None:
    closed = threading.Event()

    def on_lost(reason: str) -> None:
        client.close()
        closed.set()

    client = EngineClient(served.path, timeout_s=10, on_lost=on_lost)
    score(ask(client))
    served.stop()
    assert closed.wait(10)
    client._thread.join(10)
    assert not client._thread.is_alive()


def test_beats_reach_the_front(holding: Served) -> None:
    with a_client(holding.path) as client:
        ask(client)
        wait_until(lambda: client.beat is not None and client.beat.running == 1, "a beat")


def test_a_callback_that_raises_stops_nothing() -> None:
    def on_lost(reason: str) -> None:
        raise RuntimeError("a bug")

    with tempfile.TemporaryDirectory(prefix="bq") as folder:
        path = Path(folder) / "engine"
        with a_client(path, on_lost=on_lost) as client:
            for value in (1, 2):
                with an_engine(path):
                    assert score(ask(client, value)) == value
                wait_until(lambda: not client.connected, "its end")


# --- processes and kills --------------------------------------------------------------------------


class Process:
    """A process of ours, and the first and the last line that it has written."""

    def __init__(self, *command: str) -> None:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
        self.popen = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.popen.stdout is not None
        self._out: IO[str] = self.popen.stdout
        self.first = self.last = self._out.readline().strip()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self._out:
            self.last = line.strip()

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def end(self) -> None:
        self.popen.kill()
        self.popen.wait(10)
        self._reader.join(10)
        self._out.close()


@contextmanager
def an_engine(path: Path, *options: str) -> Iterator[Process]:
    process = Process("-m", "worker.inference.stand_in", str(path), *options)
    try:
        assert process.first == "ready"
        yield process
    finally:
        process.end()


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bq") as folder:
        yield Path(folder) / "engine"


def test_a_killed_engine_fails_its_items_and_the_next_one_is_found(path: Path) -> None:
    heard: list[str] = []
    with a_client(path, on_lost=heard.append) as client:
        with an_engine(path, "hold") as engine:
            futures = [ask(client, value) for value in range(20)]
            wait_until(lambda: "holds 20" in engine.last, "the items")
            engine.signal(signal.SIGKILL)
            for future in futures:
                with pytest.raises(EngineGone):
                    future.result(10)
        assert len(heard) == 1
        ids = [next(client._ids)]
        with an_engine(path):  # the file of the killed one was in its way
            assert [score(ask(client, value)) for value in range(5)] == [0, 1, 2, 3, 4]
        assert ids[0] > 20  # no id comes again: an old item cannot be taken for a new one


def test_a_killed_engine_tells_the_items_of_its_pass_from_those_that_waited(path: Path) -> None:
    with an_engine(path, "hold", "3") as engine, a_client(path) as client:
        futures = [ask(client, value) for value in range(8)]
        wait_until(lambda: "holds 8" in engine.last, "the items")
        wait_until(lambda: client._connection and len(client._connection._started) == 3, "a pass")
        engine.signal(signal.SIGKILL)
        gone = [future.exception(10) for future in futures]
        assert [isinstance(error, EngineGone) and error.started for error in gone] == (
            [True] * 3 + [False] * 5
        )


LARGE_ANSWERS = """
import os, signal, sys
from pathlib import Path
from blipq_worker.inference import Answer, Array, Embedded, EngineServer
from worker.inference.stand_in import StandIn
backend = StandIn(hold=True)
server = EngineServer(Path(sys.argv[1]), backend)
print("ready", flush=True)
while len(backend.open) < 64:
    server.poll(0.02)
first, second = list(backend.open)[:32], list(backend.open)[32:]
server.started(first)
for handle in first:
    _, done = backend.open.pop(handle)
    done(Answer(Embedded({"image": Array((32, 256), bytes(32768))}), 1.0, 0.5, 32))
server.poll()
server.started(second)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_pass_that_kills_is_known_behind_the_large_answers_of_the_one_before(path: Path) -> None:
    engine = Process("-c", LARGE_ANSWERS, str(path))
    try:
        with a_client(path) as client:
            futures = [ask(client) for _ in range(64)]
            gone = [future.exception(10) for future in futures]
    finally:
        engine.end()
    assert gone[:32] == [None] * 32
    assert all(isinstance(error, EngineGone) and error.started for error in gone[32:])


def test_a_frozen_engine_makes_the_items_of_its_pass_suspects(path: Path) -> None:
    with an_engine(path, "hold", "1") as engine, a_client(path, silence_s=1.0) as client:
        futures = ask(client), ask(client)
        wait_until(lambda: "holds 2" in engine.last, "the items")
        wait_until(lambda: client._connection and client._connection._started, "a pass")
        engine.signal(signal.SIGSTOP)
        gone = [future.exception(10) for future in futures]
        engine.signal(signal.SIGCONT)
        assert [isinstance(error, EngineGone) and error.started for error in gone] == [True, False]


def test_an_item_that_was_answered_is_forgotten_with_its_pass(holding: Served) -> None:
    with a_client(holding.path) as client:
        future = ask(client)
        wait_until(lambda: len(holding.backend.open) == 1, "the item")
        holding.run(lambda: holding.server.started(list(holding.backend.open)))
        connection = client._connection
        assert connection is not None
        wait_until(lambda: connection._started, "its pass")
        holding.run(holding.backend.answer_all)
        assert score(future) == 1
        assert not connection._started
        assert not holding.server._intake._works


def test_an_engine_that_says_it_will_be_quiet_is_not_taken_for_frozen(holding: Served) -> None:
    def compile() -> None:
        holding.server.be_quiet(60)
        time.sleep(4)

    with a_client(holding.path, silence_s=2) as client:
        future = ask(client)
        wait_until(lambda: len(holding.backend.open) == 1, "the item")
        holding.run(compile)
        holding.run(holding.backend.answer_all)
        assert score(future) == 1
        wait_until(lambda: client.beat is not None and client.beat.quiet_s == 0, "the usual beats")
        holding.run(lambda: time.sleep(4))
        wait_until(lambda: not client.connected, "a silence that nobody announced to be noticed")


def test_a_front_that_dies_as_a_pass_begins_does_not_end_the_engine(holding: Served) -> None:
    with a_client(holding.path) as dying, a_client(holding.path) as client:
        ask(dying)
        future = ask(client)
        wait_until(lambda: len(holding.backend.open) == 2, "the items")

        def begin() -> None:
            dying._connection._socket.shutdown(socket.SHUT_RDWR)
            holding.server.started(list(holding.backend.open))
            holding.backend.answer_all()

        holding.run(begin)
        assert score(future) == 1


@pytest.mark.parametrize("end", ["goodbye", "close"])
def test_an_engine_that_ends_in_order_suspects_nobody(holding: Served, end: str) -> None:
    with a_client(holding.path) as client:
        future = ask(client)
        wait_until(lambda: len(holding.backend.open) == 1, "the item")
        holding.run(lambda: holding.server.started(list(holding.backend.open)))
        wait_until(lambda: client._connection and client._connection._started, "its pass")
        if end == "goodbye":
            holding.stop()
        else:
            client.close()
        error = future.exception(10)
        assert isinstance(error, EngineGone)
        assert not error.started


def test_an_item_that_must_run_alone_says_so(served: Served) -> None:
    with a_client(served.path) as client:
        ask(client).result(10)
        client.submit("default", item(), "normal", alone=True).result(10)
        assert served.backend.alone == [False, True]


def test_a_frozen_engine_is_noticed_by_its_silence(path: Path) -> None:
    with an_engine(path, "hold") as engine, a_client(path, silence_s=1.0) as client:
        future = ask(client)
        wait_until(lambda: "holds 1" in engine.last, "the item")
        engine.signal(signal.SIGSTOP)
        with pytest.raises(EngineGone, match="has sent nothing for 1 s"):
            future.result(10)
        engine.signal(signal.SIGCONT)
        wait_until(lambda: client.connected, "the engine again")
        wait_until(lambda: "holds 0 cancelled 1" in engine.last, "the end of the lost item")


def test_a_send_to_a_frozen_engine_ends(path: Path) -> None:
    """Its socket is full: the thread that sends must not wait for ever, nor those behind it."""
    with (
        an_engine(path, "hold") as engine,
        a_client(path, silence_s=1.0) as client,
        ThreadPoolExecutor(32) as pool,
    ):
        assert client.connected or client.models()
        engine.signal(signal.SIGSTOP)
        sent = [pool.submit(ask, client) for _ in range(32)]
        for each in sent:
            with pytest.raises(EngineGone):
                each.result(20).result(20)
        engine.signal(signal.SIGCONT)


FRONT = """
import sys, time
from pathlib import Path
from blipq_worker.inference import EngineClient
from worker.inference.stand_in import item
client = EngineClient(Path(sys.argv[1]))
for value in range(16):
    client.submit("default", item(value), "normal")
print("sent", flush=True)
time.sleep(60)
"""
HALF = """
import socket, sys, time
from blipq_worker.inference.protocol import Hello, Submit, encoded
from worker.inference.stand_in import SIZE, item
raw = socket.socket(socket.AF_UNIX)
raw.connect(sys.argv[1])
submit = Submit("default", "normal", None, item())
raw.sendall(encoded(Hello(1, "half")) + encoded(submit, 1, SIZE) + bytes(SIZE))
raw.sendall(encoded(submit, 2, SIZE) + bytes(SIZE // 2))
print("sent", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("code", "items"), [(FRONT, 16), (HALF, 1)], ids=["between", "midst"])
def test_a_killed_fronts_items_are_cancelled_at_once(path: Path, code: str, items: int) -> None:
    with an_engine(path, "hold") as engine, a_client(path) as client:
        mine = ask(client)
        front = Process("-c", code, str(path))
        wait_until(lambda: f"holds {items + 1}" in engine.last, "the items")
        front.end()
        wait_until(lambda: f"holds 1 cancelled {items}" in engine.last, "their end", timeout=5)
        assert not mine.done()


def test_a_frozen_front_stops_no_other_one(path: Path) -> None:
    with an_engine(path) as engine, a_client(path) as client:
        front = Process("-c", HALF, str(path))
        front.signal(signal.SIGSTOP)
        assert [score(ask(client, value)) for value in range(30)] == list(range(30))
        front.end()
        assert engine.popen.poll() is None


def test_engines_may_be_killed_again_and_again_under_load(path: Path) -> None:
    """Each submit ends in its own answer or in EngineGone: none hangs, none gets another's."""
    stop = threading.Event()
    with a_client(path, timeout_s=2.0) as client:

        def submit(value: int) -> tuple[int, int]:
            answered = gone = 0
            while not stop.is_set():
                try:
                    assert score(ask(client, value)) == value
                    answered += 1
                except EngineGone:
                    gone += 1
            return answered, gone

        with ThreadPoolExecutor(12) as pool:
            threads = [pool.submit(submit, value) for value in range(12)]
            try:
                for _ in range(4):
                    with an_engine(path) as engine:
                        wait_until(lambda: client.connected, "the engine")
                        time.sleep(0.3)
                        engine.signal(signal.SIGKILL)
            finally:
                stop.set()
            counts = [thread.result(20) for thread in threads]
        assert min(answered for answered, _ in counts) > 0
        assert sum(gone for _, gone in counts) > 0


def test_importing_the_seam_loads_neither_a_model_nor_a_queue() -> None:
    code = "import blipq_worker.inference, sys; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    loaded = {name.partition(".")[0] for name in ran.stdout.split()}
    assert "msgspec" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "celery", "kombu", "redis", "PIL", "numpy"})


def test_infos_are_plain_data() -> None:
    assert msgspec.convert(msgspec.to_builtins(INFO), type(INFO)) == INFO
