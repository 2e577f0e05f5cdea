"""Serves fronts on the thread that steps the model: while the device works, and when it is idle.

There is no other thread and no lock. ``poll`` never waits longer than its argument, takes few
messages of each front a turn, and raises nothing that a front could cause: a front that breaks the
protocol, does not read, or stops within a message loses its connection and its items, and no other
front notices. What cannot be sent at once waits in a bounded buffer.
"""

import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from blipq_worker.inference.address import Door, Full, farewell
from blipq_worker.inference.front import Front, Work
from blipq_worker.inference.intake import Intake
from blipq_worker.inference.interface import Backend, Handle, HeapRows, Rows
from blipq_worker.inference.protocol import (
    Beat,
    Cancel,
    Forget,
    Hello,
    Knows,
    Message,
    ProtocolError,
    Started,
    Submit,
    Welcome,
    encoded,
    encoded_answers,
)
from blipq_worker.inference.requests import Outcome
from blipq_worker.inference.stream import Ended, Frame
from blipq_worker.inference.turns import Turns

log = logging.getLogger(__name__)

CREDITS, MESSAGES_A_TURN, CONNECTIONS_A_TURN = 128, 8, 16
BEAT_S = 0.25
#: Longest within a message, from connect to Hello, and without reading anything of what waits.
WITHIN_MESSAGE_S, UNREAD_S = 5.0, 30.0
#: Longest that a pass waits until fronts have room to hear of its beginning, and how long one that
#: was waited for in vain is not waited for again: it takes a hundredth of the time at most.
HEAR_S, DEAF_S = 0.05, 5.0
#: A turn may take so long even where ``poll`` must not wait: enough for some messages.
_TURN_S = 0.001


