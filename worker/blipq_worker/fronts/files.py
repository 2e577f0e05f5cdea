"""Files that a front writes in place, and that its worker's main process makes and reads.

A front decodes what strangers send, so it may be in their hands, and the main process may be root
where the front is another user. So a front can make, rename or remove nothing in these folders;
what is read is bounded and must be a plain file, whatever lies there, and nobody waits for it.
"""

import logging
import os
import stat
from pathlib import Path

log = logging.getLogger(__name__)

#: Enough to spoil the head of any of these files: none of them is then taken for anything.
_CLEARED = bytes(16)
_CHUNK = 1024 * 1024


def make(path: Path, *, size: int = 0, gid: int | None = None) -> None:
    """Makes a new file of this size (bytes); what is there goes. Raises OSError.

    gid: the group that may write to it, beside its user.
    """
    path.unlink(missing_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        if gid is not None:
            os.fchown(file, -1, gid)
            os.fchmod(file, 0o660)
        if size:
            os.posix_fallocate(file, 0, size)
    finally:
        os.close(file)


def clear(path: Path, most: int) -> None:
    """Has nobody take a file for anything. Raises OSError; FileNotFoundError where there is none.

    Its blocks stay, since a full disk may have no others; not those of one of more than ``most``
    bytes.
    """
    file = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if os.fstat(file).st_size > most:
            os.ftruncate(file, 0)
        os.pwrite(file, _CLEARED, 0)
    except OSError:  # the disk is full, and its blocks are not there any more
        os.ftruncate(file, 0)
    finally:
        os.close(file)


def opened(path: Path) -> int:
    """A descriptor to write to a file in place; it is made where it is missing. Raises OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def read(path: Path, most: int) -> bytes | None:
    """The content of a plain file of at most so many bytes; None where there is none.

    What is something else (a link, a pipe, a folder) or larger is logged, and None as well.
    """
    try:
        # Without O_NONBLOCK a pipe would wait for somebody who writes to it.
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        log.error("%s: not read: %s", path, error)
        return None
    try:
        found = os.fstat(file)
        if stat.S_ISREG(found.st_mode) and found.st_size <= most:
            return _content(file, most)
        log.error("%s: not read: %s of %d bytes", path, stat.filemode(found.st_mode), found.st_size)
    except OSError as error:
        log.error("%s: not read: %s", path, error)
    finally:
        os.close(file)
    return None


def _content(file: int, most: int) -> bytes:
    """What is in a file up to its end, but no more than so many bytes: it may grow meanwhile."""
    content = bytearray()
    while chunk := os.read(file, min(_CHUNK, most - len(content))):
        content += chunk
    return bytes(content)
