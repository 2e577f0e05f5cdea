"""What all requests share: the client, the operator's ledger on threads, who calls, and bodies."""

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import anyio.to_thread
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from blipq.client.async_client import AsyncClient
from blipq.client.forgetting import Forgotten, Unindex
from blipq.contract import JobInfo
from blipq.contract.base import Output
from blipq.errors import QueueUnavailable
from blipq.index import unindex_of
from blipq.ledger.acting import acting
from blipq.ledger.cells.operator import operator_for
from blipq.ledger.operator import OperatorLedger
from blipq.s3.presigned import Presigner
from blipq.webhooks.cells import outbox_of
from blipq.webhooks.outbox import Outbox
from blipq_api.access.keys import LOCAL, Caller, Keyring, Scope
from blipq_api.access.rates import SignIns, WrongKeys
from blipq_api.access.selections import Selections
from blipq_api.access.sessions import Session, Sessions
from blipq_api.problems import Problem
from blipq_api.settings import ApiSettings
from blipq_api.turns import Turns

T = TypeVar("T")

#: A request of the contract has at most 256 texts of 4,096 characters.
MOST_JSON_BYTES = 8 * 2**20
BODY_TIMEOUT_S = 30.0
#: Lists read many records, one after the other.
OPERATOR_THREADS = 4
UPLOAD_THREADS = 8
#: Bodies that are held whole at the same time, beside those of single submits.
LARGE_BODIES = 4
#: Counts of the console at the same time: each goes through many records.
COUNTS = 4


class Door:
    """The services of one door. Make it in its event loop, and close it there."""

    def __init__(self, settings: ApiSettings) -> None:
        self.settings = settings
        self.keyring = None if settings.api_keys is None else Keyring(settings.api_keys)
        self.client = AsyncClient(settings)
        home = settings.home
        self.sessions = None if self.keyring is None else Sessions(home, self.keyring)
        self.selections = Selections(home)
        self.sign_ins = SignIns()
        #: In Authorization headers, apart from those of the sign-in page.
        self.wrong_keys = WrongKeys()
        #: Of a door without keys, which knows one user.
        self.local = Session(LOCAL, secrets.token_urlsafe(32))
        self.draining = asyncio.Event()
        self._operator = operator_for(settings)
        self._outbox = outbox_of(self._operator)
        self._operator_turns = Turns(OPERATOR_THREADS)
        self._upload_turns = Turns(UPLOAD_THREADS)
        self._large_bodies = Turns(LARGE_BODIES)
        self._counts = Turns(COUNTS)
        self.presigner = Presigner(settings, settings.s3_public_endpoint_url)
        self.streams = 0

    async def aclose(self) -> None:
        if self.sessions is not None:
            await self.sessions.aclose()
        await self.selections.aclose()
        await self.client.aclose()
        self._operator.close()

    async def still_allows(self, request: Request, scope: Scope, tenant: str | None) -> bool:
        """Whether who began a request could begin it now: a long one must not outlive its key.

        Redis being away changes nothing.
        """
        caller = caller_of(request)
        if self.keyring is None or self.sessions is None or caller.key is None:
            return True
        known = self.keyring.of_digest(caller.key.sha256)
        if known is None or scope not in known.scopes or not known.sees(tenant):
            return False
        if getattr(request.state, "session", None) is None:
            return True
        with suppress(QueueUnavailable):
            return await self.sessions.find(request.headers.get("cookie", "")) is not None
        return True

    async def operate(self, work: Callable[[OperatorLedger], T]) -> T:
        """Runs what the synchronous ledger offers, on a thread. Raises Problem if all are busy."""
        return await self._on_thread(lambda: work(self._operator), self._operator_turns)

    async def webhooks(self, work: Callable[[Outbox], T]) -> T:
        """The same for the outbox of webhooks."""
        return await self._on_thread(lambda: work(self._outbox), self._operator_turns)

    async def store(self, work: Callable[[], T]) -> T:
        """Runs what talks to S3, on a thread."""
        return await self._on_thread(work, self._upload_turns)

    async def _on_thread(self, work: Callable[[], T], turns: Turns) -> T:
        async with turns.turn():
            # The limit is the limiter: the default one, of 40 threads, is for nobody else here.
            return await anyio.to_thread.run_sync(work)

    async def forget(self, ids: Sequence[str]) -> Forgotten:
        """Erases jobs that have ended, and what they left in S3 and in search indexes."""
        async with self._upload_turns.turn():
            # Indexes are opened at the first use: LanceDB is large.
            unindex = await anyio.to_thread.run_sync(lambda: self._unindex)
            return await self.client.forget(ids, unindex=unindex, only_ended=True)

    @cached_property
    def _unindex(self) -> Unindex | None:
        return unindex_of(self.settings)

    def large_body(self) -> AbstractAsyncContextManager[None]:
        """Room for a large body, for as long as it is kept. Raises Problem if there is none."""
        return self._large_bodies.turn()

    def count(self) -> AbstractAsyncContextManager[None]:
        """A turn to count jobs. Raises Problem if there is none."""
        return self._counts.turn()


