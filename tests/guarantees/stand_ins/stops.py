"""Steps of a job at which a test has a worker stop, to kill it there.

``FAULTY_STOPS`` names a folder. Who reaches a step for which the folder has a file (``arm``) stops
there until ``let_go``; all others pass, also later ones at the same step.
"""

import os
import time
from functools import wraps
from pathlib import Path
from typing import Any

#: In a front, in the order in which a job comes to them; the last two around the write of a result.
IN_FRONTS = ("received", "claimed", "fetching", "decoding", "submitted", "finishing", "stored")
STEPS = (*IN_FRONTS, "in the pass")

_LONGEST_S = 120.0


def arm(folder: Path, step: str) -> None:
    """The next one who comes to this step stops there."""
    folder.mkdir(exist_ok=True)
    (folder / step).touch()


def reached(folder: Path, step: str) -> bool:
    """Whether one has stopped there."""
    return (folder / f"{step} reached").exists()


def let_go(folder: Path) -> None:
    """Ends all stops, for good."""
    (folder / "go").touch()


def at(step: str) -> None:
    """Stops here, if it is this step's time."""
    if not step or "FAULTY_STOPS" not in os.environ:
        return
    folder = Path(os.environ["FAULTY_STOPS"])
    try:
        (folder / step).rename(folder / f"{step} reached")  # by one of all who come here
    except FileNotFoundError:
        return
    ends = time.monotonic() + _LONGEST_S
    while not (folder / "go").exists() and time.monotonic() < ends:
        time.sleep(0.02)


def stop_fronts() -> None:
    """Makes the steps of a front known; those of its pictures are ``faulty_worker``'s."""
    from blipq.ledger.worker import WorkerLedger
    from blipq_worker.claims import Held
    from blipq_worker.inference.client import EngineClient
    from blipq_worker.jobs.claiming import Claiming

    _around(Claiming, "claim", before="received")
    _around(Held, "add", after="claimed")
    _around(EngineClient, "submit", after="submitted")
    _around(WorkerLedger, "succeed", before="finishing", after="stored")


def _around(owner: type, name: str, *, before: str = "", after: str = "") -> None:
    call = getattr(owner, name)

    @wraps(call)
    def stopping(*arguments: Any, **named: Any) -> Any:
        at(before)
        answer = call(*arguments, **named)
        at(after)
        return answer

    setattr(owner, name, stopping)
