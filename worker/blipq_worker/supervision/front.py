"""A front's process, as its worker's main process sees it."""

import logging
import signal

from blipq.local.supervisor import Service
from blipq.local.worker import EXIT_MODEL
from blipq_worker.fronts.holdings import read_holdings
from blipq_worker.fronts.seat import EXIT_SHUT_DOWN
from blipq_worker.fronts.status import FrontStatus, read_status
from blipq_worker.supervision.folder import RunFolder
from blipq_worker.supervision.settling import Settler
from blipq_worker.supervision.silence import Silence

log = logging.getLogger(__name__)

#: A front that has not begun to write its status is given so long: it imports.
_START_S = 120.0
#: With these codes of a front its worker ends: a setting is wrong, or remote control demands it.
#: They stay to be seen.
ENDS_WORKER = (EXIT_MODEL, EXIT_SHUT_DOWN)


class FrontProcess:
    """Starts a front again when it dies, ends one that is frozen, and settles what it held.

    All is called on the main thread, but for ``status``.
    """

    def __init__(
        self,
        service: Service,
        number: int,
        folder: RunFolder,
        settler: Settler,
        *,
        watchdog_s: float,
    ) -> None:
        self._service = service
        self.number = number
        self._status_path, self._held_path = folder.status(number), folder.held(number)
        self._settler = settler
        self._watchdog_s = watchdog_s
        self._beats = Silence()
        self._settled = True  # whether nothing of a dead process is left to settle

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self._service.pid

    @property
    def exit_code(self) -> int | None:
        """How it ended, or None while it runs."""
        return self._service.exit_code

    def status(self) -> FrontStatus | None:
        """The last report of the living process; None before the first."""
        status, pid = read_status(self._status_path), self.pid
        return status if status is not None and status.pid == pid else None

    def start(self) -> None:
        """Starts the process; on the thread that lives as long as it shall."""
        self._clean()
        self._service.start()
        self._begin()

    def look(self, *, revive: bool = True) -> None:
        """Looks after it. revive: whether it is to run again where it ended."""
        code = self.exit_code
        if code is None:
            self._watch()
            return
        self._settle(code)
        if revive and code not in ENDS_WORKER and self._service.revive():
            log.warning("front %d: was started again (pid %s)", self.number, self.pid)
            self._begin()

    def signal(self, number: int) -> None:
        """Sends a signal if the process runs."""
        self._service.signal(number)

    def kill(self) -> None:
        """Ends the process at once, and settles what it held: if it runs, nobody is to blame."""
        code = self.exit_code
        self._service.signal(signal.SIGKILL)
        self._service.wait(10)
        if self.exit_code is not None:
            self._settle(0 if code is None else code)

    def _begin(self) -> None:
        self._settled = False
        self._beats = Silence()

    def _settle(self, code: int) -> None:
        """Once for each death; before the next process writes its own holdings."""
        if self._settled:
            return
        self._settled = True
        log.log(
            logging.WARNING if code else logging.INFO, "front %d: ended with %d", self.number, code
        )
        self._settler.settle(read_holdings(self._held_path), code)
        self._clean()

    def _clean(self) -> None:
        self._held_path.unlink(missing_ok=True)
        self._status_path.unlink(missing_ok=True)

    def _watch(self) -> None:
        problem = self._problem()
        if problem is not None:
            log.critical("front %d: %s: killed", self.number, problem)
            self._service.signal(signal.SIGKILL)

    def _problem(self) -> str | None:
        """What only the end of the process would mend."""
        status = self.status()
        silent_s = self._beats.after(None if status is None else status.beat)
        longest_s = max(self._watchdog_s, _START_S) if status is None else self._watchdog_s
        if silent_s > longest_s:
            return f"no beat for {silent_s:.0f} s"
        checks = () if status is None else status.live.items()
        return next((f"{check}: {problem}" for check, problem in checks), None)
