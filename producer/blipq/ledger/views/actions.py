"""The log of actions: who cancelled, queued again, dropped, forgot or replayed what.

The script that acts writes it (``noted.lua``), so that there is no action without its line and no
line without its action. It is kept for 30 days, and holds about ten thousand lines.
"""

import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, cast

from blipq.ledger import keys
from blipq.ledger.connection import redis_errors
from blipq.ledger.scripts.runner import ScriptRunner

_ID = re.compile(r"\d{1,16}-\d{1,16}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Action:
    """A line of the log. ``count``: how many jobs or events it came to."""

    id: str
    at: datetime
    name: str
    via: str
    action: str
    target: str
    count: int

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, as JSON has them."""
        return asdict(self) | {"at": self.at.isoformat(timespec="milliseconds")}


def is_action_id(text: str) -> bool:
    """Whether a text can be the id of a line."""
    return _ID.fullmatch(text) is not None


class ActionLog(ScriptRunner):
    """Reads the log of actions. Raises QueueUnavailable."""

    def latest(self, limit: int, before: str | None = None) -> list[Action]:
        """The newest actions first, or those before the one of an id."""
        with redis_errors():
            last = "+" if before is None else f"({before}"
            found = self.redis.xrevrange(keys.ACTIONS, last, "-", count=limit)
        return [_action(id, fields) for id, fields in cast("list[tuple[str, Any]]", found)]


def _action(id: str, fields: dict[str, str]) -> Action:
    at = datetime.fromtimestamp(int(id.partition("-")[0]) / 1000, UTC)
    texts = {name: fields[name] for name in ("name", "via", "action", "target")}
    return Action(id=id, at=at, count=int(fields["count"]), **texts)
