"""Where a worker's processes meet."""

import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from blipq.errors import InvalidRequest
from blipq_worker.supervision import folder as module
from blipq_worker.supervision.folder import RunFolder


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a short path: pytest's own are too deep for sockets where tests run at once."""
    folder = Path(tempfile.mkdtemp(prefix="bq"))
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder)


def test_a_folder_is_private_and_goes_with_its_worker(parent: Path) -> None:
    folder = RunFolder()
    assert folder.path.parent == parent
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    folder.status(1).write_text("{}")
    folder.remove()
    assert not list(parent.iterdir())


def test_folders_of_living_workers_stay_and_those_of_dead_ones_go(parent: Path) -> None:
    living, dead = RunFolder(), RunFolder()
    module.os.close(dead._lock)  # as the kernel does
    RunFolder().remove()
    assert list(parent.iterdir()) == [living.path]
    living.remove()


def test_a_folder_whose_engine_still_lives_stays(parent: Path) -> None:
    dead = RunFolder()
    lock = dead.socket.with_name("engine.sock.lock")
    with lock.open("w") as engine:
        module.fcntl.flock(engine, module.fcntl.LOCK_EX)
        module.os.close(dead._lock)
        RunFolder().remove()
        assert dead.path.exists()
    RunFolder().remove()
    assert not dead.path.exists()


def test_a_path_too_long_for_a_socket_is_passed_over(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = parent / ("d" * 100)
    deep.mkdir()
    other = parent / "o"
    other.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    monkeypatch.setattr(module, "_PARENTS", (str(parent / "missing"), str(other)))
    folder = RunFolder()
    assert folder.path.parent == other
    folder.remove()
    monkeypatch.setattr(module, "_PARENTS", (str(parent / "missing"),))
    with pytest.raises(InvalidRequest, match="BLIPQ_FRONTS=0 does without"):
        RunFolder()
