"""How many rows a dataset has and which need a job, from a part of them; and a sample of those."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from blipq_datasets.dataset import Dataset
from blipq_datasets.fields import Fields
from blipq_datasets.sources.columns import ETAG
from blipq_datasets.sources.rows import Cursor, Part, Row, Shard

#: What is read at most: evenly spread shards, and of each the beginning.
MOST_SHARDS, MOST_ROWS, MOST_BYTES = 16, 20_000, 2**30


@dataclass(slots=True)
class Survey:
    """What was read, and what it makes of the whole.

    rows: of the dataset; ``counted``: not extrapolated. read: rows that were read, of which
    ``repeated`` have the request of another or an answer already, and ``refused`` none at all.
    picture_bytes: of the ``pictures`` whose size is known. chosen: the sample's rows by shard.
    """

    rows: int = 0
    counted: bool = True
    read: int = 0
    repeated: int = 0
    refused: int = 0
    pictures: int = 0
    picture_bytes: int = 0
    chosen: dict[int, set[int]] = field(default_factory=dict)

    @property
    def jobs(self) -> int:
        """How many rows of the whole need a job."""
        needed = self.read - self.repeated - self.refused
        return round(self.rows * needed / self.read) if self.read else 0

    def of_all(self, count: int) -> int:
        """How many rows of the whole are like so many of those read."""
        return round(self.rows * count / self.read) if self.read else 0

    @property
    def size(self) -> int:
        """Rows of the sample."""
        return sum(map(len, self.chosen.values()))


def survey(dataset: Dataset, size: int, is_known: Callable[[str], bool]) -> Survey:
    """Reads a part of a dataset, and chooses ``size`` rows of it that need a job, at random.

    is_known: whether there is an answer to a row of this mark. Raises S3Unavailable.
    """
    return _Reading(dataset, size, is_known).found()


class _Reading:
    """One survey."""

    def __init__(self, dataset: Dataset, size: int, is_known: Callable[[str], bool]) -> None:
        self._dataset = dataset
        self._size = size
        self._is_known = is_known
        self._marks: set[str] = set()
        # The same rows for the same dataset: two estimates differ by what they measured alone.
        self._random = random.Random(dataset.version)
        self._places: list[tuple[int, int]] = []
        self._survey = Survey()

    def found(self) -> Survey:
        shards = self._dataset.shards
        indexes = _spread(len(shards), MOST_SHARDS)
        read_bytes = rows = 0.0
        for index in indexes:
            count, share, is_whole = self._read(index, len(indexes))
            # Of a shard that was read in part, as many rows for each byte as in that part.
            rows += count / share if share else count
            read_bytes += shards[index].size
            self._survey.counted &= is_whole
        left = sum(shard.size for shard in shards) - read_bytes
        if len(indexes) < len(shards):
            self._survey.counted = False
            rows += rows * left / read_bytes if read_bytes else 0
        self._survey.rows = round(rows)
        for index, row in self._places:
            self._survey.chosen.setdefault(index, set()).add(row)
        return self._survey

    def _read(self, index: int, parts: int) -> tuple[int, float, bool]:
        """Reads the beginning of a shard: how many rows, how much of it, and whether that is all.

        How much may be a guess: only the end of a gzip tells that it is the end.
        """
        shard, count, held, read = self._dataset.shards[index], 0, 0, Cursor()
        for after, row in shard.rows(Cursor()):
            if count * parts >= MOST_ROWS or held * parts >= MOST_BYTES:
                return count, shard.share(read), False
            count, read = count + 1, after
            self._take(index, after.rows - 1, row)
            held += len(row.data or b"")
        return count, 1.0, True

    def _take(self, index: int, number: int, row: Row) -> None:
        found = self._survey
        found.read += 1
        if (size := _size_of(row)) is not None:
            found.pictures += 1
            found.picture_bytes += size
        entry, _ = self._dataset.entry(number, "", index, row)
        if entry.work is None or entry.mark is None:
            found.refused += 1
        elif entry.mark in self._marks or self._is_known(entry.mark):
            found.repeated += 1
        else:
            self._marks.add(entry.mark)
            self._choose((index, number))

    def _choose(self, place: tuple[int, int]) -> None:
        """Each row that needs a job is in the sample with the same chance."""
        if len(self._places) < self._size:
            self._places.append(place)
        elif (other := self._random.randrange(len(self._marks))) < self._size:
            self._places[other] = place


def _spread(count: int, most: int) -> list[int]:
    """Indexes at even distances, no more than ``most``."""
    if count <= most:
        return list(range(count))
    return sorted({number * (count - 1) // (most - 1) for number in range(most)})


def _size_of(row: Row) -> int | None:
    """Bytes of a row's picture, where something says so."""
    if row.data is not None:
        return len(row.data)
    if row.image is not None and row.image.length is not None:
        return row.image.length
    size = row.columns.get("size") if ETAG in row.columns else None
    return size if isinstance(size, int) else None


class Chosen:
    """A shard of which some rows alone are read."""

    def __init__(self, shard: Shard, rows: set[int]) -> None:
        self.stem = shard.stem
        self.version = shard.version
        self.size = shard.size
        self._shard = shard
        self._rows = rows

    def share(self, cursor: Cursor) -> float:
        return self._shard.share(cursor)

    def rows(self, start: Cursor) -> Iterator[tuple[Cursor, Row]]:
        last = max(self._rows)
        for after, row in self._shard.rows(start):
            if after.rows - 1 in self._rows:
                yield after, row
            if after.rows > last:
                return

    def parts(self, fields: Fields, *, pictures: bool, lines: int) -> Iterator[Part]:
        return self._shard.parts(fields, pictures=pictures, lines=lines)


def sample_of(dataset: Dataset, chosen: dict[int, set[int]]) -> Dataset:
    """The chosen rows as a dataset."""
    shards = [Chosen(dataset.shards[index], rows) for index, rows in sorted(chosen.items())]
    return dataset.of(shards)
