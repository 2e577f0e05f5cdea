"""An engine's socket is private, and of one engine at a time."""

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from blipq_worker.inference import AddressError, EngineClient
from blipq_worker.inference.address import Address


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bq") as folder:
        yield Path(folder)


def test_the_socket_and_its_folder_are_of_their_user_alone(folder: Path) -> None:
    address = Address(folder / "run" / "engine")
    modes = [stat.S_IMODE(each.stat().st_mode) for each in (folder / "run", folder / "run/engine")]
    assert modes == [0o700, 0o600]
    address.close()
    assert not (folder / "run/engine").exists()


def test_a_folder_that_others_may_enter_is_refused(folder: Path) -> None:
    folder.chmod(0o755)
    with pytest.raises(AddressError, match="chmod 700"):
        Address(folder / "engine")


def test_a_folder_of_another_user_is_refused(folder: Path) -> None:
    os.chown(folder, 65_534, 65_534)
    with pytest.raises(AddressError, match="user's alone"):
        Address(folder / "engine")


def test_a_path_too_long_for_a_socket_is_told_on_both_sides(folder: Path) -> None:
    path = folder / ("e" * (108 - len(str(folder)) - 1))
    assert len(str(path)) == 108
    with pytest.raises(AddressError, match="at most 107 bytes, this one has 108"):
        Address(path)
    with pytest.raises(AddressError, match="at most 107 bytes, this one has 108"):
        EngineClient(path)
    Address(path.with_name(path.name[1:])).close()


def test_a_path_counts_in_bytes(folder: Path) -> None:
    with pytest.raises(AddressError, match="at most 107 bytes"):
        Address(folder / ("é" * 60))


def test_a_second_engine_at_the_same_path_is_refused(folder: Path) -> None:
    first = Address(folder / "engine")
    with pytest.raises(AddressError, match="another engine"):
        Address(folder / "engine")
    first.close()
    Address(folder / "engine").close()


LISTEN = """
import sys, time; from pathlib import Path
from blipq_worker.inference.address import Address
address = Address(Path(sys.argv[1])); print("ready", flush=True); time.sleep(60)
"""


def test_what_a_killed_engine_has_left_is_replaced(folder: Path) -> None:
    path = folder / "engine"
    process = subprocess.Popen([sys.executable, "-c", LISTEN, path], stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
    assert path.is_socket()
    address = Address(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    address.close()


def test_a_file_that_is_no_socket_is_left_alone(folder: Path) -> None:
    (folder / "engine").write_text("precious")
    with pytest.raises(AddressError, match="no socket"):
        Address(folder / "engine")
    assert (folder / "engine").read_text() == "precious"
    (folder / "engine").unlink()
    Address(folder / "engine").close()  # the refusal has let the lock go


def test_a_lock_that_is_a_link_is_not_followed(folder: Path) -> None:
    (folder / "engine.lock").symlink_to(folder / "elsewhere")
    with pytest.raises(AddressError, match="engine"):
        Address(folder / "engine")
    assert not (folder / "elsewhere").exists()


def test_an_engine_removes_no_other_engines_socket(folder: Path) -> None:
    address = Address(folder / "engine")
    (folder / "engine").unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(folder / "engine"))
        address.close()
        assert (folder / "engine").is_socket()
