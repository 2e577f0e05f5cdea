"""Errors as callers of the door read them: RFC 9457, with stable codes."""

import json
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from blipq.errors import (
    BlipqError,
    IdempotencyConflict,
    InvalidRequest,
    JobCancelled,
    JobEnded,
    JobExpired,
    JobFailed,
    JobNotFound,
    QueueFull,
    QueueUnavailable,
    ResultTimeout,
    TenantLimited,
    UnknownModel,
)
from blipq.redaction import redacted

MEDIA_TYPE = "application/problem+json"

#: The most specific class of an error decides.
_OF_ERRORS: dict[type[BlipqError], tuple[int, str]] = {
    IdempotencyConflict: (409, "idempotency_conflict"),
    UnknownModel: (422, "unknown_model"),
    InvalidRequest: (422, "invalid_request"),
    QueueUnavailable: (503, "queue_unavailable"),
    TenantLimited: (429, "tenant_limited"),
    QueueFull: (429, "queue_full"),
    JobNotFound: (404, "job_not_found"),
    ResultTimeout: (409, "job_open"),
    JobFailed: (409, "job_failed"),
    JobCancelled: (409, "job_cancelled"),
    JobExpired: (409, "job_expired"),
    JobEnded: (409, "job_ended"),
}
#: Of what the router refuses itself.
_OF_STATUS = {400: "bad_request", 404: "not_found", 405: "method_not_allowed"}
RETRY_AFTER_S = 1.0


class Problem(Exception):
    """An answer that is an error. ``more``: further members of its body."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})
        self.more = more

    @property
    def detail(self) -> str:
        """What is wrong, without the secrets of URLs that it names."""
        return redacted(str(self))

    def body(self, request_id: str) -> dict[str, Any]:
        """The members of the problem."""
        return {
            "type": f"urn:problem:blipq:{self.code}",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            "retryable": self.retry_after_s is not None,
            "request_id": request_id,
            **self.more,
        }

    def response(self, request_id: str) -> Response:
        headers = dict(self.headers)
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(math.ceil(self.retry_after_s))
        text = json.dumps(self.body(request_id))
        return Response(text, self.status, headers, MEDIA_TYPE)


#: What the router says in two words.
_OF_ROUTER = {
    404: "there is no such path: /docs and /openapi.json have all",
    405: "this path does not take this method: the header Allow has those that it takes",
}


def problem_of(error: BaseException) -> Problem:
    """An error of blipq's, or of the router's, as an answer."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, HTTPException):
        code = _OF_STATUS.get(error.status_code, "bad_request")
        detail = _OF_ROUTER.get(error.status_code, error.detail)
        return Problem(error.status_code, code, detail, headers=error.headers)
    kinds = type(error).__mro__
    found = next((_OF_ERRORS[kind] for kind in kinds if kind in _OF_ERRORS), None)
    if found is None:
        return Problem(500, "internal", "the door failed: its log has the cause")
    status, code = found
    retry = RETRY_AFTER_S if status in (429, 503) else None
    job_id = getattr(error, "job_id", None)
    more = {} if job_id is None else {"job_id": job_id}
    if isinstance(error, JobFailed):
        more["error_code"] = error.code
    if isinstance(error, TenantLimited):
        return _limited(error, status, code)
    return Problem(status, code, str(error), retry_after_s=retry, **more)


def _limited(error: TenantLimited, status: int, code: str) -> Problem:
    """A limit of the caller's tenant, which all of its keys share."""
    headers = {"RateLimit-Limit": f"{error.most:.10g}", "RateLimit-Remaining": "0"}
    more = {"tenant": error.tenant, "limit": error.limit, "most": error.most}
    return Problem(
        status, code, str(error), retry_after_s=error.retry_after_s, headers=headers, **more
    )
