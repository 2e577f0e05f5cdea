"""What a check finds, and the comparison of clocks that several checks need."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "bad"]

#: Signatures of S3 requests are refused from a difference of 15 minutes.
SKEW_WARN_S, SKEW_BAD_S = 30.0, 600.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, how it is, and what to do if it is not right."""

    state: State
    check: str
    message: str
    advice: str | None = None


Findings = Iterator[Finding]


def skew(check: str, seconds: float) -> Finding:
    """A clock that is so many seconds ahead of this machine's; behind it if negative."""
    message = f"{abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'} this machine's"
    if abs(seconds) > SKEW_BAD_S:
        return Finding("bad", check, message, "run an NTP client on both machines")
    if abs(seconds) > SKEW_WARN_S:
        return Finding("warn", check, message, "run an NTP client on both machines")
    return Finding("ok", check, message)
