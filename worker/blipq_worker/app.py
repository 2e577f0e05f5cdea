"""Wires a worker process together and runs it from start to drain: the only file that knows all."""

import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

import redis
from celery.exceptions import Reject
from celery.signals import setup_logging, worker_ready

from blipq.contract import Kind
from blipq.ledger.connection import connect
from blipq.ledger.keys import queues_of, task_name
from blipq.ledger.worker import WorkerLedger
from blipq.settings import Settings
from blipq.transport.broker import Broker, make_app
from blipq_worker.assembly import (
    Base,
    decoding_budget,
    engine_of,
    heartbeat_of,
    jobs_of,
    reconciler_of,
)
from blipq_worker.blip2.loading.compiling import since_compiling
from blipq_worker.engine.faults import Trust
from blipq_worker.inference.local import LocalInference
from blipq_worker.jobs.errors import HandBack, JobFailedTask
from blipq_worker.jobs.runner import Runner
from blipq_worker.messages.consumer import Door, consumer_class
from blipq_worker.messages.controls import refuse_controls
from blipq_worker.messages.kombu_patches import harden
from blipq_worker.messages.revokes import follow_revokes
from blipq_worker.messages.strays import Strays
from blipq_worker.process.health import BrokerLoop, HealthServer
from blipq_worker.process.heartbeat import EXIT_HUNG
from blipq_worker.process.malloc import give_large_blocks_back
from blipq_worker.process.metrics import WorkerMetrics
from blipq_worker.settings import WorkerSettings
from blipq_worker.startup import START

if TYPE_CHECKING:
    from celery import Celery

    from blipq_worker.blip2 import Blip2

log = logging.getLogger(__name__)

#: Longest that jobs are handed back from a process that cannot go on.
LEAVE_S = 10.0


