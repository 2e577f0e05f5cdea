"""A manifest is read line by line, and a line that is wrong is wrong alone."""

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from blipq import Client, InvalidRequest
from blipq.bulk import manifest as module
from blipq.bulk.manifest import Entry, JsonLines, LocalFile, Prefix, S3Object, read_work
from blipq.bulk.start import template_from

IMAGE = "s3://photos/cat.jpg"


def line(custom_id: Any = "a", **fields: Any) -> str:
    return json.dumps({"custom_id": custom_id, "kind": "caption", "image": IMAGE} | fields)


def entries(tmp_path: Path, text: str | bytes, **defaults: Any) -> list[Entry]:
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(JsonLines(LocalFile(path), defaults).entries(0, ""))


def test_a_line_is_a_request_with_a_custom_id_and_options(tmp_path: Path) -> None:
    options = {"priority": "high", "metadata": {"a": "b"}}
    (entry,) = entries(tmp_path, line(prompt="a photo of", options=options), model="m")
    assert (entry.number, entry.custom_id, entry.error) == (1, "a", None)
    assert entry.work is not None
    request, chosen = read_work(entry.work)
    assert request.model_dump(exclude_defaults=True) == {
        "image": {"uri": IMAGE},
        "prompt": "a photo of",
    }
    assert (chosen.model, chosen.priority, chosen.metadata) == ("m", "high", {"a": "b"})


