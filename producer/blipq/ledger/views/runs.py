"""Runs of bulks, for whoever watches a fleet: the processes at them note how far they are.

A note is a copy: what became of a bulk's lines is in its journal, which the process has. It is kept
for a week after the last one, and of the newest runs alone.
"""

import json
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, cast

from blipq.ledger import keys
from blipq.ledger.connection import redis_errors
from blipq.ledger.scripts.runner import ScriptRunner

KEPT_S, MOST = 7 * 86400, 200
#: A process notes at least so often: a run that was not for four times as long has none.
NOTED_EVERY_S = 15.0
LONGEST_NAME = 512


@dataclass(frozen=True, slots=True)
class Run:
    """One bulk. state: as ``blipq bulk status`` has it. counts: lines by status.

    per_s: lines that ended per second, lately. share: of the lines that are read, 0 to 1, where
    that is known. at: when this was noted, in seconds since 1970.
    """

    id: str
    name: str
    state: str
    tenant: str | None
    at: float
    counts: dict[str, int] = field(default_factory=dict)
    in_flight: int = 0
    per_s: float | None = None
    share: float | None = None
    left_s: float | None = None

    @property
    def noted(self) -> datetime:
        """When, as a time."""
        return datetime.fromtimestamp(self.at, UTC)

    @property
    def shown(self) -> str:
        """The state: a process that notes nothing any more was stopped, or cannot reach Redis."""
        silent = time.time() - self.at > 4 * NOTED_EVERY_S
        return "stopped" if silent and self.state in ("running", "paused") else self.state

    @property
    def ended(self) -> int:
        """Lines that have ended."""
        return sum(self.counts.values())


class Runs(ScriptRunner):
    """Notes and lists runs. Raises QueueUnavailable."""

    def note(self, run: Run) -> None:
        """Keeps how far a run is, in place of what was noted of it before."""
        text = json.dumps(asdict(run) | {"name": run.name[:LONGEST_NAME]})
        with redis_errors(), self.redis.pipeline() as pipe:
            pipe.set(keys.run(run.id), text, ex=KEPT_S)
            pipe.zadd(keys.RUNS, {run.id: run.at})
            pipe.zremrangebyrank(keys.RUNS, 0, -MOST - 1)
            pipe.expire(keys.RUNS, KEPT_S)
            pipe.execute()

    def newest(self) -> list[Run]:
        """Those that were noted last come first."""
        with redis_errors():
            ids = cast("list[str]", self.redis.zrevrange(keys.RUNS, 0, MOST - 1))
            found = cast("list[Any]", self.redis.mget([keys.run(id) for id in ids]) if ids else [])
        return [_run(text) for text in found if text is not None]


def _run(text: str) -> Run:
    """A note, which a client of a later version may have made: other names are left out."""
    noted, known = json.loads(text), {each.name for each in fields(Run)}
    return Run(**{name: value for name, value in noted.items() if name in known})
