"""A dataset whose command, workers and Redis are killed while it is worked on, and an audit.

On real parts; only the model is a stand-in, so that this is about what could lose a row.
img2dataset makes the shards, in S3, and duckdb and webdataset read the answers.
"""

import io
import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from benchmarks.datasets.shards import audited, check_installed, make_shards
from blipq.bulk.journal import Journal
from blipq.local.supervisor import Service
from guarantees.rig import Rig

SHARDS, WINDOW = 20, 1000
#: One row in so many has no picture that can be read.
EVERY_BAD = 97
#: The command's exit code where rows have no answer.
SOME_BAD = 3
COMMANDS, WORKERS, REDIS = 3, 10, 1
BUCKET = "sets"
#: Of the whole run, and between two looks at it.
TIMEOUT_S, POLL_S = 7200, 0.2


def asked(rows: int) -> Iterator[dict[str, Any]]:
    """The rows' columns; ``expected`` is what the stand-in answers, if it can."""
    for number in range(rows):
        expected = f"did row {number}" if number % EVERY_BAD else None
        yield {"n": number, "prompt": f"row {number}", "expected": expected}


def picture(number: int) -> bytes:
    """A small JPEG; for a bad row text, nothing, or the first half of one."""
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), f"#{number:06x}").save(stream, "JPEG")
    data = stream.getvalue()
    if number % EVERY_BAD:
        return data
    return (b"no picture", b"", data[: len(data) // 2])[number // EVERY_BAD % 3]


@dataclass(slots=True)
class Watched:
    """The most that a run held: jobs in Redis, and MiB of the command's memory.

    begun, ended: MiB once a tenth of the shards was written, and at the last look.
    """

    open: int = 0
    records: int = 0
    mib: int = 0
    begun: int = 0
    ended: int = 0

    def add_jobs(self, rig: Rig) -> None:
        """Open jobs, and records of all that Redis knows."""
        if rig.redis_answers():
            self.open = max(self.open, rig.redis(lambda raw: raw.zcard("blipq:open")))
            self.records = max(self.records, records(rig))

    def add_memory(self, process: Service, written: int) -> None:
        """Of a process that may have ended. written: shards so far."""
        with suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            sizes = dict(re.findall(r"(VmHWM|VmRSS):\s+(\d+)", status))
            if sizes:
                self.mib = max(self.mib, int(sizes["VmHWM"]) // 1024)
                self.ended = int(sizes["VmRSS"]) // 1024
                if not self.begun and written * 10 >= SHARDS:
                    self.begun = self.ended


def records(rig: Rig) -> int:
    """How many jobs Redis has a record of."""
    found: int = rig.redis(lambda raw: len(set(raw.scan_iter("blipq:job:*", count=1000))))
    return found


class Killed:
    """Two runs in a rig's folder: one that is killed, and one that writes its answers as tars."""

    def __init__(self, rig: Rig, rows: int) -> None:
        self.rig = rig
        self.rows = rows
        self.journal = rig.folder / "set.bulk"
        self.made = make_shards(rig.folder, list(asked(rows)), picture, -(-rows // SHARDS))
        self._upload()
        say(f"img2dataset has made {rows:,} samples")

    def _upload(self) -> None:
        storage = self.rig.client.storage
        storage.create_bucket(BUCKET)
        for path in filter(Path.is_file, sorted(self.made.iterdir())):
            storage.client.upload_file(str(path), BUCKET, f"shards/{path.name}")

    def run(self) -> tuple[Watched, Path]:
        """Writes Parquet, and kills what there is at even distances; its folder."""
        output, watched = self.rig.folder / "answers", Watched()
        worker = self.rig.start_worker()
        process = self._submit(output)
        for at, what in _plan(self.rows):
            self._wait(process, output, watched, lambda at=at: self._ended() >= at)
            if what == "command":
                process.signal(signal.SIGKILL)
                self.rig.wait_for_death(process)
                process = self._submit(output)
            elif what == "worker":
                self.rig.kill(worker)
                worker = self.rig.start_worker()
            else:
                self.rig.kill_redis()
                self.rig.start_redis()
            say(f"killed the {what} after {at:,} rows")
        self._finish(process, output, watched)
        return watched, output

    def run_again(self) -> tuple[Watched, Path]:
        """Writes tars; answers are taken over, and only bad rows are jobs again."""
        output, watched = self.rig.folder / "tars", Watched()
        process = self._submit(output, "--to", "webdataset", "--update")
        self._finish(process, output, watched)
        return watched, output

    def _submit(self, output: Path, *options: str) -> Service:
        service = self.rig.command(
            *("bulk", "submit", f"s3://{BUCKET}/shards/", "--prompt-column", "prompt"),
            *("--id-column", "key", "--journal", str(self.journal)),
            *("--output", str(output), "--window", str(WINDOW), *options),
        )
        service.start()
        return service

    def _wait(
        self, process: Service, output: Path, watched: Watched, is_over: Callable[[], bool]
    ) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not is_over():
            assert time.monotonic() < deadline, process.last_words()
            assert process.exit_code in (None, SOME_BAD), process.last_words()
            watched.add_jobs(self.rig)
            watched.add_memory(process, sum(1 for _ in output.glob("0*")))
            time.sleep(POLL_S)

    def _finish(self, process: Service, output: Path, watched: Watched) -> None:
        self._wait(process, output, watched, lambda: process.exit_code is not None)
        assert process.exit_code == SOME_BAD, process.last_words()
        say(f"{output.name} are written")

    def _ended(self) -> int:
        if not self.journal.exists():
            return 0
        with closing(Journal.open(self.journal)) as journal:
            counts = journal.counts()
        return sum(counts.values()) - counts.get("open", 0)


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
    check_installed()
    with tempfile.TemporaryDirectory() as folder:
        rig = Rig(Path(folder), forked=False)
        try:
            killed = Killed(rig, rows)
            parts = {
                "parquet": _part(killed.run, "tables", "*.parquet", f"{killed.made}/*.parquet"),
                "tars": _part(killed.run_again, "tars", "*.tar"),
            }
            wrong = {what: n for part in parts.values() for what, n in part.pop("wrong").items()}
            wrong["jobs left in Redis"] = records(rig)
        finally:
            rig.close()
    return {
        "rows": rows,
        "killed": {"command": COMMANDS, "worker": WORKERS, "Redis": REDIS},
        "window": WINDOW,
        **parts,
        "wrong": wrong,
    }


def _part(
    run: Callable[[], tuple[Watched, Path]], kind: str, pattern: str, *made: str
) -> dict[str, Any]:
    """A run, and what is found in its answers."""
    started = time.monotonic()
    watched, output = run()
    took = time.monotonic() - started
    stats = json.loads((output / "_stats.json").read_text())
    return {
        "s": took,
        "jobs": stats["took"]["jobs"],
        "errors": stats["errors"],
        "most_open": watched.open,
        "most_records": watched.records,
        "mib": {"tenth": watched.begun, "end": watched.ended, "most": watched.mib},
        **audited(kind, f"{output}/{pattern}", *made),
    }


def say(text: str) -> None:
    """Says how far it is."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
