"""Files that appear whole, and what stands in their place is not a file."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from blipq.files import whole_file


def test_a_file_is_replaced_whole_and_a_link_to_it_stays(tmp_path: Path) -> None:
    target, link = tmp_path / "a.png", tmp_path / "link.png"
    target.write_bytes(b"before")
    link.symlink_to(target)
    with whole_file(link) as file:
        file.write(b"after")
        file.flush()
        assert target.read_bytes() == b"before"
    assert (link.is_symlink(), target.read_bytes()) == (True, b"after")


def test_what_was_not_written_to_its_end_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_bytes(b"before")

    def fail() -> None:
        with whole_file(target) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert target.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", list[bytes]()
    os.mkfifo(pipe)
    reading = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reading.start()
    with whole_file(pipe) as file:
        file.write(b"all")
    reading.join(timeout=60)
    assert (read, pipe.is_fifo()) == ([b"all"], True)


def test_a_device_is_written_to_and_stays() -> None:
    with whole_file(Path("/dev/null")) as file:
        file.write(b"all")
    assert Path("/dev/null").is_char_device()


def test_what_was_redirected_is_added_to_not_replaced(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from blipq.files import whole_file\n"
        "with whole_file(Path('/dev/stdout')) as file: file.write(b'second')"
    )
    log = tmp_path / "log"
    log.write_bytes(b"first ")
    with log.open("ab") as stdout:
        subprocess.run([sys.executable, "-c", program], stdout=stdout, check=True, timeout=60)
    assert log.read_bytes() == b"first second"
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_file_keeps_its_mode(tmp_path: Path) -> None:
    target = tmp_path / "goldens.json"
    target.write_bytes(b"before")
    target.chmod(0o640)
    with whole_file(target) as file:
        file.write(b"after")
    assert target.stat().st_mode & 0o777 == 0o640


def test_a_file_that_cannot_be_replaced_is_written_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is mounted into a container on its own."""

    def busy(*_: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "replace", busy)
    target = tmp_path / "goldens.json"
    target.write_bytes(b"before it")
    with whole_file(target) as file:
        file.write(b"after")
    assert target.read_bytes() == b"after"
    assert [path.name for path in tmp_path.iterdir()] == ["goldens.json"]


def test_a_secret_is_never_readable_by_others(tmp_path: Path) -> None:
    with whole_file(tmp_path / "keys", mode=0o600) as file:
        file.write(b"secret")
        (scratch,) = tmp_path.iterdir()
        assert scratch.stat().st_mode & 0o077 == 0
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o600