class _Clock:
    """Runs only while fronts are served: an engine that was busy or frozen blames nobody for it."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.now = 0.0

    def tick(self) -> None:
        """Goes on by the time since the last tick, two beats at most."""
        now = time.monotonic()
        self.now += min(now - self._last, 2 * BEAT_S)
        self._last = now


class EngineServer:
    """Serves a backend at ``path``. All but ``wake`` is of the one thread that polls.

    credits: the most unanswered items of a front. uids: users whose processes are served; by
    default its own. Raises AddressError where it cannot listen.
    """

    def __init__(
        self,
        path: Path,
        backend: Backend,
        *,
        rows: Rows | None = None,
        credits: int = CREDITS,
        uids: Collection[int] | None = None,
    ) -> None:
        self._backend, self._credits = backend, credits
        self._rows = HeapRows() if rows is None else rows
        self._intake = Intake(backend, self._rows, credits, self._finish)
        self._fronts: dict[int, Front] = {}
        self._turns = Turns()
        self._done: deque[tuple[Work, Outcome]] = deque()  # appended to by any thread
        self._clock = _Clock()
        self._step, self._beat_due = 0, 0.0
        self._thread = threading.get_ident()
        self._door = Door(path, uids)
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._turns.watch(self._door.socket)
        self._turns.watch(self._bell)

    @property
    def fronts(self) -> int:
        """How many fronts are connected."""
        return len(self._fronts)

    def poll(self, timeout_s: float = 0.0) -> None:
        """Sends what is done, then serves fronts for a turn.

        Waits until a front has something, but at most ``timeout_s`` rounded down to whole
        milliseconds, which is all that epoll counts; often less. Beats are sent from here alone.
        No backend may call it from within a call of this server's.
        """
        self._thread = threading.get_ident()
        end = time.monotonic() + timeout_s
        self._settle()
        events = self._turns.ready(min(timeout_s, BEAT_S))
        self._clock.tick()
        self._serve(events, max(end, time.monotonic() + _TURN_S))
        self._settle()
        self._look_after()

    def progress(self) -> None:
        """Counts a turn of the thread; beats show it to the fronts."""
        self._step += 1

    def be_quiet(self, seconds: float) -> None:
        """Tells the fronts that ``poll`` may not be called for so long, and that this is no hang.

        Not from within a call of this server's.
        """
        self._send_beat(seconds)

    def started(self, handles: Iterable[Handle]) -> None:
        """Tells the fronts that a pass begins which these items newly take part in.

        Before the pass, so that they know what may have caused its end: what a socket has taken
        outlives this process. Behind large answers there may be no room for it: then the pass waits
        for a moment. Not from within a call of this server's.
        """
        ids: dict[Front, list[int]] = {}
        for work in self._intake.works_of(handles):
            ids.setdefault(work.front, []).append(work.id)
        for front, begun in ids.items():
            self._send(front, Started(tuple(begun)))
        # One that has died since the last poll was cut just now: its socket is closed.
        self._let_read([front for front in ids if self._is_served(front) and front.has_unread])

    def wake(self) -> None:
        """Ends the wait of ``poll``. Thread-safe."""
        with suppress(OSError, ValueError):  # it is closed
            os.eventfd_write(self._bell, 1)

    def close(self, reason: str = "the engine ends") -> None:
        """Says goodbye to every front and stops listening. Items without an answer are given up."""
        for front in list(self._fronts.values()):
            self._cut(front, reason)
        self._settle()
        self._turns.close()
        self._door.close()
        bell, self._bell = self._bell, -1
        os.close(bell)

    # -- turns --

    def _serve(self, events: dict[int, int], until: float) -> None:
        for fd, event in events.items():
            front = self._fronts.get(fd)
            if front is None:
                self._serve_others(fd)
            elif time.monotonic() >= until:
                self._turns.skip(fd)
            else:
                self._turn(front, event, until)

    def _serve_others(self, fd: int) -> None:
        if fd == self._door.socket.fileno():
            self._admit()
        elif fd == self._bell:
            os.eventfd_read(self._bell)

    def _turn(self, front: Front, event: int, until: float) -> None:
        """Serves one front. Whatever it does costs it its connection and nothing more."""
        try:
            if event & select.EPOLLOUT:
                front.flush(self._clock.now)
            if front.reader.starved and event & (select.EPOLLHUP | select.EPOLLERR):
                raise Ended("the other side has closed the connection")
            if event & ~select.EPOLLOUT:
                self._receive(front, until)
        except (ProtocolError, Ended, OSError) as error:
            self._cut(front, str(error))
        except Exception as error:  # of the backend: no front may end the engine
            log.exception("engine: serving %s failed", front)
            self._cut(front, f"internal: {error}")
        self._watch(front)

    def _receive(self, front: Front, until: float) -> None:
        """Takes messages of a front; remembers where there may be more."""
        fd = front.socket.fileno()
        for _ in range(MESSAGES_A_TURN):
            frame = front.reader.receive()
            if frame is None:
                if front.reader.starved:
                    self._turns.starve(fd)
                return
            front.begun = self._clock.now
            self._handle(front, frame)
            if not self._is_served(front):
                return
            if time.monotonic() >= until:
                break
        self._turns.again(fd)

    def _handle(self, front: Front, frame: Frame) -> None:
        message = frame.message
        if front.greeted == isinstance(message, Hello):
            raise ProtocolError("Hello must come first, and once")
        match message:
            case Hello():
                front.name, front.greeted = message.name, True
                self._send(front, Welcome(self._intake.models, self._credits, os.getpid()))
            case Submit():
                self._intake.submit(front, frame, message)
            case Cancel():
                if frame.id in front.works:
                    self._intake.cancel(front.works[frame.id])
            case Knows():
                self._send(front, self._intake.known(front, message), frame.id)
            case Forget():
                self._intake.forget(front, message)

    # -- answers --

    def _finish(self, work: Work, outcome: Outcome) -> None:
        """An item is done. Called by the backend, on any thread."""
        self._done.append((work, outcome))
        if threading.get_ident() != self._thread:
            self.wake()

    def _settle(self) -> None:
        """Sends what is done: together for each front. Rooms of pixels are free again."""
        answers: dict[Front, list[tuple[int, Outcome]]] = {}
        for _ in range(len(self._done)):
            work, outcome = self._done.popleft()
            if work.over:
                log.error("engine: item %d of %s was answered twice", work.id, work.front)
                continue
            work.over = True
            self._intake.give_back(work)
            if work.front.works.pop(work.id, None) is not None:
                answers.setdefault(work.front, []).append((work.id, outcome))
        for front, outcomes in answers.items():
            for data in encoded_answers(outcomes):
                self._send_data(front, data)

    def _send(self, front: Front, message: Message, id: int = 0) -> None:
        self._send_data(front, encoded(message, id))

    def _send_data(self, front: Front, data: bytes) -> None:
        """Sends to a front that is still there; one that cannot be sent to is cut."""
        if not self._is_served(front):
            return
        try:
            front.send(data, self._clock.now)
        except (ProtocolError, OSError) as error:
            self._cut(front, str(error))
        else:
            self._watch(front)

    def _let_read(self, fronts: Iterable[Front]) -> None:
        """Waits until the socket has all that these fronts are to read, but not for long."""
        self._clock.tick()
        waited = [each for each in fronts if self._clock.now >= each.deaf_until]
        until = time.monotonic() + HEAR_S
        while waited and (left := until - time.monotonic()) > 0:
            room = select.poll()
            for front in waited:
                room.register(front.socket, select.POLLOUT)
            room.poll(left * 1000)
            for front in waited:
                self._flush(front)
            waited = [each for each in waited if self._is_served(each) and each.has_unread]
        for front in waited:
            front.deaf_until = self._clock.now + DEAF_S

    def _flush(self, front: Front) -> None:
        """Sends what goes of what waits for a front; one that cannot be sent to is cut."""
        try:
            front.flush(self._clock.now)
        except OSError as error:
            self._cut(front, str(error))
        else:
            self._watch(front)

    # -- connections --

    def _admit(self) -> None:
        try:
            for connection, pid in self._door.admitted(len(self._fronts), CONNECTIONS_A_TURN):
                front = Front(connection, pid, self._clock.now, self._intake.lend)
                self._fronts[connection.fileno()] = front
                front.watched = front.events
                self._turns.watch(connection, front.watched)
        except Full as error:
            log.warning("engine: no connection can be taken: %s", error)
            self._turns.change(self._door.socket, 0)  # until the next beat

    def _is_served(self, front: Front) -> bool:
        return self._fronts.get(front.socket.fileno()) is front

    def _watch(self, front: Front) -> None:
        """Has epoll report what the front waits for now."""
        if self._is_served(front) and front.events != front.watched:
            front.watched = front.events
            self._turns.change(front.socket, front.watched)

    def _cut(self, front: Front, reason: str) -> None:
        """Ends a connection and gives up its items. Nothing happens where that was done before."""
        if not self._is_served(front):
            return
        del self._fronts[front.socket.fileno()]
        self._turns.forget(front.socket)
        write = log.info if front.greeted else log.debug
        write("engine: lets %s go with %d items: %s", front, len(front.works), reason)
        farewell(front.socket, None if front.has_unread else reason)
        if front.reader.lent is not None:
            self._rows.take_back(front.reader.lent)
        works, front.works = front.works, {}
        for work in works.values():
            self._intake.cancel(work)

    # -- what time brings --

    def _look_after(self) -> None:
        """Beats, and an end for fronts that keep it waiting; every so often."""
        now = time.monotonic()
        if now < self._beat_due:
            return
        self._beat_due = now + BEAT_S
        self._turns.change(self._door.socket, select.EPOLLIN)
        for front in list(self._fronts.values()):
            if (why := self._overdue(front)) is not None:
                self._cut(front, why)
        self._send_beat(0.0)

    def _send_beat(self, quiet_s: float) -> None:
        load = self._backend.load()
        beat = encoded(Beat(self._step, load.stalled_s, load.waiting, load.running, quiet_s))
        for front in list(self._fronts.values()):
            if front.greeted and not front.has_unread:  # one that does not read needs no beat
                self._send_data(front, beat)

    def _overdue(self, front: Front) -> str | None:
        """Why a front's time is up, if it is."""
        now = self._clock.now
        if front.has_unread and now - front.stuck > UNREAD_S:
            return f"nothing read for {UNREAD_S:g} s"
        waits = self._turns.waits(front.socket.fileno())
        if waits or (front.greeted and front.reader.between):
            front.begun = now
        if now - front.begun > WITHIN_MESSAGE_S:
            return f"no whole message within {WITHIN_MESSAGE_S:g} s"
        return None
