"""The checks in their order, and what keeps one that breaks from ending the others."""

import socket
from collections.abc import Callable, Generator

from blipq.ops.doctor.canary import check_canary
from blipq.ops.doctor.findings import Finding, Findings
from blipq.ops.doctor.machine import check_machine
from blipq.ops.doctor.redis import check_broker, check_redis, check_tls
from blipq.ops.doctor.storage import check_s3
from blipq.ops.doctor.workers import check_queues, check_webhooks, check_workers
from blipq.redaction import redacted
from blipq.settings import Settings


def examine(
    settings: Settings, *, canary: bool = True, torch: bool = False, create_bucket: bool = False
) -> Findings:
    """Every finding, in the order in which a job meets what is checked.

    canary: run a real job. torch: import torch to check CUDA. create_bucket: make the inbox
    bucket if it is missing.
    """
    yield Finding("ok", "endpoints", f"{settings.endpoints}, from {socket.gethostname()}")
    answering = []
    for cell in settings.by_cell.values():
        if (yield from _redis_answers(cell)):
            answering.append(cell)

    def s3(settings: Settings) -> Findings:
        return check_s3(settings, create_bucket=create_bucket)

    seen = yield from _each(settings, "s3", s3)
    uploads = not _is_bad(seen, "s3", "s3 credentials", "s3 write", "s3 conditional write")
    served = False
    for cell in answering:
        seen = yield from _each(cell, "workers", check_workers)
        served = served or all(each.state == "ok" for each in seen if each.check == "workers")
        yield from _each(cell, "queues", check_queues)
        yield from _each(cell, "webhooks", check_webhooks)
    yield from _each(settings, "this machine", lambda _: check_machine(torch))
    if canary and answering and uploads and served:
        yield from _each(settings, "canary", check_canary)
    elif canary:
        message = "not run: it needs Redis, S3 and a live worker of the model 'default'"
        yield Finding("warn", "canary", message)


def _redis_answers(cell: Settings) -> Generator[Finding, None, bool]:
    """What is about one Redis and its broker; returns whether it answers."""
    yield from _each(cell, "tls", check_tls)
    seen = yield from _each(cell, "redis", check_redis)
    if cell.broker_url is not None:
        yield from _each(cell, "broker", check_broker)
    return not _is_bad(seen, "redis")


def _is_bad(seen: list[Finding], *checks: str) -> bool:
    return any(finding.state == "bad" and finding.check in checks for finding in seen)


def _each(
    settings: Settings, check: str, look: Callable[[Settings], Findings]
) -> Generator[Finding, None, list[Finding]]:
    """One group of findings, without secrets; returns them, too."""
    seen: list[Finding] = []
    try:
        for finding in look(settings):
            seen.append(_without_secrets(settings, finding))
            yield seen[-1]
    except Exception as error:  # whatever a check raises is its finding
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        seen.append(_without_secrets(settings, Finding("bad", check, text)))
        yield seen[-1]
    return seen


def _without_secrets(settings: Settings, finding: Finding) -> Finding:
    secrets = settings.secrets
    advice = finding.advice and redacted(finding.advice, secrets)
    message = redacted(finding.message, secrets)
    if settings.cell is not None:
        message = f"cell {settings.cell}: {message}"
    return Finding(finding.state, finding.check, message, advice)
