"""Whatever a front sends: the engine goes on, and serves the others meanwhile."""

import hashlib
import itertools
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from typing import Any

import msgspec
import psutil
import pytest

from blipq_worker.inference import (
    Answer,
    Array,
    Embedded,
    EngineClient,
    HeapRows,
    ImagePixels,
    Match,
    front,
    server,
)
from blipq_worker.inference.protocol import (
    FROM_ENGINES,
    MOST_DIGESTS,
    Answers,
    Beat,
    Cancel,
    Forget,
    Goodbye,
    Hello,
    Known,
    Knows,
    Message,
    Submit,
    Vocabulary,
    Welcome,
    encoded,
)
from blipq_worker.inference.stream import Ended, Reader, no_pixels
from conftest import wait_until
from worker.inference.stand_in import NAME, SIZE, Served, answered, item, serving

HELLO = encoded(Hello(1, "raw"))
ITEM = Submit("default", "normal", 60.0, item())
WHOLE = encoded(ITEM, 1, SIZE) + bytes(SIZE)


def connected(served: Served) -> socket.socket:
    """A connection; waits where too many want one."""
    raw = socket.socket(socket.AF_UNIX)
    raw.connect(str(served.path))
    raw.settimeout(10)
    return raw


class Raw:
    """A front that sends whatever bytes it likes."""

    def __init__(self, served: Served, *first: bytes) -> None:
        self.socket = connected(served)
        self._reader = Reader(self.socket, Vocabulary(FROM_ENGINES), no_pixels)
        for data in first:
            self.socket.sendall(data)

    def send(self, message: Message, id: int = 0, pixels: bytes = b"") -> None:
        self.socket.sendall(encoded(message, id, len(pixels)) + pixels)

    def next(self, *kinds: type) -> Any:
        """The next message of these types; raises Ended where the engine ends first."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            frame = self._reader.receive()
            if frame is not None and isinstance(frame.message, kinds):
                return frame
            if frame is None:
                time.sleep(0.005)
        raise AssertionError(f"no {kinds} within 10 s")

    def outcomes(self, count: int) -> dict[int, Any]:
        found: dict[int, Any] = {}
        while len(found) < count:
            found.update(self.next(Answers).message.outcomes)
        return found

    def goodbye(self) -> str:
        """Why the engine has cut this front."""
        reason: str = self.next(Goodbye).message.reason
        with pytest.raises((Ended, ConnectionResetError)):
            self.next(Goodbye)
        return reason

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as served:
        yield served


@pytest.fixture
def holding() -> Iterator[Served]:
    with serving(hold=True) as served:
        yield served


@pytest.fixture
def beside(served: Served) -> Iterator[Callable[[], None]]:
    """A good front beside; calling it fails unless it is served."""
    with closing(EngineClient(served.path, timeout_s=10)) as client:
        values = iter(range(1, 256))

        def is_served() -> None:
            value = next(values)
            answer = client.submit("default", item(value), "normal").result(10)
            assert answer.value.scores == (value, value)  # type: ignore[union-attr]

        is_served()
        yield is_served
        assert client.connected
        is_served()


def test_items_of_one_step_are_answered_in_one_message(holding: Served) -> None:
    with closing(Raw(holding, HELLO)) as raw:
        for id in range(1, 6):
            raw.send(ITEM, id, bytes([id]) * SIZE)
        wait_until(lambda: len(holding.backend.open) == 5, "five items")
        holding.run(holding.backend.answer_all)
        outcomes = raw.next(Answers).message.outcomes
        assert [(id, outcome.value.scores[0]) for id, outcome in outcomes] == [
            (id, float(id)) for id in range(1, 6)
        ]


def test_two_arrays_reach_the_backend_as_two(served: Served) -> None:
    two = Submit("two", "high", None, item())
    with closing(Raw(served, HELLO)) as raw:
        raw.send(two, 1, bytes([3]) * (16 * 16 * 3) + bytes([5]) * (8 * 8 * 3))
        assert raw.outcomes(1)[1].value.scores == (3, 3, 5, 5)


def test_a_known_image_needs_no_pixels(served: Served) -> None:
    known = Match(ImagePixels(NAME, True), ("a cat",))
    with closing(Raw(served, HELLO)) as raw:
        raw.send(Submit("default", "high", None, item(name=NAME)), 8, bytes(SIZE))
        raw.outcomes(1)
        raw.send(Knows("default", ("b" * 64, NAME), ("generation",)), 9)
        frame = raw.next(Known)
        assert (frame.id, frame.message.known) == (9, (False, True))
        raw.send(Submit("default", "low", None, known), 10)
        assert raw.outcomes(1)[10].value.scores == ()
    (_, first, *_), (_, met, priority, deadline) = served.backend.met
    assert first.image is not None
    assert met.image is not None
    assert (met.image.digest, met.image.whole) == (first.image.digest, True)
    assert (priority, deadline) == ("low", None)


def known_to(raw: Raw, *names: str) -> tuple[bool, ...]:
    raw.send(Knows("default", names, ("generation",)), 1)
    known: tuple[bool, ...] = raw.next(Known).message.known
    return known


def test_no_front_can_give_other_pixels_the_name_of_an_image(served: Served) -> None:
    """Else one front that was taken over could spoil what all others are told of an image."""
    with closing(Raw(served, HELLO)) as honest, closing(Raw(served, HELLO)) as hostile:
        named = Submit("default", "normal", None, item(name=NAME))
        hostile.send(named, 1, bytes([6]) * SIZE)
        hostile.outcomes(1)
        assert known_to(hostile, NAME) == (True,)
        assert known_to(honest, NAME) == (False,)
        honest.send(Submit("default", "normal", None, Match(ImagePixels(NAME), ("a",))), 2)
        assert honest.outcomes(1)[2].kind == "image_unknown"
        honest.send(named, 3, bytes([7]) * SIZE)
        honest.outcomes(1)
        digests = [met[1].image.digest for met in served.backend.met if met[1].image is not None]
        assert digests == [hashlib.sha256(bytes([each]) * SIZE).hexdigest() for each in (6, 7)]


def test_an_image_is_the_same_whatever_fronts_call_it(served: Served) -> None:
    """What one front has had looked at is known of another one's image with the same pixels."""
    with closing(Raw(served, HELLO)) as one, closing(Raw(served, HELLO)) as other:
        one.send(Submit("default", "normal", None, item(name=NAME)), 1, bytes(SIZE))
        other.send(Submit("default", "normal", None, item(name="b" * 64)), 1, bytes(SIZE))
        one.outcomes(1)
        other.outcomes(1)
        assert len(served.backend.seen) == 1


