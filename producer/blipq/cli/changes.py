"""Commands that change jobs: those of ids, or all that match a filter."""

import inspect
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

import typer

from blipq.cli.terminal.options import pairs, parameters_of
from blipq.cli.terminal.output import JsonOption, connected, errors, out
from blipq.client.forgetting import Forgotten
from blipq.client.sync_client import Client
from blipq.contract import ErrorCode, JobFilter, Kind, Priority, Status
from blipq.errors import InvalidRequest
from blipq.index import unindex_of
from blipq.submission import checked

_PANEL = "Which jobs"

Which = JobFilter | list[str]


def _option(help: str, metavar: str) -> Any:
    return typer.Option(help=help, metavar=metavar, rich_help_panel=_PANEL)


def which_jobs(
    *,
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID...", help="Jobs' ids.")] = None,
    status: Annotated[
        Status | None, _option(f"All that are: {', '.join(Status)}.", "STATUS")
    ] = None,
    kind: Annotated[Kind | None, _option(f"All of a kind: {', '.join(Kind)}.", "KIND")] = None,
    model: Annotated[str | None, _option("All of a served model.", "MODEL")] = None,
    priority: Annotated[
        Priority | None, _option("All in the queue of a priority.", "PRIORITY")
    ] = None,
    code: Annotated[
        ErrorCode | None, _option("All that failed with this error code.", "CODE")
    ] = None,
    metadata: Annotated[
        list[str] | None, _option("All with this pair; may be repeated.", "NAME=VALUE")
    ] = None,
    tenant: Annotated[str | None, _option("All of this tenant's.", "TENANT")] = None,
) -> Which:
    """The ids, or the filter. Raises InvalidRequest."""
    given: dict[str, Any] = {"status": status, "kind": kind, "model": model}
    given |= {"priority": priority, "code": code, "tenant": tenant}
    given["metadata"] = pairs(metadata, "--metadata")
    if ids and any(value is not None for value in given.values()):
        raise InvalidRequest("name jobs by their ids or by a filter, not by both")
    if not ids and all(value is None for value in given.values()):
        raise InvalidRequest("which jobs? Name ids, or a filter such as --status failed")
    return ids or checked(JobFilter, **given)


def how(
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count the jobs, and change nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """How a change is made."""


#: Changes jobs, or with True only counts them; how many.
Run = Callable[[bool], int]


def change(done: str) -> Callable[[Callable[..., Run]], Callable[..., None]]:
    """Makes a command of a function: given a client and which jobs, it returns what to run.

    ``done``: what has been done to the jobs then.
    """

    def command_of(make: Callable[..., Run]) -> Callable[..., None]:
        def command(*, dry_run: bool, yes: bool, as_json: bool, **given: Any) -> None:
            chosen = {name: given.pop(name) for name in inspect.signature(which_jobs).parameters}
            with connected(as_json) as client:
                which = which_jobs(**chosen)
                run = make(client, which, **given)
                if isinstance(which, JobFilter) and not (dry_run or yes):
                    question = f"{run(True):,} jobs: are all of them to be {done}?"
                    typer.confirm(question, abort=True, err=True)
                _show(client, which, run(dry_run), done, dry_run=dry_run, as_json=as_json)

        parameters = [each for each in parameters_of(make, which_jobs, how) if each.name != "which"]
        command.__name__, command.__doc__ = make.__name__, make.__doc__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return command_of


def _show(
    client: Client, which: Which, count: int, done: str, *, dry_run: bool, as_json: bool
) -> None:
    fields: dict[str, Any] = {done.replace(" ", "_"): count}
    line = f"{count:,} would be {done}" if dry_run else f"{count:,} {done}"
    if isinstance(which, list) and len(which) == 1 and not dry_run:
        info = client.job(which[0]).info()
        fields = {"id": info.id, done.replace(" ", "_"): bool(count), "status": info.status}
        line = f"it had ended: {info.status}" if info.ended else f"it is {info.status}"
        line = done if count else line
    if as_json:
        print(json.dumps(fields))
        return
    out.print(line, markup=False)
    if isinstance(which, list) and count < len(which) > 1:
        errors.print(f"{len(which) - count:,} are unknown, or not in a state for it", style="dim")


@change("cancelled")
def cancel(client: Client, which: Which) -> Run:
    """Cancel jobs: those of ids, or all that match.

    Jobs that run are cancelled, too.

    Examples:
        blipq cancel job_0197f2a0-5c7e-7d3b-9a51-3c1d6e0f4a2b
        blipq cancel --metadata user=42 --dry-run
        blipq cancel --status queued --model default --yes --json
    """
    return lambda dry_run: client.cancel_all(which, dry_run=dry_run)


@change("queued again")
def retry(client: Client, which: Which) -> Run:
    """Queue jobs again that ended without a result.

    They have fresh attempts and a new deadline.

    Examples:
        blipq retry job_0197f2a0-5c7e-7d3b-9a51-3c1d6e0f4a2b
        blipq retry --status failed --code image_unavailable --dry-run
    """
    return lambda dry_run: client.retry_all(which, dry_run=dry_run)


@change("moved")
def expedite(
    client: Client,
    which: Which,
    to: Annotated[
        Priority, typer.Option(metavar="PRIORITY", help="high, or another priority.")
    ] = Priority.HIGH,
) -> Run:
    """Move jobs that wait into another priority's queue.

    Examples:
        blipq expedite job_0197f2a0-5c7e-7d3b-9a51-3c1d6e0f4a2b
        blipq expedite --metadata campaign=spring --to low --yes
    """
    return lambda dry_run: client.expedite(which, to, dry_run=dry_run)


def forget(
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID...", help="Jobs' ids.")] = None,
    metadata: Annotated[
        list[str] | None, _option("All with this pair; may be repeated.", "NAME=VALUE")
    ] = None,
    tenant: Annotated[str | None, _option("All of this tenant's.", "TENANT")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count the jobs, and erase nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Erase jobs with all that they left.

    That is results, events, uploads, outputs and entries of indexes. Open jobs are cancelled first.
    Says what it cannot delete.

    Examples:
        blipq forget job_0197f2a0-5c7e-7d3b-9a51-3c1d6e0f4a2b
        blipq forget --metadata user=42 --dry-run
    """
    with connected(as_json) as client:
        which = which_jobs(ids=ids, metadata=metadata, tenant=tenant)
        found = len(which) if isinstance(which, list) else client.count(which)
        if not (dry_run or yes):
            jobs = "1 job" if found == 1 else f"{found:,} jobs"
            typer.confirm(f"Erase {jobs} for good?", abort=True, err=True)
        if dry_run:
            print(json.dumps({"jobs": found})) if as_json else out.print(f"{found:,} would go")
            return
        _show_forgotten(client.forget(which, unindex=unindex_of(client.settings)), as_json)


def _show_forgotten(report: Forgotten, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(report)))
        return
    counts = {"events": report.events, "objects": len(report.objects), "entries": report.entries}
    others = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    out.print(f"{len(report.jobs):,} jobs erased" + (f", with {others}" if others else ""))
    for line in report.left:
        errors.print(f"left: {line}", style="yellow", markup=False)
