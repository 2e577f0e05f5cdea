"""Datasets from the first row to the answered shards; the tests play the worker."""

import csv
import gzip
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError
from typer.testing import Result

from blipq import Client
from blipq.bulk.driver import Driver
from blipq.bulk.manners import Manners
from blipq.bulk.start import begin
from blipq.ledger.worker import WorkerLedger
from blipq.s3.refusals import S3Unavailable
from blipq_datasets.journal import DatasetJournal
from blipq_datasets.output.shards import Output
from blipq_datasets.output.targets import LocalFolder, S3Folder
from blipq_datasets.sources.places import S3Place
from blipq_datasets.sources.rows import MOST_HELD
from blipq_datasets.uploads import Uploads

#: Of the name of the shard of set.tar.
SET = hashlib.blake2b(b"set", digest_size=4).hexdigest()
Run = Callable[..., Result]
Tar = Callable[..., bytes]
Left = Callable[[], list[str]]
Answering = Callable[[], Any]


def done(ran: Result, code: int = 0) -> dict[str, Any]:
    assert ran.exit_code == code, (ran.output, ran.exception)
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def test_parquet_of_bytes_comes_back_with_its_columns_and_types(
    run: Run, answering: Answering, uploads_left: Left, tmp_path: Path
) -> None:
    columns = pa.table(
        {
            "image": pa.array([b"one", b"two", b"one", b"", None], pa.binary()),
            "color": ["red", "blue", "red", "red", None],
            "size": pa.array([1, 2, 3, 4, 5], pa.int16()),
            "tags": [["a"], [], None, ["b"], ["c"]],
        }
    )
    pq.write_table(columns, tmp_path / "cars.parquet")
    with answering() as worker:
        ran = run(
            "submit", "cars.parquet", "--prompt", "a {color}", "--output", "answers", "--json"
        )
    assert done(ran, 3)["counts"] == {"succeeded": 2, "duplicate": 1, "refused": 2}
    found = pq.read_table(tmp_path / "answers" / "cars.parquet")
    assert found.select(columns.column_names).equals(columns)
    rows = found.to_pylist()
    assert [row["blipq_text"] for row in rows] == ["a red one", "a blue two", "a red one"] + 2 * [
        None
    ]
    assert [row["blipq_confidence"] for row in rows[:3]] == [0.5] * 3
    assert rows[0]["blipq_job"] == rows[2]["blipq_job"]
    assert rows[0]["blipq_key"] == "cars/0"
    assert [row["blipq_error_code"] for row in rows] == [None] * 3 + ["invalid_request"] * 2
    assert "the picture is empty" in rows[3]["blipq_error_message"]
    assert {(row["blipq_model"], row["blipq_revision"]) for row in rows[:3]} == {("default", "r1")}
    assert len(worker.runs) == 2
    assert uploads_left() == []
    stats = json.loads((tmp_path / "answers" / "_stats.json").read_text())
    assert stats.pop("took").pop("s") > 0
    assert stats == {
        "rows": 5,
        "shards": 1,
        "statuses": {"succeeded": 3, "refused": 2},
        "duplicate": 1,
        "errors": {"invalid_request": 2},
        "estimate": None,
    }


def test_members_of_tars_in_s3_are_read_where_they_lie(
    run: Run,
    answering: Answering,
    client: Client,
    bucket: str,
    tar: Tar,
    uploads_left: Left,
    tmp_path: Path,
) -> None:
    first = {
        "a/1.jpg": b"picture 1",
        "a/1.json": b'{"width": 3, "own": {"x": [1]}}',
        "a/1.txt": b"a cat",
        "a/1.npy": b"passed over",
        "a/2.json": b'{"width": 4.5}',
        "a/3.png": b"picture 3",
        "a/3.json": b"{",
    }
    client.storage.put(f"s3://{bucket}/set/00000.tar", tar(first), content_type="application/x-tar")
    second = tar({f"{n}.jpg": b"picture %d" % n for n in range(1, 80)})
    client.storage.put(f"s3://{bucket}/set/00001.tar", second, content_type="application/x-tar")
    with answering() as worker:
        ran = run(
            "submit",
            f"s3://{bucket}/set/",
            *("--question", "what is it?", "--question", "how many?"),
            *("--output", f"s3://{bucket}/answers", "--to", "jsonl", "--json"),
        )
    # Row 1 of the second tar has the bytes of the first tar's first picture.
    assert done(ran, 3)["counts"] == {"succeeded": 79, "duplicate": 1, "refused": 2}
    assert {each["image"]["uri"].rpartition("/")[2] for each in worker.runs} == {
        "00000.tar",
        "00001.tar",
    }
    assert all({"offset", "length", "etag"} <= set(each["image"]) for each in worker.runs)
    assert uploads_left() == []
    lines = client.storage.read(f"s3://{bucket}/answers/00000.jsonl").splitlines()
    one, two, three = map(json.loads, lines)
    assert one["blipq_answers"] == ["what is it? picture 1", "how many? picture 1"]
    assert (one["__key__"], one["txt"], one["width"], one["own"]) == ("a/1", "a cat", 3, {"x": [1]})
    assert (two["width"], two["blipq_error_message"]) == (4.5, "the row has no picture")
    assert "not JSON" in three["blipq_error_message"]
    lines = client.storage.read(f"s3://{bucket}/answers/00001.jsonl").splitlines()
    answers = [json.loads(line)["blipq_text"] for line in lines]
    assert answers == [f"what is it? picture {n}" for n in range(1, 80)]


