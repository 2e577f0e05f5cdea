"""Commands that look at many jobs, and at the queues they wait in."""

import json
import time
from enum import StrEnum
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from blipq.cli.terminal.group import Group
from blipq.cli.terminal.output import (
    JsonOption,
    connected,
    errors,
    exit_code_of,
    out,
    print_detail,
    print_jobs,
    print_json,
    status_line,
)
from blipq.contract import Status
from blipq.errors import InvalidRequest
from blipq.ledger.cells.operator import actions_of, operator_of
from blipq.ledger.codec import limits_text
from blipq.ledger.operator import QueueState

app = Group("The queues that jobs wait in.")

_STATUSES = f"Only with this status: {', '.join(Status)}."


def list_(
    status: Annotated[Status | None, typer.Option(metavar="STATUS", help=_STATUSES)] = None,
    model: Annotated[str | None, typer.Option(help="Only of this served model.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most this many.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List jobs, the newest first.

    Each with its picture and its answer, as long as its record is kept. Times are UTC.

    Examples:
        blipq list
        blipq list --status failed --limit 100
        blipq list --status running --model default --json
    """
    with connected(as_json) as client:
        operator = operator_of(client.ledger)
        print_jobs(operator.jobs(status=status, model=model, limit=limit), as_json)


def wait(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="The jobs' ids.")],
    timeout: Annotated[float, typer.Option(help="Longest wait for them all, in seconds.")] = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Wait for jobs to end.

    Exits as `result` does, by the first that did not succeed. With --json, a line of JSON for each.

    Examples:
        blipq wait job_0197f2a0-5c7e-7d3b-9a51-3c1d6e0f4a2b --timeout 600
        blipq wait $(cat ids.txt) --json
    """
    code = 0
    deadline = time.monotonic() + timeout
    with connected(as_json) as client:
        for id in ids:
            info = client.job(id).wait(max(0.0, deadline - time.monotonic()))
            code = code or exit_code_of(info)
            if as_json:
                print_json(info)
            else:
                out.print(status_line(info), markup=False)
    raise typer.Exit(code)


def log(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most this many.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List who did what, the newest first.

    Who cancelled, queued again, dropped, forgot or replayed what in the last 30 days, by a client,
    by commands or by the HTTP door, and how many jobs, events or queues that were. Times are UTC.

    Examples:
        blipq log
        blipq log --limit 1000 --json
    """
    with connected(as_json) as client:
        found = actions_of(client.ledger, limit)
    if as_json:
        print(json.dumps({"actions": [action.as_dict() for action in found]}))
        return
    for each in found:
        done = f"{each.action} {each.count:,}"
        out.print(f"{each.at:%m-%d %H:%M:%S}  {done:<16}  {each.name} ({each.via})", markup=False)
        print_detail(each.target)
    if not found:
        out.print("nothing was done")


class By(StrEnum):
    """What stats are of."""

    QUEUE = "queue"
    TENANT = "tenant"


@app.command("stats")
def stats(
    by: Annotated[
        By, typer.Option(metavar="WHAT", help="queue, or tenant: its open jobs and limits.")
    ] = By.QUEUE,
    as_json: JsonOption = False,
) -> None:
    """Show what waits in each queue, for how long, and how many workers serve it.

    Examples:
        blipq queue stats
        blipq queue stats --json
        blipq queue stats --by tenant
    """
    if by is By.TENANT:
        _tenants(as_json)
        return
    with connected(as_json) as client:
        operator = operator_of(client.ledger)
        queues = operator.queues()
        totals = {
            "open": operator.open_jobs(),
            "running": operator.running(),
            "delayed": operator.delayed(),
        }
    if as_json:
        print(json.dumps({**totals, "queues": [queue.as_dict() for queue in queues]}))
        return
    out.print(_table(queues) if queues else "no queues: nothing was ever submitted")
    summary = ", ".join(f"{number:,} {name}" for name, number in totals.items())
    errors.print(f"jobs: {summary}", style="dim")


def _table(queues: list[QueueState]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("queue", overflow="fold")
    for name in ("waiting", "oldest", "live workers"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", justify="right", no_wrap=True)
    for queue in queues:
        oldest = "" if queue.oldest_s is None else f"{queue.oldest_s:,.0f} s"
        live, state = f"{queue.live_workers:,}", "paused" if queue.paused else "active"
        table.add_row(Text(queue.queue), f"{queue.waiting:,}", oldest, live, state)
    return table


def _tenants(as_json: bool) -> None:
    with connected(as_json) as client:
        found = operator_of(client.ledger).tenants()
    if as_json:
        print(json.dumps({"tenants": [each.as_dict() for each in found]}))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("tenant", overflow="fold")
    for name in ("open", "oldest", "most open", "most per s"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in found:
        oldest = "" if each.oldest_s is None else f"{each.oldest_s:,.0f} s"
        most = "" if each.most_open is None else f"{each.most_open:,}"
        rate = "" if each.most_per_s is None else f"{each.most_per_s:g}"
        table.add_row(Text(each.tenant), f"{each.open:,}", oldest, most, rate)
    out.print(table if found else "no tenant has open jobs or limits")


@app.command("limit")
def limit(
    tenant: Annotated[
        str, typer.Argument(help="A tenant; * is all that have no limits of their own.")
    ],
    open_jobs: Annotated[
        int | None, typer.Option(min=0, help="Most open jobs; 0 lets it submit nothing.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Most jobs a second; two seconds' may come at once.")
    ] = None,
) -> None:
    """Limit what a tenant may submit. Both limits are replaced: one that is not given is none.

    Without options the tenant has no limits of its own.

    Examples:
        blipq queue limit shop --open-jobs 10000 --rate 50
        blipq queue limit '*' --open-jobs 1000
        blipq queue limit shop
    """
    with connected() as client:
        client.limit(tenant, open_jobs=open_jobs, rate=rate)
    out.print(limits_text(tenant, open_jobs, rate), markup=False)


QueueArgument = Annotated[
    list[str], typer.Argument(metavar="QUEUE...", help="Queues, such as blipq.default.low.")
]


@app.command("pause")
def pause(queues: QueueArgument) -> None:
    """Let no worker take a job from these queues. Jobs that run end; others come and wait.

    Examples:
        blipq queue pause blipq.default.low
    """
    with connected() as client:
        for queue in queues:
            out.print(f"{queue}: paused, {client.pause(queue):,} waiting", markup=False)


@app.command("resume")
def resume(queues: QueueArgument) -> None:
    """Let workers take jobs from these queues again.

    Examples:
        blipq queue resume blipq.default.low
    """
    with connected() as client:
        for queue in queues:
            out.print(f"{queue}: resumed, {client.resume(queue):,} waiting", markup=False)


@app.command("purge")
def purge(
    queue: Annotated[str, typer.Argument(help="A queue, such as blipq.default.low.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Cancel the jobs that wait in a queue. Those that run go on.

    Examples:
        blipq queue purge blipq.default.low
        blipq queue purge blipq.default.low --yes --json
    """
    with connected(as_json) as client:
        operator = operator_of(client.ledger)
        known = {state.queue: state.waiting for state in operator.queues()}
        if queue not in known:
            there = ", ".join(sorted(known)) or "none"
            raise InvalidRequest(f"there is no queue {queue!r}; there are: {there}")
        if not yes:
            question = f"Cancel {known.get(queue, 0):,} jobs that wait in {queue}?"
            typer.confirm(question, abort=True, err=True)
        cancelled = operator.purge(queue)
        if as_json:
            print(json.dumps({"queue": queue, "cancelled": cancelled}))
        else:
            out.print(f"{cancelled:,} cancelled")
