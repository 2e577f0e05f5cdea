"""Indexes of images in LanceDB, in S3 or in a folder: what the contrastive head sees in them.

An index is one table per retrieval checkpoint, so that vectors of two models never meet: the same
name can be indexed anew for another checkpoint while searches go on with the old one. Any number of
processes may write at once; whatever has been written is seen by the next search. LanceDB and
pyarrow are imported at the first use.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import numpy as np

from blipq.errors import BlipqError, InvalidRequest, QueueUnavailable
from blipq.s3.refusals import OF_THE_ASKER, S3Unavailable, refusal_in, s3_errors
from blipq.s3.storage import Storage
from blipq.settings import Settings

#: (32, 256) of the published checkpoints: an image's projected queries, each of length 1.
Vectors: TypeAlias = "np.ndarray[Any, Any]"

#: Equal values by name; a list means any of them.
Filter: TypeAlias = Mapping[str, str | Sequence[str]]

_METADATA_CACHE_BYTES = 2**28
_VECTOR_CACHE_BYTES = 2**30
_TIMEOUT = timedelta(seconds=60)
# Files of older versions go: a search that began before must have ended by then.
_KEPT_FOR = timedelta(hours=1)
# Every commit adds a small file. They are merged when there are many, and they hold a fifth of
# the table: so each row is rewritten about five times, however large the table grows.
_MANY_FILES = 64
_LARGE_SHARE = 0.2
# From so many images on a search reads 8-bit copies of the vectors, in partitions of similar ones,
# and only twice as many whole ones as it returns. It reads all of up to 64 partitions: of 32,768
# images it misses none; of more it may miss some that are far from the query.
_INDEXED_FROM = 1024
_IMAGES_PER_PARTITION = 512
_MOST_PARTITIONS = 1024
_PARTITIONS_READ = 64
_REFINED = 2


class UnknownIndex(InvalidRequest):
    """There is no such index, or not for this checkpoint."""


@dataclass(frozen=True, slots=True)
class Space:
    """The retrieval checkpoint that vectors come from. Only vectors of one revision compare."""

    checkpoint: str
    revision: str


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """An image to index. ``etag`` is that of the bytes of its vectors, where that is known."""

    id: str
    uri: str
    etag: str
    vectors: Vectors
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Found:
    """An indexed image and its cosine with the query, in [-1, 1]."""

    id: str
    uri: str
    etag: str
    metadata: dict[str, str]
    cosine: float


@dataclass(frozen=True, slots=True)
class IndexInfo:
    """An index as people see it."""

    name: str
    checkpoint: str
    revision: str
    images: int
    bytes: int
    created_at: datetime
    changed_at: datetime


class Indexes:
    """All indexes of a place. Thread-safe.

    Methods raise UnknownIndex, InvalidRequest, and QueueUnavailable where the place does not
    answer.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._storage = Storage(settings)
        self._opened: dict[str, Index] = {}
        self._found = False

    def open(self, name: str, space: Space) -> "Index":
        """The index of a name for a checkpoint."""
        table_name = _table_name(name, space.revision)
        if (index := self._opened.get(table_name)) is not None:
            return index
        with _answering():
            if (table := self._table(table_name)) is None:
                raise self._unknown(name, space)
        # After an error it is opened anew: it may have been deleted, and made again since.
        index = Index(table, lambda: self._opened.pop(table_name, None))
        self._opened[table_name] = index
        return index

    def open_or_create(self, name: str, space: Space, dimensions: int = 256) -> "Index":
        """The index of a name for a checkpoint; an empty one if there is none yet."""
        with suppress(UnknownIndex):
            return self.open(name, space)
        if self._bucket and not self._is_there():
            with s3_errors(f"s3://{self._bucket}"):
                self._storage.create_bucket(self._bucket)
        table_name = _table_name(name, space.revision)
        with _answering():
            try:
                self._database.create_table(table_name, schema=_schema(space, dimensions))
            except (RuntimeError, ValueError):
                if self._table(table_name) is None:  # else another process was faster
                    raise
        return self.open(name, space)

    def infos(self, name: str | None = None) -> list[IndexInfo]:
        """All indexes, or those of a name, by name."""
        with _answering():
            wanted = [each for each in self._table_names() if name in (None, _name_of(each))]
            tables = [table for each in wanted if (table := self._table(each)) is not None]
            return [Index(table).info() for table in tables]

    def delete(self, info: IndexInfo) -> None:
        """Removes an index with all that is in it."""
        with _answering():
            self._database.drop_table(_table_name(info.name, info.revision))

    def remove(self, name: str, ids: Sequence[str]) -> int:
        """Removes images from every index of a name; how many were there."""
        spaces = [Space(info.checkpoint, info.revision) for info in self.infos(name)]
        return sum(self.open(name, space).delete(ids) for space in spaces)

    def _unknown(self, name: str, space: Space) -> UnknownIndex:
        others = [f"{info.checkpoint} ({_short(info.revision)})" for info in self.infos(name)]
        if not others:
            return UnknownIndex(f"there is no index {name!r} (`blipq index list` shows all)")
        return UnknownIndex(
            f"the index {name!r} has no vectors of {space.checkpoint} ({_short(space.revision)}), "
            f"with which this model searches, but of {', '.join(others)}: ask a model that has "
            "that checkpoint, or index the images again"
        )

    def _table(self, table_name: str) -> Any | None:
        """A table, or None if there is none by that name."""
        try:
            return self._database.open_table(table_name) if self._is_there() else None
        except ValueError as error:
            if "not found" not in str(error):
                raise
            return None

    def _table_names(self) -> list[str]:
        """Names of all tables, and maybe of some whose files have gone since."""
        if not self._is_there():
            return []
        names: list[str] = []
        page = None
        while True:
            answer = self._database.list_tables(page_token=page, limit=1000)
            names += [each for each in answer.tables if "." in each]
            if not (page := answer.page_token):
                return sorted(names)

    def _is_there(self) -> bool:
        """Whether the place exists; LanceDB does not make buckets."""
        if not self._found:
            bucket, folder = self._bucket, self._settings.indexes
            self._found = self._storage.has_bucket(bucket) if bucket else Path(folder).is_dir()
        return self._found

    @property
    def _bucket(self) -> str | None:
        parts = urlsplit(self._settings.indexes)
        return parts.netloc if parts.scheme == "s3" else None

    @cached_property
    def _database(self) -> Any:
        # What LanceDB warns of (a table that is new, a merge that another one overtook) is usual.
        os.environ.setdefault("LANCEDB_LOG", "error")
        import lancedb

        return lancedb.connect(
            self._settings.indexes,
            storage_options=_storage_options(self._settings) if self._bucket else None,
            read_consistency_interval=timedelta(0),
            session=lancedb.Session(
                index_cache_size_bytes=_VECTOR_CACHE_BYTES,
                metadata_cache_size_bytes=_METADATA_CACHE_BYTES,
            ),
        )


