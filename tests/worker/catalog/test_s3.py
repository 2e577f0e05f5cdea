"""Checkpoints in S3: what names them, and how their bytes are read."""

import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blipq.local.stack import LocalStack
from blipq_worker.catalog.models import ModelError
from blipq_worker.catalog.s3.blocks import AHEAD, KEPT, Blocks, Range
from blipq_worker.catalog.s3.errors import Fault, S3ModelAway, S3ModelError
from blipq_worker.catalog.s3.keys import PREFIX
from blipq_worker.catalog.s3.manifest import MANIFEST, Manifest, stored_file
from blipq_worker.catalog.s3.objects import Block, Objects
from blipq_worker.catalog.s3.places import is_in_s3, place_of
from conftest import wait_until
from worker.models_in_s3 import Bucket, reach

BLOCK = 4096
FILE = "model.safetensors"


@pytest.fixture
def bucket(stack: LocalStack, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    bucket = Bucket(stack)
    reach(bucket.settings, monkeypatch)
    return bucket


class Kept:
    """A file of random bytes in S3, under a manifest with small blocks."""

    def __init__(self, bucket: Bucket, folder: Path) -> None:
        self.bucket, self.uri = bucket, bucket.place()
        self.data = random.Random(5).randbytes(40 * BLOCK + 77)
        (folder / FILE).write_bytes(self.data)
        self.manifest = Manifest(
            block_bytes=BLOCK, files={FILE: stored_file(folder / FILE, block_bytes=BLOCK)}
        )
        bucket.write(f"{self.uri}/{FILE}", self.data)
        bucket.write(f"{self.uri}/{MANIFEST}", self.manifest.written())

    def objects(self, tries: int = 1) -> Objects:
        """As a loading worker has them: after it has seen the sizes."""
        objects = Objects(place_of(self.uri), tries=tries)
        objects.check_weights(objects.manifest())
        return objects

    def ranges(self, count: int) -> list[Range]:
        """Ranges of all sizes, in no order; some have blocks in common."""
        numbers = random.Random(6)
        starts = [numbers.randrange(len(self.data)) for _ in range(count)]
        return [
            Range(FILE, start, numbers.randrange(1 + min(9 * BLOCK, len(self.data) - start)))
            for start in starts
        ]


@pytest.fixture
def kept(bucket: Bucket, tmp_path: Path) -> Kept:
    return Kept(bucket, tmp_path)


def read(blocks: Blocks, wanted: Range) -> bytes:
    view = memoryview(bytearray(wanted.size))
    blocks.fill(wanted, view)
    return bytes(view)


def test_a_place_in_s3_is_a_name_with_a_revision_where_one_is_due() -> None:
    place = place_of("s3://models/opt/v1/@0123456789abcdef")
    assert (place.bucket, place.prefix, place.revision) == ("models", "opt/v1", "0123456789abcdef")
    assert place.uri("config.json") == "s3://models/opt/v1/config.json"
    assert is_in_s3("s3://models/opt")
    assert not is_in_s3("owner/opt@main")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("s3://models", "s3://bucket/prefix"),
        ("s3://models/", "s3://bucket/prefix"),
        ("s3://no_bucket!/opt", "no name of a bucket"),
        ("s3://models/a//b", "empty"),
        ("s3://models/a/../b", "'..'"),
        ("s3://models/opt@main", "the revision that `blipq models push` printed"),
        ("s3://models/opt@0123", "first 8 digits"),
    ],
)
def test_a_name_that_can_be_no_place_says_why(name: str, told: str) -> None:
    with pytest.raises(ModelError, match="s3://") as caught:
        place_of(name)
    assert told in str(caught.value)


@pytest.mark.parametrize("name", ["../config.json", "a/b.json", ".hidden", "a\0b", ""])
def test_a_manifest_names_no_file_outside_its_folder(name: str) -> None:
    digest = "0" * 64
    file = {"bytes": 1, "sha256": digest, "blocks": [digest]}
    with pytest.raises(ValueError, match="no name of a file"):
        Manifest.model_validate({"files": {FILE: file, name: file}})


@pytest.mark.parametrize("planned", [True, False])
def test_ranges_come_as_they_were_pushed_in_any_order_and_on_any_thread(
    kept: Kept, planned: bool
) -> None:
    ranges = kept.ranges(60)
    blocks = Blocks(kept.objects(), kept.manifest)
    try:
        if planned:
            blocks.plan(ranges[::2])  # half of them are a surprise
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda each: read(blocks, each), ranges))
    finally:
        blocks.close()
    assert found == [kept.data[each.start : each.start + each.size] for each in ranges]


def test_a_damaged_range_is_refused_and_its_neighbours_are_not(kept: Kept) -> None:
    objects = kept.objects(tries=2)
    objects._etags.clear()  # as of a store that knows no conditions
    kept.bucket.damage(f"{kept.uri}/{FILE}", at=3 * BLOCK + 5)
    blocks = Blocks(objects, kept.manifest)
    try:
        assert read(blocks, Range(FILE, 0, 3 * BLOCK)) == kept.data[: 3 * BLOCK]
        with pytest.raises(S3ModelError, match="bytes 12,288 to 16,383 are not those") as caught:
            read(blocks, Range(FILE, 3 * BLOCK - 1, 2))
    finally:
        blocks.close()
    assert caught.value.code is Fault.DAMAGED


