"""blipq: asynchronous BLIP-2 jobs over a message queue. This is the producers' side."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blipq.client.async_client import AsyncClient
    from blipq.client.job import AsyncJob, Job
    from blipq.client.sync_client import Client
    from blipq.contract import (
        Array,
        Caption,
        CaptionRequest,
        CaptionResult,
        Choice,
        DescribeRequest,
        DescribeResult,
        EmbedRequest,
        EmbedResult,
        ErrorCode,
        Generation,
        Hit,
        ImageRef,
        IndexEntry,
        JobError,
        JobFilter,
        JobInfo,
        Kind,
        MatchRequest,
        MatchResult,
        Options,
        Priority,
        Receipt,
        SearchRequest,
        SearchResult,
        Skipped,
        Status,
        Turn,
        VQARequest,
        VQAResult,
        Webhook,
    )
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
        SubmitStopped,
        TenantLimited,
        UnknownModel,
    )
    from blipq.settings import Settings
    from blipq.submission import Submission

__version__ = "0.1.0"

__all__ = [
    "Array",
    "AsyncClient",
    "AsyncJob",
    "BlipqError",
    "Caption",
    "CaptionRequest",
    "CaptionResult",
    "Choice",
    "Client",
    "DescribeRequest",
    "DescribeResult",
    "EmbedRequest",
    "EmbedResult",
    "ErrorCode",
    "Generation",
    "Hit",
    "IdempotencyConflict",
    "ImageRef",
    "IndexEntry",
    "InvalidRequest",
    "Job",
    "JobCancelled",
    "JobEnded",
    "JobError",
    "JobExpired",
    "JobFailed",
    "JobFilter",
    "JobInfo",
    "JobNotFound",
    "Kind",
    "MatchRequest",
    "MatchResult",
    "Options",
    "Priority",
    "QueueFull",
    "QueueUnavailable",
    "Receipt",
    "ResultTimeout",
    "SearchRequest",
    "SearchResult",
    "Settings",
    "Skipped",
    "Status",
    "Submission",
    "SubmitStopped",
    "TenantLimited",
    "Turn",
    "UnknownModel",
    "VQARequest",
    "VQAResult",
    "Webhook",
]

#: Where the names are that are not in ``blipq.contract`` or ``blipq.errors``.
_ELSEWHERE = {
    "AsyncClient": "blipq.client.async_client",
    "AsyncJob": "blipq.client.job",
    "Client": "blipq.client.sync_client",
    "Job": "blipq.client.job",
    "Settings": "blipq.settings",
    "Submission": "blipq.submission",
}


def __getattr__(name: str) -> Any:
    """Each name is imported when it is used first: `blipq --version` needs none of them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    errors = import_module("blipq.errors")
    home = _ELSEWHERE.get(name, "blipq.errors" if hasattr(errors, name) else "blipq.contract")
    value = globals()[name] = getattr(import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
