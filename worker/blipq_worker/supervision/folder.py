"""The private folder in which a worker's processes meet."""

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blipq.errors import InvalidRequest
from blipq_worker.inference.address import LONGEST_PATH

log = logging.getLogger(__name__)

_PREFIX = "blipq-worker-"
_SOCKET = "engine.sock"
_PARENTS = ("/tmp", "/dev/shm")  # noqa: S108


class RunFolder:
    """A folder of this user alone, until ``remove``.

    It is locked as long as this process lives, which also keeps cleaners of ``/tmp`` off. What dead
    workers have left beside it goes when it is made. Raises InvalidRequest where there is no place.
    """

    def __init__(self) -> None:
        parent = _parent()
        # Under its own name only once it is locked: until then another worker could take it for a
        # dead one's.
        fresh = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent))
        self._lock = os.open(fresh, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = fresh.rename(parent / fresh.name.removeprefix("."))
        self.metrics.mkdir(mode=0o700)
        _sweep(parent)

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

    def remove(self) -> None:
        """Removes it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _parent() -> Path:
    """The first folder that can be written to, and is short enough for the path of a socket.

    A container whose root is read-only has shared memory, as a rule.
    """
    for parent in (os.environ.get("TMPDIR"), *_PARENTS):
        if parent and _is_short(Path(parent)) and os.access(parent, os.W_OK | os.X_OK):
            return Path(parent)
    places = " and ".join(_PARENTS)
    raise InvalidRequest(
        f"no folder for the worker's processes to meet in: {places} cannot be written to; TMPDIR "
        "names another one, and BLIPQ_FRONTS=0 does without"
    )


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
    """With the lock of a file or folder, if there is one. Raises OSError where another has it."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(file)
