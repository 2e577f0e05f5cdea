"""How often somebody may do something: requests and sign-ins of a key, wrong keys of an address."""

import ipaddress
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from blipq_api.problems import Problem

#: Seconds of a key's rate that it may use at once.
BURST_S = 2.0
#: Wrong keys at once and a second, of one address and of all together.
WRONG_AT_ONCE, WRONG_PER_S = 10, 0.1
ALL_WRONG_AT_ONCE, ALL_WRONG_PER_S = 200, 5.0
#: Addresses that are known apart; beyond them the oldest is dropped, and the limit of all is left.
MOST_ADDRESSES = 10_000
#: Sign-ins of one key at once and a second. Each leaves a session in Redis until it ends.
SIGN_INS_AT_ONCE, SIGN_INS_PER_S = 100, 0.1


@dataclass(slots=True)
class Bucket:
    """What is left of a rate: tokens that come back with time, up to ``most``."""

    most: float
    left: float = field(init=False)
    at: float = field(init=False)

    def __post_init__(self) -> None:
        self.left, self.at = self.most, time.monotonic()

    def pause(self, rate: float) -> float:
        """Seconds until there is a token, of which ``rate`` come a second; 0 if there is one."""
        now = time.monotonic()
        self.left = min(self.most, self.left + (now - self.at) * rate)
        self.at = now
        return 0.0 if self.left >= 1 else (1 - self.left) / rate

    def take(self, rate: float) -> float:
        """Takes a token; seconds until there is one, or 0."""
        pause = self.pause(rate)
        if not pause:
            self.left -= 1
        return pause


class WrongKeys:
    """Wrong keys that were sent to one door, by the address that they come from.

    A key has 256 random bits: no number of tries finds one, so the limit is for the work that tries
    make, which is one process' own. It is kept there, and Redis has no work with strangers.
    """

    def __init__(self) -> None:
        self._all = Bucket(ALL_WRONG_AT_ONCE)
        self._of: OrderedDict[str, Bucket] = OrderedDict()

    def pause(self, address: str) -> float:
        """Seconds until this address may send a wrong key again; 0 if it may now."""
        pause = self._all.pause(ALL_WRONG_PER_S)
        if (known := self._of.get(_network(address))) is not None:
            pause = max(pause, known.pause(WRONG_PER_S))
        return pause

    def wrong(self, address: str) -> float:
        """Takes in that a key was wrong; ``pause`` before that."""
        pause = self.pause(address)
        network = _network(address)
        own = self._of.setdefault(network, Bucket(WRONG_AT_ONCE))
        if not own.take(WRONG_PER_S):  # beyond its own limit it uses up nobody else's
            self._all.take(ALL_WRONG_PER_S)
        self._of.move_to_end(network)
        if len(self._of) > MOST_ADDRESSES:
            self._of.popitem(last=False)
        return pause


class SignIns(WrongKeys):
    """Keys that were exchanged for sessions at one door, right ones and wrong ones."""

    def __init__(self) -> None:
        super().__init__()
        #: By the names of keys, of which the file has so many.
        self._of_keys: dict[str, Bucket] = {}

    def check(self, address: str) -> None:
        """Raises Problem where too many were wrong: for a further wrong one."""
        if pause := self.pause(address):
            raise _too_many("too many wrong keys came from here: wait before you try again", pause)

    def right(self, name: str) -> None:
        """Takes in that the key of a name is to begin a session. Raises Problem for too many."""
        bucket = self._of_keys.setdefault(name, Bucket(SIGN_INS_AT_ONCE))
        if pause := bucket.take(SIGN_INS_PER_S):
            raise _too_many(f"the key {name!r} has signed in too often: wait a while", pause)


def _too_many(text: str, pause: float) -> Problem:
    return Problem(429, "too_many_sign_ins", text, retry_after_s=pause)


def _network(address: str) -> str:
    """What one client has: an IPv4 address, or 64 bits of IPv6."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if found.version == 4:
        return address
    return str(ipaddress.ip_network((found.packed, 64), strict=False))
