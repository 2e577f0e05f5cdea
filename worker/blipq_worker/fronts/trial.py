"""Whether this process could be a front, tried as the user that fronts run as."""

import os
import sys
from pathlib import Path

from blipq_worker.fronts.files import opened
from blipq_worker.fronts.seat import Seat


def shortcoming(seat: Seat) -> str | None:
    """Why this process' user is not to be a front's; None if it may.

    One who could write to what root runs would choose what it does.
    """
    try:
        os.close(opened(seat.status))
        rights = _effective_rights()
    except OSError as error:
        return str(error)
    if rights:
        return f"it keeps capabilities of root: {rights:#x}"
    places = (sys.executable, sys.prefix, *sys.path, sys.pycache_prefix or "")
    return next((f"it can write to {each}" for each in places if os.access(each, os.W_OK)), None)


def _effective_rights() -> int:
    """The capabilities of this process that count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return int(value, 16)
    return 0