def door_of(request: Request) -> Door:
    door: Door = request.app.state.door
    return door


def caller_of(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


async def read_body(request: Request, most: int = MOST_JSON_BYTES) -> bytes:
    """The whole body. Raises Problem where it is too large, or too slow."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise too_large(most)
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise too_large(most)
                parts.append(part)
    except TimeoutError:
        text = f"the body did not come within {BODY_TIMEOUT_S:g} s"
        raise Problem(408, "body_timeout", text, headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise Problem(400, "disconnected", "the caller left") from None
    return b"".join(parts)


def too_large(most: int) -> Problem:
    text = f"the body is too large: the most is {most:,} bytes"
    return Problem(413, "too_large", text, headers={"Connection": "close"})


def media_type(request: Request) -> str:
    """The type of the body, without parameters, in lower case."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_json(request: Request) -> Any:
    """The body as JSON. Raises Problem for another type, and for what is no JSON."""
    if media_type(request) != "application/json":
        raise Problem(415, "unsupported_media_type", "the body must be application/json")
    return json_of(await read_body(request))


def json_of(body: bytes) -> Any:
    """JSON without NaN. Raises Problem."""
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Problem(400, "invalid_json", f"the body is no JSON: {error}") from None


def shown(model: Output | dict[str, Any], status: int = 200, **headers: str) -> Response:
    """An answer in JSON, without members that are null."""
    if isinstance(model, Output):
        text = model.model_dump_json(exclude_none=True)
    else:
        text = json.dumps(model)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(text, status, named, "application/json")


def job_answer(info: JobInfo, status: int | None = None, **headers: str) -> Response:
    """A job: 202 while it is open, 200 when it has ended."""
    return shown(info, status or (200 if info.ended else 202), **headers)


async def while_connected(request: Request, door: Door, work: Coroutine[Any, Any, T]) -> T | None:
    """Awaits ``work``; None if the caller leaves or the door closes before it is done.

    The body must have been read: what comes then is the end of the connection.
    """
    tasks: list[asyncio.Task[Any]] = [
        asyncio.ensure_future(work),
        asyncio.ensure_future(_gone(request)),
        asyncio.ensure_future(door.draining.wait()),
    ]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        done: asyncio.Task[T] = tasks[0]
        return done.result() if done.done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Operation:
    """One method on one path. Without a scope everybody may."""

    method: str
    path: str
    handler: Handler
    scope: Scope | None

    async def answer(self, request: Request) -> Response:
        """Raises Problem where the key lacks the scope."""
        if self.scope is None:
            return await self.handler(request)
        caller = caller_of(request)
        caller.require(self.scope)
        with acting(caller.name, "api"):
            return await self.handler(request)
