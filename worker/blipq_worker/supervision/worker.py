"""Runs a worker with fronts from start to drain: the process that starts all the others."""

import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Sequence

from blipq.ledger.connection import connect
from blipq.ledger.worker import GRACE_S, WorkerLedger
from blipq.local.worker import EXIT_MODEL
from blipq.settings import Settings
from blipq.transport.broker import Broker
from blipq_worker.messages.strays import Strays
from blipq_worker.process.health import HealthServer
from blipq_worker.process.metrics import WorkerMetrics, count_in
from blipq_worker.process.periodic import Periodic
from blipq_worker.process.reconciler import Reconciler
from blipq_worker.process.signals import ECHO_S, EndSignals
from blipq_worker.settings import WorkerSettings
from blipq_worker.startup import START
from blipq_worker.supervision.engine import EngineProcess
from blipq_worker.supervision.environment import COMMAND, engine_service, front_service
from blipq_worker.supervision.folder import RunFolder
from blipq_worker.supervision.front import ENDS_WORKER, FrontProcess
from blipq_worker.supervision.metrics import Page
from blipq_worker.supervision.registry import Registry
from blipq_worker.supervision.settling import Settler
from blipq_worker.supervision.state import Whole

log = logging.getLogger(__name__)

#: Between two looks at the processes: a dead one is noticed, and its jobs go back, within it.
TURN_S = 0.1
#: A front may outlast its own deadline, and the engine the last front, by so much.
LEAVE_S = 10.0
#: So long without a look at the processes means that this one is stuck.
LONGEST_TURN_S = 60.0
#: A second signal is passed on to fronts that must not take it for an echo: they have had the first
#: one later.
PASSED_ON_S = ECHO_S + 1.0


class SplitWorker:
    """The main process of a worker with fronts. command: what starts its other processes.

    Raises PortTaken, and InvalidRequest where there is no folder for them.
    """

    def __init__(
        self,
        settings: Settings,
        options: WorkerSettings,
        fronts: int,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._options = options
        self._folder = RunFolder()
        count_in(self._folder.metrics, "main")
        self._ledger = WorkerLedger(connect(settings), settings)
        self._broker = Broker(settings)
        self._settler = Settler(self._ledger, self._broker, WorkerMetrics())
        self._engine = EngineProcess(
            engine_service(self._folder, options.models, command),
            self._folder,
            watchdog_s=options.watchdog_s,
        )
        self._fronts = [
            FrontProcess(
                front_service(self._folder, number, fronts, self.name, command),
                number,
                self._folder,
                self._settler,
                watchdog_s=options.watchdog_s,
            )
            for number in range(1, fronts + 1)
        ]
        self._whole = Whole(self._engine, self._fronts)
        grace_s = min(GRACE_S, options.lease_s)
        self._registry = Registry(self._ledger, self.name, options, self._whole, grace_s=grace_s)
        self._periodic: list[Periodic] = [
            self._registry,
            Reconciler(
                self._ledger, self._broker, self.name, lease_s=options.lease_s, grace_s=grace_s
            ),
            Strays(self._ledger, settings, self.name),
        ]
        self._signals = 0
        self._echoes = EndSignals(PASSED_ON_S)
        self._looked = time.monotonic()
        self._ready = False
        self._health = self._health_server() if options.health_port is not None else None

    def run(self) -> int:
        """Works until a signal or remote control stops it; the exit code. On the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        if self._health is not None:
            self._health.start()
        for each in self._periodic:
            each.start()
        try:
            self._engine.start()
            for front in self._fronts:
                front.start()
            return self._serve()
        finally:
            self._stop()

    # -- turns --

    def _serve(self) -> int:
        """Until a signal, or until nothing can be served; the exit code."""
        while self._signals == 0:
            code = self._engine.look()
            if code is not None:
                return code
            self._registry.look()
            self._refuse_if_told()
            for front in self._fronts:
                front.look(revive=not self._whole.draining)
            ends = [each.exit_code for each in self._fronts if each.exit_code in ENDS_WORKER]
            if ends:
                return EXIT_MODEL if EXIT_MODEL in ends else 0
            self._tell_when_ready()
            self._wait()
        log.info("draining: at most %g s", self._options.drain_timeout_s)
        return 0

    def _wait(self) -> None:
        self._looked = time.monotonic()
        time.sleep(TURN_S)

    def _refuse_if_told(self) -> None:
        """Takes no more jobs where the engine refuses to serve, and goes on saying why: what ends
        the worker is not its own to decide.
        """
        if self._engine.refusal is not None and not self._whole.draining:
            self._whole.draining = True
            self._tell_fronts()

    def _tell_when_ready(self) -> None:
        """Once, when the registry has the worker: who reads the line finds it there."""
        if self._ready or self._registry.problem is not None or not self._whole.state().taking:
            return
        self._ready = True
        models = ", ".join(self._engine.models)
        log.info("%s is ready: %s, %d fronts", self.name, models, len(self._fronts))
        log.info("ready after %s", START)

    # -- the end --

    def _on_signal(self, number: int, frame: object) -> None:
        self._signals += not self._echoes.is_echo()

    def _tell_fronts(self) -> None:
        for front in self._fronts:
            front.signal(signal.SIGTERM)

    def _stop(self) -> None:
        """Drains the fronts, then ends the engine, then all else. A second signal is passed on."""
        self._whole.draining = True
        self._drain()
        for front in self._fronts:
            front.kill()
        self._engine.stop(LEAVE_S)
        self._settler.close(LEAVE_S)
        for each in self._periodic:
            each.stop()
        if self._health is not None:
            self._health.stop()
        self._broker.close()
        self._folder.remove()

    def _drain(self) -> None:
        """Fronts end by themselves, each within its own deadline."""
        deadline = time.monotonic() + self._options.drain_timeout_s + LEAVE_S
        sent = 0
        while time.monotonic() < deadline:
            if sent < max(1, self._signals):
                sent += 1
                self._tell_fronts()
            for front in self._fronts:
                front.look(revive=False)
            if all(front.exit_code is not None for front in self._fronts):
                return
            self._wait()
        log.error("fronts are killed that have not ended in time")

    # -- health --

    def _health_server(self) -> HealthServer:
        whole, engine = self._whole, self._engine

        def unattended() -> str | None:
            age = time.monotonic() - self._looked
            return f"not looked after for {age:.0f} s" if age > LONGEST_TURN_S else None

        return HealthServer(
            self._options.health_port or 0,
            live={
                "model": lambda: engine.refusal,
                "fronts": whole.stuck_front,
                "processes": unattended,
            },
            ready={
                "redis": lambda: self._registry.problem or whole.problem("redis"),
                "s3": lambda: whole.problem("s3"),
                "model": lambda: engine.problem,
                "broker loop": lambda: whole.problem("broker loop"),
                "fronts": whole.fronts_problem,
                "draining": lambda: "yes" if whole.state().draining else None,
            },
            metrics=Page(whole, self._folder.metrics, canary=self._options.canary),
            host=self._options.health_host,
        )
