"""A bulk's journal and manifest, as the command line names them."""

import itertools
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blipq.bulk.journal import Journal
from blipq.bulk.manifest import JsonLines, LocalFile, Manifest, Prefix, S3Object, read_work
from blipq.client.sync_client import Client
from blipq.contract import Options, no_s3_uri, s3_form
from blipq.errors import InvalidRequest
from blipq.ledger.cells.operator import operator_of
from blipq.s3.outputs import live_workers, why_all_refuse
from blipq.s3.storage import Storage
from blipq.submission import checked

#: Lines whose outputs are judged before any is submitted.
LOOKED_AT = 200


def manifest_of(facts: Mapping[str, Any], storage: Storage) -> Manifest:
    """The manifest that a journal's facts name."""
    name: str = facts["manifest"]
    if facts.get("template") is not None:
        return Prefix(name, facts["template"], facts["defaults"], storage)
    if s3_form(name) is not None:
        raise InvalidRequest(no_s3_uri(name, "s3://bucket/key"))
    blocks = S3Object(name, storage) if name.startswith("s3://") else LocalFile(Path(name))
    return JsonLines(blocks, facts["defaults"])


def template_from(path: Path) -> dict[str, Any]:
    """A request without its image, from a file of JSON. Raises InvalidRequest."""
    try:
        template = json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise InvalidRequest(f"{path}: {error}") from None
    if not isinstance(template, dict) or "image" in template:
        raise InvalidRequest(f"{path}: a request without its image is expected")
    return template


def journal_path(name: str) -> Path:
    """``manifest.jsonl.bulk`` for a manifest; a journal's own name is kept."""
    if name.endswith(".bulk"):
        return Path(name)
    return Path(f"{name.rstrip('/').rpartition('/')[2] or 'objects'}.bulk")


def begin(path: Path, facts: Mapping[str, Any], storage: Storage) -> tuple[Journal, Manifest]:
    """A new bulk, or the one that this journal is of. Raises InvalidRequest if it is of another."""
    checked(Options, **facts["defaults"])
    manifest = manifest_of(facts, storage)
    if not path.exists():
        id = facts.get("id") or f"bulk_{secrets.token_hex(8)}"
        more = {"id": id, "version": manifest.version, "tenant": storage.settings.tenant}
        journal = Journal.create(path, **{**facts, **more})
        return journal, manifest
    journal = Journal.open(path)
    try:
        _check_same(journal, facts, manifest)
        check_tenant(journal, storage.settings.tenant)
    except BaseException:
        journal.close()
        raise
    return journal, manifest


def _check_same(journal: Journal, facts: Mapping[str, Any], manifest: Manifest) -> None:
    if journal.fact("cancelled"):
        raise InvalidRequest(f"{journal.path} was cancelled: give another --journal to begin anew")
    if journal.fact("version") != manifest.version:
        raise InvalidRequest(
            f"{journal.path} is of another manifest, or it has changed: give another --journal"
        )
    changed = [name for name in ("template", "defaults") if journal.fact(name) != facts.get(name)]
    if changed:
        raise InvalidRequest(f"{journal.path} was begun with other options: {', '.join(changed)}")


def check_tenant(journal: Journal, tenant: str | None) -> None:
    """Raises InvalidRequest for another tenant than the one that the bulk was begun for.

    The jobs of lines that are open are that one's: submitted again for another they would conflict.
    """
    begun = journal.fact("tenant")
    if begun != tenant:
        whom, now = (each or "no tenant" for each in (begun, tenant))
        raise InvalidRequest(
            f"{journal.path} was begun for {whom}, and BLIPQ_TENANT is of {now}: name the same, or "
            "give another --journal"
        )


def check_outputs(manifest: Manifest, journal: Journal, client: Client) -> None:
    """Raises InvalidRequest if live workers would refuse every ``output`` of the next lines.

    A single one is an error of its line alone.
    """
    workers = live_workers(operator_of(client.ledger))
    refusals = []
    entries = manifest.entries(journal.fact("lines"), journal.fact("position"))
    for entry in itertools.islice(entries, LOOKED_AT):
        request, options = read_work(entry.work) if entry.work else (None, None)
        if options is None or options.output is None:
            continue
        source = request.image if request else None
        why = why_all_refuse(options.output, options.model, workers, client.settings, source)
        if why is None:
            return
        refusals.append(f"line {entry.number}: output: {why}")
    if refusals:
        raise InvalidRequest(refusals[0])
