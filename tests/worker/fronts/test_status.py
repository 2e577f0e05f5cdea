"""A front's status is read whole or not at all."""

import zlib
from pathlib import Path
from struct import pack

import msgspec
import pytest

from blipq_worker.fronts.files import clear, make
from blipq_worker.fronts.status import ROOM, FrontStatus, read_status, write_status

STATUS = FrontStatus(
    pid=1,
    number=2,
    beat=3.5,
    threads=8,
    active=1,
    taking=True,
    draining=False,
    problems={"redis": "away"},
    live={},
)


def test_a_status_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "front-2.json"
    write_status(path, STATUS)
    later = msgspec.structs.replace(STATUS, beat=4.5, taking=False)
    write_status(path, later)
    assert read_status(path) == later
    assert list(tmp_path.iterdir()) == [path], "nothing else is left in the folder"


def test_a_status_needs_no_more_room_than_its_file_has_from_the_start(tmp_path: Path) -> None:
    """A disk that is full later keeps no front from writing."""
    path = tmp_path / "front-2.json"
    make(path, size=ROOM)
    blocks = path.stat().st_blocks
    assert read_status(path) is None
    longest = {f"check {number}": "\0" * 10_000 for number in range(8)}
    for problems in (longest, {"redis": "away"}):
        later = msgspec.structs.replace(STATUS, problems=problems)
        write_status(path, later)
        found = read_status(path)
        assert found is not None
        assert found.problems == {name: text[:500] for name, text in problems.items()}
        assert (path.stat().st_size, path.stat().st_blocks) == (ROOM, blocks)


def test_a_status_that_is_cleared_is_none(tmp_path: Path) -> None:
    path = tmp_path / "front-2.json"
    write_status(path, STATUS)
    clear(path, ROOM)
    assert read_status(path) is None


def said(content: bytes) -> bytes:
    """A file that says so."""
    return pack("<IH", zlib.crc32(content), len(content)) + content


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b'{"unknown": ' + b"[" * 30_000, id="too deep"),
        pytest.param(
            msgspec.json.encode({**msgspec.structs.asdict(STATUS), "threads": -1}), id="negative"
        ),
        pytest.param(
            msgspec.json.encode({**msgspec.structs.asdict(STATUS), "active": 2**63}), id="huge"
        ),
        pytest.param(msgspec.json.encode(STATUS)[:-1], id="cut"),
        pytest.param(b"\xff", id="no text"),
        pytest.param(b"", id="empty"),
    ],
)
def test_a_front_can_say_nothing_that_is_no_status(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "front-2.json"
    path.write_bytes(said(content))
    assert read_status(path) is None


def test_a_status_that_is_half_written_is_none(tmp_path: Path) -> None:
    path = tmp_path / "front-2.json"
    write_status(path, STATUS)
    whole = path.read_bytes()
    path.write_bytes(whole[:20] + b"X" + whole[21:])
    assert read_status(path) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"pid": "x"}'])
def test_what_is_no_status_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "front-2.json"
    path.write_bytes(content)
    assert read_status(path) is None


def test_a_front_that_has_not_written_yet_has_no_status(tmp_path: Path) -> None:
    assert read_status(tmp_path / "front-2.json") is None
