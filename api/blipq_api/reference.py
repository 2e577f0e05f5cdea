"""What the door answers, as OpenAPI 3.1 made from the contract, and as a page."""

import html
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from blipq import __version__, contract
from blipq.contract import Kind, Status
from blipq_api.door import Operation
from blipq_api.routes.uploads import Presigned, PresignRequest, Uploaded

_REF = "#/components/schemas/"
_REQUESTS: tuple[type[BaseModel], ...] = (
    contract.CaptionRequest,
    contract.VQARequest,
    contract.MatchRequest,
    contract.EmbedRequest,
    contract.DescribeRequest,
    contract.SearchRequest,
)
_INPUTS: tuple[type[BaseModel], ...] = (*_REQUESTS, contract.Options, PresignRequest)
_OUTPUTS: tuple[type[BaseModel], ...] = (contract.JobInfo, Uploaded, Presigned)

_ENDS = (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED, Status.EXPIRED)
#: What every operation may answer, and what those with a body may.
_ALWAYS = ("400", "401", "403", "408", "413", "421", "422", "429", "503")
_PROBLEMS = {
    "400": "The body is no JSON.",
    "401": "No key, or none of this door's.",
    "403": "The key does not allow it, or a page of another site sent it.",
    "404": "There is no such job or event for the caller.",
    "408": "The body did not come in time.",
    "409": "The id or idempotency key belongs to another request, or the job's state forbids it.",
    "413": "The body is too large.",
    "415": "The body's type is none of those listed.",
    "421": "A door without keys was addressed by a foreign name.",
    "422": "A field or parameter is wrong: the detail names it.",
    "429": "The key or its tenant has used up its rate or its share, too many jobs are open, or "
    "too many wrong keys came from this address.",
    "503": "Redis or S3 does not answer, or the door is busy: Retry-After is the time to wait.",
}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF + name}


def _of(name: str, **values: Any) -> dict[str, Any]:
    return {"type": name, **values}


def _object(required: list[str] | None = None, /, **properties: Any) -> dict[str, Any]:
    needed = [*properties] if required is None else required
    return {"type": "object", "properties": properties, "required": needed}


_TEXT = _of("string")
_COUNT = _of("integer", minimum=0)


def _parameter(name: str, where: str, schema: Any, text: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": where,
        "required": where == "path",
        "schema": schema,
        "description": text,
    }


_ID = _parameter("id", "path", _of("string", minLength=1, maxLength=128), "The job's id.")
_WAIT = (
    _parameter(
        "wait",
        "query",
        _of("integer", minimum=0, maximum=1_000_000),
        ("Seconds to wait for the job's end, 60 at the most."),
    ),
    _parameter("Prefer", "header", _TEXT, "`wait=30` is the same as the query's."),
)
_KEY = _parameter(
    "Idempotency-Key",
    "header",
    _of("string", minLength=1, maxLength=255),
    ("The same key with the same body is the same job; with another body it is a 409."),
)
_TRACE = _parameter(
    "Traceparent", "header", _TEXT, "W3C's place in a trace: the job's spans are below it."
)
_LIMIT = _parameter("limit", "query", _of("integer", minimum=1, maximum=500), "The most to list.")
_CURSOR = _parameter("cursor", "query", _TEXT, "`next_cursor` of the page before.")
_TIME = _of("string", format="date-time")
_LISTING = (
    _LIMIT,
    _CURSOR,
    _parameter("status", "query", _of("string", enum=[*Status]), "Only with this status."),
    _parameter("kind", "query", _of("string", enum=[*Kind]), "Only of this kind."),
    _parameter("model", "query", _TEXT, "Only of this served model."),
    _parameter("tenant", "query", _TEXT, "Only of this tenant."),
    _parameter("since", "query", _TIME, "Only submitted at this time or later."),
    _parameter("until", "query", _TIME, "Only submitted before this time."),
    {
        **_parameter(
            "metadata",
            "query",
            _of("object", additionalProperties=_TEXT),
            ("`metadata.NAME=VALUE`: only with this metadata."),
        ),
        "style": "form",
        "explode": True,
        "x-names": "metadata.NAME",
    },
)


