"""A front's status is read whole or not at all."""

import errno
from pathlib import Path

import msgspec
import pytest

from blipq_worker.fronts.status import FrontStatus, read_status, write_status

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


def test_a_full_disk_keeps_no_status_from_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> int:
        self.touch()  # a name has room where its content has none
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "front-2.json"
    write_status(path, STATUS)
    monkeypatch.setattr(Path, "write_bytes", full)
    for problems in ({"redis": "it does not answer at all"}, {}):
        later = msgspec.structs.replace(STATUS, problems=problems)
        write_status(path, later)
        assert read_status(path) == later
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"pid": "x"}'])
def test_what_is_no_status_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "front-2.json"
    path.write_bytes(content)
    assert read_status(path) is None


def test_a_front_that_has_not_written_yet_has_no_status(tmp_path: Path) -> None:
    assert read_status(tmp_path / "front-2.json") is None
