"""Real processes that start in a tenth of a second: forked from one that has imported everything.

A worker imports for five seconds of a core, and most tests start two or three.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

from blipq.local.supervisor import Service

_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload(["blipq_worker.app", "celery.worker.worker", "blipq.cli"])


class Forked(Service):
    """A Service that runs ``main`` (a module's function) instead of a command."""

    def __init__(
        self, name: str, main: Callable[[], int], *, env: Mapping[str, str], log: Path
    ) -> None:
        super().__init__(name, [], env=env, log=log)
        self._main, self._own_env = main, dict(env)

    def start(self) -> None:
        arguments = (self._main, self._own_env, self.log)
        process = _fork.Process(target=_run, args=arguments, name=self.name, daemon=True)
        process.start()
        self._process = _Child(process)


class _Child:
    """A forked process with the methods of Popen that a Service calls."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        self.pid = process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it died just now: as Popen has it
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> None:
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)


def _run(main: Callable[[], int], environment: Mapping[str, str], log: Path) -> None:
    os.setsid()
    os.environ.update(environment)
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.exit(main())
