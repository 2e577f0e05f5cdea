"""Commands that look at many jobs, and at the queues they wait in."""

import json
import time
from typing import Annotated

import typer

from blipq.cli.terminal.group import Group
from blipq.cli.terminal.output import (
    EXIT_CODES,
    JsonOption,
    connected,
    errors,
    out,
    print_json,
    status_line,
)
from blipq.contract import Status
from blipq.errors import JobCancelled, JobExpired, JobFailed
from blipq.ledger.operator import OperatorLedger, QueueState

app = Group("The queues that jobs wait in.")

_CODES = {
    Status.SUCCEEDED: 0,
    Status.FAILED: EXIT_CODES[JobFailed],
    Status.CANCELLED: EXIT_CODES[JobCancelled],
    Status.EXPIRED: EXIT_CODES[JobExpired],
}
_STATUSES = f"Only with this status: {', '.join(Status)}."


def list_(
    status: Annotated[Status | None, typer.Option(metavar="STATUS", help=_STATUSES)] = None,
    model: Annotated[str | None, typer.Option(help="Only of this served model.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most this many.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List jobs, the newest first: open ones, and the last thousand that ended.

    Examples:
        blipq list
        blipq list --status failed --limit 100
        blipq list --status running --model default --json
    """
    with connected(as_json) as client:
        operator = OperatorLedger.beside(client.ledger)
        for info in operator.jobs(status=status, model=model, limit=limit):
            if as_json:
                print_json(info)
            else:
                line = f"{info.created_at:%Y-%m-%d %H:%M:%S}  {info.kind:<8}  {status_line(info)}"
                out.print(line, markup=False)


def wait(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="The jobs' ids.")],
    timeout: Annotated[float, typer.Option(help="Longest wait for them all, in seconds.")] = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Wait for jobs to end. Exits as `result` does, by the first that did not succeed.

    Examples:
        blipq wait job_0197f2a0-5c7e-7d3b-9a51-3c1d6e0f4a2b --timeout 600
        blipq wait $(cat ids.txt) --json
    """
    code = 0
    deadline = time.monotonic() + timeout
    with connected(as_json) as client:
        for id in ids:
            info = client.job(id).wait(max(0.0, deadline - time.monotonic()))
            code = code or _CODES[info.status]
            if as_json:
                print_json(info)
            else:
                out.print(status_line(info), markup=False)
    raise typer.Exit(code)


@app.command("stats")
def stats(as_json: JsonOption = False) -> None:
    """Show what waits in each queue, for how long, and how many workers serve it.

    Examples:
        blipq queue stats
        blipq queue stats --json
    """
    with connected(as_json) as client:
        operator = OperatorLedger.beside(client.ledger)
        queues = operator.queues()
        totals = {
            "open": operator.open_jobs(),
            "running": operator.running(),
            "delayed": operator.delayed(),
        }
    if as_json:
        print(json.dumps({**totals, "queues": [queue.as_dict() for queue in queues]}))
        return
    for queue in queues:
        out.print(_line(queue), markup=False)
    told = ", ".join(f"{number:,} {name}" for name, number in totals.items())
    errors.print(f"jobs: {told}", style="dim")


def _line(queue: QueueState) -> str:
    line = f"{queue.queue}  {queue.waiting:,} waiting"
    if queue.oldest_s is not None:
        line += f", the oldest for {queue.oldest_s:,.0f} s"
    return f"{line}, {queue.live_workers} live workers"


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
        operator = OperatorLedger.beside(client.ledger)
        known = {state.queue: state.waiting for state in operator.queues()}
        if not yes:
            question = f"Cancel {known.get(queue, 0):,} jobs that wait in {queue}?"
            typer.confirm(question, abort=True, err=True)
        cancelled = operator.purge(queue)
        if as_json:
            print(json.dumps({"queue": queue, "cancelled": cancelled}))
        else:
            out.print(f"{cancelled:,} cancelled")
