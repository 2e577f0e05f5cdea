"""The shards of a source: a file, an object, a folder or a prefix."""

import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blipq.contract import no_s3_uri, s3_form
from blipq.errors import InvalidRequest
from blipq.s3.storage import Storage
from blipq.watch.objects import Objects
from blipq_datasets.sources.columns import ETAG, Columns
from blipq_datasets.sources.parquet import Parquet
from blipq_datasets.sources.places import LocalPlace, Place, S3Place
from blipq_datasets.sources.rows import Shard
from blipq_datasets.sources.tables import Csv, JsonLines
from blipq_datasets.sources.tars import PICTURES, Tar

#: Endings of shards, in the order in which a folder that has several kinds is judged.
KINDS = (
    (".tar", ".tar.gz", ".tgz"),
    (".parquet",),
    (".csv", ".tsv", ".jsonl", ".ndjson", ".csv.gz", ".tsv.gz", ".jsonl.gz", ".ndjson.gz"),
)
ENDINGS = tuple(sorted((each for kind in KINDS for each in kind), key=len, reverse=True))
MOST_SHARDS = 100_000
#: Pictures of a folder or a prefix that become one shard.
LISTED_PER_SHARD = 10_000


@dataclass(frozen=True, slots=True)
class _Found:
    """A file or an object: its name from the source's folder on, and where it is."""

    name: str
    place: str
    size: int
    etag: str | None = None


def ending_of(name: str) -> str | None:
    """The ending that makes a name that of a shard."""
    return next((each for each in ENDINGS if name.lower().endswith(each)), None)


def shards_of(source: str, wanted: Columns, storage: Storage, listing: Path) -> list[Shard]:
    """The shards, in the order of their names. Raises InvalidRequest, S3Unavailable.

    Pictures in a folder or under a prefix are listed once, into files in the folder ``listing``,
    which are the shards then.
    """
    if s3_form(source) is not None:
        raise InvalidRequest(no_s3_uri(source, "s3://bucket/prefix"))
    if source.startswith("s3://"):
        shards = _in_s3(source, wanted, storage, listing)
    else:
        shards = _local(Path(source), wanted, listing)
    if not shards:
        raise InvalidRequest(f"{source}: no pictures and no files ending in {', '.join(ENDINGS)}")
    if (table := next((each for each in shards if isinstance(each, JsonLines)), None)) is not None:
        table.check()
    for stem, count in Counter(shard.stem for shard in shards).items():
        if count > 1:
            raise InvalidRequest(f"{source}: two files are called {stem}, but for their endings")
        if not _is_text(stem):
            raise InvalidRequest(f"{source}: the name {stem!a} is not UTF-8: rename the file")
        if ".." in stem.split("/") or stem.startswith("/"):  # an output takes its name
            raise InvalidRequest(f"{source}: {stem} leads out of the folder")
    return shards


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _in_s3(source: str, wanted: Columns, storage: Storage, listing: Path) -> list[Shard]:
    bucket, _, key = source.removeprefix("s3://").partition("/")
    if not source.endswith("/") and ending_of(source):
        name = key.rpartition("/")[2]
        return [_shard(name, S3Place(source, storage), wanted)]
    folder = key.rpartition("/")[0]
    cut = len(folder) + 1 if folder else 0

    def found() -> Iterator[_Found]:
        for page in Objects(storage).pages(bucket, key):
            for each in page.uploads:
                yield _Found(each.key[cut:], each.uri, each.size, each.etag)

    def place(each: _Found) -> Place:
        return S3Place(each.place, storage, each.etag, each.size)

    files, listed = _sorted_out(found() if not listing.exists() else (), listing)
    return [_shard(each.name, place(each), wanted) for each in files] or _listed(
        listed, replace(wanted, folder=None)
    )


def _local(source: Path, wanted: Columns, listing: Path) -> list[Shard]:
    if not source.is_dir():
        if ending_of(source.name) is None:
            raise InvalidRequest(f"{source} ends in none of {', '.join(ENDINGS)}")
        return [_local_shard(source.name, source, wanted)]
    files, listed = _sorted_out(_walked(source) if not listing.exists() else (), listing)
    return [_local_shard(each.name, Path(each.place), wanted) for each in files] or _listed(
        listed, replace(wanted, folder=source)
    )


def _local_shard(name: str, path: Path, wanted: Columns) -> Shard:
    """A shard whose paths count from its own folder."""
    return _shard(name, LocalPlace(path), replace(wanted, folder=path.parent))


def _walked(folder: Path) -> Iterator[_Found]:
    """The files below a folder, without those that are hidden; links to folders lead nowhere."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for name in sorted(names):
            path = Path(root, name)
            if not name.startswith(".") and path.is_file():
                relative = path.relative_to(folder).as_posix()
                yield _Found(relative, str(path), path.stat().st_size)


def _sorted_out(found: Iterable[_Found], listing: Path) -> tuple[list[_Found], Path]:
    """Shards of the first kind that there is, or where the pictures are listed."""
    if listing.exists():
        return [], listing
    kinds: list[list[_Found]] = [[] for _ in KINDS]
    scratch = listing.with_name(f".{listing.name}.{os.getpid()}")
    scratch.mkdir(parents=True)
    try:
        _list(_sifted(found, kinds), scratch)
        files = next((kind for kind in kinds if kind), [])
        if not files:
            scratch.rename(listing)
        return sorted(files, key=lambda each: each.name), listing
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sifted(found: Iterable[_Found], kinds: list[list[_Found]]) -> Iterator[_Found]:
    """The pictures; shards go into ``kinds``."""
    for each in found:
        ending = ending_of(each.name)
        if ending is not None:
            (kind,) = (kinds[n] for n, endings in enumerate(KINDS) if ending in endings)
            kind.append(each)
            if len(kind) > MOST_SHARDS:
                raise InvalidRequest(f"more than {MOST_SHARDS:,} shards")
        elif each.name.lower().rpartition(".")[2] in PICTURES:
            yield each


def _list(pictures: Iterator[_Found], folder: Path) -> None:
    number = 0
    while lines := [_line(each) for each in itertools.islice(pictures, LISTED_PER_SHARD)]:
        with (folder / f"{number:05}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        number += 1


def _line(found: _Found) -> str:
    is_object = found.etag is not None
    row: dict[str, Any] = {"key": found.name, "image": found.place if is_object else found.name}
    row |= {"size": found.size} | ({ETAG: found.etag} if is_object else {})
    return json.dumps(row) + "\n"


def _listed(listing: Path, wanted: Columns) -> list[Shard]:
    wanted = replace(wanted, image="image", key="key")
    files = sorted(listing.glob("*.jsonl")) if listing.exists() else []
    return [JsonLines(path.stem, LocalPlace(path), wanted, packed=False) for path in files]


def _shard(name: str, place: Place, wanted: Columns) -> Shard:
    """A shard by the ending of its name. Raises InvalidRequest for columns that it lacks."""
    ending = ending_of(name)
    assert ending is not None
    stem, packed = name[: -len(ending)], ending.endswith((".gz", ".tgz"))
    if ending in KINDS[0]:
        return Tar(stem, place, wanted, packed=packed)
    if ending == ".parquet":
        columns = Parquet(stem, place, wanted).columns()
        return Parquet(stem, place, wanted.within(place.name, columns))
    if ending.startswith((".csv", ".tsv")):
        columns = Csv(stem, place, wanted, packed=packed).columns()
        return Csv(stem, place, wanted.within(place.name, columns), packed=packed)
    return JsonLines(stem, place, wanted, packed=packed)
