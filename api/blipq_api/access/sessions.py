"""Sessions of the console: a cookie in place of a key, which ends with the key.

Redis keeps which key a session is of, under the SHA-256 of the cookie's token: who reads Redis
cannot send the cookie. All doors of a deployment know all sessions.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import cast

from blipq.ledger import keys
from blipq.ledger.connection import connect_async, redis_errors
from blipq.settings import Settings
from blipq_api.access.keys import Caller, Keyring, digest

COOKIE = "blipq_session"
#: A session ends after this at the latest; a working day.
SESSION_S = 12 * 3600


@dataclass(frozen=True, slots=True)
class Session:
    """Who is signed in. ``secret``: what the tokens in this session's forms are made of."""

    caller: Caller
    secret: str

    @property
    def form_token(self) -> str:
        """What a form of this session sends back, and no other site can know."""
        return hmac.digest(self.secret.encode(), b"blipq form", hashlib.sha256).hex()

    def sent(self, token: str) -> bool:
        """Whether a form is of this session."""
        return hmac.compare_digest(self.form_token.encode(), token.encode())


class Sessions:
    """The sessions of all doors. Raises QueueUnavailable."""

    def __init__(self, settings: Settings, keyring: Keyring) -> None:
        self._redis = connect_async(settings)
        self._keyring = keyring

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._redis.aclose(close_connection_pool=True)

    async def begin(self, key: str) -> tuple[str, int]:
        """Exchanges a key of the file for a cookie's token, and the seconds it lives."""
        token = secrets.token_urlsafe(32)
        with redis_errors():
            await self._redis.set(keys.session(digest(token)), digest(key), ex=SESSION_S)
        return token, SESSION_S

    async def find(self, cookies: str) -> Session | None:
        """The session of a Cookie header, if it has one that lives and whose key is in the file."""
        token = token_of(cookies)
        if token is None:
            return None
        with redis_errors():
            found = cast("str | None", await self._redis.get(keys.session(digest(token))))
        caller = None if found is None else self._keyring.of_digest(found)
        return None if caller is None else Session(caller, token)

    async def end(self, cookies: str) -> None:
        """Ends the session of a Cookie header."""
        if (token := token_of(cookies)) is not None:
            with redis_errors():
                await self._redis.delete(keys.session(digest(token)))


def token_of(cookies: str) -> str | None:
    """The token in a Cookie header, among cookies of whatever else is on the host.

    Browsers send the one of the narrowest path first.
    """
    pairs = (each.strip().partition("=") for each in cookies.split(";"))
    return next((value for name, _, value in pairs if name == COOKIE and value), None)
