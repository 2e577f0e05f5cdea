"""The routes of the door."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from blipq.api import events, jobs, operator
from blipq.api.door import Door, Handler, caller_of
from blipq.api.gate import Gate
from blipq.api.keys import Scope
from blipq.api.problems import Problem, answer
from blipq.errors import BlipqError


@dataclass(frozen=True, slots=True)
class Operation:
    """One method on one path. Without a scope everybody may."""

    method: str
    path: str
    handler: Handler
    scope: Scope | None

    def route(self) -> Route:
        return Route(self.path, self._checked, methods=[self.method], name=self.handler.__name__)

    async def _checked(self, request: Request) -> Response:
        if self.scope is not None:
            caller_of(request).require(self.scope)
        return await self.handler(request)


OPERATIONS = (
    Operation("POST", "/v1/jobs", jobs.submit, "submit"),
    Operation("GET", "/v1/jobs", jobs.list_, "read"),
    Operation("PUT", "/v1/jobs/{id}", jobs.put, "submit"),
    Operation("GET", "/v1/jobs/{id}", jobs.read, "read"),
    Operation("DELETE", "/v1/jobs/{id}", jobs.cancel, "cancel"),
    Operation("GET", "/v1/jobs/{id}/result", jobs.result, "read"),
    Operation("GET", "/v1/jobs/{id}/events", events.events, "read"),
    Operation("POST", "/v1/jobs/{id}/cancel", jobs.cancel, "cancel"),
    Operation("POST", "/v1/jobs/{id}/retry", jobs.retry, "submit"),
    Operation("POST", "/v1/jobs/{id}/forget", jobs.forget, "cancel"),
    Operation("GET", "/v1/models", operator.models, "read"),
    Operation("GET", "/v1/queues", operator.queues, "read"),
    Operation("GET", "/v1/workers", operator.workers, "admin"),
    Operation("GET", "/v1/webhooks", operator.webhooks, "admin"),
    Operation("POST", "/v1/webhooks/{id:path}/replay", operator.replay, "admin"),
    Operation("GET", "/health", operator.health, None),
)


def app_of(door: Door) -> ASGIApp:
    """The whole door as an ASGI application, which closes the door's services when it ends."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await door.aclose()

    app = Starlette(
        routes=[operation.route() for operation in OPERATIONS],
        lifespan=lifespan,
        exception_handlers={
            BlipqError: answer,
            Problem: answer,
            HTTPException: answer,
            Exception: answer,
        },
    )
    app.state.door = door
    return Gate(app, door)
