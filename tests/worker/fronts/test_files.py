"""What the main process makes, reads and clears where a front may have put anything."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from blipq_worker.fronts.files import clear, make, opened, read
from blipq_worker.fronts.holdings import read_holdings
from blipq_worker.fronts.status import read_status
from blipq_worker.process.counted import counts_in

SECRET = b"what nobody else may read"


def link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def dangling(path: Path, target: Path) -> None:
    path.symlink_to(target.with_name("made through a link"))


def pipe(path: Path, target: Path) -> None:
    os.mkfifo(path)


def folder(path: Path, target: Path) -> None:
    path.mkdir()


def listening(path: Path, target: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


def huge(path: Path, target: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


PLANTS = [link, dangling, pipe, folder, listening, huge]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.write_bytes(SECRET)
    return path


@pytest.mark.parametrize("plant", PLANTS)
def test_nothing_that_is_planted_is_read_or_waited_for(
    plant: Callable[[Path, Path], None], target: Path
) -> None:
    path = target.with_name("planted")
    plant(path, target)
    assert read(path, 1000) is None
    assert read_status(path) is None
    assert read_holdings(path) == []
    with pytest.raises(ValueError, match="none to be read"):
        counts_in(path)


@pytest.mark.parametrize("plant", [link, dangling, pipe, listening])
def test_nothing_is_written_through_what_is_planted(
    plant: Callable[[Path, Path], None], target: Path
) -> None:
    path = target.with_name("planted")
    plant(path, target)
    with pytest.raises(OSError, match=str(path)):
        clear(path, 1000)
    make(path, size=4096)
    assert path.read_bytes() == bytes(4096)
    assert target.read_bytes() == SECRET
    assert {each.name for each in target.parent.iterdir()} == {"target", "planted"}


@pytest.mark.parametrize("plant", [link, dangling])
def test_a_front_writes_through_no_link(plant: Callable[[Path, Path], None], target: Path) -> None:
    path = target.with_name("planted")
    plant(path, target)
    with pytest.raises(OSError, match=str(path)):
        opened(path)
    assert {each.name for each in target.parent.iterdir()} == {"target", "planted"}


def test_a_file_is_cleared_in_its_place_and_one_that_is_too_large_loses_its_content(
    tmp_path: Path,
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    inode = path.stat().st_ino
    clear(path, 1000)
    assert path.read_bytes() == bytes(16) + b"x" * 984
    clear(path, 999)
    assert path.read_bytes() == bytes(16)
    assert path.stat().st_ino == inode
    with pytest.raises(FileNotFoundError):
        clear(tmp_path / "missing", 1000)


def test_a_file_is_made_for_its_user_and_one_group(tmp_path: Path) -> None:
    path = tmp_path / "file"
    make(path)
    assert path.stat().st_mode & 0o777 == 0o600
    make(path, gid=os.getegid())
    found = path.stat()
    assert (found.st_mode & 0o777, found.st_uid, found.st_gid) == (
        0o660,
        os.geteuid(),
        os.getegid(),
    )
    assert read(path, 0) == b""
    assert read(tmp_path / "missing", 0) is None