def test_items_of_one_image_share_its_origin_and_no_others_do(holding: Served) -> None:
    """What the engine makes of an image goes to all its items, and to none that only says so."""
    image = item(1, name=NAME).image

    def about(prompt: str, value: int = 1, name: str | None = NAME) -> None:
        pixels = bytes([value]) * SIZE
        own = ImagePixels(name, False, (), image.origin)
        raw.send(Submit("default", "normal", None, Match(own, (prompt,))), next(ids), pixels)

    ids = itertools.count(1)
    with ExitStack() as stack:
        raw = stack.enter_context(closing(Raw(holding, HELLO)))
        about("a")
        about("b")
        about("other pixels", 2)
        about("no name", name=None)
        raw = stack.enter_context(closing(Raw(holding, HELLO)))
        about("of another front")
        wait_until(lambda: len(holding.backend.met) == 5, "the items")
        first, second, *others = [met[1].image.origin for met in holding.backend.met]  # type: ignore[union-attr]
        assert first is second
        assert len({first, *others}) == 4


def test_a_front_has_no_more_names_than_are_bounded(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "MOST_NAMES", 2)
    called = [digit * 64 for digit in "123"]
    with closing(Raw(served, HELLO)) as raw:
        for value, name in enumerate(called[:2]):
            raw.send(
                Submit("default", "normal", None, item(name=name)), value + 1, bytes([value]) * SIZE
            )
        raw.outcomes(2)
        assert known_to(raw, called[0]) == (True,)  # used now: the other one is the oldest
        raw.send(Submit("default", "normal", None, item(name=called[2])), 3, bytes([3]) * SIZE)
        raw.outcomes(1)
        assert known_to(raw, *called) == (True, False, True)


