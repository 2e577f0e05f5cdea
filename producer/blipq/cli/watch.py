"""``blipq watch``: uploads become jobs."""

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from blipq.cli.terminal.output import JsonOption, connected, errors, out
from blipq.client.sync_client import Client
from blipq.telemetry import tracing
from blipq.telemetry.logs import set_up_logging
from blipq.watch.rules import Rules, load
from blipq.watch.start import (
    backfill_of,
    check_models,
    check_outputs,
    check_webhooks,
    cursor_of,
    source_of,
)
from blipq.watch.watcher import Wanted, Watcher


def watch(
    rules: Annotated[
        Path, typer.Argument(metavar="RULES", help="Which objects become which jobs.")
    ],
    backfill: Annotated[
        bool, typer.Option("--backfill", help="First take what is there already.")
    ] = False,
    once: Annotated[
        bool, typer.Option("--once", help="Leave when there is nothing more for now.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the jobs, and leave then.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make jobs of uploads that match a file of rules, until SIGTERM. See docs/uploads.md.

    Examples:
        blipq watch rules.toml --dry-run --backfill
        blipq watch rules.toml --backfill
        blipq watch rules.toml --once --json
    """
    with connected(as_json) as client, _stopped_by_sigterm() as stop:
        loaded = load(rules)
        check_webhooks(loaded, client.settings)
        check_models(loaded, client.ledger)
        set_up_logging(level="WARNING", line="%(asctime)s %(levelname)s %(message)s")
        tracing.start("blipq-watch")
        check_outputs(loaded, client)
        watcher = Watcher(loaded, client, stop, _report(as_json), dry_run=dry_run)
        _run(watcher, loaded, client, backfill=backfill, once=once or dry_run)
        if not as_json:
            counts = watcher.counts
            summary = f"{counts.submitted} submitted, {counts.known} had their job, "
            summary += f"{counts.left_out} left out, {counts.refused} refused"
            errors.print(summary, style="dim")


def _run(watcher: Watcher, rules: Rules, client: Client, *, backfill: bool, once: bool) -> None:
    cursor = cursor_of(rules, client, dry_run=watcher.dry_run)
    if backfill:
        watcher.window = client.settings.window
        watcher.run(backfill_of(rules, client, cursor), once=True)
        watcher.window = None
    watcher.run(source_of(rules, client, cursor, once=once), once=once)


def _report(as_json: bool) -> Callable[[Wanted, str | None], None]:
    def report(wanted: Wanted, id: str | None) -> None:
        output = wanted.submission.options.output
        if as_json:
            shown = {"upload": wanted.upload.uri, "rule": wanted.rule.name, "id": id}
            print(json.dumps(shown | ({"output": output} if output else {})), flush=True)
        else:
            line = f"{wanted.upload.uri}  {wanted.rule.name}  {id or 'would be submitted'}"
            out.print(line + (f"  {output}" if output else ""), markup=False)

    return report


@contextmanager
def _stopped_by_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets: the batch in hand is finished first."""
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
