"""The engine process: loads the models, then runs the items of fronts until SIGTERM.

It alone touches the device. It reads no queue, and a store only for its weights, before it serves:
what it may do then is to answer what connects to its socket. One thread does all of it; signals
are the exception, and only leave notes.
Another one looks whether the main process lives, which ends an engine that hangs.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from blipq.errors import InvalidRequest
from blipq_worker.batching.interface import Idle, Judge
from blipq_worker.blip2.loading.compiling import LONGEST_S, on_compiling
from blipq_worker.catalog.models import ModelError
from blipq_worker.catalog.s3.errors import S3ModelAway
from blipq_worker.catalog.s3.keys import forget_model_keys
from blipq_worker.engine.backend import Engine
from blipq_worker.engine.faults import DeviceLost, Trust
from blipq_worker.inference.address import MOST_FRONTS, AddressError, check_path
from blipq_worker.inference.interface import Handle
from blipq_worker.inference.server import BEAT_S, CREDITS, EngineServer
from blipq_worker.process.heartbeat import EXIT_HUNG
from blipq_worker.process.privacy import HUB_TOKENS
from blipq_worker.serving.device import stay_near
from blipq_worker.serving.loader import checker, load_models
from blipq_worker.settings import WorkerSettings
from blipq_worker.startup import START

if TYPE_CHECKING:
    from blipq_worker.blip2 import Blip2

log = logging.getLogger(__name__)

SOCKET = "engine.sock"
#: Is there while graphs are captured.
_TRIAL = "capturing"
#: A model cannot be served: starting the process again would not help.
EXIT_MODEL = 78
#: After fronts had their time to drain, the engine ends even where one is still connected.
PATIENCE_S = 10.0
#: How often the engine looks whether its main process lives.
_PARENT_S = 1.0


def engine_of(
    options: WorkerSettings,
    models: "Mapping[str, Blip2]",
    judge: Judge,
    *,
    max_waiting: int,
    idle: Idle | None = None,
    on_start: Callable[[Sequence[Handle]], None] = lambda handles: None,
) -> Engine:
    """The engine that the settings come to."""
    return Engine(
        models,
        judge=judge,
        max_batch_size=options.max_batch_size,
        batch_wait_timeout_s=options.batch_wait_timeout_s,
        max_waiting=max_waiting,
        idle=idle,
        on_start=on_start,
    )


def run_engine(folder: Path, options: WorkerSettings) -> int:
    """Serves at a socket in ``folder``; the exit code.

    0 after SIGTERM; EXIT_MODEL where a model cannot be served; EXIT_HUNG where the device is lost;
    1 where it cannot listen, or S3 does not give a model for now. The reason goes to stderr, and to
    the fronts.
    """
    path, note = folder / SOCKET, folder / _TRIAL
    # While models load, which cannot be interrupted otherwise; ``run`` then drains instead.
    signal.signal(signal.SIGTERM, lambda *_: _end_at_once(note))
    _end_after_parent(options.drain_timeout_s + 2 * PATIENCE_S)
    try:
        check_path(path)
        models = load_models(_careful(options, note), _noted(note))
        stay_near(next(iter(models.values())).info.device)
        check = checker(options, models)
        forget_hub_tokens()
        forget_s3()
        for name, model in models.items():
            model.write_readings(folder, name)
        process = EngineProcess(path, options, models, check)
    except (InvalidRequest, ModelError) as error:
        return _ended(EXIT_MODEL, error)
    except DeviceLost as error:
        return _ended(EXIT_HUNG, error)
    except (AddressError, S3ModelAway) as error:  # starting again can help
        return _ended(1, error)
    return process.run()


def _end_at_once(note: Path) -> None:
    """At SIGTERM, as nothing is served yet. No graph has ended it."""
    note.unlink(missing_ok=True)
    os._exit(0)


def _careful(options: WorkerSettings, note: Path) -> WorkerSettings:
    """The settings; without graphs and kernels of our own where these have ended the last try.

    A kernel that reads where nothing is breaks the device's context, and so it would each time.
    """
    if not note.exists():
        return options
    log.warning("engine: the last one ended while it captured graphs: this one does without them")
    return options.model_copy(update={"graphs": False})


@contextmanager
def _noted(note: Path) -> Iterator[None]:
    """Leaves a note while graphs are captured, which stays if they end the process.

    Where it is killed from outside, the worker's main process removes it.
    """
    note.touch()
    yield
    note.unlink()


def _end_after_parent(seconds: float) -> None:
    """Ends the process so long after its parent, if it is still there: a pass may hang, and nobody
    is left to kill it. It would keep the device's memory from the next engine.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_S)
        time.sleep(seconds)
        log.critical("engine: its main process is gone, and it has not ended in time")
        logging.shutdown()
        os._exit(EXIT_HUNG)

    threading.Thread(target=watch, name="blipq-parent", daemon=True).start()