def test_an_object_that_is_written_again_while_it_is_read_is_told(kept: Kept) -> None:
    objects = kept.objects()
    kept.bucket.write(f"{kept.uri}/{FILE}", bytes(len(kept.data)))
    with pytest.raises(S3ModelError, match="checkpoint_changed") as caught:
        objects.block(Block(FILE, 0), kept.manifest)
    assert caught.value.code is Fault.CHANGED


def test_what_is_gone_or_of_another_size_is_told_before_anything_is_read(kept: Kept) -> None:
    uri = f"{kept.uri}/{FILE}"
    kept.bucket.write(uri, kept.data[:-1])
    with pytest.raises(S3ModelError, match=r"checkpoint_changed.* 163,916 bytes, and 163,917 were"):
        kept.objects()
    kept.bucket.storage.delete(uri)
    with pytest.raises(S3ModelError, match=r"checkpoint_missing.* is not there, and was pushed"):
        kept.objects()
    kept.bucket.storage.delete(f"{kept.uri}/{MANIFEST}")
    with pytest.raises(S3ModelError, match=r"checkpoint_missing.*blipq models push"):
        kept.objects()


@pytest.mark.parametrize("data", [b"", b"{}", b'{"files": {}}', b"\xff", b'{"format": 2}'])
def test_a_manifest_that_is_none_is_told(kept: Kept, data: bytes) -> None:
    kept.bucket.write(f"{kept.uri}/{MANIFEST}", data)
    with pytest.raises(S3ModelError, match=r"checkpoint_damaged.*is no manifest"):
        kept.objects()


def test_a_name_with_a_revision_is_served_of_that_revision_alone(kept: Kept) -> None:
    revision = kept.manifest.revision
    kept.uri = f"{kept.uri}@{revision[:12]}"
    kept.objects()
    kept.uri = f"{kept.uri.partition('@')[0]}@{'f' * 12}"
    with pytest.raises(S3ModelError, match=f"has the revision {revision}"):
        kept.objects()


def test_keys_that_s3_does_not_take_are_told_and_not_shown(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{PREFIX}SECRET_ACCESS_KEY", "a-wrong-secret")
    with pytest.raises(S3ModelError, match=r"checkpoint_forbidden.*BLIPQ_MODEL_S3_") as caught:
        kept.objects()
    assert "a-wrong-secret" not in str(caught.value)


def test_a_store_that_does_not_answer_is_no_fault_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(f"{PREFIX}ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv(f"{PREFIX}ACCESS_KEY_ID", "key")
    monkeypatch.setenv(f"{PREFIX}SECRET_ACCESS_KEY", "secret")
    with pytest.raises(S3ModelAway, match="checkpoint_unavailable"):
        Objects(place_of("s3://models/opt"), tries=1).manifest()


class _Slow(Objects):
    """A store that gives blocks when it is told to."""

    def __init__(self) -> None:
        super().__init__(place_of("s3://models/opt"))
        self.go, self.begun = threading.Event(), Counter[Block]()

    def block(self, block: Block, manifest: Manifest) -> bytearray:
        self.begun[block] += 1
        assert self.go.wait(30)
        return bytearray(min(BLOCK, manifest.files[block.file].bytes - block.number * BLOCK))


@pytest.fixture
def slow() -> Iterator[tuple[_Slow, Blocks]]:
    digest = "0" * 64
    file = {"bytes": 1000 * BLOCK, "sha256": digest, "blocks": [digest] * 1000}
    manifest = Manifest.model_validate({"block_bytes": BLOCK, "files": {FILE: file}})
    objects = _Slow()
    blocks = Blocks(objects, manifest)
    yield objects, blocks
    objects.go.set()
    blocks.close()


def test_no_more_is_read_ahead_than_there_is_room_for(slow: tuple[_Slow, Blocks]) -> None:
    objects, blocks = slow
    blocks.plan([Range(FILE, 0, 500 * BLOCK)])
    objects.go.set()
    read(blocks, Range(FILE, 0, BLOCK))
    wait_until(lambda: len(objects.begun) > AHEAD, "blocks that are read ahead")
    wait_until(lambda: all(each.data.done() for each in blocks._held.values()), "their bytes")
    assert len(objects.begun) == AHEAD + 1  # the one that was used, and those that wait
    assert len(blocks._held) == AHEAD


def test_blocks_that_many_ranges_share_are_kept_up_to_a_bound(
    slow: tuple[_Slow, Blocks],
) -> None:
    """Odd layers first, then even ones: each block is needed twice, far apart."""
    objects, blocks = slow
    objects.go.set()
    odd = [Range(FILE, at * BLOCK, BLOCK // 2) for at in range(100)]
    even = [Range(FILE, at * BLOCK + BLOCK // 2, BLOCK // 2) for at in range(100)]
    blocks.plan(odd + even)
    for each in odd + even:
        read(blocks, each)
        assert len(blocks._kept) <= KEPT
    assert max(objects.begun.values()) == 2
    assert not blocks._held
    assert not blocks._kept


def test_weights_that_no_part_takes_do_not_stop_the_reading_ahead(
    slow: tuple[_Slow, Blocks],
) -> None:
    objects, blocks = slow
    objects.go.set()
    blocks.plan(Range(FILE, at * BLOCK, BLOCK) for at in range(1000))
    for at in range(2 * AHEAD, 1000):  # nobody comes for the first ones
        read(blocks, Range(FILE, at * BLOCK, BLOCK))
    assert max(objects.begun.values()) == 1
    assert not [block for block in blocks._held if block.number < 2 * AHEAD]
