"""Tables: where rows begin, what is too much, and how columns become types."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blipq.errors import InvalidRequest
from blipq_datasets.fields import Fields, cell, kinds_of, objects_of, schema_of, widened
from blipq_datasets.sources.columns import Columns
from blipq_datasets.sources.parquet import Parquet
from blipq_datasets.sources.places import LocalPlace
from blipq_datasets.sources.rows import END, Cursor
from blipq_datasets.sources.tables import Csv, JsonLines

URI = "s3://photos/cat.jpg"


def shard_of(path: Path, data: bytes) -> JsonLines | Csv:
    path.write_bytes(data)
    packed = path.suffix == ".gz"
    kind = JsonLines if ".jsonl" in path.name else Csv
    return kind("set", LocalPlace(path), Columns(), packed=packed)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", 'image,n\n%s,1\n\n%s,"2\n3"\n%s,4'),
        ("a.csv", '\ufeffimage;n\r\n%s;1\r\n\r\n%s;"2\n3"\r\n%s;4'),
        ("a.tsv", 'image\tn\n%s\t1\n%s\t"2\n3"\n%s\t4\n'),
        ("a.csv.gz", 'image,n\n%s,1\n%s,"2\n3"\n%s,4\n'),
        ("a.jsonl", '{"image": "%s", "n": "1"}\n \n{"image": "%s", "n": "2\\n3"}\n'
         '{"image": "%s", "n": "4"}'),
        ("a.jsonl.gz", '\ufeff{"image": "%s", "n": "1"}\n{"image": "%s", "n": "2\\n3"}\n'
         '{"image": "%s", "n": "4"}'),
    ],
)  # fmt: skip
def test_rows_are_the_same_from_wherever_they_are_read_on(
    name: str, data: str, tmp_path: Path
) -> None:
    text = (data % (URI, URI, URI)).encode()
    shard = shard_of(tmp_path / name, gzip.compress(text) if name.endswith("gz") else text)
    found = list(shard.rows(Cursor()))
    assert [row.columns["n"] for _, row in found] == ["1", "2\n3", "4"]
    assert [row.key for _, row in found] == ["set/0", "set/1", "set/2"]
    assert all(row.image and row.image.uri == URI and row.error is None for _, row in found)
    for number, (cursor, _) in enumerate(found, 1):
        assert list(shard.rows(cursor)) == found[number:]


@pytest.mark.parametrize("groups", [1, 7, 64, 100])
def test_rows_of_parquet_are_the_same_from_wherever_they_are_read_on(
    groups: int, tmp_path: Path
) -> None:
    images = [f"s3://photos/{n}.jpg" for n in range(150)]
    pq.write_table(pa.table({"url": images}), tmp_path / "a.parquet", row_group_size=groups)
    shard = Parquet("set", LocalPlace(tmp_path / "a.parquet"), Columns("url"))
    found = list(shard.rows(Cursor()))
    assert [row.image and row.image.uri for _, row in found] == images
    for number in (1, 6, 7, 63, 64, 65, 99, 100, 149, 150):
        assert list(shard.rows(found[number - 1][0])) == found[number:]


@pytest.mark.parametrize(
    ("name", "data", "wrong"),
    [
        ("a.csv", b"image\n" + b"x" * 2**21, "has more than 1,048,576 bytes"),
        ("a.csv", b'image,n\n"' + b"x\n" * 2**22, "the row at byte 8: field larger"),
        ("a.jsonl", b'{"image": "' + b"x" * 2**21, "has more than 1,048,576 bytes"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "not one JSON object"),
        ("a.jsonl", b'{"a": "\\ud83d"}\n', "not one JSON object"),
        ("a.jsonl", b"\xff\n", "not one JSON object"),
        ("a.jsonl", b"7\n", "not a JSON object"),
        ("a.jsonl", json.dumps(dict.fromkeys(map(str, range(600)), 1)).encode(), "512 fields"),
        ("a.csv", b"image\n\xff\n", "not UTF-8"),
        ("a.csv", b'image\n"a"b\n', "not CSV"),
        ("a.csv", b"image,n\na\n", "1 values for 2 columns"),
        ("a.jsonl.gz", b"no gzip", "the gzip is damaged"),
    ],
)
def test_what_is_no_row_is_an_error_of_its_own(
    name: str, data: bytes, wrong: str, tmp_path: Path
) -> None:
    found = [row for _, row in shard_of(tmp_path / name, data).rows(Cursor())]
    assert wrong in (found[-1].error or ""), found[-1].error
    assert len(found) < 10


@pytest.mark.parametrize("data", [b"image,image\n", b"\xff,image\n", b"x" * 2**21])
def test_a_heading_that_is_none_is_refused(data: bytes, tmp_path: Path) -> None:
    shard = shard_of(tmp_path / "a.csv", data)
    assert isinstance(shard, Csv)
    with pytest.raises(InvalidRequest):
        shard.columns()


def damage(path: Path, name: str, group: int) -> None:
    """Overwrites what a row group has of a column."""
    metadata = pq.read_metadata(path)
    (column,) = (
        metadata.row_group(group).column(n)
        for n in range(metadata.num_columns)
        if metadata.schema.column(n).path == name
    )
    begin = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[begin : begin + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(data)


def test_a_damaged_parquet_ends_in_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [f"s3://photos/{n:06}.jpg" for n in range(3000)]
    pq.write_table(pa.table({"url": rows}), path, row_group_size=1000, compression="zstd")
    damage(path, "url", group=1)
    shard = Parquet("set", LocalPlace(path), Columns("url"))
    found = [row for _, row in shard.rows(Cursor())]
    assert found[-1].error
    parts = list(shard.parts({}, pictures=False, lines=len(found)))
    assert sum(len(part.columns) for part in parts) == len(found)


def test_damage_in_another_column_costs_that_column_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table(
        {
            "url": [f"s3://photos/{n:06}.jpg" for n in range(300)],
            "note": [f"note {n}" for n in range(300)],
            "size": pa.array(range(300), pa.int16()),
        },
        schema=pa.schema(
            [("url", pa.string()), pa.field("note", pa.string(), False), ("size", pa.int16())]
        ),
    )
    pq.write_table(table, path, row_group_size=100)
    damage(path, "note", group=1)
    shard = Parquet("set", LocalPlace(path), Columns("url"))
    assert [row.error for _, row in shard.rows(Cursor())] == [None] * 300
    parts = list(shard.parts({}, pictures=True, lines=300))
    assert sum(len(part.pictures) for part in parts) == 300
    found = pa.Table.from_batches(part.columns for part in parts)
    assert found["url"].equals(table["url"])
    assert found["size"].equals(table["size"])
    assert found["note"].to_pylist() == table["note"].to_pylist()[:100] + [None] * 200


@pytest.mark.parametrize("start", [0, 64, 150])
def test_a_parquet_is_damaged_at_the_same_row_from_wherever_it_is_read_on(
    tmp_path: Path, start: int
) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"url": [f"s3://photos/{n}.jpg" for n in range(300)]})
    pq.write_table(table, path, row_group_size=50)
    damage(path, "url", group=4)
    shard = Parquet("set", LocalPlace(path), Columns("url"))
    found = list(shard.rows(Cursor(start, start)))
    assert len(found) == 200 + 1 - start
    assert found[-1][0] == Cursor(END, 201)


def test_a_text_that_is_not_utf_8_is_an_error_of_its_row(tmp_path: Path) -> None:
    texts = pa.array([b"s3://photos/1.jpg", b"s3://photos/\xe9.jpg", b"s3://photos/3.jpg"])
    bad = pa.Array.from_buffers(pa.string(), 3, texts.buffers())
    pq.write_table(pa.table({"url": bad}), tmp_path / "a.parquet")
    shard = Parquet("set", LocalPlace(tmp_path / "a.parquet"), Columns("url"))
    found = [row for _, row in shard.rows(Cursor())]
    assert [row.error for row in found] == [None, "url: the text is not UTF-8", None]
    (part,) = shard.parts({}, pictures=False, lines=3)
    objects = [row for row, _ in objects_of(part.columns)]
    assert objects == [{"url": "s3://photos/1.jpg"}, {"url": None}, {"url": "s3://photos/3.jpg"}]


def test_times_are_texts_wherever_they_lie() -> None:
    time, text = pa.timestamp("ns"), "1970-01-01 00:00:00.000000001"
    columns = [
        pa.array([1], time),
        pa.array([1], pa.timestamp("ns", "Europe/Nowhere")),
        pa.array([1], time).dictionary_encode(),
        pa.array([[1]], pa.list_(time)),
        pa.array([[1]], pa.large_list(time)),
        pa.array([[1]], pa.list_(time, 1)),
        pa.array([{"at": 1, "n": 1}], pa.struct([("at", time), ("n", pa.int8())])),
        pa.array([[("a", 1)]], pa.map_(pa.string(), time)),
        pa.array(["a"]).dictionary_encode(),
    ]
    ((found, bad),) = objects_of(pa.RecordBatch.from_arrays(columns, names=list("abcdefghi")))
    assert not bad
    assert list(found.values()) == [
        text,
        f"{text}Z",
        text,
        [text],
        [text],
        [text],
        {"at": text, "n": 1},
        [("a", text)],
        "a",
    ]


@pytest.mark.parametrize(
    ("values", "kind", "cells"),
    [
        ([1, None, 2], "int", [1, None, 2]),
        ([1, 2.5], "float", [1.0, 2.5]),
        ([True, None], "bool", [True, None]),
        (["a", 1], "json", ['"a"', "1"]),
        ([2**70], "json", [str(2**70)]),
        ([[1], {"a": 2}], "json", ["[1]", '{"a": 2}']),
        ([None], "null", [None]),
    ],
)
def test_a_column_has_the_narrowest_type_that_holds_all_its_values(
    values: list[object], kind: str, cells: list[object]
) -> None:
    fields: Fields = {}
    for value in values:
        fields = widened(fields, kinds_of({"x": value}))
    assert fields == {"x": kind}
    found = [cell(value, kind) for value in values]
    assert found == cells
    assert len(pa.RecordBatch.from_pylist([{"x": each} for each in found], schema_of(fields))) > 0