def forget_hub_tokens() -> None:
    """Drops the credentials that weights were read with, and keeps the hub's libraries off."""
    for name in HUB_TOKENS:
        os.environ.pop(name, None)
    os.environ["HF_HUB_OFFLINE"] = "1"


def forget_s3() -> None:
    """Drops what weights in S3 were read with: their keys, or what the fronts read images with."""
    forget_model_keys()
    for name in [each for each in os.environ if each.upper().startswith("AWS_")]:
        del os.environ[name]


class EngineProcess:
    """An engine, and the server that its batcher's thread attends to: a ``batcher.Idle``.

    check: see ``engine.faults.Trust``. Raises AddressError.
    """

    def __init__(
        self,
        path: Path,
        options: WorkerSettings,
        models: "Mapping[str, Blip2]",
        check: Callable[[str], None] | None,
    ) -> None:
        self._options = options
        #: Why nothing more may be run.
        self._problem: str | None = None
        #: When it ends at the latest (monotonic); None before SIGTERM.
        self._ends: float | None = None
        engine = engine_of(
            options,
            models,
            Trust(lost=self._lose_device, check=check, refuse=self._refuse),
            # A front has no more than its credits, so that nothing waits for room on this thread.
            max_waiting=MOST_FRONTS * CREDITS,
            idle=self,
            on_start=self._started,
        )
        self._batcher = engine.batcher
        self._server = EngineServer(path, engine)

    def run(self) -> int:
        """Serves until SIGTERM, or until a model is refused; the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        on_compiling(lambda: self._server.be_quiet(LONGEST_S))
        log.info("engine: ready after %s", START)
        self._batcher.run()
        self._server.poll()  # what was answered last
        self._server.close(self._problem or "the engine ends")
        return 0 if self._problem is None else _ended(EXIT_MODEL, self._problem)

    # -- between two steps, and while there is nothing to do --

    def wait(self, timeout_s: float | None) -> None:
        """Serves fronts until one of them has something to do, but at most so long."""
        self._server.progress()  # when idle, too: no two beats are equal while this thread turns
        self._server.poll(BEAT_S if timeout_s is None else timeout_s)
        if self._ends is not None:
            self._drain(self._ends)

    def wake(self) -> None:
        """Ends a wait."""
        self._server.wake()

    def _started(self, handles: Sequence[Handle]) -> None:
        self._server.started(handles)

    # -- the end --

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ends when the last front has left: these drain by themselves."""
        if self._ends is None:
            self._ends = time.monotonic() + self._options.drain_timeout_s + PATIENCE_S
        self._server.wake()

    def _drain(self, ends: float) -> None:
        if self._server.fronts == 0:
            self._batcher.close()
        elif time.monotonic() >= ends:
            # What runs cannot be stopped, and nobody waits for it.
            log.warning("engine: ends with %d fronts connected", self._server.fronts)
            self._server.close("the engine ends: its time to drain is over")
            logging.shutdown()
            os._exit(0)

    def _lose_device(self, error: Exception) -> None:
        """Ends the process: nothing on the device would work in it any more.

        Without a goodbye: fronts take the items of this pass for suspects.
        """
        log.critical("engine: the device is lost: %s: ending", error)
        self._server.poll()  # what was answered before
        logging.shutdown()
        os._exit(EXIT_HUNG)

    def _refuse(self, problem: str) -> None:
        """A model is not to be run any more: the batcher's thread ends, and records why."""
        log.critical("engine: %s", problem)
        self._problem = problem


def _ended(code: int, reason: object) -> int:
    print(f"blipq engine: {reason}", file=sys.stderr, flush=True)
    return code
