"""``python tests/guarantees/soak/uploads.py --objects 10000``: uploads under kills, and an audit.

Objects are put into a bucket while ``blipq watch`` and the workers are killed with SIGKILL and
started again. Their notifications come twice, late and out of order, among others that mean
nothing. In the end each upload must have one job and one sidecar, and nothing else may have any.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from blipq.backoff import Backoff
from blipq.local import supervisor
from blipq.local.supervisor import Service
from conftest import wait_until
from guarantees.rig import Rig, png
from sqs import Sqs, notification

BUCKET = "photos"
#: Names as users choose them.
NAMES = ("in/{n}.png", "in/a folder/{n} (1).png", "in/ü+%2F&{n}.PNG", "in/{n}/é~.png")


@dataclass
class Uploads:
    """One run. Without ``sqs`` the bucket is listed."""

    rig: Rig
    objects: int
    sqs: Sqs | None = None
    rng: random.Random = field(default_factory=lambda: random.Random(7))
    prompt: str = "fine"
    workers: int = 1
    kills: Counter[str] = field(default_factory=Counter)
    keys: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.s3: Any = self.rig.client.storage.client
        self.rig.client.storage.create_bucket(BUCKET)
        self.queue = self.sqs.create() if self.sqs else None
        self.rules = self.rig.folder / "rules.toml"
        self.rules.write_text(self._rules())

    def _rules(self) -> str:
        listed = f'every = "500ms"\nstate = "{self.rig.folder}/watch.json"'
        queue = f'queue = "{self.queue}"\nvisibility = 10'
        return f"""
name = "uploads"
[source]
{queue if self.queue else listed}
[[rules]]
name = "captions"
bucket = "{BUCKET}"
suffix = ".png"
request = {{ kind = "caption", prompt = "{self.prompt}" }}
options = {{ output = "s3://{BUCKET}/results/{{key}}.json" }}
"""

    @contextmanager
    def running(self) -> Iterator[None]:
        """The watch and the workers, each started again when it dies."""
        supervisor.RESTARTS = Backoff(1.0, 1.0)
        self.watch = self.rig.command("watch", str(self.rules), "--json")
        self.watch.start()
        stop = threading.Event()
        try:
            services = [self.watch, *self._workers()]
            options = {"report": lambda text: None}
            thread = threading.Thread(
                target=supervisor.supervise, args=(services, stop), kwargs=options
            )
            thread.start()
            yield
        finally:
            stop.set()
            thread.join()
            self.watch.stop()

    def _workers(self) -> list[Service]:
        return [self.rig.launch_worker(allowed_outputs=BUCKET) for _ in range(self.workers)]

    # -- load --

    def upload(self, number: int) -> None:
        """Puts one object, and sends what a bucket would, or worse."""
        key = self.rng.choice(NAMES).format(n=number)
        self.s3.put_object(Bucket=BUCKET, Key=key, Body=self._picture, ContentType="image/png")
        self.keys.append(key)
        self._tell(key)
        if number % 20 == 0:  # uploaded and taken back
            gone = f"in/gone-{number}.png"
            self.s3.put_object(Bucket=BUCKET, Key=gone, Body=b"", ContentType="image/png")
            self.s3.delete_object(Bucket=BUCKET, Key=gone)
            self._tell(gone)

    @property
    def _picture(self) -> bytes:
        return png(f"#{self.rng.randrange(2**24):06x}", (8, 8))

    def _tell(self, key: str) -> None:
        if self.sqs is None or self.queue is None:
            return
        for _ in range(self.rng.choice((1, 1, 2, 3))):
            self.sqs.tell(self.queue, BUCKET, key)
        late = self.rng.choice(self.keys or [key])
        if self.rng.random() < 0.2:
            self.sqs.send(self.queue, notification(BUCKET, late, f"results/{late}.json"))
        if self.rng.random() < 0.05:
            self.sqs.send(self.queue, json.dumps({"Event": "s3:TestEvent"}))

    def kill(self, name: str) -> None:
        """kill -9 of the watch or of a worker."""
        service = self.watch if name == "watch" else self.rng.choice(self.rig.workers)
        service.signal(signal.SIGKILL)
        self.kills[name] += 1

    # -- audit --

    def sidecars(self) -> set[str]:
        """Keys of the uploads that have one."""
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="results/")
        found = (each["Key"] for page in pages for each in page.get("Contents", ()))
        return {key.removeprefix("results/").removesuffix(".json") for key in found}

    def wait(self, timeout: float) -> None:
        """Until every upload has its sidecar, and no job is open."""
        wait_until(lambda: self.sidecars() >= set(self.keys), "the sidecars", timeout)
        wait_until(lambda: not self.rig.redis(lambda raw: raw.zcard("blipq:open")), "jobs", 60)

    def audit(self) -> dict[str, int]:
        """What is wrong: all zero if each upload has one job and one sidecar."""
        there = self.sidecars()
        outputs = self.rig.redis(self._outputs)
        return {
            "missing sidecars": len(set(self.keys) - there),
            "sidecars too many": len(there - set(self.keys)),
            "uploads with two jobs": sum(count > 1 for count in outputs.values()),
            "uploads without a job": len(set(self.keys) - set(outputs)),
        }

    def _outputs(self, raw: Any) -> Counter[str]:
        jobs = raw.scan_iter("blipq:job:*", count=1000)
        outputs = (raw.hget(job, "output") for job in jobs)
        prefix = f"s3://{BUCKET}/results/"
        return Counter(text.removeprefix(prefix).removesuffix(".json") for text in outputs if text)


def run(uploads: Uploads, pause: tuple[float, float]) -> bool:
    """Load with kills at random; whether the audit is clean."""
    started, calm = time.monotonic(), threading.Event()

    def trouble() -> None:
        while not calm.wait(uploads.rng.uniform(*pause)):
            uploads.kill(random.choice(("watch", "watch", "worker")))

    with uploads.running():
        killer = threading.Thread(target=trouble)
        killer.start()
        try:
            for number in range(uploads.objects):
                uploads.upload(number)
                if number % 1000 == 999:
                    say(f"{number + 1} uploaded, {len(uploads.sidecars())} sidecars")
            wait_until(
                lambda: len(uploads.sidecars()) > 0.9 * uploads.objects, "most of them", 1800
            )
            calm.set()
            say("calm")
            uploads.wait(600)
        finally:
            calm.set()
            killer.join()
    found = uploads.audit()
    print(f"{len(uploads.keys)} uploads in {time.monotonic() - started:.0f} s", end=", ")
    print(f"killed {dict(uploads.kills)}, messages left {left(uploads)}")
    print(", ".join(f"{what} {number}" for what, number in found.items()))
    return not any(found.values())


def left(uploads: Uploads) -> str:
    """Messages that the queue still has."""
    return str(uploads.sqs.count(uploads.queue)) if uploads.sqs and uploads.queue else "none"


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--source", choices=("sqs", "listing"), default="sqs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Sqs() as sqs:
        rig = Rig(Path(folder), forked=False)
        try:
            source = sqs if arguments.source == "sqs" else None
            rng = random.Random(arguments.seed)
            uploads = Uploads(rig, arguments.objects, source, rng, workers=2)
            clean = run(uploads, pause=(5, 15))
        finally:
            rig.close()
    print("clean" if clean else "NOT CLEAN")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
