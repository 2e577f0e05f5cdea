"""Where jobs may read and write: what workers enforce, and what producers can know beforehand."""

import logging
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from blipq.contract import ImageRef, split_s3_uri
from blipq.errors import QueueUnavailable
from blipq.ledger.operator import OperatorLedger
from blipq.settings import Settings

log = logging.getLogger(__name__)

VARIABLE = "BLIPQ_ALLOWED_OUTPUTS"
#: The bucket of a local stack that `output` may write, unless the variable names others.
LOCAL_BUCKET = "blipq-outputs"


def is_allowed(bucket: str, key: str, allowed: Sequence[str]) -> bool:
    """Whether an object may be read: in one of these buckets or folders; any if none is named."""
    return not allowed or (".." not in key.split("/") and _is_in(f"{bucket}/{key}", allowed))


def why_refused(
    uri: str, allowed: Sequence[str], settings: Settings, source: ImageRef | None = None
) -> str | None:
    """Why a job may not write its ``output`` there, or None. It may write nowhere if none is named.

    The inbox and the indexes are never written, whatever is allowed, nor is the job's own image.
    """
    if (why := never(uri, settings, source)) is not None:
        return why
    if not allowed:
        return f"{uri}: no outputs are allowed ({VARIABLE} names no bucket)"
    if not all(_is_in(spelling, allowed) for spelling in _spellings(*split_s3_uri(uri))):
        return f"{uri} is outside {VARIABLE} ({', '.join(allowed)})"
    return None


def never(uri: str, settings: Settings, source: ImageRef | None = None) -> str | None:
    """Why no worker writes there, or None."""
    bucket, key = split_s3_uri(uri)
    spellings = _spellings(bucket, key)
    if ".." in key.split("/"):  # a server that tidies paths up would leave the folder
        return f"{uri} has a part that is '..'"
    if bucket == settings.inbox_bucket:
        return f"{uri} is in the inbox, which holds uploads alone"
    if settings.indexes.startswith("s3://") and lies_in(uri, settings.indexes):
        return f"{uri} is among the search indexes ({settings.indexes})"
    if source is not None and source.in_s3 and _spellings(source.bucket, source.key) & spellings:
        return f"{uri} is the image that the job is about"
    return None


def lies_in(uri: str, folder: str) -> bool:
    """Whether an object is in a folder (``s3://bucket/prefix``), however it is spelled."""
    place = folder.removeprefix("s3://")
    return any(_is_in(spelling, [place]) for spelling in _spellings(*split_s3_uri(uri)))


def _spellings(bucket: str, key: str) -> set[str]:
    """The place as it is written, and as a server that tidies paths up understands it."""
    return {f"{bucket}/{key}", bucket + posixpath.normpath(f"/{key.lstrip('/')}")}


def _is_in(place: str, folders: Sequence[str]) -> bool:
    return any(place.startswith(each.rstrip("/") + "/") for each in folders)


def live_workers(operator: OperatorLedger) -> dict[str, dict[str, Any]]:
    """The live workers by name; none while Redis does not answer."""
    try:
        return operator.workers()
    except QueueUnavailable as error:
        log.warning("outputs are not judged beforehand: %s", error)
        return {}


def allowed_by(workers: Mapping[str, Mapping[str, Any]], model: str) -> Iterator[list[str]]:
    """Where each live worker of a model reports that it may write. Older workers do not."""
    for worker in workers.values():
        if model in worker.get("models", ()) and "outputs" in worker:
            yield worker["outputs"]


def why_all_refuse(
    uri: str,
    model: str,
    workers: Mapping[str, Mapping[str, Any]],
    settings: Settings,
    source: ImageRef | None = None,
) -> str | None:
    """Why every live worker of a model would refuse an ``output``, as far as they report; or None.

    Where only some of them would, that is logged: each of their jobs fails.
    """
    if (why := never(uri, settings, source)) is not None:
        return why
    reasons = [why_refused(uri, allowed, settings) for allowed in allowed_by(workers, model)]
    refusals = [reason for reason in reasons if reason is not None]
    if refusals and len(refusals) == len(reasons):
        return f"the workers of {model!r} refuse it: {refusals[0]}"
    if refusals:
        log.warning("some workers of %r refuse an output: %s", model, refusals[0])
    return None