def test_a_mark_of_utf8_before_a_line_is_no_part_of_it(tmp_path: Path) -> None:
    """As an editor leaves one at the start, and `cat` in the middle."""
    marked = codecs.BOM_UTF8 + line(custom_id="a").encode() + b"\n"
    found = entries(tmp_path, marked + marked.replace(b'"a"', b'"b"') + codecs.BOM_UTF8)
    assert [(entry.custom_id, entry.error) for entry in found] == [("a", None), ("b", None)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("hello", "not one JSON object: Expecting value at character 1"),
        ("# a comment", "not one JSON object: a comment, which JSON does not have: leave it out"),
        ("// a comment", "a comment, which JSON does not have"),
        (line() + ",", "not one JSON object: a comma behind it: leave it out"),
        ("[]", "a line is an object"),
        (b"\xff\xfe", "not UTF-8: byte 1 is 0xff"),
        (line(custom_id=None), "custom_id: a text"),
        (line(custom_id=7), "custom_id: a text"),
        (line(custom_id=""), "custom_id: a text"),
        (line(custom_id="x" * 513), "custom_id: a text"),
        (line(kind="captoin"), "captoin"),
        (line(image="cat.jpg"), "not of the form s3://"),
        (line(prmpt="x"), "prmpt"),
        (line(options={"prio": "high"}), "prio"),
        (line(options={"idempotency_key": "k"}), "the custom_id is it"),
        (line(options=[1]), "options: an object"),
        ("[" * 100_000, "recursion"),
        (line(custom_id="\ud83d"), "half of a surrogate pair"),
        (line(kind="\ud83d"), "half of a surrogate pair"),
        (line(options={"\udc00": "x"}), "half of a surrogate pair"),
    ],
)
def test_a_malformed_line_is_an_error_of_that_line(
    tmp_path: Path, text: str | bytes, told: str
) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    lines = [line("1").encode(), data, line("3").encode()]
    first, wrong, last = entries(tmp_path, b"\n".join(lines))
    assert (first.custom_id, last.custom_id) == ("1", "3")
    assert wrong.number == 2
    assert wrong.work is None
    assert told in str(wrong.error)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (gzip.compress(line().encode(), mtime=0), "gzip: unpack it"),
        (b"PK\x03\x04" + bytes(100), "a ZIP or a workbook"),
        (b"PAR1" + bytes(range(256)), "Parquet: export it"),
        (line().encode("utf-16"), "UTF-16: save it as UTF-8"),
        (line().encode("utf-16-be"), "UTF-16 or UTF-32: save it"),
        (f"[{line()}]".encode(), "one JSON array"),
        (codecs.BOM_UTF8 + b"[\n " + line().encode() + b"\n]", "one JSON array"),
        (json.dumps(json.loads(line()), indent=1).encode(), "JSON over several lines"),
        (f"{line('1')}\r{line('2')}\r".encode(), "lines end in CR alone"),
        (b"custom_id,kind,image\n1,caption,s3://photos/a.jpg\n", "CSV: make an object"),
        (b'"image";"question"\r\n', "CSV: make an object"),
        (b"custom_id\timage\n", "TSV: make an object"),
    ],
)
def test_a_file_of_another_kind_is_named_once(tmp_path: Path, data: bytes, told: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        entries(tmp_path, data)
    assert told in str(raised.value)
    assert "manifest.jsonl is " in str(raised.value)
    assert "one JSON object per line" in str(raised.value)


@pytest.mark.parametrize("first", ["# photos, an image each", "hello", "7, 8"])
def test_a_first_line_that_is_no_heading_is_refused_alone(tmp_path: Path, first: str) -> None:
    found = entries(tmp_path, f"{first}\n{line('2')}")
    assert [entry.error is None for entry in found] == [False, True]


def test_lines_of_any_length_and_ending_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    monkeypatch.setattr(module, "LONGEST_LINE", 1000)
    long = line("long", prompt="x" * 2000)
    text = f"{line('1')}\r\n\n  \n{line('2')}\n{long}\n{line('3')}\n{long}"
    found = entries(tmp_path, text)
    assert [(entry.number, entry.custom_id) for entry in found] == [
        (1, "1"),
        (4, "2"),
        (5, None),
        (6, "3"),
        (7, None),
    ]
    assert found[2].error == "longer than 1,000 bytes"
    assert int(found[-1].position) == len(text)


@pytest.mark.parametrize("block", [7, 64, 2**20])
def test_reading_goes_on_behind_any_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    text = "".join(f"{line(str(n))}\n" + "\n" * (n % 3) for n in range(20))
    whole = entries(tmp_path, text)
    lines = JsonLines(LocalFile(tmp_path / "manifest.jsonl"), {})
    for index, entry in enumerate(whole):
        assert list(lines.entries(entry.number, entry.position)) == whole[index + 1 :]


def test_a_manifest_in_s3_reads_as_a_local_one(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 100)
    text = "".join(f"{line(str(n))}\n" for n in range(30))
    client.storage.create_bucket("manifests")
    client.storage.put("s3://manifests/m.jsonl", text.encode(), content_type="text/plain")
    remote = JsonLines(S3Object("s3://manifests/m.jsonl", client.storage), {})
    assert list(remote.entries(0, "")) == entries(tmp_path, text)
    assert remote.size == len(text)


def test_a_manifest_that_changes_while_it_is_read_is_an_error(client: Client) -> None:
    client.storage.create_bucket("manifests")
    client.storage.put("s3://manifests/c.jsonl", line().encode(), content_type="text/plain")
    source = S3Object("s3://manifests/c.jsonl", client.storage)
    client.storage.put("s3://manifests/c.jsonl", line("b").encode(), content_type="text/plain")
    with pytest.raises(InvalidRequest, match="S3 refuses"):
        source.read(0)


def test_a_prefix_makes_a_request_of_each_object(client: Client) -> None:
    client.storage.create_bucket("manifests")
    for key in ("in/a.jpg", "in/b.jpg", "in/c.jpg", "out/d.jpg"):
        client.storage.put(f"s3://manifests/{key}", b"x", content_type="image/jpeg")
    options = {"output": "s3://results/{key}.json"}
    template = {"kind": "vqa", "questions": ["what is it?"], "options": options}
    source = Prefix("s3://manifests/in/", template, {"priority": "low"}, client.storage)
    found = list(source.entries(0, ""))
    assert [entry.custom_id for entry in found] == ["in/a.jpg", "in/b.jpg", "in/c.jpg"]
    assert found[1].work is not None
    request, chosen = read_work(found[1].work)
    assert request.image is not None
    assert (request.image.uri, chosen.output) == (
        "s3://manifests/in/b.jpg",
        "s3://results/in/b.jpg.json",
    )
    assert list(source.entries(found[0].number, found[0].position)) == found[1:]


def test_a_template_may_begin_with_a_mark_of_utf8(tmp_path: Path) -> None:
    (tmp_path / "template.json").write_text('\ufeff{"kind": "caption"}', "utf-8")
    assert template_from(tmp_path / "template.json") == {"kind": "caption"}


@pytest.mark.parametrize(
    ("uri", "template", "told"),
    [
        ("photos/in", {"kind": "caption"}, "not of the form"),
        ("s3://photos/in", {"kind": "vqa"}, "questions"),
        ("s3://photos/in", {"kind": "caption", "options": {"output": "s3://r/{kez}"}}, "kez"),
    ],
)
def test_a_wrong_template_is_an_error_before_anything_is_read(
    client: Client, uri: str, template: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidRequest, match=told):
        Prefix(uri, template, {}, client.storage)
