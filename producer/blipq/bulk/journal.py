"""What became of each line, on disk: an SQLite file that survives ``kill -9`` and power cuts.

A line is noted before it is submitted and ends in the same file, so that memory stays flat and a
driver that starts again knows both what is open and where to read on.
"""

import fcntl
import json
import os
import secrets
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, Self

from blipq.bulk.manifest import Entry
from blipq.contract import JobError, JobInfo, Status
from blipq.errors import BlipqError, InvalidRequest
from blipq.program import blipq

_SCHEMA = """
CREATE TABLE bulk (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE line (
    number INTEGER PRIMARY KEY,
    custom_id TEXT UNIQUE,
    job_id TEXT,
    work TEXT,      -- the request, while the line is open
    status TEXT,    -- null while it is open
    outcome TEXT
);
CREATE INDEX line_status ON line (status);
"""
#: Status of a line that never became a job, and of one that has the outcome of another line.
REFUSED, DUPLICATE = "refused", "duplicate"


@dataclass(frozen=True, slots=True)
class OpenLine:
    """A line whose job has not been collected."""

    number: int
    job_id: str
    work: str


@contextmanager
def driving(path: Path) -> Iterator[None]:
    """For the one process that works on this journal; leaves nothing beside it.

    Raises InvalidRequest beside another process, and where no file can be made.
    """
    lock = _lock_of(path)
    try:
        file = _locked(lock)
    except BlockingIOError:
        raise InvalidRequest(f"another process is at {path} already") from None
    except OSError as error:
        raise InvalidRequest(
            f"no journal can be written at {path}: {error.strerror}; give another --journal"
        ) from None
    with file:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # while it is held: the next process makes a new one


def is_driven(path: Path) -> bool:
    """Whether a process works on this journal now."""
    try:
        with _lock_of(path).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-lock")


