"""A job's call as curl and as Python, to be copied: texts of strangers are quoted for each."""

import json
import shlex
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from blipq.contract import JobInfo
from blipq_api.console.errors import path_in

#: A longer one is no help to read.
_LONGEST = 4000


@dataclass(frozen=True, slots=True)
class Snippets:
    """The texts."""

    curl: str
    python: str

    @classmethod
    def of(cls, request: Request, info: JobInfo, asked: dict[str, Any]) -> "Snippets | None":
        """The call that submits the same again. None where that is too long to be read."""
        body = _body(info, asked)
        made = cls(_curl(request, body), _python(info, body))
        return made if max(len(made.curl), len(made.python)) <= _LONGEST else None


def _body(info: JobInfo, asked: dict[str, Any]) -> dict[str, Any]:
    body = {"kind": str(info.kind), **asked}
    image = body.get("image")
    if isinstance(image, dict):  # of a URL the query may hold a signature
        image = image if str(image.get("uri", "")).startswith("s3://") else {"uri": info.image}
        body["image"] = image["uri"] if len(image) == 1 else image
    if info.model != "default":
        body["options"] = {"model": info.model}
    return body


def _curl(request: Request, body: dict[str, Any]) -> str:
    url = request.url
    prefix = request.url.path.removesuffix(path_in(request.scope))
    target = f"{url.scheme}://{url.netloc}{prefix}/v1/jobs?wait=30"
    key = '  -H "Authorization: Bearer $BLIPQ_KEY" \\\n'
    return (
        f"curl {shlex.quote(target)} \\\n"
        f"{key if request.state.session.caller.key else ''}"
        f"  -H 'Content-Type: application/json' \\\n"
        f"  -d {shlex.quote(json.dumps(body))}"
    )


def _python(info: JobInfo, body: dict[str, Any]) -> str:
    fields = {name: value for name, value in body.items() if name not in ("kind", "options")}
    if isinstance(fields.get("image"), dict):
        fields["image"] = _ImageRef(fields["image"])
    if isinstance(info.metadata, dict) and info.model != "default":
        fields["model"] = info.model
    arguments = "".join(f"        {name}={value!r},\n" for name, value in fields.items())
    imported = "Client, ImageRef" if isinstance(fields.get("image"), _ImageRef) else "Client"
    return (
        f"from blipq import {imported}\n\n"
        f"with Client() as client:\n"
        f"    job = client.{info.kind}(\n{arguments}    )\n"
        f"    print(job.result(timeout=60))"
    )


class _ImageRef:
    """A reference with a version, as Python has it."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def __repr__(self) -> str:
        return f"ImageRef({', '.join(f'{name}={value!r}' for name, value in self._fields.items())})"