class Worker:
    """One worker process: the parts, how they start, and how they stop."""

    def __init__(
        self,
        settings: Settings,
        options: WorkerSettings,
        models: Mapping[str, "Blip2"],
        check: Callable[[str], None] | None = None,
    ) -> None:
        name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        ledger = WorkerLedger(connect(settings), settings)
        base = Base(name, settings, options, list(models), ledger, Broker(settings))
        self._base = base
        self._options = options
        self._gate = base.gate
        #: Why the model is not to be run any more.
        self._problem: str | None = None
        judge = Trust(lost=self._lose_device, check=check, refuse=self._refuse_jobs)
        self._engine = engine_of(options, models, judge)
        self._decoding = decoding_budget(options)
        metrics = self._metrics()
        self._broker_loop = BrokerLoop()
        self._jobs = jobs_of(base, LocalInference(self._engine), self._decoding, metrics)
        self._heartbeat = heartbeat_of(
            base, self._stalled_for, turning=lambda: self._broker_loop.turning
        )
        self._reconciler = reconciler_of(base)
        self._strays = Strays(ledger, settings, name)
        self._health = (
            self._health_server(ledger, metrics) if options.health_port is not None else None
        )
        self._dropped = lambda: metrics.refused("dropped")
        harden(dropped=self._dropped)
        refuse_controls()
        foreign = self._jobs.foreign
        follow_revokes(foreign.cancel, foreign.cancel_sent, foreign.expire_sent)
        give_large_blocks_back()
        self._app = make_app(settings)
        register_tasks(self._app, self._jobs.runner)

    def run(self) -> int:
        """Works until it is told to stop; the exit code."""
        self._engine.batcher.start()
        self._jobs.writer.start()
        self._heartbeat.start()
        self._reconciler.start()
        self._strays.start()
        if self._health is not None:
            self._health.start()
        # A receiver, so that Celery leaves logging as the process set it up.
        setup_logging.connect(_keep_logging)
        # Its "succeeded" means that a task returned, also where its job is retried or handed back:
        # what came of each job is told by the runner.
        logging.getLogger("celery.app.trace").setLevel(logging.WARNING)
        worker_ready.connect(self._on_ready)
        door = Door(
            refuse=self._jobs.foreign.refuse,
            dropped=self._dropped,
            problem=lambda: self._heartbeat.problem,
            ended=self._on_ended,
        )
        worker = self._app.Worker(
            consumer_cls=consumer_class(door, self._broker_loop),
            hostname=f"blipq@{self._base.name}",
            pool="threads",
            concurrency=self._options.threads,
            queues=[queue for model in self._base.models for queue in queues_of(model)],
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=not self._options.send_events,
            task_events=self._options.send_events,
            quiet=True,
        )
        worker.start()
        while self._problem is not None:
            time.sleep(1.0)  # until a signal
        self._stop()
        return int(worker.exitcode or 0)

    def _stalled_for(self) -> float:
        """Seconds without progress of the model, unless it compiles, or of a decoder."""
        model = min(self._engine.batcher.stalled_for(), since_compiling())
        return max(model, self._decoding.held_for())

    def _metrics(self) -> WorkerMetrics:
        metrics = WorkerMetrics()
        metrics.gauge("jobs_held", "Jobs held now.", lambda: len(self._base.held.claims()))
        metrics.gauge("slots", "Jobs that it can hold.", lambda: self._options.threads)
        metrics.gauge("draining", "Whether it takes no more jobs.", lambda: self._gate.closed)
        metrics.gauge("stalled_seconds", "Since the model last progressed.", self._stalled_for)
        return metrics

    def _health_server(self, ledger: WorkerLedger, metrics: WorkerMetrics) -> HealthServer:
        def redis_away() -> str | None:
            try:
                ledger.redis.ping()
            except redis.RedisError as error:
                return str(error)
            return self._heartbeat.problem  # a server that answers may refuse writes

        def model_stuck() -> str | None:
            if self._problem is not None:
                return self._problem
            stalled = self._stalled_for()
            return (
                f"no progress for {stalled:.0f} s" if stalled > self._options.watchdog_s else None
            )

        def loop_stuck() -> str | None:
            # While Redis is away the loop may wait for it; ending the process would not help.
            stuck = self._broker_loop.stuck()
            return stuck if stuck and redis_away() is None else None

        return HealthServer(
            self._options.health_port or 0,
            live={"model": model_stuck, "broker loop": loop_stuck},
            ready={
                "redis": redis_away,
                "s3": self._jobs.access.trouble,
                "model": model_stuck,
                "broker loop": self._broker_loop.away,
                "draining": lambda: "yes" if self._gate.closed else None,
            },
            metrics=metrics.page,
        )

    # -- a model or a device that is not to be trusted; on the model's thread --

    def _lose_device(self, error: Exception) -> None:
        """Ends the process: nothing on the device would work in it any more."""
        log.critical("the device is lost: %s: ending", error)
        self._gate.close()
        giving = threading.Thread(target=self._jobs.outcomes.hand_back_lost, daemon=True)
        giving.start()
        giving.join(LEAVE_S)
        logging.shutdown()
        os._exit(EXIT_HUNG)

    def _refuse_jobs(self, problem: str) -> None:
        """Takes no more jobs, and goes on saying why: what ends it is not its to decide."""
        log.critical("%s: taking no more jobs", problem)
        self._problem = problem
        self._gate.close()
        threading.Thread(target=self._keep_nothing, name="blipq-refuse", daemon=True).start()

    def _keep_nothing(self) -> None:
        from celery.worker import state

        state.should_stop = 0  # type: ignore[assignment]
        while True:  # a job may be claimed while the gate closes
            self._jobs.outcomes.hand_back_all()
            time.sleep(1.0)

    # -- the end --

    def _on_ready(self, sender: Any, **_: Any) -> None:
        """Takes the signals over from Celery, whose own handling waits without an end."""
        log.info("%s is ready: %s", self._base.name, ", ".join(self._base.models))
        log.info("ready after %s", START)
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        from celery.worker import state

        if self._gate.closed:
            # Not from this frame: it may have interrupted a lock that handing back needs.
            threading.Thread(target=self._leave_now, daemon=True).start()
            return
        self._drain(0)
        state.should_stop = 0  # type: ignore[assignment]

    def _on_ended(self, error: BaseException) -> None:
        """Celery takes no more messages: by an error, or as a signal or remote control said."""
        if not self._gate.closed:
            self._drain(1 if isinstance(error, Exception) else 0)

    def _drain(self, code: int) -> None:
        """Takes no more jobs, and leaves with ``code`` when those that run have had their time."""
        self._gate.close()  # first: the next signal must find it closed
        log.info("draining: at most %g s", self._options.drain_timeout_s)
        deadline = threading.Timer(self._options.drain_timeout_s, self._leave_now, [code])
        deadline.daemon = True
        deadline.start()

    def _leave_now(self, code: int = 0) -> None:
        """Hands everything back and ends the process: its threads cannot be stopped."""
        count = self._jobs.outcomes.hand_back_all()
        log.warning("handed back: %d", count)
        logging.shutdown()
        os._exit(code)

    def _stop(self) -> None:
        self._strays.stop()
        self._reconciler.stop()
        self._engine.batcher.close(timeout=5)
        self._jobs.writer.close()
        self._heartbeat.stop()
        if self._health is not None:
            self._health.stop()
        self._base.broker.close()


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
            raise Reject(str(error), requeue=True) from error

    # A failed job is no surprise to the worker: Celery logs one line, not a traceback.
    app.task(name=task_name(kind), throws=(JobFailedTask,))(run)
