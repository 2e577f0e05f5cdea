"""Tars of strangers: what is read of them, and what none of them can do."""

import gzip
import io
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from blipq_datasets.sources.columns import Columns
from blipq_datasets.sources.places import LocalPlace
from blipq_datasets.sources.rows import Cursor, Row
from blipq_datasets.sources.tars import Tar

Made = Callable[..., bytes]


def rows_of(path: Path, data: bytes, start: Cursor | None = None) -> list[tuple[Cursor, Row]]:
    path.write_bytes(data)
    packed = data.startswith(b"\x1f\x8b")
    shard = Tar("set", LocalPlace(path), Columns(), packed=packed)
    return list(shard.rows(start or Cursor()))


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


@pytest.mark.parametrize("packed", [False, True], ids=["tar", "gzip"])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_rows_are_the_same_from_wherever_they_are_read_on(
    tmp_path: Path, tar: Made, format: int, packed: bool
) -> None:
    long = "folder/" * 13 + "name"
    if format != tarfile.USTAR_FORMAT:
        long += "x" * 150 + "\u00e9"
    members = {f"{long}.jpg": b"one" * 1000, "b.txt": b"text", "b.jpg": b"two", "c.x.png": b"-"}
    members |= {"d.jpeg": b"three"}
    data = tar(members, format)
    path = tmp_path / "set.tar"
    found = rows_of(path, gzip.compress(data) if packed else data)
    assert [(row.key, row.data) for _, row in found] == [
        (f"set/{long}", b"one" * 1000),
        ("set/b", b"two"),
        ("set/d", b"three"),
    ]
    for number, (cursor, _) in enumerate(found, 1):
        again = list(Tar("set", LocalPlace(path), Columns(), packed=packed).rows(cursor))
        assert again == found[number:]


HOSTILE = {
    "an endless name": (
        header("././@LongLink", 2**33, tarfile.GNUTYPE_LONGNAME) + bytes(1024),
        "more than 65,536 bytes",
    ),
    "an endless PAX record": (header("x", 2**40, tarfile.XHDTYPE), "more than 65,536 bytes"),
    "records without an end": (
        (header("x", 12, tarfile.XHDTYPE) + padded(b"12 comment=\n")) * 20,
        "more than 8 records",
    ),
    "a PAX record that reaches behind its end": (
        header("x", 12, tarfile.XHDTYPE) + padded(b"99 path=abc\n"),
        "malformed",
    ),
    "a PAX record of no length": (
        header("x", 12, tarfile.XHDTYPE) + padded(b"0 path=abcd\n"),
        "malformed",
    ),
    "a size that is no number": (
        header("x", 12, tarfile.XHDTYPE) + padded(b"12 size=-99\n"),
        "has no size",
    ),
    "a sparse member": (header("a.jpg", 0, tarfile.GNUTYPE_SPARSE), "sparse"),
    "a member that is cut": (header("a.jpg", 5000) + bytes(100), "ends within"),
    "no tar at all": (b"GIF89a" * 1000, "no header of a tar"),
    "a size that no file has": (header("a.bin", 2**70), "an impossible size"),
    "a size that this file has not": (header("a.bin", 10**17), "ends within"),
    "a PAX record of a length without an end": (
        header("x", 4500, tarfile.XHDTYPE) + padded(b"1" * 4490 + b" path=abc\n"),
        "malformed",
    ),
    "a member that is passed over and cut": (header("a.bin", 5000) + bytes(4000), "ends within"),
    "a header that is cut": (header("a.bin", 0) + b"half", "no header of a tar"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tar_is_a_row_with_an_error_behind_its_good_rows(
    name: str, tmp_path: Path, tar: Made
) -> None:
    good = tar({"good.jpg": b"good"})[:1024]
    data, wrong = HOSTILE[name]
    tracemalloc.start()
    try:
        found = [row for _, row in rows_of(tmp_path / "set.tar", good + data)]
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found[-1].error is not None
    assert wrong in found[-1].error
    assert found[-1].key is None
    assert most < 16 * 2**20
    assert [row.key for row in found[:-1]] == ["set/good"]


def test_a_gzip_that_unpacks_to_far_too_much_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blipq_datasets.sources.places.FREE_BYTES", 2**20)
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="w") as file:
        file.write(header("a.bin", 2**26) + bytes(2**26))
    (_, row), *rest = rows_of(tmp_path / "set.tar.gz", stream.getvalue())
    assert not rest
    assert row.error is not None
    assert "200 times" in row.error


def test_a_gzip_that_is_cut_is_a_row_with_an_error(tmp_path: Path, tar: Made) -> None:
    data = gzip.compress(tar({f"{n}.jpg": bytes([n]) * 3000 for n in range(9)}))
    found = rows_of(tmp_path / "set.tar.gz", data[:-20])
    assert found[-1][1].error is not None


def test_members_that_are_too_large_are_errors_of_their_rows(tmp_path: Path) -> None:
    big = 65 * 2**20
    data = header("a.jpg", big) + bytes(big) + header("b.jpg", 4) + padded(b"good")
    data += header("c.jpg", 0) + header("d.jpg", 4) + padded(b"good")
    data += header("d.json", 2**21) + bytes(2**21) + bytes(1024)
    found = [row for _, row in rows_of(tmp_path / "set.tar", data)]
    assert [(row.key, row.data) for row in found] == [
        ("set/a", None),
        ("set/b", b"good"),
        ("set/c", None),
        ("set/d", None),
    ]
    errors = [row.error or "" for row in found]
    assert "more than 67,108,864 bytes" in errors[0]
    assert "is empty" in errors[2]
    assert "more than 1,048,576 bytes" in errors[3]


def test_links_devices_and_folders_are_passed_over(tmp_path: Path) -> None:
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
    data = b"".join(header(f"{n}.jpg", 0, kind) for n, kind in enumerate(kinds))
    data += header("/etc/passwd.jpg", 4) + padded(b"good") + bytes(1024)
    ((_, row),) = rows_of(tmp_path / "set.tar", data)
    assert (row.key, row.data) == ("set//etc/passwd", b"good")