def _json(schema: Any, text: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


_JOB_ENDED = _json(_ref("JobInfo"), "The job, which has ended.")
_JOB_OPEN = _json(_ref("JobInfo"), "The job, which is open.")
_ACCEPTED = {
    **_json({"anyOf": [_ref("Accepted"), _ref("JobInfo")]}, "The job is recorded."),
    "headers": {"Location": {"schema": _TEXT, "description": "Where to look the job up."}},
}
_LINES = {
    "description": "An answer for each line: its number, custom_id, and id or error.",
    "content": {"application/x-ndjson": {"schema": _TEXT}},
}
_IMAGE = _of("string", format="binary")
_BODY = {"application/json": {"schema": _ref("Job")}}

#: By method and path: parameters, types of the body, answers, and problems beside the usual ones.
_Described = tuple[tuple[Any, ...], dict[str, Any], dict[str, Any], tuple[str, ...]]
_OPERATIONS: dict[tuple[str, str], _Described] = {
    ("POST", "/v1/jobs"): (
        (_KEY, _TRACE, *_WAIT),
        _BODY,
        {"200": _JOB_ENDED, "202": _ACCEPTED},
        ("409", "415"),
    ),
    ("PUT", "/v1/jobs/{id}"): (
        (_ID, _KEY, _TRACE, *_WAIT),
        _BODY,
        {"200": _JOB_ENDED, "202": _ACCEPTED},
        ("404", "409", "415"),
    ),
    ("GET", "/v1/jobs"): (_LISTING, {}, {"200": _json(_ref("JobPage"), "A page of jobs.")}, ()),
    ("GET", "/v1/jobs/{id}"): ((_ID, *_WAIT), {}, {"200": _JOB_ENDED, "202": _JOB_OPEN}, ("404",)),
    ("DELETE", "/v1/jobs/{id}"): ((_ID,), {}, {"200": _JOB_ENDED}, ("404",)),
    ("GET", "/v1/jobs/{id}/result"): (
        (_ID, *_WAIT),
        {},
        {"200": _json(_ref("Result"), "The result."), "202": _JOB_OPEN},
        ("404", "409"),
    ),
    ("GET", "/v1/jobs/{id}/events"): (
        (
            _ID,
            _parameter(
                "Last-Event-ID",
                "header",
                _of("integer", minimum=-1, maximum=999_999_999),
                "The number of the last event that was received.",
            ),
        ),
        {},
        {
            "200": {
                "description": "The job's stages, as server-sent events; the schema is of each.",
                "content": {"text/event-stream": {"schema": _ref("Event")}},
            },
            "204": {"description": "The job has ended, and all was sent."},
        },
        ("404",),
    ),
    ("POST", "/v1/jobs/{id}/cancel"): ((_ID,), {}, {"200": _JOB_ENDED}, ("404",)),
    ("POST", "/v1/jobs/{id}/retry"): ((_ID,), {}, {"202": _JOB_OPEN}, ("404", "409")),
    ("POST", "/v1/jobs/{id}/forget"): (
        (_ID,),
        {},
        {
            "200": _json(
                _ref("Forgotten"), "It is erased; `left`: what may still be there, and why."
            )
        },
        ("404", "409"),
    ),
    ("POST", "/v1/batches"): (
        (),
        {
            "application/x-ndjson": {"schema": _TEXT},
            "application/json": {"schema": _object(manifest=_TEXT)},
        },
        {"200": _LINES},
        ("415",),
    ),
    ("POST", "/v1/uploads"): (
        (),
        {
            "application/json": {"schema": _ref("PresignRequest")},
            "application/octet-stream": {"schema": _IMAGE},
            "image/*": {"schema": _IMAGE},
            "multipart/form-data": {"schema": _object(file=_IMAGE)},
        },
        {
            "201": _json(
                {"anyOf": [_ref("Uploaded"), _ref("Presigned")]},
                "The image's URI, or how to put it.",
            )
        },
        ("415",),
    ),
    ("GET", "/v1/models"): (
        (),
        {},
        {
            "200": _json(
                _object(
                    models=_of(
                        "array", items=_object(name=_TEXT, live_workers=_COUNT, waiting=_COUNT)
                    )
                ),
                "The served models.",
            )
        },
        (),
    ),
    ("GET", "/v1/queues"): (
        (),
        {},
        {
            "200": _json(
                _object(
                    open=_COUNT,
                    running=_COUNT,
                    delayed=_COUNT,
                    queues=_of(
                        "array",
                        items=_object(
                            ["queue", "waiting", "live_workers"],
                            queue=_TEXT,
                            waiting=_COUNT,
                            live_workers=_COUNT,
                            oldest_s=_of("number"),
                        ),
                    ),
                ),
                "The queues.",
            )
        },
        (),
    ),
    ("GET", "/v1/workers"): (
        (),
        {},
        {
            "200": _json(
                _object(workers=_of("array", items=_object(name=_TEXT))), "The live workers."
            )
        },
        (),
    ),
    ("GET", "/v1/actions"): (
        (_LIMIT, _CURSOR),
        {},
        {"200": _json(_ref("ActionPage"), "A page of the log of actions.")},
        (),
    ),
    ("GET", "/v1/webhooks"): (
        (_LIMIT, _parameter("dead", "query", _of("boolean"), "Those that were given up.")),
        {},
        {"200": _json(_object(events=_of("array", items=_of("object"))), "Events.")},
        (),
    ),
    ("POST", "/v1/webhooks/{id}/replay"): (
        (_parameter("id", "path", _of("string", minLength=1), "An event, a webhook-id or a job."),),
        {},
        {"202": _json(_object(events=_of("array", items=_TEXT)), "They are queued.")},
        ("404",),
    ),
    ("GET", "/health"): ((), {}, {"200": _json(_object(status=_TEXT), "The ledger answers.")}, ()),
}

_EXAMPLE = {
    "kind": "vqa",
    "image": "s3://photos/cat.jpg",
    "questions": ["what color is the cat?"],
    "options": {"expires_in": "10m", "metadata": {"order": "42"}},
}


def document(operations: Iterable[Operation]) -> dict[str, Any]:
    """The description of a door with these operations."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        path = operation.path.replace(":path", "")
        if (described := _OPERATIONS.get((operation.method, path))) is not None:
            text = " ".join((operation.handler.__doc__ or "").split())
            entry = _operation(described, operation.scope, text)
            paths.setdefault(path, {})[operation.method.lower()] = entry
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "blipq",
            "version": __version__,
            "description": "Asynchronous BLIP-2 jobs: captions, answers, matches and search.",
        },
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(described: _Described, scope: str | None, text: str) -> dict[str, Any]:
    parameters, bodies, answers, problems = described
    entry: dict[str, Any] = {"summary": text.partition(". ")[0].rstrip("."), "description": text}
    if parameters:
        entry["parameters"] = [_without_x(each) for each in parameters if "x-names" not in each]
    if bodies:
        entry["requestBody"] = {"required": True, "content": bodies}
    codes = sorted({*_ALWAYS, *problems})
    entry["responses"] = answers | {code: _problem(code) for code in codes}
    if scope is not None:
        entry["security"] = [{"key": []}, {}]
        entry["description"] += f" Needs the scope `{scope}` where the door has keys."
    return entry


def _without_x(parameter: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameter.items() if not name.startswith("x-")}


def _problem(code: str) -> dict[str, Any]:
    content = {"application/problem+json": {"schema": _ref("Problem")}}
    return {"description": _PROBLEMS[code], "content": content}


def _schemas() -> dict[str, Any]:
    """The contract's models, and the door's own shapes."""
    inputs = [(model, "validation") for model in _INPUTS]
    outputs = [(model, "serialization") for model in _OUTPUTS]
    _, found = models_json_schema([*inputs, *outputs], ref_template=_REF + "{model}")  # type: ignore[list-item]
    schemas: dict[str, Any] = dict(found["$defs"])
    results = schemas["JobInfo"]["properties"]["result"]["anyOf"][0]
    return {
        **schemas,
        **dict(_jobs(schemas)),
        "Result": results,
        "Job": {
            "oneOf": [_ref(_job_name(model)) for model in _REQUESTS],
            "discriminator": {
                "propertyName": "kind",
                "mapping": {
                    str(model.model_fields["kind"].default): _REF + _job_name(model)
                    for model in _REQUESTS
                },
            },
            "examples": [_EXAMPLE],
        },
        "Accepted": _object(
            **dict.fromkeys(("id", "status_url", "result_url", "events_url"), _TEXT),
            cancel_url=_TEXT,
        ),
        "JobPage": _object(
            ["jobs", "read"],
            jobs=_of("array", items=_ref("JobInfo")),
            read=_of("integer"),
            next_cursor=_TEXT,
            next_from=_TIME,
        ),
        "Forgotten": _object(
            jobs=_of("array", items=_TEXT),
            events=_COUNT,
            objects=_of("array", items=_TEXT),
            entries=_COUNT,
            left=_of("array", items=_TEXT),
        ),
        "Event": _object(
            ["event", "data"],
            id=_TEXT,
            event=_of("string", enum=["queued", "running", "retrying", *_ENDS, "closed"]),
            data=_TEXT,
        ),
        "ActionPage": _object(
            ["actions"],
            actions=_of(
                "array",
                items=_object(
                    at=_TIME,
                    count=_COUNT,
                    **dict.fromkeys(("id", "name", "via", "action", "target"), _TEXT),
                ),
            ),
            next_cursor=_TEXT,
        ),
        "Problem": _object(
            ["type", "title", "status", "detail", "code", "retryable", "request_id"],
            type=_TEXT,
            title=_TEXT,
            status=_of("integer"),
            detail=_TEXT,
            code=_TEXT,
            retryable=_of("boolean"),
            request_id=_TEXT,
            job_id=_TEXT,
            error_code=_TEXT,
        ),
    }


def _jobs(schemas: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each request with ``options`` beside its fields: what a body holds."""
    for model in _REQUESTS:
        request = schemas[model.__name__]
        properties = {**request["properties"], "options": _ref("Options")}
        required = ["kind", *(each for each in request.get("required", ()) if each != "kind")]
        yield _job_name(model), {**request, "properties": properties, "required": required}


def _job_name(model: type[BaseModel]) -> str:
    return model.__name__.replace("Request", "Job")


async def openapi(request: Request) -> Response:
    """The description as JSON."""
    return Response(json.dumps(request.app.state.document), media_type="application/json")


async def docs(request: Request) -> Response:
    """The description as a page, which loads nothing from elsewhere."""
    return HTMLResponse(page(request.app.state.document))


async def style(request: Request) -> Response:
    """The page's style."""
    return Response(STYLE, media_type="text/css")


STYLE = """\
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; font-size: 1.1rem; }
h2 span { display: inline-block; min-width: 4.5rem; color: #0a7; }
code, pre { font-family: ui-monospace, monospace; font-size: 0.9rem; }
pre { padding: 1rem; overflow-x: auto; border: 1px solid #8886; border-radius: 6px; }
td { padding: 0.1rem 1.5rem 0.1rem 0; vertical-align: top; }
"""


def page(document: dict[str, Any]) -> str:
    """The whole page. All text in it is ours, and is escaped all the same."""
    parts = [_HEAD]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            name = html.escape(f"{method.upper()} {path}")
            parts.append(f'<h2 id="{name}"><span>{method.upper()}</span> {html.escape(path)}</h2>')
            parts.append(f"<p>{_code(operation['description'])}</p>")
            parts.append(
                _table(
                    "Parameters",
                    [
                        (each["name"], each["description"])
                        for each in operation.get("parameters", ())
                    ],
                )
            )
            bodies = operation.get("requestBody", {}).get("content", {})
            parts.append(_table("Bodies", [(each, "") for each in bodies]))
            answers = operation["responses"]
            parts.append(
                _table(
                    "Answers", [(code, answers[code]["description"]) for code in sorted(answers)]
                )
            )
    parts.append("<h2>Shapes</h2>")
    for name, schema in sorted(document["components"]["schemas"].items()):
        text = html.escape(json.dumps(schema, indent=1))
        parts.append(f"<details><summary><code>{name}</code></summary><pre>{text}</pre></details>")
    return "\n".join(parts) + "\n"


_HEAD = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>blipq: the HTTP door</title>
<link rel="stylesheet" href="docs/style.css">
<h1>blipq: the HTTP door</h1>
<p>The same in JSON: <a href="openapi.json">openapi.json</a>.</p>"""


def _table(title: str, lines: list[tuple[str, str]]) -> str:
    if not lines:
        return ""
    rows = "".join(
        f"<tr><td><code>{html.escape(name)}</code></td><td>{_code(text)}</td></tr>"
        for name, text in lines
    )
    return f"<h3>{title}</h3><table>{rows}</table>"


def _code(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
