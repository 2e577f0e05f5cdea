"""``python tests/guarantees/soak/indexing.py``: an index is filled while what fills it is killed.

Images are indexed by ``blipq index`` and two workers. All three are killed with ``kill -9`` again
and again, and started anew, while somebody searches. At the end every image must be in the index
exactly once, and every search must have succeeded. Exit code 0 only if both hold.
"""

import argparse
import itertools
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from blipq import Client
from blipq.index.store import Index, Indexes, Space
from blipq.local.supervisor import Service
from blipq_worker.demo import world
from conftest import start_worker, wait_for_worker, wait_until
from renders import upload
from stacks import local_stack

NAME = "killed"
PREFIX = "s3://blipq-inbox/killed"
WORKERS = 2


class Searcher:
    """Searches again and again; ``failures`` says what went wrong."""

    def __init__(self, client: Client) -> None:
        self.searches = 0
        self.failures: list[str] = []
        self._client = client
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop)

    def _loop(self) -> None:
        while not self._stop.is_set():
            try:
                job = self._client.search(NAME, "a red circle", rerank=4, priority="high")
                assert job.result(timeout=120).hits
            except Exception as error:
                self.failures.append(repr(error))
            self.searches += 1
            self._stop.wait(0.1)

    @contextmanager
    def searching(self) -> Iterator[None]:
        self._thread.start()
        yield
        self._stop.set()
        self._thread.join(timeout=150)


class Siege:
    """A stack with images in it, workers and an indexer."""

    def __init__(self, folder: Path, images: int, **options: str) -> None:
        self.images = images
        self._options = {"canary": "0", **options}
        self._folder = folder
        self._logs = itertools.count()
        self.stack = local_stack(folder / "stack")
        self.stack.start()
        self.client = Client(self.stack.settings())
        self.indexes = Indexes(self.stack.settings())
        scenes = [world.scene(seed) for seed in world.DEMO_SEEDS[:images]]
        self.uris = set(upload(self.client, scenes, PREFIX))
        self.workers = [self._worker() for _ in range(WORKERS)]
        wait_for_worker(self.workers[0], self.stack.settings())
        self.indexer = self._indexer()
        self.kills = 0

    def _worker(self) -> Service:
        log = self._folder / f"worker-{next(self._logs)}.log"
        return start_worker(self.stack, log, dtype="float32", lease_s="3", **self._options)

    def _indexer(self) -> Service:
        log = self._folder / f"indexer-{next(self._logs)}.log"
        command = [sys.executable, "-m", "blipq", "index", PREFIX, "--name", NAME]
        environment = {**os.environ, **self.stack.environment()}
        service = Service("indexer", [*command, "--window", "64"], env=environment, log=log)
        service.start()
        return service

    def index(self) -> Index | None:
        """The index, once it is there."""
        infos = self.indexes.infos(NAME)
        return self.indexes.open(NAME, Space("", infos[0].revision)) if infos else None

    def count(self) -> int:
        index = self.index()
        return index.info().images if index else 0

    def kill_worker(self) -> None:
        """kill -9, and another one instead."""
        number = self.kills % WORKERS
        self.workers[number].signal(signal.SIGKILL)
        self.workers[number].stop()
        self.workers[number] = self._worker()
        self.kills += 1

    def kill_indexer(self) -> None:
        """kill -9, and the same command again."""
        self.indexer.signal(signal.SIGKILL)
        self.indexer.stop()
        self.indexer = self._indexer()
        self.kills += 1

    def wait_for(self, images: int) -> None:
        """Until so many are in the index: who is killed too often gets nothing done."""

        def enough() -> bool:
            return self.count() >= images or self.indexer.exit_code is not None

        wait_until(enough, f"{images} images", 600)

    def finish(self, timeout: float) -> None:
        """Waits for the indexer's end, and runs it again: it must find nothing left to do."""
        self._wait_for_indexer(timeout)
        wait_for_worker(self.workers[0], self.stack.settings())
        self.indexer = self._indexer()
        self._wait_for_indexer(timeout)

    def _wait_for_indexer(self, timeout: float) -> None:
        wait_until(lambda: self.indexer.exit_code is not None, "the indexer", timeout)
        assert self.indexer.exit_code == 0, self.indexer.last_words(20)

    def ids(self) -> list[str]:
        """The ids of all rows of the index."""
        index = self.index()
        assert index is not None
        rows = index._table.search().select(["id"]).limit(10 * self.images).to_list()
        return [row["id"] for row in rows]

    def close(self) -> None:
        for service in (self.indexer, *self.workers):
            service.signal(signal.SIGKILL)
            service.stop()
        self.client.close()
        self.stack.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    warnings.filterwarnings("ignore", message="lancedb fork support")  # programs, not forks
    with tempfile.TemporaryDirectory() as folder:
        siege = Siege(Path(folder), arguments.images)
        try:
            wait_until(siege.count, "the first images", 120)
            searcher = Searcher(siege.client)
            started = time.monotonic()
            with searcher.searching():
                for number in range(1, arguments.kills):
                    siege.wait_for(number * siege.images // arguments.kills)
                    draw.choice([siege.kill_worker, siege.kill_indexer])()
                    print(f"{siege.count():,} of {siege.images:,} after {siege.kills} kills")
                siege.finish(1200)
            ids = siege.ids()
        finally:
            siege.close()
    print(
        f"{len(ids):,} rows, {len(set(ids)):,} ids of {len(siege.uris):,} images, {siege.kills} "
        f"kills, {searcher.searches:,} searches, {len(searcher.failures)} failed, in "
        f"{time.monotonic() - started:.0f} s"
    )
    print(*searcher.failures[:5], sep="\n", end="")
    return 0 if sorted(ids) == sorted(siege.uris) and not searcher.failures else 1


if __name__ == "__main__":
    sys.exit(main())