def test_an_image_is_forgotten_by_the_name_that_its_front_has_given_it(served: Served) -> None:
    other, unknown = "b" * 64, "c" * 64
    with closing(Raw(served, HELLO)) as raw:
        for id, name in ((1, NAME), (2, other)):
            raw.send(Submit("default", "normal", None, item(name=name)), id, bytes([id]) * SIZE)
        raw.outcomes(2)
        assert known_to(raw, NAME, other) == (True, True)
        raw.send(Forget((NAME, unknown)))
        assert known_to(raw, NAME, other) == (False, True)
    assert served.backend.seen == {hashlib.sha256(bytes([2]) * SIZE).hexdigest()}


def test_no_front_can_have_an_image_forgotten_that_it_has_not_sent(served: Served) -> None:
    with closing(Raw(served, HELLO)) as honest, closing(Raw(served, HELLO)) as hostile:
        honest.send(Submit("default", "normal", None, item(name=NAME)), 1, bytes([7]) * SIZE)
        honest.outcomes(1)
        hostile.send(Forget((NAME, hashlib.sha256(bytes([7]) * SIZE).hexdigest())))
        assert known_to(hostile, NAME) == (False,)  # it has been read
        assert known_to(honest, NAME) == (True,)


def test_what_a_client_has_forgotten_is_bounded_by_message_alone(served: Served) -> None:
    names = [f"{number:064x}" for number in range(MOST_DIGESTS + 1)]
    image = ImagePixels(names[-1], False, item().image.pixels)
    with closing(EngineClient(served.path, timeout_s=10)) as client:
        client.submit("default", Match(image, ("a",)), "normal").result(10)
        assert client.knows("default", names[-1:], ["generation"]) == (True,)
        client.forget(names)
        assert client.knows("default", names[-1:], ["generation"]) == (False,)


GARBAGE: dict[str, tuple[bytes, str]] = {
    "zeros": (bytes(64), "no messages of blipq"),
    "http": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "no messages of blipq"),
    "no hello": (WHOLE, "Hello must come first"),
    "hello twice": (HELLO * 2, "Hello must come first, and once"),
    "an engine's message": (HELLO + encoded(Beat(1, 0.0, 0, 0)), "not for this side"),
    "another version": (HELLO[:2] + b"\x09" + HELLO[3:], "protocol version 9"),
    "an endless body": (HELLO + struct.pack("<2sBBQII", b"bq", 1, 2, 1, 2**32 - 1, 0), "at most"),
    "endless pixels": (HELLO + encoded(ITEM, 1, 2**32 - 1), "4,294,967,295 bytes of pixels"),
    "a byte too few": (HELLO + encoded(ITEM, 1, SIZE - 1), "bytes of pixels"),
    "pixels for a cancel": (HELLO + encoded(Cancel(), 1, 5), "with 5 bytes of pixels"),
    "neither pixels nor digest": (HELLO + encoded(ITEM, 1), "without pixels"),
    "an unknown model": (
        HELLO + encoded(Submit("nobody", "normal", None, item()), 1, SIZE),
        "no model 'nobody'",
    ),
    "a question about an unknown model": (
        HELLO + encoded(Knows("nobody", (NAME,), ("patches",)), 1),
        "no model 'nobody'",
    ),
    "more images to forget than one message names": (
        HELLO + encoded(Forget((NAME,) * (MOST_DIGESTS + 1))),
        "length <= 256",
    ),
    "NaN for a deadline": (
        HELLO + encoded(msgspec.structs.replace(ITEM, seconds=float("nan")), 1, SIZE),
        "Expected `float`",
    ),
    "deep nesting": (
        HELLO + struct.pack("<2sBBQII", b"bq", 1, 2, 1, 50_000, 0) + b"\x91" * 50_000,
        "Submit",
    ),
    "a giant count": (
        HELLO + struct.pack("<2sBBQII", b"bq", 1, 2, 1, 5, 0) + b"\xdd\xff\xff\xff\xff",
        "Submit",
    ),
}


