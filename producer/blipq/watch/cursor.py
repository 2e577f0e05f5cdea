"""Where a listing got to, kept through restarts: in Redis, or in a file."""

import json
from pathlib import Path
from typing import Any, Protocol

from blipq.errors import InvalidRequest
from blipq.files import whole_file
from blipq.ledger import keys
from blipq.ledger.connection import redis_errors
from blipq.ledger.operator import OperatorLedger

#: A watch that stands still for longer starts from then on.
KEPT_S = 40 * 86400


class Cursor(Protocol):
    """A small dictionary that outlives the process."""

    def load(self) -> dict[str, Any]:
        """What was saved last, or nothing."""

    def save(self, state: dict[str, Any]) -> None:
        """Saves a state in place of the last one."""


class Unsaved:
    """Another cursor's state, for a run that must leave no trace."""

    def __init__(self, cursor: Cursor) -> None:
        self._state = cursor.load()

    def load(self) -> dict[str, Any]:
        return self._state

    def save(self, state: dict[str, Any]) -> None:
        """Keeps it for this run alone."""
        self._state = state


class RedisCursor:
    """In Redis, so that it survives the host."""

    def __init__(self, name: str, ledger: OperatorLedger) -> None:
        self._key = keys.watch(name)
        self._redis: Any = ledger.redis

    def load(self) -> dict[str, Any]:
        with redis_errors():
            text = self._redis.get(self._key)
        return json.loads(text) if text else {}

    def save(self, state: dict[str, Any]) -> None:
        with redis_errors():
            self._redis.set(self._key, json.dumps(state), ex=KEPT_S)


class FileCursor:
    """In a file that is replaced whole, so that no crash leaves half of it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> dict[str, Any]:
        """What was saved last, or nothing. Raises InvalidRequest for another file."""
        try:
            state = json.loads(self._path.read_text())
            if isinstance(state, dict):
                return state
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"source.state: cannot read {self._path}: {error}") from None
        raise InvalidRequest(f"source.state: {self._path} holds something else")

    def save(self, state: dict[str, Any]) -> None:
        try:
            with whole_file(self._path) as file:
                file.write(json.dumps(state).encode())
        except OSError as error:
            raise InvalidRequest(f"source.state: cannot write {self._path}: {error}") from None