def test_a_local_tar_becomes_a_tar_with_the_same_pictures(
    run: Run, answering: Answering, tar: Tar, uploads_left: Left, tmp_path: Path
) -> None:
    members = {"./a.b/ x.jpg": b"picture x", "./a.b/ x.cls": b"7", "../y.webp": b"picture y"}
    (tmp_path / "set.tar.gz").write_bytes(gzip.compress(tar(members)))
    with answering():
        done(run("submit", "set.tar.gz", "--to", "webdataset", "--output", "answers", "--json"))
    with tarfile.open(tmp_path / "answers" / "set.tar") as archive:
        found = {
            name: archive.extractfile(name).read()  # type: ignore[union-attr]
            for name in archive.getnames()
        }
    assert list(found) == [
        f"{key}.{suffix}"
        for key, picture in (("a.b/ x", "jpg"), (f"set-{SET}-000000001", "webp"))
        for suffix in (picture, "json", "txt")
    ]
    assert found["a.b/ x.jpg"] == b"picture x"
    assert found[f"set-{SET}-000000001.txt"] == b"picture y"
    assert json.loads(found["a.b/ x.json"])["cls"] == "7"
    assert uploads_left() == []


def test_rows_without_a_key_for_a_tar_have_one_that_no_other_shard_has(
    run: Run, answering: Answering, tmp_path: Path
) -> None:
    (tmp_path / "set").mkdir()
    made = "set-01234567-000000001"
    for name, keys in (("a.1", ["k", "k", "b.c"]), ("a-1", [None, "../k", made, "\u540d"])):
        rows = [{"image": f"{name} {n}".encode(), "__key__": key} for n, key in enumerate(keys)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set" / f"{name}.parquet")
    with answering():
        done(run("submit", "set", "--to", "webdataset", "--output", "answers", "--json"))
    found = {}
    for name in ("a.1", "a-1"):
        with tarfile.open(tmp_path / "answers" / f"{name}.tar") as archive:
            found[name] = [each for each in archive.getnames() if each.endswith(".txt")]
    assert found["a.1"][0] == "k.txt"
    assert found["a-1"][3] == "\u540d.txt"
    numbered = found["a.1"][1:] + found["a-1"][:3]
    assert all(re.fullmatch(r"a[_-]1-[0-9a-f]{8}-00000000\d\.txt", each) for each in numbered)
    assert len(set(numbered)) == 5
    assert len({each.split("-")[-2] for each in numbered}) == 2, "of each shard its own"


def test_csv_rows_that_are_bad_end_in_the_error_column(
    run: Run, answering: Answering, client: Client, bucket: str, tmp_path: Path
) -> None:
    client.storage.put(f"s3://{bucket}/cat.jpg", b"cat", content_type="image/jpeg")
    good = f"s3://{bucket}/cat.jpg"
    lines = [
        "id,url,note",
        f'1,{good},"a, b\nc"',
        f"2,s3://{bucket}/none.jpg,=1+1",
        "3,no uri,",
        "4,http://10.0.0.1/x.jpg,",
        f"5,{good}",
        f'6,{good},"x"y',
        f"1,{good},again",
    ]
    (tmp_path / "cars.csv").write_text("\n".join(lines) + "\n")
    with answering():
        ran = run(
            "submit",
            "cars.csv",
            *("--to", "csv", "--escape-formulas", "--output", "answers", "--json"),
        )
    assert ran.exit_code == 3, ran.output
    with (tmp_path / "answers" / "cars.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["blipq_status"]) for row in rows] == [
        ("1", "succeeded"),
        ("2", "failed"),
        ("3", "refused"),
        ("4", "refused"),
        ("", "refused"),
        ("", "refused"),
        ("1", "refused"),
    ]
    assert rows[0]["note"] == "a, b\nc"
    assert rows[1]["note"] == "'=1+1"
    assert rows[1]["blipq_error_code"] == "image_not_found"
    assert "custom_id" in rows[6]["blipq_error_message"]


def test_a_folder_of_pictures_is_read_and_paths_lead_nowhere_else(
    run: Run, answering: Answering, uploads_left: Left, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    (folder / "one.jpg").write_bytes(b"one")
    (folder / "sub" / "two.PNG").write_bytes(b"two")
    (folder / "notes.doc").write_bytes(b"no picture")
    (folder / ".hidden.jpg").write_bytes(b"hidden")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    with answering() as worker:
        ran = run("submit", "set", "--to", "jsonl", "--output", "answers", "--json")
    assert done(ran, 3)["counts"] == {"succeeded": 2, "refused": 1}
    lines = (tmp_path / "answers" / "00000.jsonl").read_text().splitlines()
    found = {row["blipq_key"]: row["blipq_text"] for row in map(json.loads, lines)}
    assert found == {"one.jpg": "one", "sub/two.PNG": "two", "link.jpg": None}
    assert len(worker.runs) == 2
    assert uploads_left() == []


def test_pictures_under_a_prefix_are_read_where_they_lie(
    run: Run, answering: Answering, client: Client, bucket: str, tmp_path: Path
) -> None:
    for name in ("p/a.jpg", "p/b.png", "q/c.jpg"):
        client.storage.put(f"s3://{bucket}/{name}", name.encode(), content_type="image/jpeg")
    with answering() as worker:
        done(run("submit", f"s3://{bucket}/p/", "--output", "answers", "--json"))
    rows = pq.read_table(tmp_path / "answers" / "00000.parquet").to_pylist()
    assert [(row["key"], row["blipq_text"]) for row in rows] == [
        ("a.jpg", "p/a.jpg"),
        ("b.png", "p/b.png"),
    ]
    assert all(each["image"]["etag"] for each in worker.runs)


def test_an_output_that_cannot_be_written_is_told_before_any_job(
    run: Run, answering: Answering, tmp_path: Path
) -> None:
    (tmp_path / "set.csv").write_text("url\ns3://photos/1.jpg\n")
    (tmp_path / "file").touch()
    with answering() as worker:
        ran = run("submit", "set.csv", "--output", "file/answers")
    assert ran.exit_code == 2
    assert "cannot write file/answers: Not a directory" in ran.stderr
    assert worker.runs == []


def test_a_recipe_says_all_and_flags_come_first(
    run: Run, answering: Answering, client: Client, bucket: str, tmp_path: Path
) -> None:
    client.storage.put(f"s3://{bucket}/cat.jpg", b"cat", content_type="image/jpeg")
    row = {"name": "cat", "image": f"s3://{bucket}/cat.jpg"}
    (tmp_path / "set.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode() + b"\n"))
    (tmp_path / "recipe.toml").write_text(
        'source = "set.jsonl.gz"\nto = "csv"\noutput = "answers"\nid_column = "name"\n'
        '[request]\nkind = "vqa"\nquestions = ["is it a {name}?"]\n'
    )
    shown = run("submit", "--recipe", "recipe.toml", "--dry-run", "--json")
    asked = done(shown)
    assert asked["request"]["questions"] == ["is it a cat?"]
    assert asked["key"] == "cat"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.toml", "set.jsonl.gz"]
    with answering():
        done(run("submit", "--recipe", "recipe.toml", "--to", "jsonl", "--json"))
    (line,) = (tmp_path / "answers" / "set.jsonl").read_text().splitlines()
    assert json.loads(line)["blipq_text"] == "is it a cat? cat"


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (("--image-column", "picture"), "has no column 'picture'"),
        (("--id-column", "nr"), "has no column 'nr'"),
        (("--prompt", "a {shade} car"), "has no column 'shade'"),
        (("--prompt", "a {} car"), "between braces"),
        (("--prompt", "a { car"), "write {{ for a brace"),
        (("--kind", "search"), "not indexed"),
        (("--to", "excel"), "to"),
        (("--model", "/"), "options.model"),
    ],
)
def test_what_is_wrong_with_columns_is_told_before_anything_is_submitted(
    run: Run, ledger: WorkerLedger, tmp_path: Path, arguments: tuple[str, ...], wrong: str
) -> None:
    (tmp_path / "cars.csv").write_text("url,color\ns3://photos/a.jpg,red\n")
    ran = run("submit", "cars.csv", *arguments)
    assert ran.exit_code == 2, ran.output
    assert wrong in ran.stderr
    assert list(tmp_path.glob("*.bulk")) == []
    assert ledger.redis.dbsize() == 0


def test_an_update_asks_only_what_has_changed(
    run: Run, answering: Answering, tmp_path: Path
) -> None:
    def write(**pictures: bytes) -> None:
        rows = {"key": list(pictures), "image": list(pictures.values())}
        pq.write_table(pa.table(rows), tmp_path / "set.parquet")

    write(a=b"one", b=b"two", c=b"three")
    with answering() as worker:
        done(run("submit", "set.parquet", "--output", "first", "--json"))
        write(a=b"one", b=b"new", d=b"three", e=b"four")
        refused = run("submit", "set.parquet", "--output", "second")
        assert refused.exit_code == 2
        assert "--update" in refused.stderr
        refused = run("submit", "set.parquet", "--output", "first", "--update")
        assert "give another --output" in refused.stderr
        done(run("submit", "set.parquet", "--output", "second", "--update", "--json"))
    assert len(worker.runs) == 3 + 2
    rows = pq.read_table(tmp_path / "second" / "set.parquet").to_pylist()
    assert {row["blipq_key"]: row["blipq_text"] for row in rows} == {
        "a": "one",
        "b": "new",
        "d": "three",
        "e": "four",
    }
    assert all(row["blipq_job"] for row in rows)


def test_a_dataset_is_not_resumed_for_another_tenant(
    run: Run, answering: Answering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"image": [b"one"]}), tmp_path / "set.parquet")
    with answering():
        done(run("submit", "set.parquet", "--json"))
    monkeypatch.setenv("BLIPQ_TENANT", "shop")
    refused = run("submit", "set.parquet")
    assert (refused.exit_code, "begun for no tenant" in refused.stderr) == (2, True)


