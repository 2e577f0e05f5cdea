"""Wires a worker that is one process together and runs it from start to drain: knows all parts."""

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import redis

from blipq.ledger.connection import connect
from blipq.ledger.worker import WorkerLedger
from blipq.settings import Settings
from blipq.transport.broker import Broker
from blipq_worker.assembly import (
    Base,
    decoding_budget,
    heartbeat_of,
    jobs_of,
    reconciler_of,
)
from blipq_worker.blip2.loading.compiling import since_compiling
from blipq_worker.engine.faults import Trust
from blipq_worker.images.bottleneck import Bottleneck
from blipq_worker.inference.local import LocalInference
from blipq_worker.messages.strays import Strays
from blipq_worker.process.health import BrokerLoop, HealthServer
from blipq_worker.process.heartbeat import EXIT_HUNG
from blipq_worker.process.metrics import CANARY_PASSED, DECODE_BOUND, SERVING, WorkerMetrics
from blipq_worker.serving.engine import engine_of
from blipq_worker.settings import WorkerSettings
from blipq_worker.taking import Taker

if TYPE_CHECKING:
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
        self._infos = {name: model.info for name, model in models.items()}
        self._gate = base.gate
        #: Why the model is not to be run any more.
        self._problem: str | None = None
        judge = Trust(lost=self._lose_device, check=check, refuse=self._refuse_jobs)
        self._engine = engine_of(options, models, judge, max_waiting=2 * options.threads)
        self._decoding = decoding_budget(options)
        slots = max(model.info.slots for model in models.values())
        self._bottleneck = Bottleneck(lambda: self._decoding.waiting, self._engine.load, slots)
        metrics = self._metrics(has_canary=check is not None)
        self._broker_loop = BrokerLoop()
        self._jobs = jobs_of(base, LocalInference(self._engine), self._decoding, metrics)
        self._heartbeat = heartbeat_of(
            base,
            self._stalled_for,
            turning=lambda: self._broker_loop.turning,
            decode_bound=self._is_decode_bound,
            decoding={name: info.way for name, info in self._infos.items()},
        )
        self._reconciler = reconciler_of(base)
        self._strays = Strays(ledger, settings, name)
        self._health = (
            self._health_server(ledger, metrics) if options.health_port is not None else None
        )
        self._taker = Taker(
            base,
            self._jobs,
            metrics,
            self._broker_loop,
            hostname=f"blipq@{name}",
            problem=lambda: self._heartbeat.problem,
        )

    def run(self) -> int:
        """Works until a signal or remote control stops it; the exit code."""
        self._engine.batcher.start()
        self._jobs.writer.start()
        self._heartbeat.start()
        self._reconciler.start()
        self._strays.start()
        self._jobs.forgetting.start()
        if self._health is not None:
            self._health.start()
        code = self._taker.run()
        while self._problem is not None:
            time.sleep(1.0)  # until a signal
        self._stop()
        return code

    def _stalled_for(self) -> float:
        """Seconds without progress of the model, unless it compiles, or of a decoder."""
        model = min(self._engine.batcher.stalled_for(), since_compiling())
        return max(model, self._decoding.held_for())

    def _is_decode_bound(self) -> bool:
        """At each beat."""
        self._bottleneck.look()
        return self._bottleneck.holds

    def _metrics(self, *, has_canary: bool) -> WorkerMetrics:
        metrics = WorkerMetrics()
        metrics.gauge("engine_serving", SERVING, lambda: self._problem is None)
        if has_canary:
            metrics.gauge("canary_passed", CANARY_PASSED, lambda: self._problem is None)
        metrics.gauge("jobs_held", "Jobs held now.", lambda: len(self._base.held.claims()))
        metrics.gauge("slots", "Jobs that it can hold.", lambda: self._options.threads)
        metrics.gauge("draining", "Whether it takes no more jobs.", lambda: self._gate.closed)
        metrics.gauge("decode_bound", DECODE_BOUND, lambda: self._bottleneck.holds)
        metrics.gauge("stalled_seconds", "Since the model last progressed.", self._stalled_for)
        infos = self._infos.items()
        metrics.decoding({name: (info.decoding, info.device) for name, info in infos})
        metrics.loaded({name: info.load_seconds for name, info in infos})
        metrics.gpus(info.gpu for _, info in infos)
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
            metrics=metrics.answer,
            host=self._options.health_host,
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
        self._taker.refuse()

    def _stop(self) -> None:
        self._strays.stop()
        self._jobs.forgetting.stop()
        self._reconciler.stop()
        self._engine.batcher.close(timeout=5)
        self._jobs.writer.close()
        self._heartbeat.stop()
        if self._health is not None:
            self._health.stop()
        self._base.broker.close()
