"""The routes of the door."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp

from blipq.errors import BlipqError
from blipq_api import events, reference
from blipq_api.console import errors, routes
from blipq_api.door import Door, Operation
from blipq_api.gate import Gate
from blipq_api.problems import Problem
from blipq_api.routes import batches, jobs, operator, uploads

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
    Operation("POST", "/v1/batches", batches.submit, "submit"),
    Operation("POST", "/v1/uploads", uploads.upload, "submit"),
    Operation("GET", "/v1/models", operator.models, "read"),
    Operation("GET", "/v1/queues", operator.queues, "read"),
    Operation("GET", "/v1/workers", operator.workers, "admin"),
    Operation("GET", "/v1/actions", operator.actions, "admin"),
    Operation("GET", "/v1/webhooks", operator.webhooks, "admin"),
    Operation("POST", "/v1/webhooks/{id:path}/replay", operator.replay, "admin"),
    Operation("GET", "/health", operator.health, None),
    Operation("GET", "/openapi.json", reference.openapi, None),
    Operation("GET", "/docs", reference.docs, None),
    Operation("GET", "/docs/style.css", reference.style, None),
)


def app_of(door: Door) -> ASGIApp:
    """The whole door as an ASGI application, which closes the door's services when it ends."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await door.aclose()

    app = Starlette(
        routes=[
            *(Route(each.path, each.answer, methods=[each.method]) for each in OPERATIONS),
            *(Route(each.path, each.answer, methods=[each.method]) for each in routes.PAGES),
        ],
        lifespan=lifespan,
        exception_handlers={
            BlipqError: errors.handle,
            Problem: errors.handle,
            HTTPException: errors.handle,
            Exception: errors.handle,
        },
    )
    app.state.door = door
    app.state.document = reference.document(OPERATIONS)
    return Gate(app, door)
