"""``blipq index``: ``python -m blipq_worker.index.ingest``.

Needs no model: workers look at the images.

Nothing is noted between runs. What is in the index with the ETag that S3 lists is done; the rest is
asked for. So a run that was killed is simply run again, and asks twice for at most what was in
flight: to index an image again changes nothing.
"""

import argparse
import itertools
import json
import mimetypes
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from blipq.cli.terminal.options import pairs
from blipq.cli.terminal.output import connected, errors, out, reported
from blipq.client.job import Job
from blipq.client.sync_client import Client
from blipq.contract import EmbedRequest, ErrorCode, ImageRef, IndexEntry, Options, Priority, Status
from blipq.errors import InvalidRequest, JobFailed
from blipq.s3.refusals import s3_errors
from blipq.settings import Settings
from blipq.submission import checked
from blipq_worker.index.store import Index, Indexes, IndexInfo, Space, UnknownIndex

#: Images looked up, and jobs submitted and waited for, in one go.
_CHUNK = 256
_PROBE_TIMEOUT_S = 60.0
_SUBMIT_TIMEOUT_S = 600.0
_FAILURES_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Listed:
    """An object that S3 lists."""

    uri: str
    etag: str


@dataclass(slots=True)
class Tally:
    """What became of the images so far. ``failures`` are the first few, with why."""

    indexed: int = 0
    skipped: int = 0
    failed: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Images that nothing more is to be done about."""
        return self.indexed + self.skipped + self.failed

    def fail(self, uri: str, why: str) -> None:
        """Counts an image that is not in the index."""
        self.failed += 1
        if len(self.failures) < _FAILURES_SHOWN:
            self.failures.append((uri, why))


class Prefix:
    """The images under ``s3://bucket/prefix``. Raises InvalidRequest.

    What its name says is no image is left out; what has no such name is tried.
    """

    def __init__(self, client: Client, source: str) -> None:
        self.uri = source
        self.bucket, _, self._prefix = source.removeprefix("s3://").partition("/")
        if not source.startswith("s3://") or not self.bucket:
            raise InvalidRequest(f"{source!r} is not of the form s3://bucket/prefix")
        self._client = client.storage.client

    def __iter__(self) -> Iterator[Listed]:
        pages = self._client.get_paginator("list_objects_v2")
        with s3_errors(self.uri):
            for page in pages.paginate(Bucket=self.bucket, Prefix=self._prefix):
                for found in page.get("Contents", ()):
                    if _may_be_image(found["Key"]):
                        yield Listed(f"s3://{self.bucket}/{found['Key']}", found["ETag"].strip('"'))

    def count(self) -> int:
        """How many there are."""
        return sum(1 for _ in self)


def _may_be_image(key: str) -> bool:
    guessed, _ = mimetypes.guess_type(key)
    return not key.endswith("/") and (guessed is None or guessed.startswith("image/"))


class Indexer:
    """Puts what is under a prefix into an index, a window of jobs at a time."""

    def __init__(
        self,
        client: Client,
        known: Index | None,
        entry: Mapping[str, Any],
        options: Options,
        *,
        window: int,
    ) -> None:
        self.tally = Tally()
        self._client = client
        self._known = known
        self._entry = entry
        self._options = options
        self._chunk = min(_CHUNK, window)
        self._chunks_in_flight = max(1, window // self._chunk)

    def run(self, images: Iterable[Listed]) -> Iterator[Tally]:
        """Works on all images; the tally after each step."""
        in_flight: deque[tuple[list[Listed], list[Job[Any]]]] = deque()
        images = iter(images)
        while listed := list(itertools.islice(images, self._chunk)):
            new = self._new(listed)
            self.tally.skipped += len(listed) - len(new)
            in_flight.append((new, self._submit(new)))
            if len(in_flight) >= self._chunks_in_flight:
                self._settle(*in_flight.popleft())
            yield self.tally
        for chunk in in_flight:
            self._settle(*chunk)
            yield self.tally

    def _new(self, listed: list[Listed]) -> list[Listed]:
        """Those that are not in the index as they are."""
        if self._known is None:
            return listed
        etags = self._known.etags([image.uri for image in listed])
        return [image for image in listed if etags.get(image.uri) != image.etag]

    def _submit(self, images: Sequence[Listed]) -> list[Job[Any]]:
        requests = [
            EmbedRequest(
                image=ImageRef(uri=image.uri, etag=image.etag),
                index=IndexEntry(**self._entry),
            )
            for image in images
        ]
        return self._client.submit_many(requests, self._options, timeout=_SUBMIT_TIMEOUT_S)

    def _settle(self, images: Sequence[Listed], jobs: Sequence[Job[Any]]) -> None:
        """Waits for jobs."""
        for image, job in zip(images, self._client.wait_all(jobs), strict=True):
            info = job.info()
            if info.status is Status.SUCCEEDED:
                self.tally.indexed += 1
            else:
                why = f"{info.error.code}: {info.error.message}" if info.error else info.status
                self.tally.fail(image.uri, why)


def known_index(client: Client, indexes: Indexes, name: str, model: str) -> Index | None:
    """The index as the model's workers see it now, or None if it has yet to be made.

    Raises JobFailed where the model cannot search at all, ResultTimeout where no worker answers.
    """
    probe = client.search(name, "a", top_k=1, rerank=0, model=model, priority=Priority.HIGH)
    try:
        found = probe.result(timeout=_PROBE_TIMEOUT_S)
    except JobFailed as error:
        if error.code is not ErrorCode.INVALID_REQUEST:
            raise
        return None
    return indexes.open(name, Space(found.checkpoint or "", found.revision or ""))


# -- commands --


def _add(arguments: argparse.Namespace) -> int:
    with connected(arguments.json) as client:
        indexes = Indexes(client.settings)
        prefix = Prefix(client, arguments.source)
        total = prefix.count()
        known = known_index(client, indexes, arguments.name, arguments.model)
        entry = {"name": arguments.name, "metadata": pairs(arguments.metadata, "--metadata") or {}}
        options = checked(Options, model=arguments.model, priority=arguments.priority)
        indexer = Indexer(
            client,
            known,
            checked(IndexEntry, **entry).model_dump(exclude_none=True),
            options,
            window=arguments.window,
        )
        with _bar(shown=not arguments.json) as bar:
            task = bar.add_task("", total=total)
            for tally in indexer.run(prefix):
                bar.update(task, completed=tally.done, description=_summary(tally))
        if indexer.tally.indexed:
            index = known or known_index(client, indexes, arguments.name, arguments.model)
            if index is not None:
                index.compact()
        _tell(indexer.tally, as_json=arguments.json)
    return 3 if indexer.tally.failed else 0


def _bar(*, shown: bool) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=errors,
        disable=not (shown and errors.is_terminal),
    )


def _summary(tally: Tally) -> str:
    counts = {"indexed": tally.indexed, "skipped": tally.skipped, "failed": tally.failed}
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


def _tell(tally: Tally, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(tally)))
        return
    for uri, why in tally.failures:
        errors.print(f"{uri}: {why}", style="red", markup=False)
    if tally.failed > len(tally.failures):
        errors.print(f"and {tally.failed - len(tally.failures):,} more", style="red")
    out.print(_summary(tally) or "no images there", markup=False)


def _list(arguments: argparse.Namespace) -> int:
    with reported(arguments.json):
        infos = Indexes(checked(Settings)).infos()
    if arguments.json:
        print(json.dumps([_described(info) for info in infos]))
        return 0
    table = Table("index", "images", "size", "checkpoint", "changed", box=None)
    for info in infos:
        size, changed = f"{info.bytes / 2**20:,.1f} MiB", f"{info.changed_at:%Y-%m-%d %H:%M} UTC"
        table.add_row(info.name, f"{info.images:,}", size, info.checkpoint, changed)
    out.print(table if infos else "no indexes")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    with reported(arguments.json):
        infos = _of(Indexes(checked(Settings)), arguments.name)
    if arguments.json:
        print(json.dumps([_described(info) for info in infos]))
        return 0
    for info in infos:
        for name, value in _described(info).items():
            out.print(f"{name:12}{value}", markup=False)
    return 0


def _delete(arguments: argparse.Namespace) -> int:
    with reported(arguments.json):
        indexes = Indexes(checked(Settings))
        images = 0
        for info in _of(indexes, arguments.name):
            if arguments.id:
                space = Space(info.checkpoint, info.revision)
                images += indexes.open(info.name, space).delete(arguments.id)
            else:
                images += info.images
                indexes.delete(info)
    if arguments.json:
        print(json.dumps({"index": arguments.name, "deleted": images}))
    else:
        out.print(f"deleted: {images:,} images")
    return 0


def _of(indexes: Indexes, name: str) -> list[IndexInfo]:
    if not (infos := indexes.infos(name)):
        raise UnknownIndex(f"there is no index {name!r}")
    return infos


def _described(info: IndexInfo) -> dict[str, Any]:
    dates = {"created_at": info.created_at.isoformat(), "changed_at": info.changed_at.isoformat()}
    return asdict(info) | dates


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="blipq index")
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("add")
    add.add_argument("source")
    add.add_argument("--name", required=True)
    add.add_argument("--model", default="default")
    add.add_argument("--priority", default="low")
    add.add_argument("--window", type=int, default=512)
    add.add_argument("--metadata", action="append")
    add.set_defaults(run=_add)
    commands.add_parser("list").set_defaults(run=_list)
    show, delete = commands.add_parser("show"), commands.add_parser("delete")
    for command, run in ((show, _show), (delete, _delete)):
        command.add_argument("name")
        command.set_defaults(run=run)
    delete.add_argument("--id", action="append")
    for command in (add, commands.choices["list"], show, delete):
        command.add_argument("--json", action="store_true")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code."""
    import typer

    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except typer.Exit as left:
        return left.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
