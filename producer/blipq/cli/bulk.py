"""``blipq bulk``: a manifest's requests, however many."""

import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

from blipq.bulk.driver import Driver
from blipq.bulk.journal import DUPLICATE, REFUSED, Journal, driving, is_driven
from blipq.bulk.manifest import Entry, Manifest
from blipq.bulk.manners import HOST_RATE, Manners, next_time
from blipq.bulk.results import write
from blipq.bulk.start import begin, check_outputs, journal_path, template_from
from blipq.cli.terminal.bar import Bar
from blipq.cli.terminal.group import Group
from blipq.cli.terminal.output import JsonOption, connected, errors, out, reported
from blipq.client.sync_client import Client
from blipq.contract import Priority, Status
from blipq.errors import InvalidRequest, QueueFull, QueueUnavailable
from blipq.ledger.cells.operator import home_of
from blipq.ledger.views.runs import NOTED_EVERY_S, Run, Runs
from blipq.program import blipq
from blipq.redaction import redacted

app = Group("Many requests from a manifest, some at a time.")

JournalArgument = Annotated[
    str, typer.Argument(metavar="JOURNAL", help="The journal, or the manifest it is named after.")
]
#: Refused lines that are shown on the terminal, and the most characters of each reason.
REASONS, REASON_CHARS = 5, 300
WindowOption = Annotated[
    int | None, typer.Option(min=1, help="Jobs in flight at a time; by default BLIPQ_WINDOW.")
]
RateOption = Annotated[
    float | None, typer.Option(min=0.001, help="The most lines that are submitted a second.")
]
HostRateOption = Annotated[
    float, typer.Option(min=0.001, help="Of those, with pictures from one web host.")
]
UntilOption = Annotated[
    str | None,
    typer.Option(metavar="HH:MM", help="Submit nothing from then on; the same command goes on."),
]


