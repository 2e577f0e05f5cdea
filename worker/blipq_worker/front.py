"""Wires a front together: it takes jobs and decodes their images for an engine elsewhere.

A worker has several beside one engine. What strangers send is read here, so a front may die of it:
it loads no weights and is back within a second. Nothing of it imports torch.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping

import redis

from blipq.ledger.connection import connect
from blipq.ledger.worker import WorkerLedger
from blipq.settings import Settings
from blipq.transport.broker import Broker
from blipq_worker.assembly import Base, decoding_budget, jobs_of
from blipq_worker.claims import Held
from blipq_worker.fronts.holdings import Holdings
from blipq_worker.fronts.seat import EXIT_ENGINE_GONE, EXIT_SHUT_DOWN, Seat
from blipq_worker.fronts.status import FrontStatus, write_status
from blipq_worker.images.bottleneck import Bottleneck
from blipq_worker.inference.client import EngineClient
from blipq_worker.inference.interface import EngineGone
from blipq_worker.inference.requests import ModelInfo
from blipq_worker.process.health import BrokerLoop
from blipq_worker.process.heartbeat import LeaseBeat, beat_s
from blipq_worker.process.metrics import WorkerMetrics, count_in
from blipq_worker.reading import Readers
from blipq_worker.settings import WorkerSettings
from blipq_worker.startup import START
from blipq_worker.taking import Taker

#: Once the engine is gone, jobs that are not given back by then are given back from outside of
#: their threads.
GIVE_BACK_WITHIN_S = 10.0
#: The worker's main process kills an engine that is frozen. If even that does not happen, the front
#: gives it up so much later.
PATIENCE_S = 10.0

_POLL_S = 0.1


def share_of(options: WorkerSettings, models: Mapping[str, ModelInfo], of: int) -> WorkerSettings:
    """The options of one of ``of`` fronts that keep the slots of an engine full together."""
    slots = [info.slots for info in models.values() if not info.device.startswith("cpu")]
    return options.filling(max(slots, default=0)).shared_by(of)


class Front:
    """One front, from its wait for the engine to its end."""

    def __init__(self, settings: Settings, options: WorkerSettings, seat: Seat) -> None:
        self._settings, self._options, self._seat = settings, options, seat
        self._serving: _Serving | None = None
        self._lost: str | None = None
        self._engine = EngineClient(
            seat.socket,
            name=f"front-{seat.number}",
            silence_s=options.watchdog_s + PATIENCE_S,
            timeout_s=options.job_timeout_s,
            on_lost=self._on_lost,
            check=Readers().check,
        )

    def run(self) -> int:
        """Works until it is stopped, or the engine is gone; the exit code."""
        signal.signal(signal.SIGTERM, _leave)
        signal.signal(signal.SIGINT, _leave)
        with START.part("wait for the engine"):
            models = self._awaited()
        if models is None:
            return EXIT_ENGINE_GONE
        options = share_of(self._options, models, self._seat.of)
        self._serving = _Serving(self._settings, options, self._seat, self._engine, models)
        if self._lost is not None:  # before anybody was there to notify
            return EXIT_ENGINE_GONE
        return self._serving.run()

    def _awaited(self) -> Mapping[str, ModelInfo] | None:
        """The models of the engine, as soon as there is one; None if that is gone again."""
        due = 0.0
        while self._lost is None:
            if time.monotonic() >= due:
                due = time.monotonic() + beat_s(self._options.lease_s)
                self._say_waiting()
            if self._engine.connected:
                try:
                    return self._engine.models()
                except EngineGone:
                    return None
            time.sleep(_POLL_S)
        return None

    def _say_waiting(self) -> None:
        waits = self._engine.problem or "no engine yet"
        _say(self._seat, problems={"engine": waits})

    def _on_lost(self, reason: str) -> None:
        """The engine is gone. On the thread that reads from it."""
        self._lost = reason
        # Requests from now on fail at once, and waits for no other engine.
        self._engine.close()
        if self._serving is not None:
            self._serving.lose_engine()


class _Serving:
    """A front that has an engine."""

    def __init__(
        self,
        settings: Settings,
        options: WorkerSettings,
        seat: Seat,
        engine: EngineClient,
        models: Mapping[str, ModelInfo],
    ) -> None:
        ledger = WorkerLedger(connect(settings), settings)
        # Messages that wait for their time are in hand beside those that have a thread.
        holdings = Holdings(seat.holdings, 4 * options.threads + 64)
        held = Held(holdings)
        self._seat, self._engine = seat, engine
        broker = Broker(settings)
        self._base = Base(seat.worker, settings, options, list(models), ledger, broker, held)
        self._decoding = decoding_budget(options)
        slots = max(info.slots for info in models.values())
        self._bottleneck = Bottleneck(lambda: self._decoding.waiting, lambda: engine.beat, slots)
        self._broker_loop = BrokerLoop()
        count_in(seat.metrics, f"front-{seat.number}")
        metrics = WorkerMetrics()
        self._jobs = jobs_of(self._base, engine, self._decoding, metrics)
        self._beat = _Beat(self)
        self._taker = Taker(
            self._base,
            self._jobs,
            metrics,
            self._broker_loop,
            hostname=f"blipq@{seat.worker}.{seat.number}",
            problem=lambda: self._beat.problem,
            in_hand=holdings,
            shut_down=EXIT_SHUT_DOWN,
        )

    def run(self) -> int:
        self._jobs.writer.start()
        self._beat.start()
        self._jobs.forgetting.start()
        code = self._taker.run()
        self._jobs.forgetting.stop()
        self._jobs.writer.close()
        self._beat.stop()
        self._engine.close()
        self._base.broker.close()
        return code

    def lose_engine(self) -> None:
        """Ends the front. Its jobs' threads hear of it by themselves."""
        self._taker.end(EXIT_ENGINE_GONE, GIVE_BACK_WITHIN_S)

    @property
    def base(self) -> Base:
        return self._base

    def stalled_for(self) -> float:
        """Seconds that the slowest decoder has taken."""
        return self._decoding.held_for()

    def say(self) -> None:
        """Writes the front's status."""
        gate = self._base.gate
        self._bottleneck.look()
        away = self._redis_away()
        problems = {
            "redis": away,
            "s3": self._jobs.access.trouble(),
            "engine": self._engine.problem,
            "broker loop": self._broker_loop.away(),
        }
        # While Redis is away the loop may wait for it; ending the process would not help.
        live = {"broker loop": self._broker_loop.stuck() if away is None else None}
        _say(
            self._seat,
            threads=self._base.options.threads,
            active=len(self._base.held.claims()),
            taking=gate.open and self._broker_loop.turning and self._engine.connected,
            draining=gate.closed,
            problems=_found(problems),
            live=_found(live),
            decode_bound=self._bottleneck.holds,
        )

    def _redis_away(self) -> str | None:
        try:
            self._base.ledger.redis.ping()
        except redis.RedisError as error:
            return str(error)
        return self._beat.problem  # a server that answers may refuse writes


