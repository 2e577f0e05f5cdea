"""Commands for webhooks: the process that sends them, and looking after what it could not send."""

import asyncio
import json
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blipq.cli.terminal.group import Group
from blipq.cli.terminal.output import (
    JsonOption,
    act_on_each,
    connected,
    errors,
    out,
    print_detail,
    reported,
)
from blipq.client.sync_client import Client
from blipq.errors import InvalidRequest
from blipq.exporter import ANYWHERE
from blipq.program import blipq
from blipq.redaction import redacted
from blipq.settings import Settings
from blipq.submission import checked

if TYPE_CHECKING:
    from blipq.webhooks.outbox import Outbox
    from blipq.webhooks.response import Answer

app = Group("Outcomes by signed webhook.")
secret = Group("Secrets that sign webhooks.")
app.add_typer(secret, name="secret")


@app.command("run")
def run(
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port of /metrics; none by default.")
    ] = None,
    metrics_host: Annotated[
        str, typer.Option(help="Address that this port is open at, such as 127.0.0.1.")
    ] = ANYWHERE,
) -> None:
    """Send webhooks until SIGTERM. Any number may run; they share the work.

    With BLIPQ_CELLS it sends those of all cells, and with BLIPQ_CELL those of one.

    Examples:
        BLIPQ_WEBHOOK_SECRETS=whsec_... blipq webhooks run
    """
    from blipq.webhooks import sender

    with reported():
        sender.run(checked(Settings), metrics_port=metrics_port, metrics_host=metrics_host)


@app.command("test")
def try_(
    url: Annotated[str, typer.Argument(help="Where to post an event of the type blipq.test.")],
    as_json: JsonOption = False,
) -> None:
    """Post a signed test event, as a sender on this machine would. Exit code 1 unless it is 2xx.

    Examples:
        blipq webhooks test https://example.org/hook
    """
    with reported(as_json):
        answer = asyncio.run(_post_test(checked(Settings), url))
    if as_json:
        print(json.dumps({"outcome": answer.outcome, "detail": answer.detail}))
    else:
        out.print(f"{answer.outcome}: {answer.detail}", markup=False)
    raise typer.Exit(0 if answer.outcome == "delivered" else 1)


async def _post_test(settings: Settings, url: str) -> "Answer":
    from blipq.ssrf.http import GuardedHttp
    from blipq.webhooks.delivery import signed_headers, trial_body
    from blipq.webhooks.response import post

    secrets = _secrets(settings)
    now = datetime.now(UTC)
    body = trial_body(now)
    http = GuardedHttp(settings.webhook_policy, timeout_s=settings.webhook_timeout_s)
    try:
        headers = signed_headers(f"msg_{uuid.uuid4().hex}", body, secrets, now=now)
        return await post(http, url, headers, body)
    finally:
        http.close()


@app.command("list")
def list_(
    dead: Annotated[bool, typer.Option("--dead", help="Those that were given up.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="At most this many.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """List events that wait to be sent, or were given up, and count what came of all attempts.

    Times are UTC.

    Examples:
        blipq webhooks list --dead
    """
    with connected(as_json) as client:
        outbox = _outbox(client)
        events = [_shown(event) for event in outbox.listed(dead=dead, limit=limit)]
        counted: dict[str, Any] = {
            "pending": outbox.pending(),
            "dead": outbox.dead(),
            "attempts": outbox.counts(),
            "senders": list(outbox.senders()),
        }
    if as_json:
        print(json.dumps({**counted, "events": events}))
        return
    for event in events:
        _show(event)
    attempts = ", ".join(f"{number} {outcome}" for outcome, number in counted["attempts"].items())
    summary = f"{counted['pending']} pending, {counted['dead']} dead, "
    summary += f"{len(counted['senders'])} senders; attempts: {attempts or 'none'}"
    errors.print(summary, style="dim")


def _shown(event: dict[str, Any]) -> dict[str, Any]:
    """Without the tokens that URLs of receivers carry."""
    texts = {name: redacted(text) for name, text in event.items() if isinstance(text, str)}
    return {**event, **texts}


def _show(event: dict[str, Any]) -> None:
    """Two lines: which event and when, and what came of it where."""
    at = datetime.fromtimestamp(event.get("dead_at") or event["due_at"], UTC)
    out.print(f"{at:%m-%d %H:%M:%S}  {event['event']}", markup=False)
    detail = f"attempts {event['attempts']}"
    detail += f", {event['outcome']}: {event['detail']}" if "outcome" in event else ""
    print_detail(f"{detail}  {event['url']}")


@app.command("replay")
def replay(
    ids: Annotated[
        list[str], typer.Argument(metavar="ID...", help="An event, a webhook-id or a job's id.")
    ],
) -> None:
    """Send events again, under the same webhook-id: dead, waiting, or the end of a kept job.

    Examples:
        blipq webhooks replay job_0197f2a0-5c7e-7d3b-9a51-3c1d6e0f4a2b
    """
    with connected() as client:
        outbox = _outbox(client)

        def again(id: str) -> bool:
            events = outbox.replay(id)
            for event in events:
                out.print(f"{event}: queued", markup=False)
            return bool(events)

        act_on_each(ids, again, "no event {}: never posted, or past its retention")


@secret.command("new")
def new() -> None:
    """Print a new secret. Put it first in BLIPQ_WEBHOOK_SECRETS, and give it to receivers.

    Examples:
        blipq webhooks secret new
    """
    from blipq.webhooks.delivery import new_secret

    print(new_secret())


@secret.command("of")
def of_tenant(
    tenant: Annotated[str, typer.Argument(help="A tenant, such as shop.")],
) -> None:
    """Print a tenant's own secrets, the newest first, which are derived from BLIPQ_WEBHOOK_SECRETS.

    Examples:
        blipq webhooks secret of shop
    """
    from blipq.ledger.codec import check_tenant
    from blipq.webhooks.delivery import tenant_secret

    with reported():
        check_tenant(tenant)
        for each in _secrets(checked(Settings)):
            print(tenant_secret(each, tenant))


def _secrets(settings: Settings) -> list[str]:
    """Those of the deployment. Raises InvalidRequest without one."""
    if not settings.webhook_secrets:
        new = blipq("webhooks secret new")
        raise InvalidRequest(f"no secret to sign with: set BLIPQ_WEBHOOK_SECRETS as `{new}` shows")
    return [each.get_secret_value() for each in settings.webhook_secrets]


def _outbox(client: Client) -> "Outbox":
    from blipq.webhooks.cells import outbox_of

    return outbox_of(client.ledger)
