"""The engine's process, as its worker's main process sees it."""

import logging
import signal
from collections.abc import Mapping

from blipq.local.supervisor import Service
from blipq.local.worker import EXIT_MODEL
from blipq_worker.inference import EngineClient, EngineGone, ModelInfo
from blipq_worker.inference.protocol import Beat
from blipq_worker.supervision.folder import RunFolder
from blipq_worker.supervision.silence import Silence

log = logging.getLogger(__name__)


class EngineProcess:
    """Starts the engine again when it dies, and ends one that is frozen.

    All is called on the main thread, but for what only reads: ``problem``, ``stalled_s``,
    ``models``, ``state``.
    """

    def __init__(self, service: Service, folder: RunFolder, *, watchdog_s: float) -> None:
        self._service = service
        self._trial = folder.trial
        self._watchdog_s = watchdog_s
        self._beats, self._idle = Silence(), Silence()
        self._beat: Beat | None = None
        self._count = 0  # of beats
        self._models: dict[str, ModelInfo] = {}
        #: Whether the present process, or the one that ended last, has served.
        self._served = False
        self._goodbye = ""
        self.stalled_s = 0.0
        #: Why its models are not to be served any more.
        self.refusal: str | None = None
        # A beat that is late by the watchdog's time is for ``_is_frozen`` to see.
        self._client = EngineClient(
            folder.socket, name="main", silence_s=2 * watchdog_s, on_lost=self._lost
        )

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self._service.pid

    @property
    def serving(self) -> bool:
        """Whether its models can take requests now."""
        return self._client.connected and self.refusal is None

    @property
    def models(self) -> Mapping[str, ModelInfo]:
        """What it serves, or has served; empty until it first does."""
        return self._models

    @property
    def state(self) -> str:
        """In a word, for people: serving, starting or refused."""
        if self.refusal is not None:
            return "refused"
        return "serving" if self.serving else "starting"

    @property
    def problem(self) -> str | None:
        """Why no job can be computed now."""
        if self.refusal is not None or self.serving:
            return self.refusal
        return "it is starting again" if self._models else "it is starting"

    def start(self) -> None:
        """Starts the process; on the thread that lives as long as it shall."""
        self._served = False
        self._service.start()

    def look(self) -> int | None:
        """Looks after it; the code that the worker is to end with, if it cannot serve at all."""
        code = self._service.exit_code
        if code is None:
            self._watch()
        elif code == EXIT_MODEL:
            return self._refused()
        elif self.refusal is None and self._revived(code):
            log.warning("engine: ended with %d, and was started again (pid %s)", code, self.pid)
            self._served = False
        return None

    def _revived(self, code: int) -> bool:
        if code == -signal.SIGKILL:  # by whoever needed the memory, as a rule: not by its graphs
            self._trial.unlink(missing_ok=True)
        return self._service.revive()

    def stop(self, timeout: float) -> None:
        """Ends the process: it may take this time (seconds) until it is killed."""
        self._client.close()  # the engine stays while somebody is connected
        self._service.stop(timeout)

    def _refused(self) -> int | None:
        if not self._served:
            log.info("engine: it cannot serve its models: ending")  # it has logged why itself
            return EXIT_MODEL
        if self.refusal is None:
            self.refusal = self._goodbye or "the engine refuses to serve its models: see its log"
            log.critical("%s: taking no more jobs", self.refusal)
        return None

    def _watch(self) -> None:
        if not self._served:
            self._note_models()
            self._beats = Silence()
        elif self._is_frozen():
            log.critical("engine: no progress for %g s: killed", self._watchdog_s)
            self._service.signal(signal.SIGKILL)

    def _note_models(self) -> None:
        """It takes the time that loading takes; only then is it watched."""
        if not self._client.connected:
            return
        try:
            self._models = dict(self._client.models())
        except EngineGone:  # at this moment
            return
        self._served = True
        log.info("engine: serves %s (pid %s)", ", ".join(self._models), self.pid)

    def _is_frozen(self) -> bool:
        beat = self._client.beat
        if beat is not self._beat:  # two may be equal
            self._beat, self._count = beat, self._count + 1
        quiet_s = 0.0 if beat is None else beat.quiet_s
        silent_s = self._beats.after(self._count) - quiet_s
        is_busy = beat is not None and beat.running > 0
        # It may count its progress from before it had anything to do.
        busy_s = self._idle.after(None) if is_busy else self._idle.after(object())
        self.stalled_s = min(beat.progress_s, busy_s) if beat is not None else 0.0
        return max(silent_s, self.stalled_s) > self._watchdog_s

    def _lost(self, reason: str) -> None:
        """On the thread that reads."""
        self._goodbye = reason
        log.info("engine: the connection ended: %s", reason)
