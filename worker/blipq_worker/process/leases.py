"""Keeps this process's leases alive, and brings back the jobs of those that died."""

import json
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from blipq.errors import BlipqError
from blipq.ledger.ledger import Claim, Ledger, Turn
from blipq.transport.broker import Broker

log = logging.getLogger(__name__)

#: A worker whose model or decoder hangs, or whose device is lost, ends with this code: its
#: supervisor starts it again.
EXIT_HUNG = 70

LONGEST_BEAT_S = 2.0
LONGEST_TURN_S = 5.0


def beat_s(lease_s: float) -> float:
    """How often leases are renewed."""
    return min(LONGEST_BEAT_S, lease_s / 5)


class Held:
    """The jobs this process has claimed. A claim that is lost hears of it through its event."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: dict[str, str] = {}
        self._claims: dict[str, tuple[Claim, threading.Event, list[Callable[[], object]]]] = {}

    @contextmanager
    def asking(self, id: str, nonce: str) -> Iterator[None]:
        """While the ledger is asked for a claim, it may be ours without our knowing it."""
        with self._lock:
            self._asked[nonce] = id
        try:
            yield
        finally:
            with self._lock:
                del self._asked[nonce]

    def asked(self) -> dict[str, str]:
        """The claims that are asked for now: nonce to id."""
        with self._lock:
            return dict(self._asked)

    def add(self, claim: Claim) -> None:
        """Holds a claim."""
        with self._lock:
            self._claims[claim.id] = (claim, threading.Event(), [])

    def event(self, claim: Claim) -> threading.Event:
        """The event that is set when the claim is lost."""
        with self._lock:
            entry = self._claims.get(claim.id)
        if entry is not None and entry[0].token == claim.token:
            return entry[1]
        gone = threading.Event()
        gone.set()
        return gone

    def on_lost(self, claim: Claim, call: Callable[[], object]) -> None:
        """Calls ``call`` when the claim is lost, at once if it is already."""
        with self._lock:
            entry = self._claims.get(claim.id)
            if entry is not None:
                entry[2].append(call)
        if self.event(claim).is_set():
            call()

    def has_asked(self, claim: Claim) -> bool:
        """Whether the claim's job has asked the model for something."""
        with self._lock:
            entry = self._claims.get(claim.id)
        return entry is not None and bool(entry[2])

    def remove(self, claim: Claim) -> bool:
        """Lets a claim go; False if it was not held any more."""
        with self._lock:
            entry = self._claims.get(claim.id)
            if entry is None or entry[0].token != claim.token:
                return False
            del self._claims[claim.id]
            return True

    def claims(self) -> list[Claim]:
        """What is held now."""
        with self._lock:
            return [claim for claim, _, _ in self._claims.values()]

    def lose(self, ids: Sequence[str]) -> None:
        """Tells those whose claims are gone."""
        with self._lock:
            entries = [self._claims[id] for id in ids if id in self._claims]
        for _, lost, calls in entries:
            lost.set()
            for call in calls:
                call()


class Periodic(ABC):
    """A daemon thread that does one thing every ``interval_s``, and outlives Redis' outages."""

    def __init__(self, name: str, interval_s: float) -> None:
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stops the thread after what it does now."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    @abstractmethod
    def tick(self) -> None:
        """The one thing."""

    def _loop(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                self.tick()
            except BlipqError as error:
                log.warning("%s: %s", self._thread.name, error)
            except Exception:
                log.exception("%s", self._thread.name)


class Heartbeat(Periodic):
    """Renews the leases, says that the worker lives, and ends a process that hangs.

    The three belong together: a lease must not be renewed where nothing makes progress.
    ``taking``: whether a message that comes now would be run at once.
    """

    def __init__(
        self,
        ledger: Ledger,
        held: Held,
        worker: str,
        models: Sequence[str],
        *,
        outputs: Sequence[str] = (),
        threads: int,
        lease_s: float,
        grace_s: float,
        watchdog_s: float,
        stalled_for: Callable[[], float],
        taking: Callable[[], bool],
        draining: Callable[[], bool],
    ) -> None:
        super().__init__("blipq-heartbeat", beat_s(lease_s))
        self._ledger = ledger
        self._held = held
        self._worker = worker
        self._models = list(models)
        self._outputs = list(outputs)
        self._threads = threads
        self._lease_s = lease_s
        self._grace_s = grace_s
        self._watchdog_s = watchdog_s
        self._stalled_for = stalled_for
        self._taking = taking
        self._draining = draining
        self._started = time.time()
        self._room_since: float | None = None
        self._problem: str | None = None

    @property
    def problem(self) -> str | None:
        """Why the last beat did not reach the ledger, or None."""
        return self._problem

    def tick(self) -> None:
        """One beat. Raises what the ledger raises."""
        self._watch()
        try:
            self._beat()
        except Exception as error:
            self._problem = str(error)
            raise
        self._problem = None

    def _beat(self) -> None:
        claims = self._held.claims()
        if claims:
            tokens = {claim.id: claim.token for claim in claims}
            self._held.lose(self._ledger.renew(tokens, lease_s=self._lease_s))
        self._register(len(claims))

    def _watch(self) -> None:
        stalled = self._stalled_for()
        if stalled > self._watchdog_s:
            log.critical("the model or a decoder has made no progress for %.0f s: ending", stalled)
            logging.shutdown()
            os._exit(EXIT_HUNG)

    def _register(self, active: int) -> None:
        info = {
            "pid": os.getpid(),
            "models": self._models,
            "outputs": self._outputs,
            "threads": self._threads,
            "active": active,
            "draining": self._draining(),
            "started_at": self._started,
        }
        spare = self._had_room(active)
        models = [] if self._draining() else self._models
        # Two missed beats and the worker no longer counts as live.
        ttl_s = 2.5 * self._interval_s
        self._ledger.register(self._worker, models, json.dumps(info), ttl_s=ttl_s, spare=spare)

    def _had_room(self, active: int) -> bool:
        """Whether it had room at each beat of a whole grace: what waits then, it was not sent."""
        if active >= self._threads or not self._taking():
            self._room_since = None
            return False
        now = time.monotonic()
        self._room_since = self._room_since or now
        return now - self._room_since >= self._grace_s


class Reconciler(Periodic):
    """Publishes again what a crash, a lost message or a backoff left behind.

    One worker at a time does it; the turn of a dead one ends by itself.
    """

    def __init__(
        self, ledger: Ledger, broker: Broker, worker: str, *, lease_s: float, grace_s: float
    ) -> None:
        super().__init__("blipq-reconciler", min(1.0, lease_s / 4))
        self._ledger = ledger
        self._broker = broker
        # An outage that ends no turn is too short to end a lease.
        ttl_s = min(LONGEST_TURN_S, lease_s / 2)
        self._turn = Turn(worker, ttl_s=ttl_s, patience_s=2 * beat_s(lease_s))
        self._grace_s = grace_s

    def tick(self) -> None:
        """One sweep, if it is our turn: a chunk at a time, until nothing is due."""
        more = True
        while more and not self._stop.is_set():
            more = self._sweep()

    def _sweep(self) -> bool:
        """One chunk; whether more may be due."""
        swept = self._ledger.reconcile(grace_s=self._grace_s, turn=self._turn)
        if swept.messages:
            log.info("published again: %d", len(swept.messages))
            self._broker.publish_all(swept.messages)
        return swept.more