class Index:
    """One index for one checkpoint. Thread-safe."""

    def __init__(self, table: Any, forget: Callable[[], object] = lambda: None) -> None:
        self._table = table
        self._forget = forget

    def upsert(self, entries: Sequence[Entry]) -> None:
        """Adds images, or replaces those with the same id; all of them or none."""
        latest = list({entry.id: entry for entry in entries}.values())
        with _answering(self._forget):
            rows = _rows(latest, self._table.schema)
            merge = self._table.merge_insert("id").when_matched_update_all()
            merge.when_not_matched_insert_all().execute(rows, timeout=_TIMEOUT)

    def delete(self, ids: Sequence[str]) -> int:
        """Removes images; how many of them were there."""
        with _answering(self._forget):
            result = self._table.delete(_any_of("id", ids))
            return int(result.num_deleted_rows)

    def search(self, queries: Vectors, limit: int, filter: Filter | None = None) -> list[Found]:
        """The images nearest to ``queries`` (n, dimensions), best first.

        A query's cosine with an image is that of the best of its 32 vectors; the image's is the
        mean over the queries. A text is one query.
        """
        vectors = np.asarray(queries, dtype=np.float32)
        with _answering(self._forget):
            search = self._table.search(vectors[0] if len(vectors) == 1 else vectors, "vectors")
            search = search.distance_type("cosine").limit(limit)
            search = search.nprobes(_PARTITIONS_READ).refine_factor(_REFINED)
            if filter:
                search = search.where(_condition(filter), prefilter=True)
            search = search.select(["id", "uri", "etag", "metadata", "_distance"])
            rows = search.to_list(timeout=_TIMEOUT)
        return [
            Found(
                id=row["id"],
                uri=row["uri"],
                etag=row["etag"],
                metadata=_metadata(row["metadata"]),
                cosine=1 - row["_distance"] / len(vectors),
            )
            for row in rows
        ]

    def etags(self, ids: Sequence[str]) -> dict[str, str]:
        """ETags by id, of those ids that are there."""
        with _answering(self._forget):
            search = self._table.search().where(_any_of("id", ids))
            search = search.select(["id", "etag"]).limit(len(ids))
            rows = search.to_list(timeout=_TIMEOUT)
        return {row["id"]: row["etag"] for row in rows}

    def compact(self, *, at_once: bool = True) -> None:
        """Merges small files into larger ones, and drops old versions; else only if it is due.

        Writers go on meanwhile. Where one is faster, nothing is merged this time.
        """
        with _answering(self._forget):
            if not at_once and not self._many_small_files():
                return
            with suppress(RuntimeError):
                self._table.optimize(cleanup_older_than=_KEPT_FOR)
                self._index_columns()

    def _index_columns(self) -> None:
        """Finds ids by a tree, vectors by 8-bit copies: made again when partitions are too few."""
        from lancedb.index import BTree, IvfSq

        images = self._table.count_rows()
        if images < _INDEXED_FROM:
            return
        known = {each.name for each in self._table.list_indices()}
        if "ids" not in known:
            self._table.create_index("id", config=BTree(), name="ids")
        partitions = [int(name.rpartition("-")[2]) for name in known if name.startswith("vectors-")]
        wanted = min(_MOST_PARTITIONS, max(1, images // _IMAGES_PER_PARTITION))
        if wanted < 2 * max(partitions, default=0):
            return
        config = IvfSq(distance_type="cosine", num_partitions=wanted, max_iterations=10)
        self._table.create_index("vectors", config=config, name=f"vectors-{wanted}")
        for number in partitions:
            self._table.drop_index(f"vectors-{number}")

    def _many_small_files(self) -> bool:
        stats = self._table.stats()
        files, rows = stats["fragment_stats"], int(stats["num_rows"])
        small_rows = rows - int(files["lengths"]["max"])
        return int(files["num_fragments"]) >= _MANY_FILES and small_rows >= _LARGE_SHARE * rows

    def info(self) -> IndexInfo:
        """The index's checkpoint, its number of images and when it changed last."""
        with _answering(self._forget):
            made = {key.decode(): value.decode() for key, value in _metadata_of(self._table)}
            stats = self._table.stats()
            changed = self._table.list_versions()[-1]["timestamp"]
        return IndexInfo(
            name=_name_of(self._table.name),
            checkpoint=made["checkpoint"],
            revision=made["revision"],
            images=int(stats["num_rows"]),
            bytes=int(stats["total_bytes"]),
            created_at=datetime.fromisoformat(made["created_at"]),
            changed_at=changed.astimezone(UTC),
        )


@contextmanager
def _answering(failed: Callable[[], object] = lambda: None) -> Iterator[None]:
    """LanceDB's errors as blipq's: it has no types of its own for them."""
    try:
        yield
    except BlipqError:
        raise
    except (RuntimeError, OSError, ValueError) as error:
        failed()
        message = f"the index does not answer: {str(error).partition(chr(10))[0][:500]}"
        if (refusal := refusal_in(str(error))) is not None and refusal in OF_THE_ASKER:
            raise S3Unavailable(message, refusal) from error
        raise QueueUnavailable(message) from error


# -- names, rows and conditions --


def _table_name(name: str, revision: str) -> str:
    return f"{name}.{_short(revision)}"


def _short(revision: str) -> str:
    return revision[:12]


def _name_of(table_name: str) -> str:
    return table_name.rpartition(".")[0]


def _schema(space: Space, dimensions: int) -> Any:
    import pyarrow as pa

    # The key makes two writers that add the same id at once conflict, so that one of them tries
    # again and updates: without it the table would hold both rows.
    key = {"lance-schema:unenforced-primary-key": "true"}
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False, metadata=key),
            pa.field("uri", pa.string()),
            pa.field("etag", pa.string()),
            pa.field("metadata", pa.list_(pa.string())),
            pa.field("vectors", pa.list_(pa.list_(pa.float16(), dimensions))),
        ],
        metadata={
            "checkpoint": space.checkpoint,
            "revision": space.revision,
            "created_at": datetime.now(UTC).isoformat(),
        },
    )


