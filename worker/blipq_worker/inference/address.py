"""Where an engine listens: a private socket of one engine at a time, and who may come in."""

import fcntl
import logging
import os
import socket
import stat
import struct
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from blipq_worker.inference.protocol import Goodbye, encoded

log = logging.getLogger(__name__)


#: The kernel's: 108 with the zero at the end.
LONGEST_PATH = 107
MOST_FRONTS = 64
_BACKLOG = 128
_PEER = struct.Struct("3i")  # pid, uid, gid: SO_PEERCRED


class AddressError(Exception):
    """No engine can listen there; the message says why, and what would help."""


def check_path(path: Path) -> None:
    """Raises AddressError for a path that no socket can have."""
    length = len(os.fsencode(path))
    if length > LONGEST_PATH:
        raise AddressError(
            f"the path of a socket has at most {LONGEST_PATH} bytes, this one has {length}: {path}"
        )


class Address:
    """A listening socket and its file, until ``close``.

    The folder is made where it is missing; it must be of this user, and closed to all others. A
    lock file beside the socket says that an engine lives: what a dead one has left is replaced.
    Raises AddressError.
    """

    def __init__(self, path: Path) -> None:
        check_path(path)
        self._path = path
        try:
            _check_folder(path.parent)
            self._lock = _locked(path.with_name(path.name + ".lock"))
        except OSError as error:
            raise AddressError(f"no engine can listen at {path}: {error}") from error
        try:
            self.socket = _bound(path)
        except OSError as error:
            os.close(self._lock)
            raise AddressError(f"no engine can listen at {path}: {error}") from error
        except AddressError:
            os.close(self._lock)
            raise
        self._inode = path.stat().st_ino

    def close(self) -> None:
        """Stops listening; the file goes, unless another socket has taken its place."""
        self.socket.close()
        try:
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
        except FileNotFoundError:
            pass
        os.close(self._lock)  # last: until here nobody else may bind


def _check_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise AddressError(
            f"the folder of an engine's socket must be its user's alone (chmod 700): {folder}"
        )


def _locked(path: Path) -> int:
    """A descriptor that holds the lock as long as it is open."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise AddressError(f"another engine has the lock {path}") from error
    except OSError:
        os.close(lock)
        raise
    return lock


def _bound(path: Path) -> socket.socket:
    if os.path.lexists(path):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise AddressError(f"this is no socket, and is left alone: {path}")
        path.unlink()
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(os.fspath(path))
        path.chmod(0o600)
        listening.listen(_BACKLOG)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return listening


class Full(Exception):
    """The process has no descriptor left for another connection."""


class Door:
    """Listens at a path. uids: users that are served; by default this process's."""

    def __init__(self, path: Path, uids: Collection[int] | None) -> None:
        self._address = Address(path)
        self._uids = {os.geteuid()} if uids is None else set(uids)
        self.socket = self._address.socket

    def admitted(self, fronts: int, most: int) -> list[tuple[socket.socket, int]]:
        """Connections and their processes, of at most so many that wait. Raises Full.

        fronts: how many there are. Who may not come in gets the reason, and counts all the same: a
        crowd at the door must not hold the engine up.
        """
        found: list[tuple[socket.socket, int]] = []
        for _ in range(most):
            try:
                connection, _ = self.socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                break
            except OSError as error:
                if found:
                    break  # these first; the error comes again
                raise Full(str(error)) from error
            pid, refused = self._peer(connection, fronts + len(found))
            if refused is None:
                connection.setblocking(False)
                found.append((connection, pid))
            else:
                farewell(connection, refused)
        return found

    def _peer(self, connection: socket.socket, fronts: int) -> tuple[int, str | None]:
        """A process and why it may not come in."""
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        pid, uid, _ = _PEER.unpack(peer)
        if uid not in self._uids:
            log.warning("engine: refuses process %d of user %d", pid, uid)
            return pid, f"user {uid} is not served"
        if fronts >= MOST_FRONTS:
            return pid, f"{MOST_FRONTS} fronts are connected, and no more are served"
        return pid, None

    def close(self) -> None:
        """Stops listening."""
        self._address.close()


def farewell(connection: socket.socket, reason: str | None) -> None:
    """Closes a connection; the reason goes out if there is room for it."""
    with suppress(OSError):  # it has gone, or does not read
        if reason is not None:
            goodbye = encoded(Goodbye(reason[:500]))
            connection.send(goodbye, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    connection.close()
