"""``python tests/guarantees/soak/bulk.py --lines 100000``: a bulk that is killed, and an audit.

``blipq bulk submit`` is killed with SIGKILL again and again while it works on a manifest, and
started again. Meanwhile Redis' memory and the jobs in flight are watched. In the end each line must
have exactly one outcome. A stand-in ends the jobs: this is about what submits and collects them.
"""

import argparse
import itertools
import json
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from blipq import Settings
from blipq.bulk.journal import Journal
from blipq.ledger.connection import connect
from blipq.ledger.worker import Claim, WorkerLedger
from blipq.local.supervisor import Service
from conftest import wait_until
from guarantees.rig import Rig

QUEUE = "blipq.default.low"
#: One line in so many is malformed, or has the custom_id of the line before it.
EVERY_BAD = 97


class StandIn:
    """Takes messages from the queue and ends their jobs, through the ledger as a worker would."""

    def __init__(self, settings: Settings) -> None:
        self.runs: Counter[str] = Counter()
        self._settings = settings
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "StandIn":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with connect(self._settings) as raw:
            redis: Any = raw
            ledger = WorkerLedger(raw, self._settings)
            while not self._stop.is_set():
                messages = redis.rpop(QUEUE, 100)
                ids = [json.loads(message)["headers"]["id"] for message in messages or ()]
                for id in ids or self._found_again(ledger):
                    self._end(ledger, id)

    def _found_again(self, ledger: WorkerLedger) -> list[str]:
        """Jobs whose submitter was killed before it published them, as workers find them."""
        time.sleep(0.05)
        ledger.register("stand-in", ["default"], "{}", ttl_s=10, spare=True)
        return [message.id for message in ledger.reconcile(grace_s=1).messages]

    def _end(self, ledger: WorkerLedger, id: str) -> None:
        claim = ledger.claim(id, "stand-in")
        if isinstance(claim, Claim):
            prompt = json.loads(claim.request)["prompt"]
            self.runs[prompt] += 1
            result = {"kind": "caption", "captions": [{"text": f"did {prompt}"}]}
            ledger.succeed(claim, json.dumps(result), "{}")


@dataclass
class Bulk:
    """One run in the rig's folder."""

    rig: Rig
    lines: int
    window: int
    most_open: int = 0
    most_memory: int = 0
    most_rss: int = 0
    good: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.manifest = self.rig.folder / "manifest.jsonl"
        self.journal = self.rig.folder / "manifest.jsonl.bulk"
        self.output = self.rig.folder / "results.jsonl"
        with self.manifest.open("w") as file:
            for number in range(1, self.lines + 1):
                file.write(self._line(number) + "\n")

    def _line(self, number: int) -> str:
        if number % EVERY_BAD == 0:
            return "{"
        custom_id = f"line-{number - 1}" if number % EVERY_BAD == 2 else f"line-{number}"
        self.good.add(custom_id)
        asked = {"kind": "caption", "image": "s3://photos/cat.jpg", "prompt": custom_id}
        return json.dumps({"custom_id": custom_id, **asked})

    def blipq(self, *arguments: str) -> Service:
        """``blipq bulk ...``."""
        service = self.rig.command("bulk", *arguments)
        service.start()
        return service

    def submit(self) -> Service:
        return self.blipq(
            "submit", str(self.manifest), "--journal", str(self.journal),
            "--window", str(self.window),
        )  # fmt: skip

    def ended(self) -> int:
        """Lines that have ended, as the journal has it."""
        if not self.journal.exists():
            return 0
        with closing(Journal.open(self.journal)) as journal:
            counts = journal.counts()
        return sum(counts.values()) - counts.get("open", 0)

    def watch(self, process: Service) -> None:
        """Keeps the highest figures that were seen."""
        self.most_open = max(self.most_open, self.rig.redis(lambda raw: raw.zcard("blipq:open")))
        memory = self.rig.redis(lambda raw: raw.info("memory")["used_memory"])
        self.most_memory = max(self.most_memory, memory)
        with suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            if held := re.search(r"VmRSS:\s+(\d+)", status):  # none when it has just been killed
                self.most_rss = max(self.most_rss, int(held[1]) // 1024)

    def wait(self, process: Service, lines: int, timeout: float) -> None:
        """Until so many lines have ended."""

        def reached() -> bool:
            self.watch(process)
            return self.ended() >= lines

        wait_until(reached, f"{lines} lines", timeout)

    def run(self, kills: int, timeout: float) -> None:
        """Submits, killed at even distances, and writes the results."""
        for kill in range(1, kills + 1):
            process = self.submit()
            self.wait(process, self.lines * kill // (kills + 1), timeout)
            process.signal(signal.SIGKILL)
            self.rig.wait_for_death(process)
            say(f"killed after {self.ended()} lines")
        process = self.submit()
        self.wait(process, self.lines, timeout)
        self.rig.wait_for_death(process, timeout=60)
        assert process.exit_code == 3, process.last_words()  # some lines are bad
        written = self.blipq("results", str(self.journal), "--output", str(self.output))
        self.rig.wait_for_death(written, timeout=120)
        assert written.exit_code == 0, written.last_words()

    def audit(self, runs: Counter[str]) -> dict[str, int]:
        """What is wrong: all zero if each line has its one outcome."""
        outcomes = [json.loads(line) for line in self.output.read_text().splitlines()]
        done = Counter(each["custom_id"] for each in outcomes if each["status"] == "succeeded")
        texts = {
            each["custom_id"]: each["result"]["captions"][0]["text"]
            for each in outcomes
            if each["status"] == "succeeded"
        }
        numbers = [each["line"] for each in outcomes]
        return {
            "lines without an outcome": self.lines - len(set(numbers)),
            "lines with two": len(numbers) - len(set(numbers)),
            "out of order": sum(a >= b for a, b in itertools.pairwise(numbers)),
            "custom_ids without a result": len(self.good - set(done)),
            "custom_ids with two results": sum(count > 1 for count in done.values()),
            "results too many": len(set(done) - self.good),
            "results of another line": sum(text != f"did {id}" for id, text in texts.items()),
            "jobs left in Redis": self.rig.redis(
                lambda raw: sum(1 for _ in raw.scan_iter("blipq:job:*", count=1000))
            ),
            "run more than once": sum(count > 1 for count in runs.values()),
        }


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--window", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rig = Rig(Path(folder), forked=False)
        try:
            bulk = Bulk(rig, arguments.lines, arguments.window)
            started = time.monotonic()
            with StandIn(rig.settings) as stand_in:
                bulk.run(arguments.kills, timeout=3600)
            found = bulk.audit(stand_in.runs)
            print(f"{bulk.lines} lines in {time.monotonic() - started:.0f} s", end=", ")
            print(f"killed {arguments.kills} times, {len(bulk.good)} custom_ids with a result")
            print(f"at most {bulk.most_open} open jobs (window {bulk.window})", end=", ")
            print(f"{bulk.most_memory / 2**20:.0f} MiB in Redis, {bulk.most_rss} MiB in blipq bulk")
        finally:
            rig.close()
    print(", ".join(f"{what} {number}" for what, number in found.items()))
    clean = not any(found.values()) and bulk.most_open <= bulk.window
    print("clean" if clean else "NOT CLEAN")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