@app.command("submit")
def submit(
    manifest: Annotated[
        str | None, typer.Argument(help="A file or s3:// object with a request per line.")
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(metavar="S3-URI", help="Instead: a request per object under it.")
    ] = None,
    template: Annotated[
        Path | None, typer.Option(help="With --prefix: the request, as JSON without its image.")
    ] = None,
    journal: Annotated[
        str | None, typer.Option(help="What became of each line; by default MANIFEST.bulk here.")
    ] = None,
    window: WindowOption = None,
    rate: RateOption = None,
    host_rate: HostRateOption = HOST_RATE,
    until: UntilOption = None,
    model: Annotated[str, typer.Option(help="Served model of lines that name none.")] = "default",
    priority: Annotated[
        Priority, typer.Option(help="Priority of lines that name none.")
    ] = Priority.LOW,
    expires_in: Annotated[
        str | None, typer.Option(help="Deadline of lines that name none, such as 2d.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Submit a manifest and collect the results; the same command again goes on after a kill.

    Exits 0 if all lines succeeded, 3 if not, 5 where it stopped at --until. See docs/bulk.md.

    Examples:
        blipq bulk submit manifest.jsonl
        blipq bulk submit s3://photos/manifest.jsonl --window 2000 --priority normal
        blipq bulk submit --prefix s3://photos/2026/ --template caption.json
    """
    with connected(as_json) as client:
        manners = manners_of(rate, host_rate, until)
        source, given = _source(manifest, prefix, template)
        defaults = {"model": model, "priority": priority.value}
        defaults |= {"expires_in": expires_in} if expires_in else {}
        facts = {"manifest": source, "template": given, "defaults": defaults}
        path = journal_path(journal or source)
        with suppress(QueueUnavailable):  # the driver waits for Redis, and meets it then
            client.ledger.check_models([model])
        with driving(path):
            kept, found = begin(path, facts, client.storage)
            with closing(kept):
                check_outputs(found, kept, client)
                most = window or client.settings.window
                drive(*(client, kept, found.entries, share_of(found), most, manners, as_json))
                end(kept, as_json)


def _source(
    manifest: str | None, prefix: str | None, template: Path | None
) -> tuple[str, dict[str, Any] | None]:
    if (manifest is None) == (prefix is None) or (prefix is None) != (template is None):
        raise InvalidRequest("give either a manifest, or --prefix and --template")
    if prefix is not None and template is not None:
        return prefix, template_from(template)
    return str(manifest), None


def manners_of(rate: float | None, host_rate: float, until: str | None) -> Manners:
    """What the options say. Raises InvalidRequest."""
    return Manners(rate, host_rate, None if until is None else next_time(until))


def share_of(manifest: Manifest) -> Callable[[Driver], float | None]:
    """How much of a manifest lies before where a driver reads."""
    size = manifest.size
    return lambda driver: int(driver.position) / size if size and driver.position else None


def drive(
    client: Client,
    journal: Journal,
    entries: Callable[[int, str], Iterator[Entry]],
    share: Callable[[Driver], float | None],
    window: int,
    manners: Manners,
    as_json: bool,
    also: Callable[[Driver], None] = lambda driver: None,
) -> None:
    """Works on a bulk until its last line has ended, or the time is over.

    share: how much lies before where the driver reads. also: called after each step. Raises
    typer.Exit when it is interrupted.
    """
    with Bar(share, shown=not as_json) as bar:
        reasons = Reasons(journal, shown=not as_json)

        noting = Noting(client, journal, share)

        def report(driver: Driver) -> None:
            reasons.show(driver)
            bar.show(driver)
            noting.note(driver)
            also(driver)

        driver = Driver(client, journal, entries, window=window, manners=manners, report=report)
        try:
            driver.run()
            noting.note(driver, state=summary_of(journal, own=True)["state"])
        except KeyboardInterrupt:
            noting.note(driver, state="stopped")
            if not as_json:
                errors.print("the same command goes on from here", style="dim")
            raise typer.Exit(130) from None


def end(journal: Journal, as_json: bool, more: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Shows what became of a bulk. Raises typer.Exit with the command's exit code.

    more: what its JSON has beside that.
    """
    summary = {**summary_of(journal, own=True), **more}
    _show(summary, as_json)
    if not as_json:
        refused = summary["counts"].get(REFUSED, 0)
        if refused > REASONS:
            text = f"{refused:,} lines were refused; the results have the reason of each"
            errors.print(text, style="yellow")
        command = blipq(f"bulk results {shlex.quote(str(journal.path))} --output FILE")
        errors.print(f"results: {command}", style="dim", markup=False)
    if summary["state"] == "stopped":
        if not as_json:
            errors.print("the time is over: the same command goes on from here", style="yellow")
        raise typer.Exit(5)
    raise typer.Exit(0 if set(summary["counts"]) <= {Status.SUCCEEDED, DUPLICATE} else 3)


class Noting:
    """Notes how far a bulk is, for the console."""

    def __init__(
        self, client: Client, journal: Journal, share: Callable[[Driver], float | None]
    ) -> None:
        self._client = client
        self._journal = journal
        self._share = share
        self._at: float | None = None
        self._ended = 0

    def note(self, driver: Driver, *, state: str | None = None) -> None:
        """Notes it now and then, or at once with a ``state`` to end with."""
        now = time.time()
        passed = None if self._at is None else now - self._at
        if state is None and passed is not None and passed < NOTED_EVERY_S:
            return
        ended = sum(driver.counts.values())
        per_s = (ended - self._ended) / passed if passed else None
        share = self._share(driver)
        left = driver.lines * (1 / share - 1) + driver.in_flight if share else None
        run = Run(
            id=self._journal.fact("id"),
            name=redacted(self._journal.fact("manifest")),
            state=state or ("paused" if driver.paused else "running"),
            tenant=self._journal.fact("tenant"),
            at=now,
            counts=dict(driver.counts),
            in_flight=driver.in_flight,
            per_s=per_s,
            share=share,
            left_s=left / per_s if left is not None and per_s else None,
        )
        self._at, self._ended = now, ended
        with suppress(QueueUnavailable, QueueFull):  # nobody but people needs it
            Runs.beside(home_of(self._client.ledger, run.id)).note(run)


class Reasons:
    """Tells on stderr why the first refused lines are refused, each once and as soon as it is."""

    def __init__(self, journal: Journal, *, shown: bool) -> None:
        self._journal = journal
        self._left = REASONS if shown else 0
        self._shown: set[int] = set()

    def show(self, driver: Driver) -> None:
        """Counts the refused lines that were not shown."""
        if not self._left or driver.counts.get(REFUSED, 0) == len(self._shown):
            return
        for number, why in self._journal.refusals(REASONS):
            if self._left and number not in self._shown:
                cut = f"{why[:REASON_CHARS]}..." if len(why) > REASON_CHARS else why
                errors.print(f"line {number} is refused: {cut}", style="yellow", markup=False)
                self._shown.add(number)
                self._left -= 1


@app.command("status")
def status(journal: JournalArgument, as_json: JsonOption = False) -> None:
    """Show how far a bulk is.

    Examples:
        blipq bulk status manifest.jsonl
        blipq bulk status manifest.jsonl.bulk --json
    """
    with reported(as_json), closing(Journal.open(journal_path(journal))) as kept:
        _show(summary_of(kept), as_json)


@app.command("results")
def results(
    journal: JournalArgument,
    output: Annotated[
        str, typer.Option(metavar="FILE", help="A file or s3:// object, as JSON lines.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Write what became of the lines: each once, in the order of the manifest.

    Exits 5 if lines are open still; they are left out.

    Examples:
        blipq bulk results manifest.jsonl --output results.jsonl
        blipq bulk results manifest.jsonl --output s3://photos/results.jsonl
    """
    with connected(as_json) as client, closing(Journal.open(journal_path(journal))) as kept:
        lines = write(kept, output, client.storage)
        summary = summary_of(kept)
        if as_json:
            print(json.dumps({"output": output, "lines": lines, "state": summary["state"]}))
        else:
            out.print(f"{output}: {lines:,} lines", markup=False)
        if summary["state"] == "stopped":
            if not as_json:
                errors.print("not all lines have ended: submit it again to go on", style="yellow")
            raise typer.Exit(5)


@app.command("cancel")
def cancel(journal: JournalArgument, as_json: JsonOption = False) -> None:
    """Cancel a bulk: what has ended stays, what is in flight is cancelled, the rest is not read.

    Examples:
        blipq bulk cancel manifest.jsonl
    """
    with connected(as_json) as client, closing(Journal.open(journal_path(journal))) as kept:
        kept.note(cancelled=True)
        if is_driven(kept.path):
            if not as_json:
                errors.print("the process that is at it cancels the rest", style="dim")
            return
        with driving(kept.path):
            Driver(client, kept, lambda number, position: iter(()), window=1).run()
        _show(summary_of(kept), as_json)


@app.command("pause")
def pause(journal: JournalArgument) -> None:
    """Pause a bulk: nothing more is submitted, what is in flight is collected.

    Examples:
        blipq bulk pause manifest.jsonl
    """
    with reported(), closing(Journal.open(journal_path(journal))) as kept:
        kept.note(paused=True)


@app.command("resume")
def resume(journal: JournalArgument) -> None:
    """Go on with a bulk that is paused; where no process is at it, `bulk submit` does.

    Examples:
        blipq bulk resume manifest.jsonl
    """
    with reported(), closing(Journal.open(journal_path(journal))) as kept:
        kept.note(paused=False)


def summary_of(journal: Journal, *, own: bool = False) -> dict[str, Any]:
    """How far a bulk is. own: this process is the one that works on it, and has ended."""
    counts = journal.counts()
    state = "cancelled" if journal.fact("cancelled") else "stopped"
    if state == "stopped" and journal.fact("exhausted") and not counts.get("open"):
        state = "done"
    elif not own and is_driven(journal.path):
        state = "paused" if journal.fact("paused") else "running"
    return {
        "id": journal.fact("id"),
        "manifest": journal.fact("manifest"),
        "state": state,
        "lines": sum(counts.values()),
        "counts": counts,
    }


def _show(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary))
        return
    counts = ", ".join(f"{number:,} {status}" for status, number in summary["counts"].items())
    out.print(f"{summary['manifest']}: {summary['state']}, {counts or 'no lines'}", markup=False)
