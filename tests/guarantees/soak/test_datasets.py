"""A dataset whose command, worker and Redis are killed while it is worked on."""

import io
import json
import signal
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blipq.bulk.journal import Journal
from blipq.local.supervisor import Service
from conftest import wait_until
from guarantees.rig import Rig, png

ROWS, PER_SHARD, WINDOW = 2000, 250, 300
#: One row in so many has no picture, one no prompt, and one is the row before it again.
NO_PICTURE, NO_PROMPT, AGAIN = 97, 89, 83

Row = dict[str, Any]


def row(number: int) -> Row:
    asked = number - 1 if number and number % AGAIN == 0 else number
    picture = png(f"#{asked:06x}")
    return {
        "key": f"row-{number}",
        "image": b"no picture" if number % NO_PICTURE == 0 else picture,
        "prompt": None if number % NO_PROMPT == 0 else f"row {asked}",
        "number": number,
    }


def write_parquet(rig: Rig, shards: Sequence[Sequence[Row]]) -> str:
    folder = rig.folder / "set"
    folder.mkdir()
    for number, rows in enumerate(shards):
        pq.write_table(pa.Table.from_pylist(list(rows)), folder / f"{number:05}.parquet")
    return str(folder)


def write_tars(rig: Rig, shards: Sequence[Sequence[Row]]) -> str:
    rig.client.storage.create_bucket("sets")
    for number, rows in enumerate(shards):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for each in rows:
                others = {name: value for name, value in each.items() if name != "image"}
                for suffix, data in (("png", each["image"]), ("json", json.dumps(others).encode())):
                    member = tarfile.TarInfo(f"{each['key']}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        uri = f"s3://sets/set/{number:05}.tar"
        rig.client.storage.put(uri, stream.getvalue(), content_type="application/x-tar")
    return "s3://sets/set/"


class Dataset:
    """One run in the rig's folder."""

    def __init__(self, rig: Rig, source: str) -> None:
        self.rig = rig
        self.source = source
        self.journal = rig.folder / "set.bulk"
        self.output = rig.folder / "answers"
        self.most_open = 0

    def submit(self) -> Service:
        """``blipq bulk submit``, started."""
        service = self.rig.command(
            "bulk", "submit", self.source,
            "--prompt-column", "prompt", "--id-column", "key",
            "--journal", str(self.journal), "--output", str(self.output),
            "--window", str(WINDOW),
        )  # fmt: skip
        service.start()
        return service

    def wait(self, process: Service, rows: int) -> None:
        """Until so many rows have ended."""

        def reached() -> bool:
            assert process.exit_code is None, process.last_words()
            if self.rig.redis_answers():
                open = self.rig.redis(lambda raw: raw.zcard("blipq:open"))
                self.most_open = max(self.most_open, open)
            return self.ended() >= rows

        wait_until(reached, f"{rows} rows", timeout=120)

    def ended(self) -> int:
        if not self.journal.exists():
            return 0
        with closing(Journal.open(self.journal)) as journal:
            counts = journal.counts()
        return sum(counts.values()) - counts.get("open", 0)

    def answers(self) -> list[Row]:
        paths = sorted(self.output.glob("*.parquet"))
        assert len(paths) == ROWS // PER_SHARD
        return [row for path in paths for row in pq.read_table(path).to_pylist()]


def uploads_left(rig: Rig) -> list[Any]:
    inbox = rig.settings.inbox_bucket
    found = rig.client.storage.client.list_objects_v2(Bucket=inbox, Prefix="bulk/")
    return list(found.get("Contents", ()))


@pytest.mark.parametrize("write", [write_parquet, write_tars], ids=["parquet", "tars in S3"])
def test_each_row_has_its_answer_whatever_is_killed(
    rig: Rig, write: Callable[[Rig, Sequence[Sequence[Row]]], str]
) -> None:
    rows = [row(number) for number in range(ROWS)]
    shards = [rows[start : start + PER_SHARD] for start in range(0, ROWS, PER_SHARD)]
    dataset = Dataset(rig, write(rig, shards))
    worker = rig.start_worker()
    process = dataset.submit()
    dataset.wait(process, ROWS // 4)
    process.signal(signal.SIGKILL)
    rig.wait_for_death(process)
    first = {path: path.stat().st_mtime_ns for path in dataset.output.glob("*.parquet")}
    process = dataset.submit()
    dataset.wait(process, ROWS // 2)
    rig.kill(worker)
    rig.start_worker()
    dataset.wait(process, 3 * ROWS // 4)
    rig.kill_redis()
    rig.start_redis()
    rig.wait_for_death(process, timeout=120)
    assert process.exit_code == 3, process.last_words()  # some rows are bad

    answers = dataset.answers()
    assert Counter(each["blipq_key"] for each in answers) == {each["key"]: 1 for each in rows}
    for asked, found in zip(rows, answers, strict=True):
        assert (found["key"], found["number"]) == (asked["key"], asked["number"])
        if asked["prompt"] is None:
            assert found["blipq_error_code"] == "invalid_request"
        elif asked["image"] == b"no picture":
            assert found["blipq_error_code"] == "image_invalid"
        else:
            assert found["blipq_text"] == f"did {asked['prompt']}", found
    stats = json.loads((dataset.output / "_stats.json").read_text())
    assert stats["rows"] == ROWS
    assert 0 < dataset.most_open <= WINDOW
    assert uploads_left(rig) == []
    assert first
    assert all(path.stat().st_mtime_ns == written for path, written in first.items())
    assert rig.redis(lambda raw: list(raw.scan_iter("blipq:job:*"))) == []
