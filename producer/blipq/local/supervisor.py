"""Keeps child processes running: starts them, restarts what dies, stops them all."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from blipq.backoff import Backoff

#: A process that lived this long starts again at once; one that dies sooner waits longer each time.
STEADY_S = 30.0
RESTARTS = Backoff(1.0, 30.0)

_PR_SET_PDEATHSIG = 1


def _die_with(parent: int) -> None:
    """Linux: the kernel ends the child when its parent is killed, so nothing is left behind.

    The parent is the thread that started it: start services from one that lives as long as they.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was killed before this process had set its signal
        os._exit(1)


class Service:
    """One child process. Its output goes to ``log``, or to this process' own if None.

    env: what it has in its environment; this process' own is there as well if it ``inherits``.
    restarts: pauses before it is started again, by default RESTARTS.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        inherits: bool = True,
        log: Path | None = None,
        restarts: Backoff | None = None,
    ) -> None:
        self.name = name
        self.command = list(command)
        self.log = log
        self.env = {**(os.environ if inherits else {}), **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._pauses = restarts
        self._restarts = 0
        self._seen_dead: float | None = None

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def exit_code(self) -> int | None:
        """How it ended, or None while it runs or has not been started."""
        return self._process.poll() if self._process else None

    def start(self) -> None:
        """Starts the process in a session of its own: Ctrl-C reaches only the supervisor."""
        output = self.log.open("ab") if self.log else None
        try:
            self._process = subprocess.Popen(
                self.command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
                preexec_fn=partial(_die_with, os.getpid()) if sys.platform == "linux" else None,
            )
        finally:
            if output:
                output.close()
        self._started = time.monotonic()
        self._seen_dead = None

    def signal(self, number: int) -> None:
        """Sends a signal if the process runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def stop(self, timeout: float = 10.0) -> None:
        """Asks the process to end, and kills it after ``timeout`` seconds."""
        self.signal(signal.SIGTERM)
        self.wait(timeout)

    def wait(self, timeout: float) -> None:
        """Waits for the process to end, and kills it after ``timeout`` seconds."""
        if self._process is None:
            return
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def revive(self) -> bool:
        """Starts a process that died, after its pause; True if it was started."""
        if self.exit_code is None:
            return False
        now = time.monotonic()
        if self._seen_dead is None:
            self._seen_dead = now
            if now - self._started >= STEADY_S:
                self._restarts = 0
        if now - self._started < (self._pauses or RESTARTS).pause_s(self._restarts):
            return False
        self._restarts += 1
        self.start()
        return True

    def last_words(self, lines: int = 12) -> str:
        """The last lines of the log; empty if there is none."""
        if self.log is None or not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def reap(own: Collection[int | None]) -> None:
    """Waits for children that have ended, but for our ``own``, whose codes others want to know."""
    with suppress(ChildProcessError):  # there is no child
        while (ended := _next_ended()) is not None and ended not in own:
            os.waitpid(ended, os.WNOHANG)


def _next_ended() -> int | None:
    """A child that has ended, and stays to be waited for."""
    found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return None if found is None else found.si_pid


def supervise(
    services: Sequence[Service],
    stop: threading.Event,
    *,
    report: Callable[[str], None] = print,
    give_up_on: Sequence[int] = (),
    one_by_one: bool = False,
    reaps: bool = False,
) -> int:
    """Starts again what ends until ``stop`` is set; returns 0.

    A code in ``give_up_on`` (of a model that cannot be loaded) is returned at once: starting
    again would not help. one_by_one: such a service is left alone, and the code is returned when
    no other is left. reaps: this is the first process of a container, and starts nothing beside
    the services: it waits for what others leave to it, too.
    """
    reported: set[str] = set()
    left = list(services)
    while not stop.wait(0.2):
        if reaps:
            reap({service.pid for service in services})
        for service in list(left):
            code = service.exit_code
            if code is None:
                reported.discard(service.name)
            elif code in give_up_on:
                left.remove(service)
                if not one_by_one or not left:
                    return code
                report(f"{service.name} ended with {code}, and is not started again")
            elif service.revive():
                report(f"{service.name} was started again (pid {service.pid})")
            elif service.name not in reported:
                reported.add(service.name)
                report(f"{service.name} ended with {code}")
    return 0