class Killed(BaseException):
    """Stands in for kill -9: nothing below it catches it."""


@pytest.mark.parametrize("step", range(14))
def test_a_run_that_is_killed_anywhere_goes_on(
    run: Run,
    answering: Answering,
    uploads_left: Left,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    """Before and after each change of the journal, of the inbox and of the output."""
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(3):
        rows = [f"{number}-{n // 2}".encode() for n in range(40)]
        pq.write_table(pa.table({"image": rows}), folder / f"{number}.parquet")
    places: tuple[tuple[Any, str], ...] = (
        (Uploads, "put"),
        (DatasetJournal, "add"),
        (DatasetJournal, "end"),
        (Uploads, "delete"),
        (Output, "_write"),
        (Uploads, "sweep"),
        (LocalFolder, "has"),
    )
    owner, name = places[step % 7]
    real = getattr(owner, name)
    calls = iter(range(1000))

    def deadly(*args: Any, **options: Any) -> Any:
        call = next(calls)
        if call != (0 if name == "sweep" else 1):
            return real(*args, **options)
        if step >= 7:
            real(*args, **options)
        raise Killed

    monkeypatch.setattr(owner, name, deadly)
    arguments = ("submit", "set", "--output", "answers", "--window", "30", "--json")
    with answering():
        with pytest.raises(Killed):
            run(*arguments)
        monkeypatch.setattr(owner, name, real)
        assert done(run(*arguments))["counts"] == {"succeeded": 60, "duplicate": 60}
    for number in range(3):
        rows = pq.read_table(tmp_path / "answers" / f"{number}.parquet").to_pylist()
        assert [row["blipq_text"] for row in rows] == [f"{number}-{n // 2}" for n in range(40)]
    assert uploads_left() == []
    assert not list((tmp_path / "answers").glob(".*"))


@pytest.mark.parametrize("place", ["read", "put", "write"])
def test_a_run_waits_while_s3_is_away(
    run: Run,
    answering: Answering,
    client: Client,
    bucket: str,
    tar: Tar,
    uploads_left: Left,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    pictures = {f"{n}.jpg": f"picture {n}".encode() for n in range(150)}
    source = f"s3://{bucket}/set.tar.gz"
    packed = gzip.compress(tar(pictures))
    client.storage.put(source, packed, content_type="application/gzip")
    owner, name = {
        "read": (S3Place, "read"),
        "put": (Uploads, "put"),
        "write": (S3Folder, "has"),
    }[place]
    real, calls = getattr(owner, name), iter(range(1000))

    def flaky(*args: Any, **options: Any) -> Any:
        if next(calls) == 2:
            raise S3Unavailable("S3 does not answer")
        return real(*args, **options)

    monkeypatch.setattr("blipq_datasets.sources.places.BLOCK_BYTES", 1000)
    monkeypatch.setattr(owner, name, flaky)
    output = f"s3://{bucket}/answers"
    with answering() as worker:
        ran = run("submit", source, "--output", output, "--to", "jsonl", "--json")
    assert done(ran)["counts"] == {"succeeded": 150}
    assert len(worker.runs) == 150
    lines = client.storage.read(f"{output}/set.jsonl").splitlines()
    assert [json.loads(line)["blipq_text"] for line in lines] == [
        f"picture {n}" for n in range(150)
    ]
    assert uploads_left() == []


def test_an_update_goes_on_from_a_run_that_was_cancelled(
    run: Run, answering: Answering, client: Client, uploads_left: Left, tmp_path: Path
) -> None:
    table = pa.table({"image": [b"one", b"two"], "key": ["a", "b"]})
    pq.write_table(table, tmp_path / "set.parquet")
    facts = {"id": "bulk_x", "dataset": True, "cancelled": True, "manifest": "set.parquet"}
    DatasetJournal.create(tmp_path / "set.parquet.bulk", **facts).close()
    left = f"s3://{client.settings.inbox_bucket}/bulk/bulk_x/1/left.jpg"
    client.storage.put(left, b"left", content_type="image/jpeg")
    refused = run("submit", "set.parquet")
    assert refused.exit_code == 2
    assert "was cancelled" in refused.stderr
    with answering() as worker:
        done(run("submit", "set.parquet", "--update", "--json"))
    assert len(worker.runs) == 2
    assert uploads_left() == []


def _damaged(kind: str, tar: Tar) -> tuple[str, bytes]:
    """The name and the bytes of a shard that has good rows before its damage."""
    pictures = {f"{n}.jpg": b"picture %d" % n for n in range(3)}
    if kind == "tar":
        return "a.tar", tar(pictures)[: 5 * 512 + 4]
    if kind == "tar.gz":
        return "a.tar.gz", gzip.compress(tar({"0.jpg": b"picture 0", "1.jpg": bytes(9000)}))[:-20]
    if kind == "csv.gz":
        lines = b"image\n" + b"".join(b"%d.jpg\n" % n for n in range(2000))
        return "a.csv.gz", gzip.compress(lines)[:-20]
    if kind == "csv":
        return "a.csv", b"image\n0.jpg\n1.jpg\n" + b"x" * 2**21
    stream = pa.BufferOutputStream()
    table = pa.table({"image": [b"picture 0", b"picture 1", b"picture 2"]})
    pq.write_table(table, stream, row_group_size=1, compression="none")
    data = bytearray(stream.getvalue().to_pybytes())
    column = pq.read_metadata(pa.BufferReader(bytes(data))).row_group(2).column(0)
    begin = column.dictionary_page_offset or column.data_page_offset
    data[begin : begin + column.total_compressed_size] = bytes(column.total_compressed_size)
    return "a.parquet", bytes(data)


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "csv", "csv.gz", "parquet"])
def test_a_run_that_is_killed_behind_a_damaged_shard_has_one_row_for_the_damage(
    run: Run,
    answering: Answering,
    tar: Tar,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setattr("blipq_datasets.sources.places.BLOCK_BYTES", 1000)
    folder = tmp_path / "set"
    folder.mkdir()
    name, data = _damaged(kind, tar)
    (folder / name).write_bytes(data)
    for n in range(3):
        (folder / f"{n}.jpg").write_bytes(b"picture %d" % n)
    real = DatasetJournal.add

    def deadly(journal: DatasetJournal, entries: Any, ids: Any) -> Any:
        added = real(journal, entries, ids)
        if any(entry.error and name in entry.error for entry in entries):
            raise Killed
        return added

    monkeypatch.setattr(DatasetJournal, "add", deadly)
    arguments = ("submit", "set", "--output", "answers", "--to", "jsonl", "--json")
    with answering():
        with pytest.raises(Killed):
            run(*arguments)
        monkeypatch.setattr(DatasetJournal, "add", real)
        ran = run(*arguments)
    assert ran.exit_code == 3, ran.output
    lines = (tmp_path / "answers" / "a.jsonl").read_text().splitlines()
    errors = [json.loads(line)["blipq_error_message"] for line in lines]
    assert [error for error in errors if error and name in error] == errors[-1:]


def test_a_name_that_is_not_utf_8_is_a_key_with_its_bytes_in_digits(
    run: Run, answering: Answering, tmp_path: Path
) -> None:
    def header(name: bytes, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
        member = tarfile.TarInfo(name.decode("latin-1"))
        member.size, member.type = size, kind
        return member.tobuf(tarfile.GNU_FORMAT, "latin-1")

    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 512)

    long = b"x" * 150 + b"\xe9.jpg"
    record = b"15 path=p\xe9.jpg\n"
    data = header(b"\xe9.jpg", 3) + padded(b"one")
    data += header(b"././@LongLink", len(long), tarfile.GNUTYPE_LONGNAME) + padded(long)
    data += header(b"cut", 3) + padded(b"two")
    data += header(b"pax", len(record), tarfile.XHDTYPE) + padded(record)
    data += header(b"cut", 5) + padded(b"three") + bytes(1024)
    (tmp_path / "set.tar").write_bytes(data)
    with answering():
        done(run("submit", "set.tar", "--output", "answers", "--to", "jsonl", "--json"))
    lines = (tmp_path / "answers" / "set.jsonl").read_text().splitlines()
    assert {row["blipq_key"]: row["blipq_text"] for row in map(json.loads, lines)} == {
        r"set/\xe9": "one",
        "set/" + "x" * 150 + r"\xe9": "two",
        r"set/p\xe9": "three",
    }


def test_a_shard_whose_name_is_not_utf_8_is_refused(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / os.fsdecode(b"\xe9.csv")).write_bytes(b"url\ns3://photos/a.jpg\n")
    ran = run("submit", "set")
    assert ran.exit_code == 2, ran.output
    assert "is not UTF-8: rename the file" in " ".join(ran.stderr.split())


@pytest.mark.parametrize("to", ["jsonl", "csv", "webdataset"])
def test_nanoseconds_come_back_as_texts(
    run: Run, answering: Answering, tmp_path: Path, to: str
) -> None:
    table = pa.table(
        {
            "image": [b"one"],
            "at": pa.array([1], pa.timestamp("ns", "Europe/Nowhere")),
            "took": pa.array([[1]], pa.list_(pa.duration("ns"))),
            "daily": pa.array([1], pa.time64("ns")),
            "day": pa.array([10**7], pa.date32()),
        }
    )
    pq.write_table(table, tmp_path / "set.parquet")
    arguments = ("--prompt", "at {at}", "--output", "answers", "--to", to)
    with answering():
        done(run("submit", "set.parquet", *arguments, "--json"))
    written = next((tmp_path / "answers").glob("set.*")).read_text("latin-1")
    for text in ("at 1970-01-01 00:00:00.000000001Z one", "00:00:00.000000001", "29349-01-26"):
        assert text in written
    assert pq.read_table(tmp_path / "set.parquet").equals(table)


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("set", "set/answers"),
        ("set", "set"),
        ("set/", "other/../set/answers"),
        ("link", "set/answers"),
        ("s3://datasets/set/", "s3://datasets/set"),
        ("s3://datasets/set/", "s3://datasets/set/answers/"),
        ("s3://datasets/set", "s3://datasets/set-answers"),
        ("s3://datasets", "s3://datasets/answers"),
    ],
)
def test_answers_may_not_go_below_the_source(
    run: Run, ledger: WorkerLedger, bucket: str, tmp_path: Path, source: str, output: str
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.csv").write_text("url\ns3://photos/a.jpg\n")
    (tmp_path / "link").symlink_to("set")
    before = sorted(tmp_path.rglob("*"))
    ran = run("submit", source, "--output", output)
    assert ran.exit_code == 2, ran.output
    assert "is below the source" in " ".join(ran.stderr.split())
    assert sorted(tmp_path.rglob("*")) == before
    assert ledger.redis.dbsize() == 0


@pytest.mark.parametrize("name", ["photos/2026/", "photos/2026.csv", "photos/manifest.jsonl"])
def test_an_arn_as_a_source_is_answered_with_its_s3_uri(
    run: Run, tmp_path: Path, name: str
) -> None:
    ran = run("submit", f"arn:aws:s3:::{name}")
    assert ran.exit_code == 2, ran.output
    assert f"write s3://{name}" in " ".join(ran.stderr.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["here", "s3"])
def test_a_manifest_of_any_name_stays_one_beside_datasets(
    run: Run, answering: Answering, client: Client, bucket: str, tmp_path: Path, place: str
) -> None:
    client.storage.put(f"s3://{bucket}/cat.jpg", b"cat", content_type="image/jpeg")
    line = {"custom_id": "1", "kind": "caption", "image": f"s3://{bucket}/cat.jpg"}
    data = json.dumps(line).encode() + b"\n"
    if place == "here":
        source = "requests.txt"
        (tmp_path / source).write_bytes(data)
    else:
        source = f"s3://{bucket}/manifest"
        client.storage.put(source, data, content_type="text/plain")
    with answering():
        for _ in range(2):
            assert done(run("submit", source, "--json"))["counts"] == {"succeeded": 1}


def test_a_manifest_that_was_begun_goes_on_beside_datasets(
    run: Run, answering: Answering, client: Client, bucket: str, tmp_path: Path
) -> None:
    client.storage.put(f"s3://{bucket}/cat.jpg", b"cat", content_type="image/jpeg")
    line = {"custom_id": "1", "kind": "caption", "image": f"s3://{bucket}/cat.jpg"}
    (tmp_path / "requests.csv").write_text(json.dumps(line) + "\n")
    defaults = {"model": "default", "priority": "low"}
    facts = {"manifest": "requests.csv", "template": None, "defaults": defaults}
    begin(tmp_path / "requests.csv.bulk", facts, client.storage)[0].close()
    with answering():
        assert done(run("submit", "requests.csv", "--json"))["counts"] == {"succeeded": 1}


@pytest.mark.parametrize("refused", ["each", "the request"])
def test_who_may_not_delete_is_told_once_and_holds_no_more_than_the_window(
    run: Run,
    answering: Answering,
    client: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: str,
) -> None:
    rows, window = 200, 10
    table = pa.table({"image": [b"picture %d" % n for n in range(rows)]})
    pq.write_table(table, tmp_path / "set.parquet")
    call, put = BaseClient._make_api_call, Uploads.put
    held = []

    def refusing(self: Any, operation: str, options: Any) -> Any:
        if operation != "DeleteObjects":
            return call(self, operation, options)
        if refused == "the request":
            raise ClientError({"Error": {"Code": "AccessDenied"}}, operation)
        return {
            "Errors": [{**each, "Code": "AccessDenied"} for each in options["Delete"]["Objects"]]
        }

    def noted(self: Uploads, pictures: Any) -> None:
        put(self, pictures)
        held.append(len(self.held))

    with monkeypatch.context() as patched:
        patched.setattr(BaseClient, "_make_api_call", refusing)
        patched.setattr(Uploads, "put", noted)
        with answering():
            ran = run("submit", "set.parquet", "--window", window)
    for each in client.storage.client.list_objects_v2(
        Bucket=client.settings.inbox_bucket, Prefix="bulk/"
    )["Contents"]:
        client.storage.client.delete_object(Bucket=client.settings.inbox_bucket, Key=each["Key"])
    assert ran.exit_code == 0, ran.output
    assert max(held) <= window + MOST_HELD
    assert ran.stderr.count("S3 refused to delete") == 1
    assert f"S3 refused to delete {rows} uploaded pictures" in " ".join(ran.stderr.split())


def test_a_shard_has_no_more_columns_than_are_written(
    run: Run,
    answering: Answering,
    client: Client,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("blipq_datasets.fields.MOST_COLUMNS", 3)
    client.storage.put(f"s3://{bucket}/cat.jpg", b"cat", content_type="image/jpeg")
    rows = [{"image": f"s3://{bucket}/cat.jpg", f"own {n}": n, "x" * 600: 1} for n in range(5)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "set.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    with answering():
        done(run("submit", "set.jsonl.gz", "--output", "answers", "--json"))
    found = pq.read_table(tmp_path / "answers" / "set.parquet")
    names = [name for name in found.column_names if not name.startswith("blipq_")]
    assert names == ["image", "own 0", "own 1"]
    assert found["own 1"].to_pylist() == [None, 1, None, None, None]


def test_a_path_counts_from_its_tables_folder(
    run: Run, answering: Answering, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    for name in ("", "sub"):
        (folder / name / "pictures").mkdir(parents=True)
        (folder / name / "pictures" / "a.jpg").write_bytes(f"in {name or 'set'}".encode())
        (folder / name / "cars.csv").write_text("image\npictures/a.jpg\n../pictures/a.jpg\n")
    with answering():
        ran = run("submit", "set", "--to", "jsonl", "--output", "answers", "--json")
    assert done(ran, 3)["counts"] == {"succeeded": 2, "refused": 2}
    for name, text in (("cars", "in set"), ("sub/cars", "in sub")):
        lines = (tmp_path / "answers" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["blipq_text"] for line in lines] == [text, None]


def test_results_of_a_duplicate_have_the_answer_of_the_line_that_was_asked(
    run: Run, answering: Answering, client: Client, tmp_path: Path
) -> None:
    table = pa.table({"image": [b"one", b"two", b"one"], "key": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "set.parquet")
    with answering():
        done(run("submit", "set.parquet", "--json"))
    done(run("results", "set.parquet", "--output", "results.jsonl", "--json"))
    first, second, third = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert third == {**first, "custom_id": "c", "line": 3, "same_as": 1}
    assert first["result"]["captions"][0]["text"] == "one"
    assert "same_as" not in second


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (("--image-column", "picture"), "has no column 'picture'"),
        (("--prompt", "a {shade} car"), "has no column 'shade'"),
    ],
)
def test_a_column_that_the_first_line_of_json_lacks_is_told_before_anything_is_submitted(
    run: Run, ledger: WorkerLedger, tmp_path: Path, arguments: tuple[str, ...], wrong: str
) -> None:
    (tmp_path / "cars.jsonl").write_text('{"url": "s3://photos/a.jpg", "color": "red"}\n')
    ran = run("submit", "cars.jsonl", *arguments)
    assert ran.exit_code == 2, ran.output
    assert wrong in ran.stderr
    assert list(tmp_path.glob("*.bulk")) == []
    assert ledger.redis.dbsize() == 0


def test_who_updates_a_run_that_is_not_over_is_told_to_cancel_it_first(
    run: Run, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"image": [b"one"]}), tmp_path / "set.parquet")
    facts = {"id": "bulk_x", "dataset": True, "manifest": "set.parquet", "version": "old"}
    DatasetJournal.create(tmp_path / "set.parquet.bulk", **facts).close()
    ran = run("submit", "set.parquet", "--update")
    assert ran.exit_code == 2, ran.output
    assert "bulk cancel set.parquet.bulk" in " ".join(ran.stderr.split())


def test_lance_is_refused_by_name(run: Run, tmp_path: Path) -> None:
    (tmp_path / "cars.csv").write_text("url\ns3://photos/1.jpg\n")
    ran = run("submit", "cars.csv", "--to", "lance", "--output", "answers")
    assert (ran.exit_code, "lance is not written: write parquet" in ran.output) == (2, True)
    assert not (tmp_path / "cars.csv.bulk").exists()


def test_rows_that_redis_lost_when_the_time_was_over_keep_their_pictures(
    run: Run,
    answering: Answering,
    ledger: WorkerLedger,
    uploads_left: Left,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pictures = [f"picture {n}".encode() for n in range(3)]
    pq.write_table(pa.table({"image": pa.array(pictures, pa.binary())}), tmp_path / "a.parquet")
    over, collect = [False], Driver._collect

    def lost(driver: Driver) -> int:
        ledger.redis.flushdb()
        over[0] = True
        return collect(driver)

    with monkeypatch.context() as patched:
        patched.setattr(Driver, "_collect", lost)
        patched.setattr(Manners, "is_over", property(lambda manners: over[0]))
        ran = run("submit", "a.parquet", "--json")
        assert (ran.exit_code, json.loads(ran.stdout)["counts"]) == (5, {"open": 3})
    assert len(uploads_left()) == 3
    with answering():
        ran = run("submit", "a.parquet", "--json")
    assert (ran.exit_code, json.loads(ran.stdout)["counts"]) == (0, {"succeeded": 3})
    assert uploads_left() == []