@pytest.mark.parametrize(("data", "why"), GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_costs_its_sender_the_connection_and_nobody_else(
    served: Served, beside: Callable[[], None], data: bytes, why: str
) -> None:
    with closing(Raw(served, data)) as raw:
        assert why in raw.goodbye()
    beside()


def test_random_bytes_cost_their_senders_the_connection(
    served: Served, beside: Callable[[], None]
) -> None:
    dice = random.Random(1)
    for number in range(60):
        good = [b"", HELLO, HELLO + WHOLE, HELLO + WHOLE[: dice.randrange(len(WHOLE))]]
        with closing(Raw(served)) as raw, suppress(OSError):
            raw.socket.sendall(dice.choice(good) + dice.randbytes(dice.randrange(9_000)))
        if number % 10 == 0:
            beside()
    wait_until(lambda: served.server.fronts == 1, "the end of the other fronts")


def test_one_flipped_byte_costs_at_most_the_connection(
    served: Served, beside: Callable[[], None]
) -> None:
    dice = random.Random(2)
    for _ in range(150):
        data = bytearray(HELLO + WHOLE[:-SIZE])
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        with closing(Raw(served)) as raw, suppress(OSError):
            raw.socket.sendall(data)
    beside()


def test_an_id_in_use_is_refused(holding: Served) -> None:
    with closing(Raw(holding, HELLO, WHOLE, WHOLE)) as raw:
        assert "the id 1 is in use" in raw.goodbye()
    wait_until(lambda: holding.backend.cancelled == [0], "the end of its item")


def test_a_front_beyond_its_credits_is_cut_and_its_items_are_cancelled(holding: Served) -> None:
    with closing(Raw(holding, HELLO)) as raw:
        assert raw.next(Welcome).message.credits == 128
        with suppress(OSError):
            for id in range(129):
                raw.send(ITEM, id, bytes(SIZE))
        assert "more than 128 items" in raw.goodbye()
    wait_until(lambda: len(holding.backend.cancelled) == 128, "the end of its items")
    assert len(holding.backend.met) == 128


def test_a_cancelled_item_is_answered_and_gives_its_credit_back() -> None:
    with serving(hold=True, credits=1) as served, closing(Raw(served, HELLO)) as raw:
        for id in range(1, 4):
            raw.send(ITEM, id, bytes(SIZE))
            raw.send(Cancel(), id)
            assert raw.outcomes(1)[id].kind == "cancelled"
        raw.send(Cancel(), 3)  # late: it is nothing
        raw.send(Cancel(), 77)
        raw.send(ITEM, 4, bytes(SIZE))
        wait_until(lambda: len(served.backend.open) == 1, "the next item")


def test_the_end_of_a_front_cancels_its_items_and_no_others(holding: Served) -> None:
    with closing(Raw(holding, HELLO, WHOLE)) as raw:
        wait_until(lambda: len(holding.backend.open) == 1, "an item")
        other = Raw(holding, HELLO, WHOLE)
        wait_until(lambda: len(holding.backend.open) == 2, "another item")
        other.close()
        wait_until(lambda: holding.backend.cancelled == [1], "its end")
        holding.run(lambda: holding.backend.answer(0))
        assert list(raw.outcomes(1)) == [1]


def test_all_memory_for_pixels_comes_back() -> None:
    rows = HeapRows()
    left = rows._left
    with serving(hold=True, rows=rows) as served, ExitStack() as stack:
        ways: list[list[bytes]] = [
            [HELLO, WHOLE],
            [HELLO, WHOLE, WHOLE],
            [HELLO, WHOLE[:-1]],
            [HELLO, WHOLE, b"x" * 50],
            [HELLO, WHOLE, encoded(Cancel(), 1)],
        ]
        for data in ways:
            stack.enter_context(closing(Raw(served, *data)))
        wait_until(lambda: len(served.backend.met) == 4, "the items")
        stack.close()
        wait_until(lambda: served.server.fronts == 0, "the end of the fronts")
        wait_until(lambda: rows._left == left, "all memory back")


def test_a_front_waits_while_there_is_no_memory_and_others_are_served() -> None:
    rows = HeapRows(most_bytes=2 * SIZE)
    with serving(hold=True, rows=rows) as served, closing(Raw(served, HELLO)) as raw:
        items = b"".join(encoded(ITEM, id, SIZE) + bytes(SIZE) for id in range(1, 6))
        sender = threading.Thread(target=raw.socket.sendall, args=[items])
        sender.start()  # it waits, too
        wait_until(lambda: len(served.backend.open) == 2, "two items")
        with closing(Raw(served, HELLO)) as other:
            assert known_to(other, NAME) == (False,)
        assert len(served.backend.met) == 2

        def answer_one() -> None:
            if served.backend.open:
                served.backend.answer(min(served.backend.open))

        for count in range(3, 6):
            served.run(answer_one)
            wait_until(lambda count=count: len(served.backend.met) == count, "the next item")  # type: ignore[misc]
        served.run(lambda: setattr(served.backend, "hold", False))
        for _ in range(2):
            served.run(answer_one)
        assert sorted(raw.outcomes(5)) == [1, 2, 3, 4, 5]
        sender.join()


def test_a_starved_front_that_ends_is_noticed() -> None:
    with serving(hold=True, rows=HeapRows(most_bytes=0)) as served:
        raw = Raw(served, HELLO, WHOLE[:5_000])
        wait_until(
            lambda: any(each.reader.starved for each in served.server._fronts.values()), "a front"
        )
        raw.close()
        wait_until(lambda: served.server.fronts == 0, "its end")


def test_a_front_that_stops_within_a_message_is_cut(
    served: Served, beside: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "WITHIN_MESSAGE_S", 0.5)
    halves = [b"", HELLO[:7], HELLO + WHOLE[:10], HELLO + WHOLE[:-1]]
    with ExitStack() as stack:
        raws = [stack.enter_context(closing(Raw(served, half))) for half in halves]
        idle = stack.enter_context(closing(Raw(served, HELLO)))
        for raw in raws:
            assert "no whole message within 0.5 s" in raw.goodbye()
        idle.send(ITEM, 1, bytes(SIZE))
        assert list(idle.outcomes(1)) == [1]  # nothing to say is no fault
    beside()


def test_a_front_that_trickles_is_cut_too(
    served: Served, beside: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "WITHIN_MESSAGE_S", 0.5)
    with closing(Raw(served, HELLO)) as raw:
        with suppress(BrokenPipeError, ConnectionResetError):
            for byte in WHOLE[:20_000]:
                raw.socket.sendall(bytes([byte]))
                time.sleep(0.01)
        assert "no whole message" in raw.goodbye()
    beside()


def test_an_engine_that_did_not_poll_blames_no_front_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "WITHIN_MESSAGE_S", 1.0)
    with serving() as served, closing(Raw(served, HELLO, WHOLE[:-1])) as raw:
        wait_until(lambda: served.server.fronts == 1, "the front")
        served.run(lambda: time.sleep(2))
        time.sleep(2)
        raw.socket.sendall(WHOLE[-1:])
        assert list(raw.outcomes(1)) == [1]


