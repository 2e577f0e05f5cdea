"""Lets processes in: those of users that are served, as many as there are places."""

import logging
import os
import socket
import struct
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from blipq_worker.seam.address import Address
from blipq_worker.seam.protocol import Goodbye, encoded

log = logging.getLogger(__name__)

MOST_FRONTS = 64
_PEER = struct.Struct("3i")  # pid, uid, gid: SO_PEERCRED


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

        fronts: how many there are. Who may not come in is told why, and counts all the same: a
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