def _metadata_of(table: Any) -> Any:
    return (table.schema.metadata or {}).items()


def _rows(entries: Sequence[Entry], schema: Any) -> Any:
    import pyarrow as pa

    vectors = [np.asarray(entry.vectors, dtype=np.float16) for entry in entries]
    ends = np.cumsum([0, *(len(each) for each in vectors)], dtype=np.int32)
    numbers = pa.array(np.concatenate(vectors).ravel())
    flat = pa.FixedSizeListArray.from_arrays(numbers, vectors[0].shape[1])
    pairs = [[_pair(*pair) for pair in entry.metadata.items()] for entry in entries]
    return pa.table(
        {
            "id": pa.array([entry.id for entry in entries], pa.string()),
            "uri": pa.array([entry.uri for entry in entries], pa.string()),
            "etag": pa.array([entry.etag for entry in entries], pa.string()),
            "metadata": pa.array(pairs, pa.list_(pa.string())),
            "vectors": pa.ListArray.from_arrays(pa.array(ends), flat),
        },
        schema=schema,
    )


def _pair(name: str, value: str) -> str:
    """A pair of metadata as one text: lists of texts can be filtered by."""
    return json.dumps([name, value], ensure_ascii=False)


def _metadata(pairs: Sequence[str] | None) -> dict[str, str]:
    return dict(json.loads(pair) for pair in pairs or ())


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _any_of(column: str, values: Sequence[str]) -> str:
    return f"{column} IN ({', '.join(map(_literal, values))})"


def _condition(filter: Filter) -> str:
    """A filter in LanceDB's SQL. Names and values are literals, whatever they hold."""
    parts = []
    for name, wanted in filter.items():
        values = [wanted] if isinstance(wanted, str) else wanted
        pairs = ", ".join(_literal(_pair(name, value)) for value in values)
        parts.append(f"array_has_any(metadata, [{pairs}])")
    return " AND ".join(parts)


def _storage_options(settings: Settings) -> dict[str, str]:
    """The settings of ``Storage`` in LanceDB's words; unset, it finds credentials as AWS does."""
    secret = settings.s3_secret_access_key
    endpoint = settings.s3_endpoint
    options = {
        "aws_endpoint": endpoint,
        "aws_access_key_id": settings.s3_access_key_id,
        "aws_secret_access_key": secret.get_secret_value() if secret else None,
        "aws_region": settings.s3_region or ("us-east-1" if endpoint else None),
        "allow_http": "true" if endpoint and endpoint.startswith("http://") else None,
        "connect_timeout": "3s",
        "timeout": "30s",
    }
    return {name: value for name, value in options.items() if value is not None}
