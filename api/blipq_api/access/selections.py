"""What a session is about to change: the jobs that its reader has counted, for ten minutes.

A filter would also hit what comes to match it between the question and the answer. So the ids are
kept, in Redis, where any door finds them; of each session the last ones alone.
"""

import json
import secrets
from dataclasses import asdict, dataclass
from typing import cast

from blipq.ledger import keys
from blipq.ledger.connection import connect_async, redis_errors
from blipq.settings import Settings
from blipq_api.access.keys import digest
from blipq_api.access.sessions import Session

KEPT_S = 600


@dataclass(frozen=True, slots=True)
class Selection:
    """Jobs, and what is to be done with them. ``target``: how the log of actions names them.

    ``tenant``: whose jobs the session saw; None is all.
    """

    action: str
    ids: list[str]
    tenant: str | None
    target: str


class Selections:
    """The selections of all doors. Raises QueueUnavailable."""

    def __init__(self, settings: Settings) -> None:
        self._redis = connect_async(settings)

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._redis.aclose(close_connection_pool=True)

    async def keep(self, session: Session, selection: Selection) -> str:
        """Keeps a selection in place of the session's last one; the token to take it with."""
        token = secrets.token_urlsafe(16)
        text = json.dumps([token, asdict(selection)])
        with redis_errors():
            await self._redis.set(_key(session), text, ex=KEPT_S)
        return token

    async def take(self, session: Session, token: str) -> Selection | None:
        """The selection of a token, once. None if it is gone, or another one took its place."""
        with redis_errors():
            text = cast("str | None", await self._redis.get(_key(session)))
            kept, fields = (None, {}) if text is None else json.loads(text)
            # Of two that come at the same time, one deletes it.
            if kept is None or kept != token or not await self._redis.delete(_key(session)):
                return None
        return Selection(**fields)


def _key(session: Session) -> str:
    return keys.selection(digest(session.secret))
