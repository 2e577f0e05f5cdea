"""Takes jobs from Celery's queues and runs them: what each process that does so has in common."""

import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from celery.exceptions import Reject, WorkerShutdown
from celery.signals import setup_logging, worker_ready

from blipq.contract import Kind
from blipq.ledger.keys import queues_of, task_name
from blipq.transport.broker import make_app
from blipq_worker.assembly import Base, Jobs
from blipq_worker.jobs.errors import HandBack, JobFailedTask
from blipq_worker.jobs.runner import Runner
from blipq_worker.messages.consumer import Door, InHand, consumer_class
from blipq_worker.messages.controls import refuse_controls
from blipq_worker.messages.kombu_patches import harden
from blipq_worker.messages.revokes import follow_revokes
from blipq_worker.process.health import BrokerLoop
from blipq_worker.process.malloc import give_large_blocks_back
from blipq_worker.process.metrics import WorkerMetrics
from blipq_worker.process.signals import ECHO_S, EndSignals
from blipq_worker.startup import START

if TYPE_CHECKING:
    from celery import Celery

log = logging.getLogger(__name__)


class Taker:
    """Celery's worker around a process's jobs, from start to drain. One in a process.

    hostname: this process to Celery. problem: why Redis takes no writes, or None. in_hand: follows
    each message until it is settled. shut_down: the exit code where remote control ends it.
    """

    def __init__(
        self,
        base: Base,
        jobs: Jobs,
        metrics: WorkerMetrics,
        broker_loop: BrokerLoop,
        *,
        hostname: str,
        problem: Callable[[], str | None],
        in_hand: InHand | None = None,
        shut_down: int = 0,
    ) -> None:
        self._base = base
        self._jobs = jobs
        self._broker_loop = broker_loop
        self._hostname = hostname
        self._signals = EndSignals(ECHO_S)
        self._shut_down = shut_down
        self._is_shut_down = False
        self._door = Door(
            record=jobs.foreign.receive,
            refuse=jobs.foreign.refuse,
            dropped=lambda: metrics.refused("dropped"),
            problem=problem,
            ended=self._on_ended,
            in_hand=in_hand,
        )
        harden(dropped=self._door.dropped)
        refuse_controls()
        foreign = jobs.foreign
        follow_revokes(foreign.cancel, foreign.cancel_sent, foreign.expire_sent)
        give_large_blocks_back()
        self._app = make_app(base.settings)
        register_tasks(self._app, jobs.runner)

    def run(self) -> int:
        """Takes jobs until it is to stop and those that run have ended; the exit code."""
        options = self._base.options
        gc.freeze()  # what is loaded stays: collections need not walk it, with everything stopped
        # A receiver, so that Celery leaves logging as the process set it up.
        setup_logging.connect(_keep_logging)
        # Its "succeeded" means that a task returned, also where its job is retried or handed back:
        # what came of each job is reported by the runner.
        logging.getLogger("celery.app.trace").setLevel(logging.WARNING)
        worker_ready.connect(self._on_ready)
        worker = self._app.Worker(
            consumer_cls=consumer_class(self._door, self._broker_loop),
            hostname=self._hostname,
            pool="threads",
            concurrency=options.threads,
            queues=[queue for model in self._base.models for queue in queues_of(model)],
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=not options.send_events,
            task_events=options.send_events,
            quiet=True,
        )
        worker.start()
        return self._shut_down if self._is_shut_down else int(worker.exitcode or 0)

    def end(self, code: int, within_s: float) -> None:
        """Takes no more jobs, and ends with ``code`` once those that run have ended.

        After ``within_s`` they are handed back, and the process ends. On any thread.
        """
        if not self._base.gate.closed:
            self._drain(code, within_s)
            _stop_celery(code)

    def refuse(self) -> None:
        """Takes no more jobs, and gives back what it has; the process goes on. On any thread."""
        self._base.gate.close()
        threading.Thread(target=self._keep_nothing, name="blipq-refuse", daemon=True).start()

    def _keep_nothing(self) -> None:
        _stop_celery(0)
        while True:  # a job may be claimed while the gate closes
            self._jobs.outcomes.hand_back_all()
            time.sleep(1.0)

    def _on_ready(self, sender: Any, **_: Any) -> None:
        """Takes the signals over from Celery, whose own handling waits without an end."""
        log.info("%s is ready: %s", self._hostname, ", ".join(self._base.models))
        START.ready()
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        is_first = not self._signals.has_come
        if self._signals.is_echo() or (is_first and self._is_shut_down):
            return  # what ends the rest of the worker reports what remote control demanded
        if self._base.gate.closed:
            # Not from this frame: it may have interrupted a lock that handing back needs.
            code = self._shut_down if self._is_shut_down else 0
            threading.Thread(target=self._leave_now, args=[code], daemon=True).start()
            return
        self._drain(0, self._base.options.drain_timeout_s)
        _stop_celery(0)

    def _on_ended(self, error: BaseException) -> None:
        """Celery takes no more messages: by an error, or by a signal or remote control."""
        if self._base.gate.closed:
            return
        self._is_shut_down = isinstance(error, WorkerShutdown)
        otherwise = 1 if isinstance(error, Exception) else 0
        code = self._shut_down if self._is_shut_down else otherwise
        self._drain(code, self._base.options.drain_timeout_s)

    def _drain(self, code: int, within_s: float) -> None:
        self._base.gate.close()  # first: the next signal must find it closed
        log.info("draining: at most %g s", within_s)
        deadline = threading.Timer(within_s, self._leave_now, [code])
        deadline.daemon = True
        deadline.start()

    def _leave_now(self, code: int = 0) -> None:
        """Hands everything back and ends the process: its threads cannot be stopped."""
        count = self._jobs.outcomes.hand_back_all()
        if count:
            log.warning("handed back: %d", count)
        logging.shutdown()
        os._exit(code)


def _stop_celery(code: int) -> None:
    """Has Celery stop as soon as its loop turns: the worker's exit code is ``code``."""
    from celery.worker import state

    state.should_stop = code  # type: ignore[assignment]


def _keep_logging(**_: Any) -> None:
    """Logging is set up already."""


def register_tasks(app: "Celery", runner: Runner) -> None:
    """One Celery task per kind, so that monitors show what runs."""
    for kind in Kind:
        _register(app, runner, kind)


def _register(app: "Celery", runner: Runner, kind: Kind) -> None:
    def run(id: str, request: Any = None, options: Any = None) -> None:
        try:
            runner.run(kind, id, request, options)
        except HandBack as error:
            raise Reject("this process takes no more jobs", requeue=True) from error

    # A failed job is no surprise to the worker: Celery logs one line, not a traceback.
    app.task(name=task_name(kind), throws=(JobFailedTask,))(run)
