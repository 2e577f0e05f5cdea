"""A bulk's journal with what datasets need beside it, in the same file and the same transactions.

``request``: the first line with a request. A later line with an equal one is a duplicate, and has
that line's outcome. ``earlier``: outcomes of the run before this one, which need no job.
``shard``: which line begins each shard, and what kinds of values its columns have.
"""

import json
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blipq.bulk.journal import DUPLICATE, REFUSED, Journal, OpenLine
from blipq.bulk.manifest import Entry
from blipq.contract import Status
from blipq_datasets.fields import Fields, widened

_MORE = """
CREATE TABLE request (mark TEXT PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE earlier (mark TEXT PRIMARY KEY, job_id TEXT, status TEXT, outcome TEXT) WITHOUT ROWID;
CREATE TABLE shard (number INTEGER PRIMARY KEY, first INTEGER NOT NULL, fields TEXT NOT NULL);
"""

NOTED_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class RowEntry(Entry):
    """A row as a line. mark: its request, of which bytes and which model; None with ``error``.

    fields: the kinds of its columns.
    """

    shard: int = 0
    mark: str | None = None
    fields: Fields = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a line. number: its own; of a duplicate, the rest is that of the first."""

    number: int
    key: str | None
    job_id: str | None
    status: str
    is_duplicate: bool
    details: dict[str, Any]


class DatasetJournal(Journal):
    """One dataset's file."""

    schema = Journal.schema + _MORE
    #: Of an outcome: also which model answered, and what that took.
    kept = Journal.kept | {
        "model": True,
        "receipt": {"checkpoint": True, "revision": True, "gpu_ms": True, "cache_hit": True},
    }

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._shard = -1
        self._fields: Fields = {}

    # -- taking rows in --

    def take_over(self, earlier: Path) -> None:
        """What an earlier journal has answers to needs no job, nor what an estimate has."""
        self._db.execute("ATTACH DATABASE ? AS old", (str(earlier),))
        with self._changing():
            self._db.execute(
                "INSERT OR IGNORE INTO earlier"
                " SELECT a.mark, l.job_id, l.status, l.outcome"
                " FROM old.request a JOIN old.line l ON l.number = a.number WHERE l.status = ?",
                (Status.SUCCEEDED,),
            )
            self._db.execute(
                "INSERT OR IGNORE INTO earlier SELECT * FROM old.earlier"
                " WHERE NOT EXISTS (SELECT 1 FROM old.line)"
            )
        self._db.execute("DETACH DATABASE old")

    def is_known(self, mark: str) -> bool:
        """Whether a line has this request, here or in the earlier run."""
        found = self._db.execute(
            "SELECT 1 FROM request WHERE mark = ? UNION ALL SELECT 1 FROM earlier WHERE mark = ?",
            (mark, mark),
        )
        return found.fetchone() is not None

    def _take(self, entry: Entry, job_id: str) -> OpenLine | str:
        if isinstance(entry, RowEntry):
            self._note_shard(entry)
            if entry.work is not None and entry.mark is not None:
                return self._take_request(entry, entry.mark, job_id)
        return super()._take(entry, job_id)

    def _take_request(self, entry: RowEntry, mark: str, job_id: str) -> OpenLine | str:
        taken = super()._take(entry, job_id)
        if isinstance(taken, str):
            return taken
        first = self._db.execute("SELECT number FROM request WHERE mark = ?", (mark,)).fetchone()
        if first is not None:
            self._end(entry.number, DUPLICATE, {"same_as": first[0]})
            self._db.execute("UPDATE line SET job_id = NULL WHERE number = ?", (entry.number,))
            return DUPLICATE
        self._db.execute("INSERT INTO request VALUES (?, ?)", (mark, entry.number))
        old = self._db.execute(
            "SELECT job_id, status, outcome FROM earlier WHERE mark = ?", (mark,)
        ).fetchone()
        if old is None:
            return taken
        self._end(entry.number, old[1], json.loads(old[2]))
        self._db.execute("UPDATE line SET job_id = ? WHERE number = ?", (old[0], entry.number))
        return str(old[1])

    def _note_shard(self, entry: RowEntry) -> None:
        if entry.shard != self._shard:
            self._db.execute(
                "INSERT OR IGNORE INTO shard VALUES (?, ?, '{}')", (entry.shard, entry.number)
            )
            self._shard, self._fields = entry.shard, self.shard(entry.shard)[1]
        fields = widened(self._fields, entry.fields)
        if fields != self._fields:
            self._fields = fields
            self._db.execute(
                "UPDATE shard SET fields = ? WHERE number = ?", (json.dumps(fields), entry.shard)
            )

    # -- reading --

    def shard(self, number: int) -> tuple[int, Fields]:
        """The line that begins a shard, and its columns."""
        found = self._db.execute(
            "SELECT first, fields FROM shard WHERE number = ?", (number,)
        ).fetchone()
        return found[0], json.loads(found[1])

    def begun(self) -> list[tuple[int, range]]:
        """The shards of which lines are known, and these lines."""
        found = self._db.execute("SELECT number, first FROM shard ORDER BY number").fetchall()
        ends = [first for _, first in found[1:]] + [self.fact("lines") + 1]
        return [
            (number, range(first, end)) for (number, first), end in zip(found, ends, strict=True)
        ]

    def lines_of(self, shard: int) -> range | None:
        """The lines of a shard, once all of them are known and none before its end is open."""
        behind = self._db.execute(
            "SELECT min(first) FROM shard WHERE number > ?", (shard,)
        ).fetchone()[0]
        if behind is None and not self.fact("exhausted"):
            return None
        last = self.fact("lines") if behind is None else behind - 1
        open = self._db.execute(
            "SELECT 1 FROM line WHERE status IS NULL AND number <= ? LIMIT 1", (last,)
        )
        if open.fetchone() is not None:
            return None
        own = self._db.execute("SELECT first FROM shard WHERE number = ?", (shard,)).fetchone()
        return range(last + 1, last + 1) if own is None else range(own[0], last + 1)

    def outcomes_of(self, lines: range) -> Iterator[Outcome]:
        """What became of each line that has ended, in order."""
        rows = self._db.execute(
            "SELECT l.number, l.custom_id, o.job_id, o.status, l.status = ?, o.outcome, l.outcome"
            " FROM line l JOIN line o ON o.number ="
            "  CASE l.status WHEN ? THEN json_extract(l.outcome, '$.same_as') ELSE l.number END"
            " WHERE l.number BETWEEN ? AND ? AND l.status IS NOT NULL AND o.status IS NOT NULL"
            " ORDER BY l.number",
            (DUPLICATE, DUPLICATE, lines.start, lines.stop - 1),
        )
        for number, key, job_id, status, is_duplicate, details, own in rows:
            key = key or json.loads(own).get("custom_id")
            yield Outcome(number, key, job_id, status, bool(is_duplicate), json.loads(details))

    def ended_among(self, lines: Collection[int]) -> list[int]:
        """Which of these lines have ended."""
        rows = self._db.execute(
            "SELECT number FROM line WHERE status IS NOT NULL"
            " AND number IN (SELECT value FROM json_each(?))",
            (json.dumps(list(lines)),),
        )
        return [number for (number,) in rows]

    def took(self) -> dict[str, float]:
        """What this run took so far, without the jobs whose answers it took over.

        Seconds of the command over all its starts, jobs, GPU-seconds, and how many jobs found the
        features of their picture cached.
        """
        found = self._db.execute(
            "SELECT count(*), sum(json_extract(l.outcome, '$.receipt.gpu_ms')),"
            " sum(coalesce(json_extract(l.outcome, '$.receipt.cache_hit'), 0))"
            " FROM line l JOIN request a ON a.number = l.number"
            " LEFT JOIN earlier e ON e.mark = a.mark"
            " WHERE l.status IS NOT NULL AND l.status != ? AND e.mark IS NULL",
            (REFUSED,),
        ).fetchone()
        return {
            "s": round(self.fact("worked_s") or 0.0, 3),
            "jobs": found[0],
            "gpu_s": round((found[1] or 0.0) / 1000, 3),
            "cache_hits": found[2] or 0,
        }


class Clock:
    """How long commands have worked on a run, kept in its journal."""

    def __init__(self, journal: DatasetJournal) -> None:
        self._journal = journal
        self._before: float = journal.fact("worked_s") or 0.0
        self._began = self._noted = time.monotonic()

    def note(self, *, at_once: bool = False) -> None:
        """Keeps it, now and then: a command that is killed loses NOTED_EVERY_S at most."""
        now = time.monotonic()
        if at_once or now - self._noted >= NOTED_EVERY_S:
            self._noted = now
            self._journal.note(worked_s=self._before + now - self._began)