class _Beat(LeaseBeat):
    """Renews the front's leases, and says how the front is."""

    def __init__(self, serving: _Serving) -> None:
        base, options = serving.base, serving.base.options
        super().__init__(
            base.ledger,
            base.held,
            usage=base.usage,
            lease_s=options.lease_s,
            watchdog_s=options.watchdog_s,
            stalled_for=serving.stalled_for,
        )
        self._serving = serving

    def tick(self) -> None:
        """One beat. Raises what the ledger raises."""
        try:
            super().tick()
        finally:  # also while Redis is away: this process is none the worse for it
            self._serving.say()


def _found(problems: Mapping[str, str | None]) -> dict[str, str]:
    return {name: problem for name, problem in problems.items() if problem is not None}


def _say(
    seat: Seat,
    *,
    problems: dict[str, str],
    live: dict[str, str] | None = None,
    threads: int = 0,
    active: int = 0,
    taking: bool = False,
    draining: bool = False,
    decode_bound: bool = False,
) -> None:
    """Writes the front's status; by default that of one which does nothing yet."""
    status = FrontStatus(
        pid=os.getpid(),
        number=seat.number,
        beat=time.monotonic(),
        threads=threads,
        active=active,
        taking=taking,
        draining=draining,
        problems=problems,
        live=live or {},
        decode_bound=decode_bound,
    )
    write_status(seat.status, status)


def _leave(*_: object) -> None:
    """Ends a front that has taken nothing yet."""
    sys.exit(0)
