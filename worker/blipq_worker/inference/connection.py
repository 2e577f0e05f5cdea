"""One connection of a front to its engine, from the welcome to its end."""

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from pathlib import Path
from typing import Any

from blipq_worker.inference.interface import EngineBusy, EngineGone, settle
from blipq_worker.inference.protocol import (
    FROM_ENGINES,
    Answers,
    Beat,
    Cancel,
    Goodbye,
    Hello,
    Known,
    ProtocolError,
    Started,
    Vocabulary,
    Welcome,
    encoded,
)
from blipq_worker.inference.requests import Answer, Outcome
from blipq_worker.inference.stream import Ended, Frame, Reader, no_pixels

#: Enough for an image and its request, where the system allows it: then sending does not wait.
_SEND_BUFFER = 2**20
_VOCABULARY = Vocabulary(FROM_ENGINES)


class _Silent(EngineGone):
    """The engine is frozen."""


class Connection:
    """A connection on which the engine has welcomed it. Raises EngineGone where it does not.

    Any thread sends; one thread calls ``serve``, which reads until the connection ends. silence_s:
    so long without a message means that the engine is frozen.
    """

    def __init__(self, path: Path, name: str, silence_s: float) -> None:
        self._silence_s = silence_s
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._reader = Reader(self._socket, _VOCABULARY, no_pixels)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._sending = threading.Lock()  # a message goes out whole before another one begins
        # Under this condition: what has no answer yet, the credits left, and whether it is over.
        self._changed = threading.Condition()
        self._open: dict[int, Future[Any]] = {}
        self._started: set[int] = set()
        self._gone: EngineGone | None = None
        self.beat: Beat | None = None
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            self._socket.setblocking(False)  # where too many want to connect it fails at once
            self._socket.connect(os.fspath(path))
            self._socket.setblocking(True)
            self._send([encoded(Hello(os.getpid(), name))])
            self.welcome = self._welcome()
        except (OSError, Ended, ProtocolError) as error:
            self._socket.close()
            raise EngineGone(f"no engine at {path}: {error}") from error
        except EngineGone:
            self._socket.close()
            raise
        self._credits = self.welcome.credits

    def _welcome(self) -> Welcome:
        message = self._next().message
        if not isinstance(message, Welcome):
            raise ProtocolError(f"{type(message).__name__} where Welcome must come")
        return message

    # -- any thread --

    def submit(
        self, id: int, make: Callable[[], bytes], pixels: Sequence[memoryview], timeout_s: float
    ) -> "Future[Answer]":
        """Sends an item as soon as there is a credit: ``make`` encodes it then.

        Raises EngineBusy, EngineGone, and what ``make`` raises.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._credits > 0 or self._gone, timeout_s):
                limit = self.welcome.credits
                raise EngineBusy(f"{limit} items had no answer for {timeout_s:g} s")
            self._credits -= 1
        try:
            data = make()
        except BaseException:
            with self._changed:
                self._credits += 1
                self._changed.notify()
            raise
        future: Future[Answer] = Future()
        with self._changed:  # before it is sent: its answer may come at once
            self._enter(id, future)
        self._send([data, *pixels])
        return future

    def request(self, id: int, data: bytes) -> "Future[Any]":
        """Sends a request that takes no credit. Raises EngineGone."""
        future: Future[Any] = Future()
        with self._changed:
            self._enter(id, future)
        self._send([data])
        return future

    def notify(self, data: bytes) -> None:
        """Sends a message that has no reply. Raises EngineGone."""
        self._send([data])

    def cancel(self, id: int) -> None:
        """Notifies the engine that nobody waits for an item, unless it was answered."""
        with self._changed:
            if id not in self._open:
                return
        with suppress(EngineGone):
            self._send([encoded(Cancel(), id)])

    def end(self, reason: str, *, died: bool = False) -> None:
        """Ends the connection: all that has no answer fails with EngineGone. Once.

        died: whatever runs may have been to blame.
        """
        with self._changed:
            if self._gone is not None:
                return
            self._gone = EngineGone(reason)
            futures, self._open = self._open, {}
            started = self._started if died else set()
            self._changed.notify_all()
        with suppress(OSError):
            # Before the close: it also ends a send that waits on another thread.
            self._socket.shutdown(socket.SHUT_RDWR)
        for id, future in futures.items():
            settle(future, EngineGone(reason, started=id in started))

    def _enter(self, id: int, future: "Future[Any]") -> None:
        if self._gone is not None:
            raise EngineGone(str(self._gone))
        self._open[id] = future

    def _send(self, parts: Sequence["bytes | memoryview"]) -> None:
        """Sends the parts one behind the other, without a copy. Raises EngineGone."""
        try:
            with self._sending:
                sent = self._socket.sendmsg(parts, [], socket.MSG_NOSIGNAL)
                for rest in _after(parts, sent):  # a signal came
                    self._socket.sendall(rest)
        except (BrokenPipeError, ConnectionResetError) as error:
            # The thread that reads finds the end, too, and why it came.
            raise EngineGone(f"sending to the engine failed: {error}") from error
        except BaseException as error:
            # After half a message the engine would take the next one for its rest.
            self.end(f"sending to the engine failed: {error!r}")
            if isinstance(error, OSError):
                raise EngineGone(str(self._gone)) from error
            raise

    # -- the thread that reads --

    def serve(self) -> str:
        """Settles what the engine answers until the connection ends; the reason."""
        try:
            while True:
                frame = self._next()
                self._receive(frame)
        except (OSError, Ended, _Silent) as error:
            self.end(str(error), died=True)
        except (ProtocolError, EngineGone) as error:
            self.end(str(error))
        except BaseException as error:  # a fault of ours: nobody may wait for what is never read
            self.end(f"reading from the engine failed: {error!r}")
            raise
        with self._changed:
            return str(self._gone)

    def close(self) -> None:
        """Frees the descriptor. Nobody may send any more."""
        with self._sending:
            self._socket.close()

    def _next(self) -> Frame:
        """The next message. Raises EngineGone where the engine closes, or is silent too long."""
        quiet_s = 0.0 if self.beat is None else self.beat.quiet_s
        due = time.monotonic() + max(self._silence_s, quiet_s)
        while (frame := self._reader.receive()) is None:
            left = due - time.monotonic()
            if left <= 0 or not self._poll.poll(left * 1000):
                raise _Silent(f"the engine has sent nothing for {self._silence_s:g} s")
        if isinstance(frame.message, Goodbye):
            raise EngineGone(f"the engine closed the connection: {frame.message.reason}")
        return frame

    def _receive(self, frame: Frame) -> None:
        match frame.message:
            case Answers(outcomes=outcomes):
                for future, outcome in self._answered(outcomes):
                    settle(future, outcome)
            case Started(ids=ids):
                with self._changed:
                    self._started.update(id for id in ids if id in self._open)
            case Known(known=known):
                with self._changed, suppress(KeyError, InvalidStateError):
                    self._open.pop(frame.id).set_result(known)
            case Beat() as beat:
                self.beat = beat

    def _answered(
        self, outcomes: Sequence[tuple[int, Outcome]]
    ) -> list[tuple["Future[Any]", Outcome]]:
        """Whose answers these are. Each gives a credit back, also where nobody waits any more."""
        with self._changed:
            self._credits += len(outcomes)
            self._changed.notify(len(outcomes))
            self._started.difference_update(id for id, _ in outcomes)
            return [(self._open.pop(id), outcome) for id, outcome in outcomes if id in self._open]


def _after(parts: Sequence["bytes | memoryview"], sent: int) -> list[memoryview]:
    """What is left of the parts, of bytes, behind those that were sent."""
    rest = []
    for part in parts:
        if sent < len(part):
            rest.append(memoryview(part)[sent:])
        sent = max(0, sent - len(part))
    return rest
