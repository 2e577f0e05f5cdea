"""The private folder in which a worker's processes meet."""

import fcntl
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blipq.errors import InvalidRequest
from blipq_worker.fronts import files, holdings, status
from blipq_worker.fronts.user import SETTING
from blipq_worker.inference.address import LONGEST_PATH
from blipq_worker.process import counted

log = logging.getLogger(__name__)

_PREFIX = "blipq-worker-"
_SOCKET = "engine.sock"
_PARENTS = ("/tmp", "/dev/shm")  # noqa: S108


class RunFolder:
    """A folder of this user alone, until ``remove``.

    It is locked as long as this process lives, which also keeps cleaners of ``/tmp`` off. What dead
    workers have left beside it goes when it is made. gid: the group of fronts of another user,
    which may pass through it, and write to the files that are made for them. Raises InvalidRequest
    where there is no place.
    """

    def __init__(self, gid: int | None = None) -> None:
        self._gid = gid
        parent = _parent(is_shared=gid is not None)
        # Under its own name only once it is locked: until then another worker could take it for a
        # dead one's.
        fresh = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent))
        self._lock = os.open(fresh, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = fresh.rename(parent / fresh.name.removeprefix("."))
        self.metrics.mkdir(mode=0o700)
        if gid is not None:
            self._let_pass(gid)
        _sweep(parent)

    def _let_pass(self, gid: int) -> None:
        try:
            for each in (self.path, self.metrics):
                os.chown(each, -1, gid)
                each.chmod(0o710)
        except OSError as error:
            self.remove()
            raise InvalidRequest(f"{SETTING}: {error}") from error

    @property
    def socket(self) -> Path:
        """Where the engine listens."""
        return self.path / _SOCKET

    @property
    def trial(self) -> Path:
        """What the engine leaves if the graphs that it captures end it."""
        return self.path / "capturing"

    @property
    def metrics(self) -> Path:
        """What the fronts have counted."""
        return self.path / "metrics"

    def status(self, front: int) -> Path:
        """How a front is (see ``fronts.status``)."""
        return self.path / f"front-{front}.json"

    def held(self, front: int) -> Path:
        """What a front holds (see ``fronts.holdings``)."""
        return self.path / f"front-{front}.held"

    def prepare(self, front: int) -> None:
        """Has a front's files ready for its next process: nothing is left of what the last one said
        and held, and of its counts what is whole. Raises OSError.
        """
        places = (
            (self.status(front), status.ROOM, status.ROOM),
            (self.held(front), holdings.ROOM, 0),
        )
        for path, most, size in places:
            try:
                files.clear(path, most)
            except FileNotFoundError:
                files.make(path, size=size, gid=self._gid)
        for kind in counted.KINDS:
            path = counted.file_of(self.metrics, kind, f"front-{front}")
            try:
                counted.counts_in(path)
            except ValueError:
                files.make(path, size=counted.ROOM, gid=self._gid)

    def remove(self) -> None:
        """Removes it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _parent(*, is_shared: bool) -> Path:
    """The first folder that can be written to, and is short enough for the path of a socket.

    A container whose root is read-only has shared memory, as a rule. is_shared: with fronts of
    another user, whose names in it must be out of their reach.
    """
    for named in (os.environ.get("TMPDIR"), *_PARENTS):
        if not named or not os.access(named, os.W_OK | os.X_OK):
            continue
        parent = Path(named).resolve()
        if _is_short(parent) and not (is_shared and _can_be_swapped(parent)):
            return parent
    places = " and ".join(_PARENTS)
    wrong = "can be written to by others and have no sticky bit" if is_shared else "are read-only"
    raise InvalidRequest(
        f"no folder for the worker's processes to meet in: {places} {wrong}; TMPDIR names another "
        "one, and BLIPQ_FRONTS=0 does without"
    )


def _can_be_swapped(folder: Path) -> bool:
    """Whether others than root could put something in the place of what root makes in a folder."""
    for each in (folder, *folder.parents):
        found = each.stat()
        is_open = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if found.st_uid != 0 or (is_open and not found.st_mode & stat.S_ISVTX):
            return True
    return False


def _is_short(parent: Path) -> bool:
    return len(os.fsencode(parent / f"{_PREFIX}12345678" / _SOCKET)) <= LONGEST_PATH


def _sweep(parent: Path) -> None:
    """Removes the folders of workers that were killed."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError), _locked(folder), _locked(folder / f"{_SOCKET}.lock"):
            log.info("removing what a worker that was killed has left: %s", folder)
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """With the lock of a file or folder of this user, if there is one.

    Raises OSError where another has it, or it is another user's: anybody may use these names.
    """
    try:
        # A pipe of this name must keep nobody waiting.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        yield
        return
    try:
        if os.fstat(file).st_uid != os.geteuid():
            raise PermissionError(f"another user's: {path}")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(file)
