"""Faults of an index: `tests/guarantees/soak/indexing.py` does so with thousands of images."""

from pathlib import Path

from conftest import wait_until
from guarantees.soak.indexing import Searcher, Siege

IMAGES = 60


def test_killed_workers_and_indexers_leave_every_image_in_the_index_once(tmp_path: Path) -> None:
    siege = Siege(tmp_path, IMAGES, max_batch_size="2")  # slow enough to be killed half way
    try:
        wait_until(siege.count, "the first images", 60)
        searcher = Searcher(siege.client)
        with searcher.searching():
            siege.kill_worker()
            siege.kill_indexer()
            siege.finish(120)
        assert sorted(siege.ids()) == sorted(siege.uris)
        assert searcher.searches
        assert searcher.failures == []
    finally:
        siege.close()