def test_ten_thousand_connections_end_nothing(served: Served, beside: Callable[[], None]) -> None:
    descriptors = psutil.Process().num_fds()
    kept: list[socket.socket] = []
    for number in range(10_000):
        raw = connected(served)
        if number % 50 == 0 and len(kept) < 150:
            kept.append(raw)  # more than are served
        else:
            raw.close()
        if number % 1_000 == 0:
            beside()
    assert served.server.fronts <= 64
    beside()
    for raw in kept:
        raw.close()
    wait_until(lambda: served.server.fronts == 1, "the end of all others")
    assert psutil.Process().num_fds() <= descriptors + 2


def test_the_front_beyond_the_last_place_is_told_so(served: Served) -> None:
    with ExitStack() as stack:
        for _ in range(64):
            raw = stack.enter_context(closing(Raw(served, HELLO)))
            raw.next(Welcome)
        with closing(Raw(served)) as late:
            assert "64 fronts are connected" in late.goodbye()
        raw.send(ITEM, 1, bytes(SIZE))
        assert list(raw.outcomes(1)) == [1]


def test_a_crowd_at_the_door_holds_nobody_up(served: Served, beside: Callable[[], None]) -> None:
    """All places are taken: those who are refused come again and again."""
    stop = threading.Event()

    def knock() -> None:
        while not stop.is_set():
            with suppress(OSError):
                connected(served).close()

    with ExitStack() as stack:
        for _ in range(63):
            stack.enter_context(closing(Raw(served, HELLO))).next(Welcome)
        crowd = [threading.Thread(target=knock) for _ in range(4)]
        for each in crowd:
            each.start()
        for _ in range(50):
            beside()
        stop.set()
        for each in crowd:
            each.join()


