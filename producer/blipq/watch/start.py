"""What a file of rules needs to be watched."""

from pathlib import Path

from blipq.client.sync_client import Client
from blipq.errors import InvalidRequest, QueueUnavailable, UnknownModel
from blipq.ledger.cells.operator import home_of, operator_of
from blipq.ledger.protocols import Producer
from blipq.s3.outputs import live_workers, why_all_refuse
from blipq.settings import Settings
from blipq.ssrf.policy import Forbidden
from blipq.watch.cursor import Cursor, FileCursor, RedisCursor, Unsaved
from blipq.watch.listing import Backfill, Listing
from blipq.watch.objects import Objects
from blipq.watch.queue import WAIT_S, Queue
from blipq.watch.rules import Rules
from blipq.watch.sources import Source


def source_of(rules: Rules, client: Client, cursor: Cursor, *, once: bool) -> Source:
    """Where the rules say that news comes from."""
    source = rules.source
    if source.queue is not None:
        wait_s = 2 if once else WAIT_S
        return Queue(source.queue, client.settings, visibility_s=source.visibility, wait_s=wait_s)
    return Listing(
        Objects(client.storage),
        rules.places,
        cursor,
        every_s=source.every,
        overlap_s=source.overlap,
    )


def backfill_of(rules: Rules, client: Client, cursor: Cursor) -> Backfill:
    return Backfill(Objects(client.storage), rules.places, cursor)


def cursor_of(rules: Rules, client: Client, *, dry_run: bool) -> Cursor:
    """Where the rules say that the cursor is kept."""
    state = rules.source.state
    cursor: Cursor
    if isinstance(state, Path):
        cursor = FileCursor(state)
    else:
        cursor = RedisCursor(rules.name, home_of(client.ledger, rules.name))
    return Unsaved(cursor) if dry_run else cursor


def check_webhooks(rules: Rules, settings: Settings) -> None:
    """Raises InvalidRequest if a rule's webhook may not be posted to."""
    for rule in rules.rules:
        webhook = rule.options.get("webhook")
        url = webhook.get("url") if isinstance(webhook, dict) else webhook
        try:
            if url is not None:
                settings.webhook_policy.check(url)
        except Forbidden as error:
            raise InvalidRequest(f"rule {rule.name}: options.webhook: {error}") from None


def check_models(rules: Rules, ledger: Producer) -> None:
    """Raises InvalidRequest if jobs of a rule would be refused for their model."""
    for rule in rules.rules:
        try:
            ledger.check_models([str(rule.options.get("model", "default"))])
        except UnknownModel as error:
            raise InvalidRequest(f"rule {rule.name}: options.{error}") from None
        except QueueUnavailable:  # as with everything else, it waits for Redis and meets it then
            return


def check_outputs(rules: Rules, client: Client) -> None:
    """Raises InvalidRequest if every live worker of a rule's model would refuse its ``output``."""
    workers = live_workers(operator_of(client.ledger))
    for rule in rules.rules:
        _, options = rule.job(rule.sample, watch="sample")
        if options.output is None:
            continue
        source = rule.sample.reference
        why = why_all_refuse(options.output, options.model, workers, client.settings, source)
        if why is not None:
            raise InvalidRequest(f"rule {rule.name}: options.output: {why}")
