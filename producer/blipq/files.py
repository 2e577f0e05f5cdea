"""Files that somebody else names."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def is_same(path: Path, other: str | Path) -> bool:
    """Whether both are one file, however they are named."""
    try:
        return path.samefile(other)
    except (OSError, ValueError):  # ValueError: a NUL in a name
        return False


@contextmanager
def whole_file(path: Path, mode: int | None = None) -> Iterator[BinaryIO]:
    """A file to write, which has its name when it is whole, or never.

    A pipe, a device or an open file's name, as /dev/stdout, is written as it is, and so is a file
    in a folder that may not be written. ``mode``: of a new file; else that of the old one, which
    keeps its owner where it can, or what the umask leaves. Raises OSError.
    """
    if _is_no_file(path):
        with path.open("ab") as file:  # not "wb": what was redirected there stays
            yield file
        return
    target = Path(os.path.realpath(path))  # behind a link: the link stays
    if target.exists() and not os.access(target.parent, os.W_OK):
        with target.open("wb") as file:
            yield file
        return
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with open(_created(scratch, target, mode), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _rename(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


def _is_no_file(path: Path) -> bool:
    names = {path.absolute(), Path(os.path.realpath(path))}
    if any(name.is_relative_to(folder) for name in names for folder in ("/dev/fd", "/proc")):
        return True
    return str(path) in {"/dev/stdout", "/dev/stderr"} or (path.exists() and not path.is_file())


def _created(scratch: Path, target: Path, mode: int | None) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    if mode is not None or not target.exists():
        return os.open(scratch, flags, 0o666 if mode is None else mode)
    old = target.stat()
    descriptor = os.open(scratch, flags, 0o600)
    with suppress(OSError):  # root alone may
        os.fchown(descriptor, old.st_uid, old.st_gid)
    os.fchmod(descriptor, old.st_mode & 0o777)
    return descriptor


def _rename(scratch: Path, target: Path) -> None:
    try:
        scratch.replace(target)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        shutil.copyfile(scratch, target)  # a file that is mounted on its own cannot be replaced