def test_an_engine_without_descriptors_serves_those_that_are_there(
    served: Served, beside: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.socket.accept

    def accept(self: socket.socket) -> Any:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(socket.socket, "accept", accept)
    with closing(Raw(served, HELLO)) as raw:
        beside()
        monkeypatch.setattr(socket.socket, "accept", real)
        raw.next(Welcome)


def test_a_front_that_reads_nothing_is_cut_before_it_costs_much_memory(
    served: Served, beside: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks and never reads: what waits for it is bounded, and others are served meanwhile."""
    monkeypatch.setattr(front, "MOST_UNREAD", 2**20)
    question = encoded(Knows("default", (NAME,) * 256, ("patches",)), 1)
    before = psutil.Process().memory_info().rss
    with closing(Raw(served, HELLO)) as raw, suppress(BrokenPipeError, ConnectionResetError):
        for number in itertools.count():
            raw.socket.sendall(question)
            if number % 1_000 == 0:
                beside()
    wait_until(lambda: served.server.fronts == 1, "its end")
    assert psutil.Process().memory_info().rss - before < 16 * 2**20


def test_a_front_that_reads_late_gets_all_its_answers(holding: Served) -> None:
    """Its socket is full: what does not go out at once is kept, and goes when it reads again."""
    features = Answer(Embedded({"a": Array((2**16,), bytes(2**18))}), 1.0, 0.0, 1)
    with closing(Raw(holding, HELLO)) as raw:
        for id in range(1, 41):
            raw.send(ITEM, id, bytes(SIZE))
        wait_until(lambda: len(holding.backend.open) == 40, "forty items")

        def answer() -> None:
            for _, done in holding.backend.open.values():
                done(features)
            holding.backend.open.clear()

        holding.run(answer)
        wait_until(lambda: any(f.has_unread for f in holding.server._fronts.values()), "a rest")
        time.sleep(0.6)  # some beats are due meanwhile: none may stand between two halves
        assert sorted(raw.outcomes(40)) == list(range(1, 41))
        raw.next(Beat)


def test_a_front_that_never_reads_again_is_cut(
    served: Served, beside: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "UNREAD_S", 0.5)
    question = encoded(Knows("default", (NAME,) * 256, ("patches",)), 1)
    with closing(Raw(served, HELLO)) as raw:
        with suppress(BrokenPipeError, ConnectionResetError):  # cut before it has sent all
            for _ in range(3_000):
                raw.socket.sendall(question)
        wait_until(lambda: served.server.fronts == 1, "its end")
    beside()


def test_a_backend_that_raises_fails_the_item_alone(served: Served) -> None:
    def submit(*_: object) -> object:
        raise RuntimeError("a bug")

    with closing(Raw(served, HELLO)) as raw:
        raw.next(Welcome)
        served.backend.submit = submit  # type: ignore[method-assign,assignment]
        raw.send(ITEM, 1, bytes(SIZE))
        failure = raw.outcomes(1)[1]
        assert (failure.kind, failure.message) == ("internal", "a bug")
        del served.backend.submit
        raw.send(ITEM, 2, bytes(SIZE))
        assert raw.outcomes(1)[2].value.scores == (0, 0)


def test_a_backend_that_raises_at_a_question_costs_that_front_alone(
    served: Served, beside: Callable[[], None]
) -> None:
    def knows(*_: object) -> object:
        raise RuntimeError("a bug")

    served.backend.knows = knows  # type: ignore[method-assign,assignment]
    with closing(Raw(served, HELLO)) as raw:
        raw.send(Knows("default", (NAME,), ("patches",)), 1)
        assert "a bug" in raw.goodbye()
    beside()


def test_an_item_answered_twice_is_answered_once(holding: Served) -> None:
    with closing(Raw(holding, HELLO, WHOLE)) as raw:
        wait_until(lambda: len(holding.backend.open) == 1, "an item")
        [(_, done)] = holding.backend.open.values()

        def answer_twice() -> None:
            done(answered(1.0))
            done(answered(2.0))

        holding.run(answer_twice)
        assert list(raw.outcomes(1)) == [1]
        raw.send(ITEM, 1, bytes(SIZE))
        wait_until(lambda: len(holding.backend.open) == 2, "the same id again")


def test_answers_from_another_thread_are_sent_at_once(holding: Served) -> None:
    with closing(Raw(holding, HELLO, WHOLE)) as raw:
        wait_until(lambda: len(holding.backend.open) == 1, "an item")
        thread = threading.Thread(target=holding.backend.answer, args=[0])
        thread.start()
        assert list(raw.outcomes(1)) == [1]
        thread.join()


def test_beats_tell_the_step_and_the_load(holding: Served) -> None:
    with closing(Raw(holding, HELLO, WHOLE)) as raw:
        wait_until(lambda: len(holding.backend.open) == 1, "an item")
        first = raw.next(Beat).message
        second = raw.next(Beat).message
        assert second.step > first.step
        assert second.running == 1
        assert second.progress_s < 5


def test_one_front_is_not_served_before_all_others(holding: Served) -> None:
    """A front that always has something gets its few messages a turn, and no more."""
    with closing(Raw(holding, HELLO)) as greedy, closing(Raw(holding, HELLO)) as modest:
        modest.next(Welcome)
        flood = encoded(Cancel(), 5) * 20_000
        thread = threading.Thread(target=greedy.socket.sendall, args=[flood])
        thread.start()
        for id in range(1, 20):
            modest.send(ITEM, id, bytes(SIZE))
        wait_until(lambda: len(holding.backend.open) == 19, "the modest front's items")
        thread.join()


def test_poll_waits_no_longer_than_it_is_told_and_no_longer_than_to_a_wake() -> None:
    with serving() as served:
        asked: list[float] = []

        def wake_soon() -> None:
            timer = threading.Timer(0.05, served.server.wake)
            timer.start()
            started = time.monotonic()
            served.server.poll(0.24)
            asked.append(time.monotonic() - started)
            timer.join()

        served.run(wake_soon)
        wait_until(lambda: asked, "the poll")
        assert 0.02 < asked[0] < 0.2


def test_a_goodbye_says_that_the_engine_ends() -> None:
    with serving() as served:
        raw = Raw(served, HELLO)
        raw.next(Welcome)
    assert raw.goodbye() == "the engine ends"
    raw.close()
    served.server.wake()  # late: it is nothing


def test_a_process_of_another_user_is_refused(served: Served) -> None:
    """First by the files' modes, and by its credentials where these would let it in."""
    assert _as_nobody(served) == "PermissionError"
    served.path.parent.chmod(0o755)
    served.path.chmod(0o666)
    assert "user 65534 is not served" in _as_nobody(served)
    wait_until(lambda: served.server.fronts == 0, "nobody")


def test_a_process_of_a_user_who_is_allowed_is_served() -> None:
    with serving(uids={65_534}) as served:
        served.path.parent.chmod(0o755)
        served.path.chmod(0o666)
        assert "Welcome" in _as_nobody(served)
        with closing(Raw(served)) as raw:
            assert f"user {os.geteuid()} is not served" in raw.goodbye()


AS_NOBODY = """
import os, socket, sys
from blipq_worker.inference.protocol import FROM_ENGINES, Hello, Vocabulary, encoded
from blipq_worker.inference.stream import Reader, no_pixels
import time
os.setgroups([]); os.setgid(65534); os.setuid(65534)
raw = socket.socket(socket.AF_UNIX)
raw.settimeout(10)
try:
    raw.connect(sys.argv[1])
    raw.sendall(encoded(Hello(1, "nobody")))
except OSError as error:
    if not isinstance(error, BrokenPipeError):
        sys.exit(print(type(error).__name__))
reader = Reader(raw, Vocabulary(FROM_ENGINES), no_pixels)
while (frame := reader.receive()) is None:
    time.sleep(0.01)
print(frame.message)
"""


def _as_nobody(served: Served) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, served.path], capture_output=True, text=True, timeout=30
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()
