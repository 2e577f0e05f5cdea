"""The jobs this process has claimed, and how a lost claim is signalled."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from blipq.ledger.worker import Claim

#: A claim, what is set when it is lost, and who else is notified then.
_Entry = tuple[Claim, threading.Event, list[Callable[[], object]]]


class Lost(Exception):
    """The claim is gone: cancelled, expired or taken over. Nobody wants the answer."""


class Notes(Protocol):
    """Where it is noted what becomes of claims, for whoever finds the process dead."""

    def asking(self, id: str, nonce: str) -> None:
        """A claim is requested."""

    def claimed(self, claim: Claim) -> None:
        """A claim was granted."""

    def decoding(self, id: str) -> AbstractContextManager[None]:
        """While a picture of a claimed job is decoded."""

    def suspect(self, id: str) -> None:
        """A claimed job may have ended its engine."""

    def unclaimed(self, id: str) -> None:
        """A claim has ended, or none was granted."""


class NoNotes:
    """Notes nothing: the leases alone show that the process is dead."""

    def asking(self, id: str, nonce: str) -> None:
        """See ``Notes``."""

    def claimed(self, claim: Claim) -> None:
        """See ``Notes``."""

    def decoding(self, id: str) -> AbstractContextManager[None]:
        """See ``Notes``."""
        return nullcontext()

    def suspect(self, id: str) -> None:
        """See ``Notes``."""

    def unclaimed(self, id: str) -> None:
        """See ``Notes``."""


class Held:
    """The jobs this process has claimed. A lost claim is signalled by the claim's event."""

    def __init__(self, notes: Notes | None = None) -> None:
        self._notes = NoNotes() if notes is None else notes
        # The notes are written under it, too, so that they have the order of the facts.
        self._lock = threading.Lock()
        self._asked: dict[str, str] = {}
        self._claims: dict[str, _Entry] = {}
        self._suspects: set[str] = set()  # tokens

    @contextmanager
    def asking(self, id: str, nonce: str) -> Iterator[None]:
        """Until the answer to a request has come, the claim may be ours already."""
        with self._lock:
            self._asked[nonce] = id
            if id not in self._claims:  # else it is another message of a job that runs here
                self._notes.asking(id, nonce)
        try:
            yield
        finally:
            with self._lock:
                del self._asked[nonce]
                if id not in self._claims:
                    self._notes.unclaimed(id)

    def requested(self) -> dict[str, str]:
        """The claims that are requested now: nonce to id."""
        with self._lock:
            return dict(self._asked)

    def add(self, claim: Claim) -> None:
        """Holds a claim."""
        with self._lock:
            self._notes.claimed(claim)
            self._claims[claim.id] = (claim, threading.Event(), [])

    def decoding(self, claim: Claim) -> AbstractContextManager[None]:
        """While a picture of the claim's job is decoded: it may end the process."""
        return self._notes.decoding(claim.id)

    def suspect(self, claim: Claim) -> None:
        """Has a claim's job taken for one that may have ended its engine, while it is held."""
        with self._lock:
            if self._entry(claim) is not None:
                self._notes.suspect(claim.id)
                self._suspects.add(claim.token)

    def is_suspect(self, claim: Claim) -> bool:
        """Whether a claim's job may have ended its engine."""
        with self._lock:
            return claim.token in self._suspects

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

    def has_request(self, claim: Claim) -> bool:
        """Whether the claim's job has a request at the model."""
        with self._lock:
            entry = self._entry(claim)
        return entry is not None and bool(entry[2])

    def remove(self, claim: Claim) -> bool:
        """Lets a claim go; False if it was not held any more."""
        with self._lock:
            if self._entry(claim) is None:
                return False
            del self._claims[claim.id]
            self._suspects.discard(claim.token)
            self._notes.unclaimed(claim.id)
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
