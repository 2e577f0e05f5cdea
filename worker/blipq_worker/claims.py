"""The jobs this process has claimed, and who hears when a claim is lost."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from blipq.ledger.worker import Claim

#: A claim, what is set when it is lost, and who else is told then.
_Entry = tuple[Claim, threading.Event, list[Callable[[], object]]]


class Lost(Exception):
    """The claim is gone: cancelled, expired or taken over. Nobody wants the answer."""


class Held:
    """The jobs this process has claimed. A claim that is lost hears of it through its event."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: dict[str, str] = {}
        self._claims: dict[str, _Entry] = {}

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
            entry = self._entry(claim)
        if entry is not None:
            return entry[1]
        gone = threading.Event()
        gone.set()
        return gone

    def on_lost(self, claim: Claim, call: Callable[[], object]) -> None:
        """Calls ``call`` when the claim is lost, at once if it is already."""
        with self._lock:
            entry = self._entry(claim)
            if entry is not None:
                entry[2].append(call)
        if self.event(claim).is_set():
            call()

    def has_asked(self, claim: Claim) -> bool:
        """Whether the claim's job has asked the model for something."""
        with self._lock:
            entry = self._entry(claim)
        return entry is not None and bool(entry[2])

    def remove(self, claim: Claim) -> bool:
        """Lets a claim go; False if it was not held any more."""
        with self._lock:
            if self._entry(claim) is None:
                return False
            del self._claims[claim.id]
            return True

    def claims(self) -> list[Claim]:
        """All claims that are held now."""
        with self._lock:
            return [claim for claim, _, _ in self._claims.values()]

    def lose(self, claims: Iterable[Claim]) -> None:
        """Tells those whose claims are gone, and no newer claim of the same job."""
        with self._lock:
            entries = [entry for claim in claims if (entry := self._entry(claim)) is not None]
        for _, lost, calls in entries:
            lost.set()
            for call in calls:
                call()

    def _entry(self, claim: Claim) -> _Entry | None:
        """What is held of this very claim. With the lock held."""
        entry = self._claims.get(claim.id)
        return entry if entry is not None and entry[0].token == claim.token else None
