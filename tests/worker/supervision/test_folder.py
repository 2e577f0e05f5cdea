"""Where a worker's processes meet."""

import os
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


def test_names_of_others_keep_no_worker_from_its_start_and_stay(parent: Path) -> None:
    """Anybody may plant them in a folder that all share."""
    os.mkfifo(parent / "blipq-worker-pipe")
    (parent / "blipq-worker-link").symlink_to(parent / "target")
    (parent / "target").mkdir()
    with_pipe = parent / "blipq-worker-folder"
    with_pipe.mkdir()
    os.mkfifo(with_pipe / "engine.sock.lock")
    RunFolder().remove()
    left = {each.name for each in parent.iterdir()}
    assert left == {"blipq-worker-link", "blipq-worker-pipe", "target"}, "the last was its own"


@pytest.mark.root
def test_folders_of_other_users_are_left_alone(parent: Path) -> None:
    theirs = parent / "blipq-worker-theirs"
    theirs.mkdir()
    os.chown(theirs, 65_534, 65_534)
    RunFolder().remove()
    assert list(parent.iterdir()) == [theirs]


@pytest.mark.root
def test_a_group_may_pass_through_it_and_write_to_its_fronts_files_alone(parent: Path) -> None:
    folder = RunFolder(64_999)
    for _ in range(2):  # the second process finds them
        folder.prepare(1)
    (folder.metrics / "counter_main.db").touch(mode=0o600)
    seen = {
        str(each.relative_to(parent)): (stat.filemode((found := each.stat()).st_mode), found.st_gid)
        for each in (folder.path, *folder.path.rglob("*"))
    }
    name, shared = folder.path.name, ("-rw-rw----", 64_999)
    assert seen == {
        name: ("drwx--x---", 64_999),
        f"{name}/metrics": ("drwx--x---", 64_999),
        f"{name}/front-1.json": shared,
        f"{name}/front-1.held": shared,
        f"{name}/metrics/counter_front-1.db": shared,
        f"{name}/metrics/histogram_front-1.db": shared,
        f"{name}/metrics/counter_main.db": ("-rw-------", os.getegid()),
    }
    folder.remove()
    assert not list(parent.iterdir())


@pytest.mark.root
def test_a_place_whose_names_others_can_change_is_none_to_meet_fronts_of_another_user_in(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PARENTS", (str(parent / "missing"),))
    inner = parent / "inner"
    inner.mkdir()
    monkeypatch.setenv("TMPDIR", str(inner))
    for path, mode, uid in [
        (inner, 0o777, 0),
        (inner, 0o770, 0),
        (inner, 0o1777, 65_534),
        (parent, 0o777, 0),
    ]:
        path.chmod(mode)
        os.chown(path, uid, 0)
        RunFolder().remove()
        with pytest.raises(InvalidRequest, match="no sticky bit"):
            RunFolder(64_999)
        path.chmod(0o700)
        os.chown(path, 0, 0)
    inner.chmod(0o1777)
    RunFolder(64_999).remove()


def test_a_group_that_cannot_be_given_is_an_error_of_the_setting(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, uid: int, gid: int) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(os, "chown", refuse)
    monkeypatch.setattr(module, "_can_be_swapped", lambda folder: False)
    with pytest.raises(InvalidRequest, match=r"BLIPQ_FRONT_USER: .* not permitted"):
        RunFolder(64_999)
    assert not list(parent.iterdir())
