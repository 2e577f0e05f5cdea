"""A dataset whose command, workers and Redis are killed while it is worked on, and an audit.

On real parts; only the model is a stand-in, so that this is about what could lose a row.
"""

import json
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from blipq.bulk.journal import Journal
from blipq.local.supervisor import Service
from conftest import wait_until
from guarantees.rig import Rig

PER_SHARD, WINDOW = 5000, 1000
#: One row in so many names no picture.
EVERY_BAD = 97
COMMANDS, WORKERS, REDIS = 3, 10, 1


class Killed:
    """One run in a rig's folder."""

    def __init__(self, rig: Rig, rows: int) -> None:
        self.rig = rig
        self.rows = rows
        self.source, self.journal = rig.folder / "set", rig.folder / "set.bulk"
        self.output = rig.folder / "answers"
        self.most_open = self.most_rss = 0
        self.source.mkdir()
        for start in range(0, rows, PER_SHARD):
            numbers = range(start, min(start + PER_SHARD, rows))
            table = pa.Table.from_pylist([self._row(number) for number in numbers])
            pq.write_table(table, self.source / f"{start // PER_SHARD:05}.parquet")

    def _row(self, number: int) -> dict[str, Any]:
        image = "no picture://" if number % EVERY_BAD == 0 else self.rig.image.uri
        return {"key": f"row-{number}", "image": image, "prompt": f"row {number}", "n": number}

    def run(self, timeout: float) -> None:
        """Works on it, and kills what there is at even distances."""
        self.worker = self.rig.start_worker()
        process = self._submit()
        for at, what in _plan(self.rows):
            self._wait(process, at, timeout)
            if what == "command":
                process.signal(signal.SIGKILL)
                self.rig.wait_for_death(process)
                process = self._submit()
            elif what == "worker":
                self.rig.kill(self.worker)
                self.worker = self.rig.start_worker()
            else:
                self.rig.kill_redis()
                self.rig.start_redis()
            say(f"killed the {what} after {at:,} rows")
        self._wait(process, self.rows, timeout)
        self.rig.wait_for_death(process, timeout=600)
        assert process.exit_code == 3, process.last_words()  # some rows are bad

    def _submit(self) -> Service:
        service = self.rig.command(
            *("bulk", "submit", str(self.source), "--prompt-column", "prompt"),
            *("--id-column", "key", "--journal", str(self.journal)),
            *("--output", str(self.output), "--window", str(WINDOW)),
        )
        service.start()
        return service

    def _wait(self, process: Service, rows: int, timeout: float) -> None:
        def reached() -> bool:
            assert process.exit_code is None or self._ended() >= rows, process.last_words()
            self._watch(process)
            return self._ended() >= rows

        wait_until(reached, f"{rows} rows", timeout)

    def _watch(self, process: Service) -> None:
        if self.rig.redis_answers():
            open = self.rig.redis(lambda raw: raw.zcard("blipq:open"))
            self.most_open = max(self.most_open, open)
        with suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            if held := re.search(r"VmHWM:\s+(\d+)", status):
                self.most_rss = max(self.most_rss, int(held[1]) // 1024)

    def _ended(self) -> int:
        if not self.journal.exists():
            return 0
        with closing(Journal.open(self.journal)) as journal:
            counts = journal.counts()
        return sum(counts.values()) - counts.get("open", 0)

    def audit(self) -> dict[str, int]:
        """What is wrong: all zero if each row is once in the answers, as it was, with its own."""
        keys: Counter[str] = Counter()
        others = errors = changed = 0
        for path in sorted(self.output.glob("*.parquet")):
            for found in pq.read_table(path).to_pylist():
                keys[found["blipq_key"]] += 1
                asked = self._row(found["n"])
                changed += any(found[name] != value for name, value in asked.items())
                bad = found["n"] % EVERY_BAD == 0
                errors += bad != (found["blipq_error_code"] is not None)
                others += not bad and found["blipq_text"] != f"did {asked['prompt']}"
        return {
            "rows without an answer": self.rows - len(keys),
            "rows with two": sum(count > 1 for count in keys.values()),
            "answers of another row": others,
            "rows whose columns changed": changed,
            "errors in the wrong rows": errors,
            "jobs left in Redis": self.rig.redis(
                lambda raw: sum(1 for _ in raw.scan_iter("blipq:job:*", count=1000))
            ),
        }


def _plan(rows: int) -> list[tuple[int, str]]:
    """After how many rows what is killed."""
    counts = {"command": COMMANDS, "worker": WORKERS, "Redis": REDIS}
    return sorted(
        (rows * (2 * number + 1) // (2 * count), what)
        for what, count in counts.items()
        for number in range(count)
    )


def kills(rows: int) -> dict[str, Any]:
    """Runs it; what it took and what was wrong."""
    with tempfile.TemporaryDirectory() as folder:
        rig = Rig(Path(folder), forked=False)
        try:
            started = time.monotonic()
            killed = Killed(rig, rows)
            killed.run(timeout=7200)
            took = time.monotonic() - started
            wrong = killed.audit()
            stats = json.loads((killed.output / "_stats.json").read_text())
        finally:
            rig.close()
    return {
        "rows": rows,
        "s": took,
        "killed": {"command": COMMANDS, "worker": WORKERS, "Redis": REDIS},
        "most_open": killed.most_open,
        "window": WINDOW,
        "mib": killed.most_rss,
        "statuses": stats["statuses"],
        "wrong": wrong,
    }


def say(text: str) -> None:
    """Says how far it is."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