def _locked(lock: Path) -> IO[bytes]:
    """The file, locked. Raises OSError; of these, BlockingIOError where another has locked it."""
    while True:
        file = lock.open("wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(lock, file):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # whose holder removed it between the two calls


def _is_at(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


class Journal:
    """One bulk's file. ``create`` or ``open`` it."""

    schema: ClassVar[str] = _SCHEMA
    #: What is kept of a job that has ended.
    kept: ClassVar[dict[str, Any]] = {"result": True, "result_uri": True, "error": True}

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = sqlite3.connect(path, timeout=30, isolation_level=None)
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
        except sqlite3.Error:  # not a database, say
            self.close()
            raise

    @classmethod
    def create(cls, path: Path, **facts: Any) -> Self:
        """A new file, whole or not at all. Raises BlipqError where it cannot be written."""
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            cls._write(scratch, facts)
            scratch.rename(path)
        except (sqlite3.Error, OSError) as error:  # a full disk, say
            scratch.unlink(missing_ok=True)
            raise BlipqError(f"{path}: {error}") from error
        return cls(path)

    @classmethod
    def _write(cls, path: Path, facts: Mapping[str, Any]) -> None:
        with closing(sqlite3.connect(path)) as db, db:
            db.executescript(cls.schema)
            pairs = {"position": "", "lines": 0, **facts}.items()
            db.executemany(
                "INSERT INTO bulk VALUES (?, ?)", [(key, json.dumps(value)) for key, value in pairs]
            )

    @classmethod
    def open(cls, path: Path) -> Self:
        """A file that is there. Raises InvalidRequest."""
        if not path.is_file():
            raise InvalidRequest(f"there is no bulk {path}: {blipq('bulk submit')} makes one")
        journal: Self | None = None
        try:
            journal = cls(path)
            journal.fact("id")
        except sqlite3.DatabaseError as error:
            if journal is not None:
                journal.close()
            raise InvalidRequest(f"{path} is not a bulk's journal: {error}") from None
        return journal

    def close(self) -> None:
        self._db.close()

    # -- the bulk --

    def fact(self, name: str) -> Any:
        """Something about the bulk, or None."""
        row = self._db.execute("SELECT value FROM bulk WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def note(self, **facts: Any) -> None:
        """Keeps something about the bulk."""
        with self._changing():
            self._note(facts)

    def _note(self, facts: dict[str, Any]) -> None:
        for name, value in facts.items():
            self._db.execute("REPLACE INTO bulk VALUES (?, ?)", (name, json.dumps(value)))

    # -- lines --

    def add(
        self, entries: Sequence[Entry], job_ids: Sequence[str]
    ) -> tuple[list[OpenLine], Counter[str]]:
        """Notes the next lines, and where to read on; those that are to be submitted.

        A malformed line, or one whose ``custom_id`` was used before, ends here: how many with which
        status.
        """
        added: list[OpenLine] = []
        ended: Counter[str] = Counter()
        with self._changing():
            for entry, job_id in zip(entries, job_ids, strict=True):
                taken = self._take(entry, job_id)
                if isinstance(taken, OpenLine):
                    added.append(taken)
                else:
                    ended[taken] += 1
            self._note({"position": entries[-1].position, "lines": entries[-1].number})
        return added, ended

    def _take(self, entry: Entry, job_id: str) -> OpenLine | str:
        """Notes a line: it is open, or has this status at once."""
        if entry.work is None:
            self._refuse(entry, entry.error or "malformed")
        elif self._insert(entry, job_id):
            return OpenLine(entry.number, job_id, entry.work)
        else:
            self._refuse(entry, f"custom_id: line {self._line_of(entry)} has it, too")
        return REFUSED

    def _insert(self, entry: Entry, job_id: str) -> bool:
        inserted = self._db.execute(
            "INSERT INTO line (number, custom_id, job_id, work) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (custom_id) DO NOTHING",
            (entry.number, entry.custom_id, job_id, entry.work),
        )
        return inserted.rowcount == 1

    def _line_of(self, entry: Entry) -> int:
        found = self._db.execute("SELECT number FROM line WHERE custom_id = ?", (entry.custom_id,))
        number: int = found.fetchone()[0]
        return number

    def _refuse(self, entry: Entry, message: str) -> None:
        outcome = {"custom_id": entry.custom_id, **_refusal(message)}
        self._db.execute(
            "INSERT INTO line (number, status, outcome) VALUES (?, ?, ?)",
            (entry.number, REFUSED, json.dumps(outcome)),
        )

    def open_lines(self) -> list[OpenLine]:
        """Lines whose jobs have not been collected: never more than the window was."""
        rows = self._db.execute(
            "SELECT number, job_id, work FROM line WHERE status IS NULL ORDER BY number"
        )
        return [OpenLine(*row) for row in rows]

    def end(self, infos: Collection[tuple[int, JobInfo]]) -> None:
        """Keeps outcomes, and as ``collected`` whose: their jobs are to be released.

        When this returns they are on disk.
        """
        with self._changing():
            self._note({"collected": [info.id for _, info in infos]})
            for number, info in infos:
                outcome = info.model_dump(mode="json", include=self.kept, exclude_none=True)
                self._end(number, info.status, outcome)

    def refuse(self, refused: Sequence[tuple[int, str]]) -> None:
        """Keeps that lines can never be jobs, and why."""
        if not refused:
            return
        with self._changing():
            for number, message in refused:
                self._end(number, REFUSED, _refusal(message))

    def cancel(self, numbers: Iterable[int]) -> None:
        """Keeps that lines were cancelled."""
        with self._changing():
            for number in numbers:
                self._end(number, Status.CANCELLED, {})

    def _end(self, number: int, status: str, outcome: dict[str, Any]) -> None:
        self._db.execute(
            "UPDATE line SET status = ?, outcome = ?, work = NULL"
            " WHERE number = ? AND status IS NULL",
            (status, json.dumps(outcome), number),
        )

    # -- reading --

    def counts(self) -> dict[str, int]:
        """How many lines have each status; ``open`` those without one."""
        rows = self._db.execute("SELECT status, count(*) FROM line GROUP BY status")
        return {status or "open": count for status, count in rows}

    def refusals(self, most: int) -> list[tuple[int, str]]:
        """The first lines that never became a job, and why; at most so many."""
        rows = self._db.execute(
            "SELECT number, outcome FROM line WHERE status = ? ORDER BY number LIMIT ?",
            (REFUSED, most),
        )
        return [(number, json.loads(outcome)["error"]["message"]) for number, outcome in rows]

    def outcomes(self) -> Iterator[dict[str, Any]]:
        """What became of each line that has ended, in their order.

        A duplicate has the outcome of the line that it is the same as, once that one has ended.
        """
        rows = self._db.execute(
            "SELECT l.number, l.custom_id, o.number, o.job_id, o.status, o.outcome"
            " FROM line l JOIN line o ON o.number ="
            "  CASE l.status WHEN ? THEN json_extract(l.outcome, '$.same_as') ELSE l.number END"
            " WHERE l.status IS NOT NULL AND o.status IS NOT NULL ORDER BY l.number",
            (DUPLICATE,),
        )
        for number, custom_id, first, job_id, status, outcome in rows:
            line = {"custom_id": custom_id, "line": number, "status": status}
            line |= {"same_as": first} if first != number else {}
            yield line | ({"job_id": job_id} if job_id else {}) | json.loads(outcome)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):  # a full disk, say
                raise BlipqError(f"{self.path}: {error}") from error
            raise


def _refusal(message: str) -> dict[str, Any]:
    error = JobError(code="invalid_request", message=message[:2000])
    return {"error": error.model_dump(mode="json")}
